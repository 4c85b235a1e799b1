"""What every rank holds of a state, as rank 0 judges it: one plan for all, and an owner for every part.

Ranks describe themselves in a text; rank 0 lays out the files for all of them together, proves that they are filled,
every element once, and names who writes what several hold. It rejects ranks that disagree, parts that overlap or are
missing, tensors without a place, and files that nobody fills.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product, zip_longest
from math import prod
from typing import Any, NamedTuple

from restow.boxes import overlap
from restow.checkpoint import Checkpoint
from restow.errors import (
    CoverageError,
    IntegrityError,
    MissingTensorError,
    PrecisionError,
    UnexpectedTensorError,
    show,
)
from restow.layout import axis_size, name_of
from restow.prepare import Prepared
from restow.targets import Shard, Target, whole_target
from restow.torch.dtypes import narrows
from restow.torch.storage import Slot, memory_of


class Held(NamedTuple):
    """A tensor on one rank: its shape (global for DTensors), dtype, and runs (None for a plain tensor)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    runs: tuple[tuple[tuple[int, int], ...], ...] | None


class Holding(NamedTuple):
    """What one rank holds: tensors, which of them are further names of one memory, its part of an axis, its words."""

    held: tuple[Held, ...]
    tied: Mapping[str, str]
    shard: tuple[str, int, int] | None
    words: Mapping[str, str]


def holding_of(slots: Mapping[str, Slot], shard: Shard | None, words: Mapping[str, str]) -> Holding:
    """This rank's own."""
    held = tuple(
        Held(n, s.target.shape, s.target.dtype, None if s.plain else s.target.runs) for n, s in slots.items()
    )
    return Holding(held, tied_names(slots), (shard.axis, shard.rank, shard.of) if shard else None, words)


def told(holding: Holding) -> str:
    """A holding as a text for rank 0."""
    return json.dumps(holding, separators=(",", ":"))


def heard(text: str) -> Holding:
    """The holding that a rank told."""
    held, tied, shard, words = json.loads(text)
    tensors = (Held(n, tuple(shape), dtype, _deep(runs)) for n, shape, dtype, runs in held)
    return Holding(tuple(tensors), tied, tuple(shard) if shard else None, words)


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value


def tied_names(slots: Mapping[str, Slot]) -> dict[str, str]:
    """Further names of one memory -> its first name."""
    first: dict[object, str] = {}
    found = {}
    for name, slot in slots.items():
        memory = memory_of(slot.local)
        if memory is not None and first.setdefault(memory, name) != name:
            found[name] = first[memory]
    return found


def check_words(everybody: Sequence[Holding]) -> None:
    """Raise `IntegrityError` unless all ranks said the same: destination, layout, dtype and so on, tensors alike."""
    for rank, one in enumerate(everybody):
        for key, text in everybody[0].words.items():
            if one.words.get(key) != text:
                raise IntegrityError(
                    f"{key} {show(text)} on every rank", f"{show(one.words.get(key))} on rank {rank}"
                )
    known: dict[str, tuple[int, Held, object]] = {}
    for rank, one in enumerate(everybody):
        for held in one.held:
            other, first, shard = known.setdefault(held.name, (rank, held, one.shard))
            part = held.runs is None and one.shard is not None
            if first.dtype != held.dtype or (first.shape != held.shape and not (part and shard != one.shard)):
                raise IntegrityError(
                    f"{show(held.name)} as {first.dtype} {list(first.shape)}, which rank {other} holds",
                    f"{held.dtype} {list(held.shape)} on rank {rank}",
                    tensor=held.name,
                )


def union_of(everybody: Sequence[Holding]) -> dict[str, Target]:
    """Every tensor that some rank holds, whole; a plain part as the ranks of the first one's part hold it."""
    union: dict[str, Target] = {}
    first = [one for one in everybody if one.shard == everybody[0].shard]
    for one in (*first, *everybody):
        for held in one.held:
            union.setdefault(held.name, whole_target(held.name, held.shape, held.dtype))
    return union


def tied_anywhere(everybody: Sequence[Holding]) -> dict[str, str]:
    """Further names of one memory -> its first name, on any rank: where no element is held, nothing shows it."""
    return {name: first for one in everybody for name, first in one.tied.items()}


def check_homes(prepared: Prepared, tied: Mapping[str, str]) -> None:
    """Raise `UnexpectedTensorError` for tensors of the state that have no place in the files under any name."""
    missing = set(prepared.missing)
    homes = {first for name, first in tied.items() if name not in missing}
    homeless = [name for name in prepared.missing if name not in homes and tied.get(name, name) in missing]
    if homeless:
        raise UnexpectedTensorError(
            "a place in the files for every tensor of the state", f"{len(homeless)} without one", tensor=homeless[0],
            sections=[("no place", map(show, homeless))],
            hint="rename= says how names differ; leave out of the state what is not to be saved",
        )  # fmt: skip


def check_filled(prepared: Prepared) -> None:
    """Raise `MissingTensorError` for tensors of the files that no rank holds; `prepared` is for all ranks together."""
    unused, passed = prepared.left
    lost = [*unused, *passed]
    for path, to in prepared.pairs.items():
        module, into = prepared.modules[path], prepared.source.modules[to]
        for row in module.layout.rows:
            names = module.tensors.get(row.role, ())
            if row.role in into.tensors and (None in names or not names):
                index = product(*(range(axis_size(row, axis, module.sizes)) for axis in row.name_axes))
                spelled = [f"{path}.{name_of(row, at, module.sizes)}" for at in index]
                lost += [name for name, there in zip_longest(spelled, names) if there is None]
    if lost:
        raise MissingTensorError(
            "a tensor of the state for every tensor of the files", f"{len(lost)} that no rank holds", tensor=lost[0],
            sections=[("missing", map(show, lost))],
            hint="rename= says how names differ; like= must be a checkpoint of this very model",
        )  # fmt: skip


def owners(everybody: Sequence[Holding], prepared: Prepared) -> list[list[str]]:
    """The tensors that each rank writes: of those that hold the same part, one, taken in turn.

    Raises `CoverageError` where the parts of a tensor do not make it up, each element once.
    """
    own: list[list[str]] = [[] for _ in everybody]
    holders: dict[str, dict[Cut, list[int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, one in enumerate(everybody):
        for held in one.held:
            cut = Cut(held.runs, None)
            if held.runs is None and one.shard is not None and _cut_by(prepared, held.name, one.shard[0]):
                cut = Cut(None, one.shard)
            holders.setdefault(held.name, {}).setdefault(cut, []).append(rank)
            shapes.setdefault(held.name, held.shape)
    for turn, (name, cuts) in enumerate(holders.items()):
        found = _wrong(name, shapes[name], list(cuts), prepared)
        if found:
            raise CoverageError(
                f"every element of {show(name)} on some rank, once", found, tensor=name,
                hint="ranks that hold the same part must hold exactly the same",
            )  # fmt: skip
        for ranks in cuts.values():
            own[ranks[turn % len(ranks)]].append(name)
    return own


class Cut(NamedTuple):
    """A part of a tensor: the runs of a DTensor, or the shard of a plain tensor; neither for one that is whole."""

    runs: tuple[tuple[tuple[int, int], ...], ...] | None
    shard: tuple[str, int, int] | None


def _cut_by(prepared: Prepared, name: str, axis: str) -> bool:
    """Whether `shard=` cuts a plain tensor: one of the experts that has the axis among its dims."""
    if name not in prepared.owners:
        return False
    path, role, _ = prepared.owners[name]
    row = prepared.modules[path].layout.row(role)
    return axis in row.axes and axis not in row.name_axes


def _wrong(name: str, shape: Sequence[int], cuts: Sequence[Cut], prepared: Prepared) -> str:
    """What keeps these parts from making up a tensor, each element once; nothing if they do."""
    boxes, shards = [], set()
    for runs, shard in cuts:
        if runs is not None:
            boxes += list(product(*runs))
        elif shard is not None:
            shards.add(shard)
        elif len(cuts) > 1:
            return "it whole on one rank, a part on another"
    if not shards and not boxes:
        return "" if cuts[0] == (None, None) or not prod(shape) else f"0 of {prod(shape)} held"
    if not shards:
        volume = sum(prod(length for _, length in box) for box in boxes)
        return "parts that overlap" if overlap(boxes) is not None else (
            "" if volume == prod(shape) else f"{volume} of {prod(shape)} held")  # fmt: skip
    axis, _, of = min(shards)
    if boxes or any((a, n) != (axis, of) for a, _, n in shards):
        return "parts of several kinds"
    path, role, _ = prepared.owners[name]
    module = prepared.modules[path]
    size = axis_size(module.layout.row(role), axis, module.sizes)
    gone = [
        rank for rank in range(of) if (axis, rank, of) not in shards and Shard(axis, rank, of).run(size)[1]
    ]
    return f"no rank with part {gone[0]} of {of} of {axis}" if gone else ""


def narrowed(targets: Iterable[Target], prepared: Prepared) -> dict[str, str]:
    """The tensors that lose precision in the files -> the cast. Raises `PrecisionError` for rows that must be exact."""
    source: Checkpoint = prepared.source
    found: dict[str, str] = {}
    for name, _, given, _ in targets:
        if name in prepared.plain:
            places: Sequence[str] = [prepared.plain[name]]
            row = source.routers.get(places[0])
        elif name in prepared.owners and prepared.owners[name][0] in prepared.pairs:
            path, role, _ = prepared.owners[name]
            module = source.modules[prepared.pairs[path]]
            places = [place for place in module.tensors.get(role, ()) if place is not None]
            row = module.layout.row(role) if places else None
        else:
            continue
        for place in places:
            if source.coded is not None and place in source.coded:
                found[name] = f"{given} -> {source.coded[place].codec.name}"
                break
            into = source.tensors[place].dtype
            if not narrows(given, into):
                continue
            if row is not None and row.exact:
                raise PrecisionError(
                    f"{show(place)} in {given}, as the state has it", into, tensor=place,
                    sections=[("tensor", [show(place)]), ("row", [str(row)])],
                    hint="keep it in its precision in the files: its family selects experts by it",
                )  # fmt: skip
            found[name] = f"{given} -> {into}"
            break
    return found
