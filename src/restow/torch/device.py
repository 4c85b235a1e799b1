"""Running a plan into the memory of a CUDA device: pinned slots filled by reader threads, moved on in order.

A fixed number of pinned host slots and as many on the device, allocated once a call. Threads read a slot's bytes, side by
side; one stream copies them raw to the device slot, another writes them into the parameters' own storage, transposed or
cast on the way by the device, one launch for a run of experts. Nothing else is allocated there. Sources in memory and
host destinations are `read`'s, and rejected by `on_one_device`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.plans import Copy, Plan
from restow.reads import spans
from restow.torch.dtypes import torch_dtype
from restow.torch.raw import raw
from restow.torch.read import Booked, Progress, _compare, _Files, _Ledger
from restow.torch.strides import tile_axis

SLOTS = 4
SLOT = 64 << 20  # bytes of one slot, on the host and on the device
PIECE = 1 << 20  # bytes below which a slot is not divided among more threads
ALIGN = 512


class Piece(NamedTuple):
    """Bytes of a file and where they go in a slot."""

    file: str
    begin: int
    length: int
    at: int


class Shape(NamedTuple):
    """What tiles of one pattern and target share: dtype, box, strides in the slot and in the destination."""

    target: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    source: tuple[int, ...]
    strides: tuple[int, ...]


class Load(NamedTuple):
    """One slot's worth of work: reads, and by shape the (byte in the slot, element in the destination) of each tile."""

    pieces: list[Piece]
    tiles: dict[Shape, list[tuple[int, int]]]
    size: int


def on_one_device(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is a plan of ours: files only, into one CUDA device only."""
    filled = {plan.targets[copy.target].name for copy in plan.copies}
    devices = {tensors[name].device for name in filled}
    return (
        len(devices) == 1
        and next(iter(devices)).type == "cuda"
        and not plan.codings
        and all(part.file and part.coding < 0 for part in plan.parts)
    )


def run_on_device(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    *,
    root: str | None,
    stamps: Mapping[str, tuple[int, ...]],
    threads: int,
    progress: Progress | None = None,
) -> Booked:
    """Run a plan whose targets all lie on one CUDA device; like `read.run_plan` in all else."""
    with ExitStack() as stack:
        files = _Files(stack, root, stamps)
        ledger = _Ledger()
        ledger.book(*_pump(plan, tensors, files, threads, progress))
        files.check()
    return Booked(ledger.read, _compare(plan, ledger))


def loads(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[Load]:
    """The plan's copies cut into tiles and packed into slots, in the order of the files; neighbours are one read."""
    pieces: list[Piece] = []
    tiles: dict[Shape, list[tuple[int, int]]] = {}
    size, file, end = 0, "", -1  # bytes of the slot in use, and where in which file its last read ends
    for reads, need, parts in _tiles(plan, tensors):
        first = reads[0]
        joined = first.begin == end and first.file == file
        at = size if joined else -(-size // ALIGN) * ALIGN + first.begin % ALIGN
        if at + need > SLOT and pieces:
            yield Load(pieces, tiles, size)
            pieces, tiles, joined = [], {}, False
            at = first.begin % ALIGN
        if joined:
            pieces[-1] = pieces[-1]._replace(length=pieces[-1].length + first.length)
            reads = reads[1:]
        for piece in reads:
            pieces.append(Piece(piece.file, piece.begin, piece.length, piece.at + at))
        for shape, to in parts:
            places = tiles.get(shape)
            if places is None:
                places = tiles[shape] = []
            places.append((at, to))
        size = at + need
        last = pieces[-1]
        file, end = last.file, last.begin + last.length if last.at + last.length == size else -1
    if pieces:
        yield Load(pieces, tiles, size)


Tiles = tuple[list[Piece], int, list[tuple[Shape, int]]]


class _Kind(NamedTuple):
    """What copies of one pattern into one target share."""

    shape: Shape
    offset: int
    strides: tuple[int, ...]
    size: int
    simple: bool  # one read that fits a slot


def _tiles(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[Tiles]:
    """(reads, bytes in the slot, where each tile goes) of every tile of every copy; reads are relative to the tile."""
    known: dict[tuple[int, int, str], _Kind] = {}
    limit = SLOT - ALIGN
    for batch in plan.batches():
        part = plan.parts[batch[0].source]
        kinds = []
        for one in batch:
            key = (one.pattern, one.target, part.dtype)
            kind = known.get(key)
            if kind is None:
                kind = known[key] = _kind(plan, one, tensors[plan.targets[one.target].name], limit)
            kinds.append(kind)
        kind = kinds[0]
        begin = part.begin + batch[0].at * kind.shape.dtype.itemsize
        to = [k.offset + _dot(one.start, k.strides) for one, k in zip(batch, kinds, strict=True)]
        if kind.simple:
            tiles = [(k.shape, place) for k, place in zip(kinds, to, strict=True)]
            yield [Piece(part.file, begin, kind.size, 0)], kind.size, tiles
        else:
            yield from _cut(part.file, begin, [k.shape for k in kinds], to, limit)


def _kind(plan: Plan, copy: Copy, tensor: torch.Tensor, limit: int) -> _Kind:
    sizes, steps, places = plan.patterns[copy.pattern]
    dtype = torch_dtype(plan.parts[copy.source].dtype)
    strides = tuple(step * tensor.stride(dim) for dim, step in places)
    how, size = spans(sizes, steps, dtype.itemsize), prod(sizes) * dtype.itemsize
    simple = how.outer == 0 and not how.rows and size <= limit
    shape = Shape(copy.target, dtype, sizes, steps, strides)
    return _Kind(shape, int(tensor.storage_offset()), tuple(tensor.stride()), size, simple)


def _cut(
    file: str,
    begin: int,
    shapes: Sequence[Shape],
    to: Sequence[int],
    limit: int,
) -> Iterator[Tiles]:
    """A copy that is larger than a slot or not one run of its file, tile by tile."""
    sizes, steps = shapes[0].sizes, shapes[0].source
    width = shapes[0].dtype.itemsize
    how = spans(sizes, steps, width)
    axis, length = tile_axis(sizes, width, how, shapes[0].strides, limit)
    for index in product(*(range(n) for n in sizes[:axis])):
        for first in range(0, sizes[axis] if sizes else 1, length):
            place = (*index, first)[: len(sizes)]
            box = (min(length, sizes[axis] - first), *sizes[axis + 1 :]) if sizes else ()
            start = begin + width * _dot(place, steps)
            if how.rows:
                need = (box[0] - 1) * steps[axis] * width + how.run
                reads, strides = [Piece(file, start, need, 0)], steps[axis:]
            else:
                loops = max(0, how.outer - axis)
                run = width * prod(box[loops:])
                reads = [
                    Piece(file, start + width * _dot(i, steps[axis:]), run, n * run)
                    for n, i in enumerate(product(*(range(k) for k in box[:loops])))
                ]
                need, strides = width * prod(box), _packed(box)
            tiles = [
                (
                    Shape(one.target, one.dtype, box, strides, one.strides[axis:]),
                    at + _dot(place, one.strides),
                )
                for one, at in zip(shapes, to, strict=True)
            ]
            yield reads, need, tiles


def _pump(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    files: _Files,
    threads: int,
    progress: Progress | None,
) -> tuple[int, dict[int, int]]:
    """Fill, send and move slot after slot; the bytes read, and the elements written by target."""
    names = [target.name for target in plan.targets]
    device = tensors[names[plan.copies[0].target]].device
    read, written, total = 0, dict[int, int](), plan.bytes
    host = [torch.empty(SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
    views = [raw(slot) for slot in host]
    there = [torch.empty(SLOT, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    sent, moved = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    moved.wait_stream(torch.cuda.current_stream(device))
    left = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]  # host slot free again
    taken = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]  # device slot free again
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        queue: list[tuple[int, Load, list[Future[int]]]] = []

        def send() -> int:
            slot, load, reads = queue.pop(0)
            got = sum(future.result() for future in reads)
            with torch.cuda.stream(sent):
                sent.wait_event(taken[slot])
                there[slot][: load.size].copy_(host[slot][: load.size], non_blocking=True)
                left[slot].record(sent)
            with torch.cuda.stream(moved):
                moved.wait_event(left[slot])
                for shape, places in load.tiles.items():
                    _move(shape, places, there[slot], tensors[names[shape.target]])
                    count = prod(shape.sizes) * len(places)
                    written[shape.target] = written.get(shape.target, 0) + count
                taken[slot].record(moved)
            if progress is not None:
                progress(min(read + got, total), total)
            return got

        for number, load in enumerate(loads(plan, tensors)):
            slot = number % SLOTS
            if len(queue) == SLOTS:
                read += send()
            left[slot].synchronize()
            shares = _shares(load.pieces, threads)
            queue.append((slot, load, [pool.submit(_fill, files, part, views[slot]) for part in shares]))
            while queue and all(future.done() for future in queue[0][2]):
                read += send()
        while queue:
            read += send()
    torch.cuda.current_stream(device).wait_stream(moved)
    torch.cuda.synchronize(device)
    return read, written


def _move(shape: Shape, places: Sequence[tuple[int, int]], slot: torch.Tensor, into: torch.Tensor) -> None:
    """Tiles of one shape from the slot into the destination: one launch for every run at even distances."""
    width = shape.dtype.itemsize
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape.sizes, shape.source, strict=True))
    for first, count, step, far in runs(places):
        at, to = places[first]
        end = at + (count - 1) * step + span * width
        box = slot[at:end].view(shape.dtype)
        if count == 1:
            source = box.as_strided(shape.sizes, shape.source)
            into.as_strided(shape.sizes, shape.strides, to).copy_(source)
            continue
        source = box.as_strided((count, *shape.sizes), (step // width, *shape.source))
        into.as_strided((count, *shape.sizes), (far, *shape.strides), to).copy_(source)


def runs(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """(first, count, step, far) of neighbours in `places` whose two numbers grow evenly, both upwards."""
    first = 0
    while first < len(places):
        count, step, far = 1, 0, 0
        if first + 1 < len(places):
            step, far = (b - a for a, b in zip(places[first], places[first + 1], strict=True))
            while step > 0 and far > 0 and first + count < len(places):
                before, here = places[first + count - 1], places[first + count]
                if (here[0] - before[0], here[1] - before[1]) != (step, far):
                    break
                count += 1
        yield first, count, step, far
        first += count


def _shares(pieces: Sequence[Piece], threads: int) -> list[list[Piece]]:
    """A slot's reads divided evenly among threads: as few calls as can be, each of which gives up the interpreter."""
    share = max(PIECE, -(-sum(piece.length for piece in pieces) // threads))
    shares: list[list[Piece]] = [[]]
    room = share
    for piece in pieces:
        at = 0
        while at < piece.length:
            if not room:
                shares.append([])
                room = share
            length = min(room, piece.length - at)
            shares[-1].append(Piece(piece.file, piece.begin + at, length, piece.at + at))
            at += length
            room -= length
    return shares


def _fill(files: _Files, pieces: Sequence[Piece], slot: memoryview) -> int:
    read = 0
    for piece in pieces:
        read += files.get(piece.file).preadv(piece.begin, [slot[piece.at : piece.at + piece.length]])
    return read


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(i * step for i, step in zip(index, steps, strict=False))
