"""The wording of what is wrong with experts modules: counts, shapes, names in two layouts, strangers among them.

Every text is made of what the finding knows: names, shapes, rows and sizes. It decides nothing and rejects nothing;
what many modules have wrong in the same words becomes one error here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from restow.errors import (
    LISTED,
    AmbiguousLayoutError,
    AmbiguousTensorError,
    MissingTensorError,
    RestowError,
    ShapeMismatchError,
    UnexpectedTensorError,
    show,
)
from restow.family import Spelling
from restow.gather import Matched
from restow.layout import rows_text
from restow.module import Module, Shapes

NAMING = ("missing", "extra", "tensors")  # sections that list tensors at fault


def folded(errors: Sequence[tuple[str, RestowError]]) -> tuple[RestowError, ...]:
    """One error for what many modules have wrong in the same words: the first one, with all tensors and paths."""
    alike: dict[object, list[tuple[str, RestowError]]] = {}
    for path, error in errors:
        words = (text.replace(path, "") for text in (error.expected, error.found))
        alike.setdefault((type(error), *words), []).append((path, error))
    folded = []
    for (_, first), *others in alike.values():
        if others:
            named = [error.sections for _, error in others]
            first.sections = tuple(
                (label, (*lines, *_lines(named, label)) if label in NAMING else lines)
                for label, lines in first.sections
            )
            first.sections = (*first.sections, ("and in", tuple(show(path) for path, _ in others)))
        folded.append(first)
    return tuple(folded)


def _lines(errors: Sequence[Iterable[tuple[str, Sequence[str]]]], label: str) -> list[str]:
    """What the sections of other errors say under a label."""
    return [line for sections in errors for known, lines in sections if known == label for line in lines]


def count_errors(
    module: Module,
    missing: Sequence[str],
    lacking: int,
    extra: Sequence[str],
    by_row: Mapping[str, Mapping[tuple[int, ...], str]],
    what: str,
) -> list[RestowError]:
    """Experts too few or too many, in one error: `missing` are the first names of the `lacking` ones."""
    experts = module.sizes.get("e", 0)
    expected = f"{experts} experts in {show(module.path)}"
    if lacking:
        whole = _whole_experts(module, by_row)
        listed = missing if len(missing) == lacking else missing[:LISTED]
        in_all = [f"{lacking} tensors"] if len(missing) != lacking else []
        return [
            MissingTensorError(
                expected,
                f"{whole}" if whole != experts else f"{lacking} of their tensors missing",
                tensor=missing[0],
                sections=[("missing", map(show, listed)), ("in all", in_all), ("extra", map(show, extra))],
                hint=f"get {what} again, or name the experts it holds: nothing is filled in their place"
                if what == "the checkpoint"
                else f"give {what} all tensors of these experts, or say with experts= or shard= which it holds",
            )
        ]
    if extra:
        return [
            UnexpectedTensorError(
                expected,
                f"{_whole_experts(module, by_row)}",
                tensor=extra[0],
                sections=[("extra", map(show, extra))],
                hint="check the number of experts in config.json against the files",
            )
        ]
    return []


def _whole_experts(module: Module, by_row: Mapping[str, Mapping[tuple[int, ...], str]]) -> int:
    """How many experts have all their tensors: the number that an error prints as found."""
    counts: dict[int, int] = defaultdict(int)
    need = 0
    for row in module.layout.rows:
        if "e" not in row.name_axes:
            continue
        at = row.name_axes.index("e")
        need += prod(len(words) for words in row.labels.values())
        for index in by_row[row.role]:
            counts[index[at]] += 1
    return sum(1 for e, count in counts.items() if count == need) if need else 0


def shape_error(
    module: Module, wrong: Sequence[tuple[str, str]], shapes: Shapes, told: bool = True
) -> ShapeMismatchError:
    """Shapes that are not the layout's, beside a stacked module's few others; `told` if a config or the other side gave sizes."""
    name, expected = wrong[0]
    sizes, layout = module.sizes, module.layout
    used = {a: sizes[a] for row in layout.rows for a in sorted(row.axes) if a in sizes}
    lines = [f"{show(n)} {list(shapes[n])}, expected {want}" for n, want in wrong]
    every = [n for names in module.tensors.values() for n in names if n is not None]
    if len(every) <= LISTED // 2:
        bad = {n for n, _ in wrong}
        lines += [f"{show(n)} {list(shapes[n])}, as expected" for n in every if n not in bad]
    return ShapeMismatchError(
        f"shape {expected} for {show(name)}",
        f"{list(shapes[name])}",
        tensor=name,
        sections=[
            ("tensors", lines),
            ("layout", rows_text(layout)),
            ("sizes", [", ".join(f"{axis} = {size}" for axis, size in used.items())]),
        ],
        hint="check config.json against the files: sizes come from the config first, shapes must agree"
        if told
        else "no config says these sizes, so shapes must agree in all roles; a folder with its config.json may say otherwise",
    )


def mixed_error(path: str, matched: Matched, candidates: Sequence[Spelling]) -> RestowError:
    lines = []
    for tag, found in sorted(matched.items(), key=lambda item: -len(item[1])):
        name = next(iter(found.values()))
        lines.append(f"{'/'.join(candidates[tag].names)}: {len(found)} tensors, such as {show(name)}")
    first = min(next(iter(found.values())) for found in matched.values())
    return AmbiguousTensorError(
        f"the experts of {show(path)} in one layout",
        f"in parts of {len(matched)}",
        tensor=first,
        sections=[("layouts", lines)],
        hint="keep one of them: which values count is not for a reader to decide",
    )


def two_error(
    path: str, fits: Sequence[Spelling], names: Collection[str], shapes: Shapes
) -> AmbiguousLayoutError:
    lines = [f"{'/'.join(s.names)}: " + "; ".join(rows_text(s.layout)) for s in fits]
    name = min(names)
    return AmbiguousLayoutError(
        f"one layout for {show(path)}",
        f"{len(fits)} that fit its names and shapes",
        tensor=name,
        sections=[("layouts", lines), ("tensors", (f"{show(n)} {list(shapes[n])}" for n in sorted(names)))],
        hint="say which one with layout=NAME (on the command line --layout NAME)",
    )


def none_error(
    path: str,
    tried: Sequence[tuple[int, Module, list[RestowError]]],
    candidates: Sequence[Spelling],
    shapes: Shapes,
) -> RestowError:
    """No candidate fits: a shape error if every reason is one, else an error that lists each candidate's reason."""
    first = [errors[0] for *_, errors in tried]
    lines = [f"{'/'.join(candidates[tag].names)}: {errors[0].args[0]}, found {errors[0].args[1]}"
             for tag, _, errors in tried]  # fmt: skip
    kind = type(first[0]) if len({type(error) for error in first}) == 1 else AmbiguousLayoutError
    name = first[0].tensor or ""
    return kind(
        f"the experts of {show(path)} in one of the layouts below",
        f"none that fits; {show(name)} has shape {list(shapes.get(name, ()))}",
        tensor=name,
        sections=[("layouts", lines)],
        hint="check config.json against the files, or say the layout with layout=NAME (--layout NAME)",
    )


def stranger_error(path: str, names: Sequence[str], module: Module | None) -> RestowError:
    twins = [
        n for n in names if any(s.isdigit() and len(s) > 1 and s[0] == "0" for s in n[len(path) :].split("."))
    ]
    if twins:
        return AmbiguousTensorError(
            f"expert numbers without leading zeros in {show(path)}",
            f"{len(twins)} with",
            tensor=twins[0],
            sections=[("tensors", map(show, twins))],
            hint="rename or drop them: an expert may have one number only",
        )
    rows = rows_text(module.layout) if module else ()
    return UnexpectedTensorError(
        f"only expert weights below {show(path)}",
        f"{len(names)} other tensors",
        tensor=names[0],
        sections=[("extra", map(show, names)), ("layout", rows)],
        hint="if they belong there, the family's table must say so",
    )
