"""What each rank of an expert-parallel mesh would hold, and what its plan costs: figures, no torch, no data.

Rank (i, j) of a mesh of ep x ep_shard holds chunk i of the experts and chunk j of the next dim of every
expert tensor, as a DTensor with placements [Shard(0), Shard(1)] does; every other tensor is whole on every
rank. It rejects what `planning` rejects.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import NamedTuple

from restow.boxes import Run, strides_of
from restow.checkpoint import Checkpoint
from restow.entries import DTYPE_BITS
from restow.errors import RestowError
from restow.landing import Wish, layout_of
from restow.layout import Layout, axis_size, name_of
from restow.module import Module
from restow.moves import freeze
from restow.named import FORMS
from restow.notation import Row
from restow.planning import make_plan
from restow.plans import Copy, Plan, Read
from restow.reads import GAP, spans
from restow.targets import Runs, Shard, Target, axis_runs
from restow.wanted import default_targets

Place = tuple[Row, tuple[int, ...], Mapping[str, int]]  # a row, the index in its names, the module's sizes


class Rank(NamedTuple):
    """One rank's plan in figures; sizes are bytes of the files, `written` bytes of memory.

    `straight` bytes land where they are read to, `tiled` ones pass through a buffer that fits a cache.
    `wanted` are the bytes that the rank's part of the experts has in the files, `experts_read` what is read
    for them, gaps included.
    """

    rank: int
    place: tuple[int, int]
    experts: Run
    reads: int
    read: int
    wanted: int
    experts_read: int
    straight: int
    tiled: int
    written: int
    seconds: float
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def rank_figures(source: Checkpoint, layout: str | Layout, *, ep: int, ep_shard: int = 1, rank: int) -> Rank:
    """Plan one rank, and count."""
    return _figures(source, layout, ep, ep_shard, rank)[0]


class Node(NamedTuple):
    """The ranks of one machine in figures: bytes that they read in all, and how many different ones these are."""

    ranks: tuple[Rank, ...]
    read: int
    distinct: int


def node_figures(
    source: Checkpoint, layout: str | Layout, *, ep: int, ep_shard: int = 1, ranks: range
) -> Node:
    """Plan the ranks of one machine, and count what several of them read."""
    planned = [_figures(source, layout, ep, ep_shard, rank) for rank in ranks]
    distinct, file, end = 0, "", 0
    for read in sorted(read for _, reads in planned for read in reads):
        if read.file != file:
            file, end = read.file, 0
        distinct += max(0, read.end - max(end, read.begin))
        end = max(end, read.end)
    figures = tuple(rank for rank, _ in planned)
    return Node(figures, sum(rank.read for rank in figures), distinct)


def _figures(
    source: Checkpoint, layout: str | Layout, ep: int, ep_shard: int, rank: int
) -> tuple[Rank, tuple[Read, ...]]:
    started = time.perf_counter()
    place = divmod(rank, ep_shard)
    targets = rank_targets(source, layout, (ep, ep_shard), place)
    made = make_plan(source, targets, Wish(layout, part=_by_name(source, layout)))
    reads = len(made.reads)
    seconds = time.perf_counter() - started
    experts = source.expert_tensors
    wanted = read = straight = total = 0
    for batch in made.batches():
        pattern, itemsize = made.patterns[batch[0].pattern], made.itemsize(batch[0])
        count = made.read_bytes(batch[0])
        total += count
        straight += count if goes_straight(made, batch) else 0
        if made.parts[batch[0].source].name in experts:
            read += count
            wanted += prod(pattern.sizes) * itemsize
    size = max((module.sizes.get("e", 0) for module in source.modules.values()), default=0)
    left = [name for name in made.unused if name not in experts]
    figures = Rank(
        rank, place, Shard("e", place[0], ep).run(size), reads, total, wanted, read, straight,
        total - straight, made.written, seconds, made.missing, tuple(left),
    )  # fmt: skip
    return figures, made.reads


def rank_targets(
    source: Checkpoint, layout: str | Layout, mesh: tuple[int, int], place: tuple[int, int]
) -> list[Target]:
    """The tensors that the rank at `place` of the mesh holds: global shapes, and its own runs."""
    places = _places(source, layout)
    targets = []
    for target in default_targets(source, layout, Wish(layout)):
        runs = _held(places[target.name], mesh, place) if target.name in places else target.runs
        if runs is not None:
            targets.append(target._replace(runs=runs))
    return targets


def _places(source: Checkpoint, layout: str | Layout) -> dict[str, Place]:
    to = layout_of(layout, source.family)
    assert to is not None
    found: dict[str, Place] = {}
    for path, module in source.modules.items():
        for row in to.rows:
            lengths = [axis_size(row, axis, module.sizes) for axis in row.name_axes]
            for index in product(*map(range, lengths)):
                found[f"{path}.{name_of(row, index, module.sizes)}"] = (row, index, module.sizes)
    return found


def _held(where: Place, mesh: tuple[int, int], place: tuple[int, int]) -> Runs | None:
    """The runs of one expert tensor at a place of the mesh; None where its name gives it to other ranks."""
    row, index, sizes = where
    start, length = (
        Shard("e", place[0], mesh[0]).run(axis_size(row, "e", sizes)) if "e" in row.axes else (0, 0)
    )
    if "e" in row.name_axes and not start <= index[row.name_axes.index("e")] < start + length:
        return None
    part = {"e": (start, length)} if "e" in row.axes and "e" not in row.name_axes else {}
    runs = list(axis_runs(row, sizes, part))
    cut = next((i for i, dim in enumerate(row.dims) if "e" not in (f.axis for f in dim.factors)), None)
    if mesh[1] > 1 and cut is not None:
        at, count = Shard("e", place[1], mesh[1]).run(sum(n for _, n in runs[cut]))
        runs[cut] = ((at, count),) if count else ()
    return tuple(runs)


def _by_name(source: Checkpoint, layout: str | Layout) -> bool:
    """Whether the layout has an expert's number in a name, so that a rank holds only some of the names."""
    to = layout_of(layout, source.family)
    return to is not None and any("e" in row.name_axes for row in to.rows)


def goes_straight(plan: Plan, batch: tuple[Copy, ...]) -> bool:
    """Whether a batch is read into place with no buffer in between, into packed tensors on the CPU.

    The same rule as the executor's: one destination, one dtype, and runs that are long on both sides.
    """
    copy = batch[0]
    part, target, pattern = plan.parts[copy.source], plan.targets[copy.target], plan.patterns[copy.pattern]
    if len(batch) > 1 or part.dtype != target.dtype:
        return False
    itemsize = DTYPE_BITS[part.dtype] // 8
    strides = strides_of(target.local_shape)
    run, packed = len(pattern.sizes), 1
    while run and pattern.target[run - 1][1] * strides[pattern.target[run - 1][0]] == packed:
        run -= 1
        packed *= pattern.sizes[run]
    how = spans(pattern.sizes, pattern.source, itemsize)
    return not how.rows and (itemsize * packed >= GAP or run <= how.outer)


def free_layouts(source: Checkpoint) -> tuple[str, ...]:
    """The layouts into which the experts' files are read straight: those that keep the files' order."""
    kinds = {(module.layout, freeze(module.sizes)): module for module in source.modules.values()}
    free = [_straight_layouts(source, module) for module in kinds.values()]
    return tuple(name for name in free[0] if all(name in names for names in free)) if free else ()


def _straight_layouts(source: Checkpoint, module: Module) -> list[str]:
    family = source.family
    own = [name for spelling in family.spellings for name in spelling.names] if family is not None else []
    names = [name for found in module.tensors.values() for name in found if name is not None]
    alone = replace(
        source,
        modules={module.path: module},
        tensors={name: source.tensors[name] for name in names},
        routers={},
        problems=(),
    )
    found: dict[Layout | None, str] = {}
    for name in dict.fromkeys([*own, *FORMS]):
        try:
            layout = layout_of(name, family)
            made = make_plan(alone, default_targets(alone, name, Wish(name)), Wish(name))
        except RestowError:  # a layout of other roles: nothing goes there, free or not
            continue
        if not made.missing and not made.unused and all(goes_straight(made, b) for b in made.batches()):
            found.setdefault(layout, name)
    return list(found.values())
