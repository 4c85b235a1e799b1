"""What a load refuses unless its caller allows it: destinations left unfilled, sources left unused, exact rows narrowed,
integers for floats and floats for integers.

It judges a plan, before the first byte. A pattern that allows nothing is refused too, since it was meant to.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from restow.checkpoint import Checkpoint
from restow.codecs import CODECS, rounds
from restow.errors import (
    DtypeMismatchError,
    MissingTensorError,
    PrecisionError,
    RestowError,
    UnexpectedTensorError,
    UsageError,
    show,
)
from restow.landing import Wish
from restow.plans import Plan
from restow.problems import alike, merged
from restow.torch.dtypes import is_float, narrows
from restow.torch.storage import Slots


def judge_missing(made: Plan, opened: Checkpoint, allow: Sequence[str]) -> tuple[str, ...]:
    """Destinations that nothing fills: refused, unless allowed."""
    return _allowed(made.missing, allow, "allow_missing", _missing_error(opened))


def _missing_error(opened: Checkpoint) -> Any:
    def error(names: Sequence[str]) -> RestowError:
        files = sorted({entry.pieces[0].file for entry in opened.tensors.values() if entry.pieces[0].file})
        mine = MissingTensorError(
            "every tensor of the destination in the source",
            f"{len(names)} that it does not hold",
            path=opened.path,
            tensor=names[0],
            sections=[("missing", map(show, names)), ("looked in", map(show, files))],
            hint="rename= says how names differ; allow_missing= leaves a tensor as it is",
        )
        # What the source itself lacks is said in its own names, too.
        return merged([mine, *(problem.error for problem in opened.problems if problem.fatal)])

    return error


def judge_unused(
    made: Plan, slots: Slots, opened: Checkpoint, wish: Wish, allow: Sequence[str]
) -> tuple[str, ...]:
    """Source tensors without a place: refused, unless allowed, part of other pieces, or aliases of what was filled."""
    unused = [name for name in made.unused if name not in slots.aliases]
    if wish.part:
        held = {source for source, *_ in made.layouts}
        experts = opened.expert_tensors
        refused = [n for n in unused if n in experts and experts[n][0] in held]
        elsewhere = tuple(n for n in unused if n not in refused)
        return (*elsewhere, *_allowed(refused, allow, "allow_unused", _unused_error(opened)))
    return _allowed(unused, allow, "allow_unused", _unused_error(opened))


def _unused_error(opened: Checkpoint) -> Any:
    def error(names: Sequence[str]) -> UnexpectedTensorError:
        return UnexpectedTensorError(
            "a place for every tensor of the source",
            f"{len(names)} without one",
            path=opened.path,
            tensor=names[0],
            sections=[("unused", map(show, names))],
            hint="rename= says how names differ, part=True that this is a piece, allow_unused= leaves them out",
        )

    return error


def judge_narrowed(made: Plan, opened: Checkpoint, allow: Sequence[str]) -> dict[str, str]:
    """Casts that lose precision, by destination.

    Where `allow` does not name it, raises `PrecisionError` for one that a row forbids, and `DtypeMismatchError` between
    integers and floats: one side of it holds codes, or no weight.
    """
    found: dict[str, str] = {}
    barred: dict[str, RestowError] = {}
    for copy in made.copies:
        part, target = made.parts[copy.source], made.targets[copy.target]
        if target.name in found:
            continue
        if part.coding >= 0:
            codec = CODECS[made.codings[part.coding].codec]
            if rounds(codec, target.dtype):
                found[target.name] = f"{codec.name} -> {target.dtype}"
            continue
        if not narrows(part.dtype, target.dtype):
            continue
        row = opened.routers.get(part.name)
        if row is not None and row.exact:
            barred[target.name] = PrecisionError(
                f"{show(target.name)} in {part.dtype}, as {show(part.name)} is and must stay",
                target.dtype,
                tensor=target.name,
                sections=[("tensor", [show(target.name)]), ("row", [str(row)])],
                hint="keep this tensor in its precision in the model: its family selects experts by it",
            )
        elif is_float(part.dtype) != is_float(target.dtype):
            barred[target.name] = DtypeMismatchError(
                f"{'floats' if is_float(target.dtype) else 'integers'} for {show(target.name)}, which is {target.dtype}",
                part.dtype,
                path=opened.path,
                tensor=target.name,
                sections=[("tensor", [f"{show(part.name)} {part.dtype}"])],
                hint="get the checkpoint again, or its config.json if these are codes; allow_narrowed= casts them",
            )
        found[target.name] = f"{part.dtype} -> {target.dtype}"
    _allowed(list(barred), allow, "allow_narrowed", lambda names: _barred([barred[name] for name in names]))
    return found


def _barred(errors: Sequence[RestowError]) -> RestowError:
    """One error for each class of them, the first with a line for the other."""
    classes = dict.fromkeys(type(error) for error in errors)
    return merged([alike([error for error in errors if type(error) is cls]) for cls in classes])


def _allowed(names: Sequence[str], patterns: Sequence[str], option: str, error: Any) -> tuple[str, ...]:
    """The names, all of them allowed; raises for one that is not, and for a pattern that matches none."""
    if isinstance(patterns, str):
        raise UsageError(f"{option} as a list of patterns", f"the text {patterns!r}")
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise UsageError(f"{option} patterns that match something", f"{idle[0]!r}, which matches nothing")
    refused = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if refused:
        raise error(refused)
    return tuple(names)
