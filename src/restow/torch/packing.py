"""Packing a plan into slots of a fixed size: which bytes are read where, and which tiles of a slot go where afterwards.

All of it is decided in arrays before the first byte is read, so that next to nothing is left to the interpreter while
threads read: neighbours in a file are one read, whatever tensors they are of. It moves no data and rejects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from restow.plans import Plan
from restow.reads import spans
from restow.torch.dtypes import torch_dtype
from restow.torch.strides import dot, tile_axis

ALIGN = (
    512  # bytes: a tile begins in its slot as it does in its file, so that words and cache lines stay whole
)
SHARE = 8 << 20  # bytes that a thread reads before it looks for more
LARGE = 16 << 20  # the same where small reads are slow

Ints = npt.NDArray[np.int64]
Piece = tuple[str, int, int, int]  # (file, first byte, bytes, where in the slot)


class Shape(NamedTuple):
    """What tiles of one pattern and target share: dtype, box, strides in the slot and in the destination."""

    target: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    source: tuple[int, ...]
    strides: tuple[int, ...]


class Share(NamedTuple):
    """What one thread reads before it looks for more: `size` bytes of slot number `slot` from byte `at`, gaps included."""

    slot: int
    at: int
    size: int
    pieces: list[Piece]


class Slot(NamedTuple):
    """One filling of a slot: its bytes, how many shares fill it, and its tiles, by place in `Packed`'s arrays."""

    size: int
    shares: int
    first: int
    last: int


class Packed(NamedTuple):
    """A plan in slots. Of each tile: its shape, its byte in the slot, its element in the destination's storage."""

    shares: list[Share]
    slots: list[Slot]
    shapes: list[Shape]
    shape: Ints
    at: Ints
    to: Ints


class _Tile(NamedTuple):
    """A tile of a kind of copy, all numbers relative to the copy: its bytes, element, shape and reads."""

    need: int
    to: int
    shape: int
    reads: list[tuple[int, int, int]]  # (byte in the file, bytes, byte in the tile)


def packed(plan: Plan, tensors: Mapping[str, torch.Tensor], capacity: int, share: int = SHARE) -> Packed:
    """The plan's copies cut into tiles and packed into slots of `capacity` bytes, in the order of the files.

    A slot holds a window of `reads` at least: what is read through is not cut further, since the plan counts it.
    """
    if not plan.copies:
        return Packed([], [], [], *(np.zeros(0, np.int64) for _ in range(3)))
    columns = list(zip(*plan.copies, strict=True))
    sources, ats, targets, patterns = (_array(columns[i]) for i in (0, 1, 2, 4))
    files, kinds = (
        _numbered([part.file for part in plan.parts]),
        _numbered([part.dtype for part in plan.parts]),
    )
    lead = _leads(plan, sources, ats, patterns)
    # Tensors of one role may be of several dtypes: what is alike else has other bytes.
    code = (patterns * len(plan.targets) + targets) * len(kinds[0]) + kinds[1][sources]
    key = np.where(lead == np.arange(len(lead)), code, code + (1 + code[lead]) * (1 + code.max()))
    _, where, kind = np.unique(key, return_index=True, return_inverse=True)
    shapes: dict[Shape, int] = {}
    tables = [_tiles(plan, int(i), int(lead[i]), tensors, capacity - ALIGN, shapes) for i in where]

    widths = _array([torch_dtype(name).itemsize for name in kinds[0]])[kinds[1]][sources]
    begins = _array([part.begin for part in plan.parts])[sources] + widths * ats
    base = _places(plan, tensors, targets, columns[3])
    tiles = _Tiles(tables, kind)
    owner = tiles.copy  # of each tile, its copy
    to = base[owner] + tiles.column([t.to for t in chain(*tables)])
    shape = tiles.column([t.shape for t in chain(*tables)])
    need = tiles.column([t.need for t in chain(*tables)])

    mine = np.flatnonzero(lead[owner] == owner)  # tiles that are read; the others share one of them
    first = begins[owner[mine]] + tiles.column([t.reads[0][0] for t in chain(*tables)])[mine]
    at, slot = _seats(first, need[mine], widths[owner[mine]], capacity)
    reader = np.zeros(len(owner), np.int64)  # of each tile that is read, its place among them
    reader[mine] = np.arange(len(mine))
    reader = reader[tiles.first[lead[owner]] + tiles.number]
    order = np.argsort(slot[reader], kind="stable")
    reads = _Reads(tables, tiles.row[mine])
    table = (
        slot[reads.tile],
        files[1][sources][owner[mine]][reads.tile],
        begins[owner[mine]][reads.tile] + reads.begin,
        reads.length,
        at[reads.tile] + reads.at,
    )
    shares = list(_shares(files[0], share, *_joined(*table)))
    counts = np.bincount([share.slot for share in shares], minlength=int(slot[-1]) + 1)
    ends = np.zeros(len(counts), np.int64)
    np.maximum.at(ends, slot, at + need[mine])
    cuts = np.searchsorted(slot[reader][order], np.arange(len(counts) + 1))
    slots = [Slot(*map(int, row)) for row in zip(ends, counts, cuts[:-1], cuts[1:], strict=True)]
    return Packed(shares, slots, list(shapes), shape[order], at[reader][order], to[order])


def _array(values: Sequence[int]) -> Ints:
    return np.fromiter(values, np.int64, len(values))


def _numbered(names: Sequence[str]) -> tuple[list[str], Ints]:
    known: dict[str, int] = {}
    numbers = _array([known.setdefault(name, len(known)) for name in names])
    return list(known), numbers


def _leads(plan: Plan, sources: Ints, ats: Ints, patterns: Ints) -> Ints:
    """Of each copy the one whose read it shares: itself, or an earlier one that reads the same."""
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    box = _array([boxes.setdefault(p[:2], len(boxes)) for p in plan.patterns])[patterns]
    new = np.ones(len(sources), bool)
    new[1:] = (np.diff(sources) != 0) | (np.diff(ats) != 0) | (np.diff(box) != 0)
    found: Ints = np.flatnonzero(new)[np.cumsum(new) - 1]
    return found


def _places(
    plan: Plan, tensors: Mapping[str, torch.Tensor], targets: Ints, starts: Sequence[Sequence[int]]
) -> Ints:
    """Of each copy the element in its destination's storage at which it begins."""
    of = {int(i): tensors[plan.targets[i].name] for i in np.unique(targets)}
    wide = max((tensor.dim() for tensor in of.values()), default=0)
    steps = np.zeros((len(plan.targets), wide), np.int64)
    origin = np.zeros(len(plan.targets), np.int64)
    for i, tensor in of.items():
        steps[i, : tensor.dim()] = tensor.stride()
        origin[i] = int(tensor.storage_offset())
    if any(tensor.dim() < wide for tensor in of.values()):
        starts = [(*start, *(0,) * (wide - len(start))) for start in starts]
    flat = np.fromiter(chain.from_iterable(starts), np.int64, wide * len(starts)).reshape(len(starts), wide)
    found: Ints = origin[targets] + (flat * steps[targets]).sum(1)
    return found


def _tiles(
    plan: Plan,
    copy: int,
    lead: int,
    tensors: Mapping[str, torch.Tensor],
    limit: int,
    shapes: dict[Shape, int],
) -> list[_Tile]:
    """The tiles of every copy like this one: whole where it is one run that fits, else cut as its lead's are."""
    one, first = plan.copies[copy], plan.copies[lead]
    sizes, steps, places = plan.patterns[one.pattern]
    dtype = torch_dtype(plan.parts[one.source].dtype)

    def strides_of(target: int, axes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        tensor = tensors[plan.targets[target].name]
        return tuple(step * tensor.stride(dim) for dim, step in axes)

    strides = strides_of(one.target, places)
    how, size = spans(sizes, steps, dtype.itemsize), prod(sizes) * dtype.itemsize

    def shape(*box: tuple[int, ...]) -> int:
        return shapes.setdefault(Shape(one.target, dtype, *box), len(shapes))

    if how.outer == 0 and not how.rows and size <= limit:
        return [_Tile(size, 0, shape(sizes, steps, strides), [(0, size, 0)])]
    width = dtype.itemsize
    axis, length = tile_axis(
        sizes, width, how, strides_of(first.target, plan.patterns[first.pattern].target), limit
    )
    found = []
    for index in product(*(range(n) for n in sizes[:axis])):
        for at in range(0, sizes[axis] if sizes else 1, length):
            place = (*index, at)[: len(sizes)]
            box = (min(length, sizes[axis] - at), *sizes[axis + 1 :]) if sizes else ()
            start = width * dot(place, steps)
            if how.rows:
                need = (box[0] - 1) * steps[axis] * width + how.run
                reads, source = [(start, need, 0)], steps[axis:]
            else:
                loops = max(0, how.outer - axis)
                run = width * prod(box[loops:])
                inner = enumerate(product(*(range(n) for n in box[:loops])))
                reads = [(start + width * dot(i, steps[axis:]), run, n * run) for n, i in inner]
                need, source = len(reads) * run, tuple(prod(box[i + 1 :]) for i in range(len(box)))
            found.append(_Tile(need, dot(place, strides), shape(box, source, strides[axis:]), reads))
    return found


class _Tiles:
    """All tiles of all copies, in order: of each its copy, its number in the copy, its row in the kinds' tables."""

    def __init__(self, tables: Sequence[Sequence[_Tile]], kind: Ints) -> None:
        counts = _array([len(table) for table in tables])
        begins = np.cumsum(counts) - counts
        many = counts[kind]
        self.first: Ints = np.cumsum(many) - many  # of each copy, its first tile
        self.copy: Ints = np.repeat(np.arange(len(kind)), many)
        self.number: Ints = np.arange(len(self.copy)) - np.repeat(self.first, many)
        self.row: Ints = begins[kind[self.copy]] + self.number

    def column(self, values: Sequence[int]) -> Ints:
        found: Ints = _array(values)[self.row]
        return found


class _Reads:
    """The reads of tiles, in order: of each its tile, its byte in the copy, its bytes, its byte in the tile."""

    def __init__(self, tables: Sequence[Sequence[_Tile]], rows: Ints) -> None:
        each = [tile.reads for tile in chain(*tables)]
        counts = _array([len(reads) for reads in each])
        flat = np.array([read for reads in each for read in reads], np.int64).reshape(-1, 3)
        many = counts[rows]
        self.tile: Ints = np.repeat(np.arange(len(rows)), many)
        number = np.arange(len(self.tile)) - np.repeat(np.cumsum(many) - many, many)
        self.begin, self.length, self.at = flat[(np.cumsum(counts) - counts)[rows][self.tile] + number].T


def _seats(first: Ints, need: Ints, width: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Where each tile lies in its slot, and in which: beside its neighbour in the file, aligned as it is there."""
    lean = np.where(first % width == 0, first % ALIGN, 0)  # words that lie askew in the file are set straight
    gaps = (lean[1:] - lean[:-1] - need[:-1]) % ALIGN
    line = lean[0] + np.concatenate([[0], np.cumsum(need[:-1] + gaps)])  # as if there were one endless slot
    slot, shift = np.zeros(len(line), np.int64), np.zeros(len(line), np.int64)
    ends, one, number = line + need, 0, 0
    while one < len(line):
        off = int(line[one] - lean[one])
        end = int(np.searchsorted(ends, off + capacity, side="right"))
        slot[one:end], shift[one:end] = number, off
        one, number = end, number + 1
    return line - shift, slot


def _joined(slot: Ints, file: Ints, begin: Ints, length: Ints, at: Ints) -> tuple[Ints, ...]:
    """Reads of one slot that adjoin in the file and in the slot as one."""
    apart = np.ones(len(slot), bool)
    apart[1:] = (
        (np.diff(slot) != 0)
        | (np.diff(file) != 0)
        | (begin[1:] != begin[:-1] + length[:-1])
        | (at[1:] != at[:-1] + length[:-1])
    )
    heads = np.flatnonzero(apart)
    return slot[heads], file[heads], begin[heads], np.add.reduceat(length, heads), at[heads]


def _shares(names: Sequence[str], share: int, *columns: Ints) -> Iterator[Share]:
    """Reads cut into shares that span `share` bytes of a slot at most: few calls, each of which gives up the interpreter."""
    place, first, end = -1, 0, 0  # of the share that is being made: its slot, and what it spans there
    pieces: list[Piece] = []
    for slot, file, begin, length, at in zip(*(column.tolist() for column in columns), strict=True):
        done = 0
        while done < length:
            room = first + share - (at + done)
            if slot != place or room <= 0:
                if pieces:
                    yield Share(place, first, end - first, pieces)
                place, first, room, pieces = slot, at + done, share, []
            part = min(room, length - done)
            pieces.append((names[file], begin + done, part, at + done))
            done += part
            end = at + done
    if pieces:
        yield Share(place, first, end - first, pieces)
