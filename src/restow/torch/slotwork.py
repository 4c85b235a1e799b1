"""What a pump of slots does, decided before its first read: launches and copies of every slot, and the kernel's tables.

Transposes without a cast become rows of a table for one launch a slot; everything else is torch's copy, one for a run of
like tiles at even distances. Codes have slots of their own after the plain ones: they are decoded into a scratch, as often
as it is full, and moved from there. It moves no data and rejects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from restow.plans import Plan
from restow.torch.across import COLUMNS, Launch, Matrix, launches, matrix_of, usable
from restow.torch.coded_slots import coded_slots, parted
from restow.torch.coded_tiles import Decode
from restow.torch.device_decode import TABLES, Decoding, Scratch, scheduled, scratch_of
from restow.torch.packing import SHARE, Ints, Packed, packed

TABLE = 1 << 20  # bytes of a slot that are kept for the table of its transposes
WORTH = 1 << 30  # bytes of a plan from which on a kernel is worth its compilation, a second where it is new


class Run(NamedTuple):
    """Tiles of one shape at even distances: the first one's places, how many, byte and element from one to the next."""

    shape: int
    at: int
    to: int
    times: int
    step: int
    far: int


class Batch(NamedTuple):
    """What is decoded into the scratch at once, and goes from there."""

    decodings: list[Decoding]
    launches: list[Launch]
    runs: list[Run]


class Work(NamedTuple):
    """What is left to do with a slot that has arrived: launches of the kernel, copies of torch's, elements by target; of
    codes, batch after batch."""

    launches: list[Launch]
    runs: list[Run]
    written: dict[int, int]
    batches: Sequence[Batch] = ()

    @property
    def table(self) -> tuple[int, int]:
        """The rows of all tables that it needs."""
        every = [*self.launches, *(one for batch in self.batches for one in batch.launches)]
        return (every[0].first, every[-1].last) if every else (0, 0)


class Job(NamedTuple):
    """All that a pump does, decided before: the packed plan, the work of each slot, the rows of all tables."""

    packed: Packed
    work: list[Work]
    rows: torch.Tensor
    targets: list[torch.Tensor]
    size: int  # bytes that are read in all
    decodes: Sequence[Decode] = ()
    scratch: Scratch | None = None


def prepared(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    there: Sequence[torch.Tensor],
    worth: int = WORTH,
    share: int = SHARE,
    scratch: torch.Tensor | None = None,
) -> Job:
    """Everything that can be decided before the first read; `there` are the device slots, `scratch` is as large as one,
    and needed where there are codes."""
    plain, codes = parted(plan)
    box = packed(plain, tensors, there[0].numel() - TABLE, share)
    targets = [tensors[t.name] if t.name in tensors else torch.empty(0) for t in plan.targets]
    coded = None
    if scratch is not None:
        coded = coded_slots(codes, tensors, room_of(there[0].numel(), scratch.numel()), share)
    shares = [*box.shares, *(coded.shares if coded is not None else ())]
    size = sum(length for one in shares for _, _, length, _ in one.pieces)
    use = size >= worth
    numbers = np.arange(len(box.slots))
    slot_of = np.repeat(numbers, [slot.last - slot.first for slot in box.slots])
    base = np.array([slot.data_ptr() for slot in there], np.int64)[numbers % len(there)]
    rows, mine, runs = _moves(box, targets, slot_of, numbers, base, use)
    work = [Work(mine[i], runs[i], _written(box, slot.first, slot.last)) for i, slot in enumerate(box.slots)]
    job = Job(box, work, torch.from_numpy(rows), targets, size)
    if coded is not None and scratch is not None:
        batches, unit, at = scheduled(coded, scratch.numel() - TABLES)
        moved = Packed([], coded.slots, coded.shapes, coded.shape, at, coded.to)
        home = np.full(len(batches), scratch.data_ptr(), np.int64)
        more, mine, runs = _moves(moved, targets, unit, np.array([slot for slot, _ in batches]), home, use)
        after, shift, count = len(rows), len(box.slots), len(box.shapes)
        held: list[list[Batch]] = [[] for _ in coded.slots]
        for (slot, decodings), launched, copied in zip(batches, mine, runs, strict=True):
            moves = [one._replace(first=one.first + after, last=one.last + after) for one in launched]
            copies = [one._replace(shape=one.shape + count) for one in copied]
            held[slot].append(Batch(decodings, moves, copies))
        work += [Work([], [], _written(moved, s.first, s.last), held[i]) for i, s in enumerate(coded.slots)]
        late = [one._replace(slot=one.slot + shift) for one in coded.shares]
        box = box._replace(
            shares=[*box.shares, *late],
            slots=[*box.slots, *coded.slots],
            shapes=[*box.shapes, *coded.shapes],
        )
        rows = np.concatenate([rows, more])
        job = Job(
            box,
            work,
            torch.from_numpy(rows),
            targets,
            size,
            coded.decodes,
            scratch_of(scratch, coded.decodes),
        )
    return job._replace(rows=job.rows.pin_memory()) if there[0].is_cuda else job


def room_of(slot: int, scratch: int) -> tuple[int, int]:
    """What a slot and a scratch of these sizes take of codes and of values."""
    return slot - TABLE, scratch - TABLES


def _moves(
    box: Packed, targets: Sequence[torch.Tensor], unit: Ints, slot: Ints, base: Ints, use: bool
) -> tuple[Ints, list[list[Launch]], list[list[Run]]]:
    """The rows of all tables, and of each unit (a slot, or a batch of one) its launches and runs; `unit` has that of each
    tile, `slot` and `base` the slot and the address of each unit; `use` says whether the kernel is worth it."""
    known: dict[object, Matrix | None] = {}  # a shape is of one target, and layers have like ones
    matrices: list[Matrix | None] = []
    for shape in box.shapes:
        into, key = targets[shape.target], shape[1:]
        if not use or shape.dtype != into.dtype or not usable(into.device, shape.dtype.itemsize):
            matrices.append(None)
            continue
        if key not in known:
            known[key] = matrix_of(shape.sizes, shape.source, shape.strides)
        matrices.append(known[key])
    home = [targets[shape.target].untyped_storage().data_ptr() for shape in box.shapes]
    counts = np.array([len(m.places) if m is not None else 0 for m in matrices], np.int64)
    rows_of = np.bincount(slot[unit], counts[box.shape])  # a table that is too long is none
    ours = (counts[box.shape] > 0) & (rows_of[slot[unit]] * COLUMNS * 8 <= TABLE)
    tiles = np.flatnonzero(ours)
    rows, widths, keys = _table(box, matrices, tiles, home, base[unit[tiles]], unit)
    mine: list[list[Launch]] = [[] for _ in slot]
    for one in launches(rows, widths, keys):
        mine[int(keys[one.first])].append(one)
    runs: list[list[Run]] = [[] for _ in slot]
    for number, found in _runs(box, np.flatnonzero(~ours), unit):
        runs[number].append(found)
    return rows, mine, runs


def _table(
    box: Packed,
    matrices: Sequence[Matrix | None],
    tiles: Ints,
    home: Sequence[int],
    base: Ints,
    slot_of: Ints,
) -> tuple[Ints, Ints, Ints]:
    """The rows of all transposes, slot by slot and by width in each; their widths, and their slots."""
    kinds = []
    for shape, matrix, to in zip(box.shapes, matrices, home, strict=True):
        width = shape.dtype.itemsize
        places = matrix.places if matrix is not None else []
        sizes = matrix[:4] if matrix is not None else ()
        kinds.append([(a * width, to + b * width, *sizes, width) for a, b in places])
    counts = np.array([len(kind) for kind in kinds], np.int64)
    flat = np.array([row for kind in kinds for row in kind], np.int64).reshape(-1, COLUMNS + 1)
    many = counts[box.shape[tiles]]
    tile = np.repeat(np.arange(len(tiles)), many)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(many) - many, many)
    rows = flat[(np.cumsum(counts) - counts)[box.shape[tiles]][tile] + number]
    widths = rows[:, -1]
    rows[:, 0] += base[tile] + box.at[tiles][tile]
    rows[:, 1] += box.to[tiles][tile] * widths
    keys = slot_of[tiles][tile]
    order = np.lexsort((widths, keys))
    return np.ascontiguousarray(rows[order, :COLUMNS]), widths[order], keys[order]


def _written(box: Packed, first: int, last: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for i, times in enumerate(np.bincount(box.shape[first:last]).tolist()):
        if times:
            shape = box.shapes[i]
            found[shape.target] = found.get(shape.target, 0) + times * prod(shape.sizes)
    return found


def _runs(box: Packed, tiles: Ints, slot_of: Ints) -> Iterator[tuple[int, Run]]:
    """(slot, run) of tiles that torch copies: neighbours of one shape whose two places grow evenly, both upwards."""
    order = tiles[np.lexsort((tiles, box.shape[tiles], slot_of[tiles]))]
    columns = (slot_of[order], box.shape[order], box.at[order], box.to[order])
    now: tuple[int, int] = -1, -1
    run = Run(-1, 0, 0, 0, 0, 0)
    for slot, shape, at, to in zip(*(column.tolist() for column in columns), strict=True):
        step, far = at - run.at - (run.times - 1) * run.step, to - run.to - (run.times - 1) * run.far
        if now == (slot, shape) and step > 0 and far > 0 and (run.times == 1 or (step, far) == run[4:]):
            run = Run(shape, run.at, run.to, run.times + 1, step, far)
            continue
        if run.times:
            yield now[0], run
        now, run = (slot, shape), Run(shape, at, to, 1, 0, 0)
    if run.times:
        yield now[0], run
