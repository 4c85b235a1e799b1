"""Packing coded copies into slots: codes and the scales that they need lie in one slot, each beside its neighbours in the file.

The same in arrays as `packing` for plain copies. `decodable` says which copies a device decodes; the rest is `decode`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from restow.plans import Copy, Plan
from restow.torch.coded_tiles import CodedJob, Decode, coded_jobs
from restow.torch.dtypes import torch_dtype
from restow.torch.packing import (
    ALIGN,
    Ints,
    Shape,
    Share,
    Slot,
    _array,
    _joined,
    _leads,
    _numbered,
    _places,
    _shares,
)

SEATS = 3  # codes, and two scales at most


class Coded(NamedTuple):
    """Coded copies in slots. Of each tile, in the order of slots: its decoding, a shape, the bytes of its codes and
    scales in the slot, its first wanted value, its element in the destination's storage, and what it is a neighbour of."""

    shares: list[Share]
    slots: list[Slot]
    decodes: list[Decode]
    shapes: list[Shape]
    slot: Ints
    decode: Ints
    shape: Ints
    at: Ints  # [tiles, SEATS]
    first: Ints
    to: Ints
    kin: Ints


def is_coded(plan: Plan, copy: Copy) -> bool:
    return plan.parts[copy.source].coding >= 0


def parted(plan: Plan) -> tuple[Plan, Plan]:
    """The plan's plain copies and its coded ones, each as a plan."""
    if not plan.codings:
        return plan, replace(plan, copies=())
    plain = replace(plan, copies=tuple(copy for copy in plan.copies if not is_coded(plan, copy)))
    return plain, replace(plan, copies=tuple(copy for copy in plan.copies if is_coded(plan, copy)))


def decodable(
    plan: Plan, tensors: Mapping[str, torch.Tensor], room: tuple[int, int]
) -> tuple[Plan, Plan | None]:
    """What a device does, plain copies included, and what it leaves; copies that share a read stay together."""
    if not plan.codings:
        return plan, None
    known: dict[tuple[object, ...], bool] = {}
    ours: list[Copy] = []
    rest: list[Copy] = []
    for batch in plan.batches():
        good = True
        for copy in batch if is_coded(plan, batch[0]) else ():
            key = _kind(plan, copy)
            if key not in known:
                known[key] = _jobs(plan, copy, tensors, room) is not None
            good = good and known[key]
        (ours if good else rest).extend(batch)
    if not rest:
        return plan, None
    return replace(plan, copies=tuple(ours)), replace(plan, copies=tuple(rest))


def _kind(plan: Plan, copy: Copy) -> tuple[object, ...]:
    """What copies have in common that are decoded alike; of one coding, scales may still have dtypes of their own."""
    part = plan.parts[copy.source]
    scales = tuple(plan.parts[i].dtype for i in part.scales)
    return copy.target, copy.pattern, part.coding, copy.at, scales


def _jobs(
    plan: Plan, copy: Copy, tensors: Mapping[str, torch.Tensor], room: tuple[int, int]
) -> tuple[CodedJob, ...] | None:
    part, pattern = plan.parts[copy.source], plan.patterns[copy.pattern]
    tensor = tensors[plan.targets[copy.target].name]
    strides = tuple(step * tensor.stride(dim) for dim, step in pattern.target)
    scales = tuple(plan.parts[i].dtype for i in part.scales)
    box = copy.at, pattern.sizes, pattern.source
    return coded_jobs(plan.codings[part.coding], box, scales, tensor.dtype, strides, room)


def coded_slots(
    plan: Plan, tensors: Mapping[str, torch.Tensor], room: tuple[int, int], share: int
) -> Coded | None:
    """A plan of coded copies, all of them `decodable` in `room`: bytes of a slot, bytes of the scratch beside it."""
    if not plan.copies:
        return None
    sources, ats, targets, starts, patterns = zip(*plan.copies, strict=True)
    lead = _leads(plan, _array(sources), _array(ats), _array(patterns))
    kinds: dict[tuple[object, ...], int] = {}
    kind = _array([kinds.setdefault(_kind(plan, copy), len(kinds)) for copy in plan.copies])
    _, firsts = np.unique(kind, return_index=True)
    tables = []
    for i in firsts.tolist():
        made = _jobs(plan, plan.copies[i], tensors, room)
        assert made is not None, "`decodable` has seen to it"
        tables.append(made)
    job = _Jobs([len(table) for table in tables], kind)
    rows = list(chain(*tables))

    mine = np.flatnonzero(lead[job.owner] == job.owner)  # jobs that are read; the others share one of them
    reader = np.zeros(len(job.owner), np.int64)
    reader[mine] = np.arange(len(mine))
    reader = reader[job.first[lead[job.owner]] + job.number]

    parts = np.full((len(plan.copies), SEATS), -1, np.int64)  # of each copy, its codes and scales
    for i, source in enumerate(sources):
        there = (source, *plan.parts[source].scales)
        parts[i, : len(there)] = there
    parts = parts[job.owner[mine]]
    need = _seats(rows, [[seat.need for seat in one.seats] for one in rows])[job.row[mine]]
    begin = _seats(rows, [one.begins for one in rows])[job.row[mine]]
    held, seat = np.nonzero(parts >= 0)
    parts, need, begin = parts[held, seat], need[held, seat], begin[held, seat]
    begins = _array([part.begin for part in plan.parts])
    widths = _array([1 if part.coding >= 0 else torch_dtype(part.dtype).itemsize for part in plan.parts])
    names, files = _numbered([part.file for part in plan.parts])
    begin = begin + begins[parts]

    slot = _filled(np.bincount(held, need + ALIGN).astype(np.int64), room[0])
    order = np.lexsort((begin, files[parts], slot[held]))
    at = np.zeros((len(mine), SEATS), np.int64)
    lies = _lined(begin[order], need[order], widths[parts][order], slot[held][order])
    at[held[order], seat[order]] = lies

    which, from_, length, into = _reads(rows, job.row[mine][held[order]], seat[order])
    reads = (
        slot[held][order][which],
        files[parts][order][which],
        begin[order][which] + from_,
        length,
        lies[which] + into,
    )
    shares = list(_shares(names, share, *_joined(*reads)))
    counts = np.bincount([one.slot for one in shares], minlength=int(slot[-1]) + 1)
    ends = np.zeros(len(counts), np.int64)
    np.maximum.at(ends, slot[held][order], lies + need[order])
    base = _places(plan, tensors, _array(targets), starts)
    return _tiles(plan, tensors, rows, job, reader, slot, at, base, shares, (ends, counts))


class _Jobs:
    """All jobs of all copies, in order: of each its copy, its number there, its row in the kinds' tables."""

    def __init__(self, counts: Sequence[int], kind: Ints) -> None:
        long = _array(counts)
        many = long[kind]
        self.first: Ints = np.cumsum(many) - many  # of each copy, its first job
        self.owner: Ints = np.repeat(np.arange(len(kind)), many)
        self.number: Ints = np.arange(len(self.owner)) - np.repeat(self.first, many)
        self.row: Ints = (np.cumsum(long) - long)[kind[self.owner]] + self.number


def _seats(rows: Sequence[CodedJob], values: Sequence[Sequence[int]]) -> Ints:
    found = np.zeros((len(rows), SEATS), np.int64)
    for line, some in zip(found, values, strict=True):
        line[: len(some)] = some
    return found


def _reads(rows: Sequence[CodedJob], row: Ints, seat: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Every read of seats, which are given as a row and a number there: the seat's place among them, and the read."""
    each = [one.seats[i].reads if i < len(one.seats) else () for one in rows for i in range(SEATS)]
    counts = _array([len(reads) for reads in each])
    flat = np.array([read for reads in each for read in reads], np.int64).reshape(-1, 3)
    many = counts[row * SEATS + seat]
    which = np.repeat(np.arange(len(row)), many)
    number = np.arange(len(which)) - np.repeat(np.cumsum(many) - many, many)
    begin, length, at = flat[(np.cumsum(counts) - counts)[(row * SEATS + seat)[which]] + number].T
    return which, begin, length, at


def _filled(need: Ints, capacity: int) -> Ints:
    """The slot of every job: as many as it takes, in order."""
    slot, ends = np.zeros(len(need), np.int64), np.cumsum(need)
    one = number = 0
    while one < len(need):
        end = int(np.searchsorted(ends, ends[one] - need[one] + capacity, side="right"))
        slot[one:end] = number
        one, number = end, number + 1
    return slot


def _lined(begin: Ints, need: Ints, width: Ints, slot: Ints) -> Ints:
    """Where seats lie that follow each other in their slots: beside the neighbour in the file, aligned as it is there."""
    lean = np.where(begin % width == 0, begin % ALIGN, 0)
    gaps = (lean[1:] - lean[:-1] - need[:-1]) % ALIGN
    line = lean[0] + np.concatenate([[0], np.cumsum(need[:-1] + gaps)])
    heads = np.flatnonzero(np.concatenate([[True], np.diff(slot) != 0]))
    found: Ints = line - np.repeat((line - lean)[heads], np.diff([*heads.tolist(), len(line)]))
    return found


def _tiles(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    rows: Sequence[CodedJob],
    job: _Jobs,
    reader: Ints,
    slot: Ints,
    at: Ints,
    base: Ints,
    shares: list[Share],
    filled: tuple[Ints, Ints],
) -> Coded:
    """The tiles of all jobs, alike ones of a slot beside each other."""
    decodes: dict[Decode, int] = {}
    lines: list[list[int]] = []
    counts = []
    for one in rows:
        counts.append(len(one.tiles))
        for tile in one.tiles:
            where = (*tile.at, *(0,) * (SEATS - len(tile.at)))
            lines.append(
                [decodes.setdefault(tile.decode, len(decodes)), tile.first, tile.to, *where, len(lines)]
            )
    flat, many, every = np.array(lines, np.int64), _array(counts), [t for one in rows for t in one.tiles]
    times = many[job.row]
    owner = np.repeat(np.arange(len(job.row)), times)  # of each tile, its job
    number = np.arange(len(owner)) - np.repeat(np.cumsum(times) - times, times)
    line = flat[(np.cumsum(many) - many)[job.row][owner] + number]
    target = _array([copy.target for copy in plan.copies])[job.owner][owner]
    shapes: dict[Shape, int] = {}
    known: dict[tuple[int, int], int] = {}
    shape = np.zeros(len(owner), np.int64)
    for i, pair in enumerate(zip(line[:, -1].tolist(), target.tolist(), strict=True)):
        if pair not in known:
            tile = every[pair[0]]
            made = Shape(pair[1], tile.decode.dtype, tile.sizes, tile.source, tile.strides)
            known[pair] = shapes.setdefault(made, len(shapes))
        shape[i] = known[pair]
    to = base[job.owner][owner] + line[:, 2]
    outer = {i: max((*tensors[plan.targets[i].name].stride(), 1)) for i in set(target.tolist())}
    kin = to % _array([outer.get(i, 1) for i in range(len(plan.targets))])[target]
    lies = at[reader][owner] + line[:, 3:-1]
    mine = slot[reader][owner]
    order = np.lexsort((lies[:, 0], kin, shape, line[:, 0], mine))
    ends, sent = filled
    cuts = np.searchsorted(mine[order], np.arange(len(sent) + 1))
    slots = [Slot(*map(int, row)) for row in zip(ends, sent, cuts[:-1], cuts[1:], strict=True)]
    return Coded(
        shares, slots, list(decodes), list(shapes), mine[order], line[order, 0], shape[order], lies[order],
        line[order, 1], to[order], kin[order],
    )  # fmt: skip
