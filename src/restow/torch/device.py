"""Running a plan into the memory of a device: pinned slots filled by reader threads, moved on in order.

A fixed number of pinned host slots and as many on the device, allocated once a call. Threads read a slot's bytes from the
files, side by side; one stream copies the raw bytes to the device slot, another writes them into the parameter's own
storage, transposed or cast on the way by the device. No tensor is ever allocated on the device but the slots. It rejects
nothing of its own; sources in memory and host destinations are `read`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.plans import Copy, Plan
from restow.reads import spans
from restow.torch.dtypes import torch_dtype
from restow.torch.raw import raw
from restow.torch.read import Booked, Files, Landing, Progress, compared, landing_of, tile_axis

SLOTS = 4
SLOT = 64 << 20  # bytes of one slot, on the host and on the device
PIECE = 4 << 20  # bytes of one read, so that all threads work on one slot
ALIGN = 512


class Piece(NamedTuple):
    """Bytes of a file and where they go in a slot."""

    file: str
    begin: int
    length: int
    at: int


class Tile(NamedTuple):
    """A part of a copy inside a slot: its box there, and where the box goes."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    landings: tuple[tuple[Landing, int], ...]  # with the first element's place in the destination's storage


class Load(NamedTuple):
    """One slot's worth of work."""

    pieces: tuple[Piece, ...]
    tiles: tuple[Tile, ...]
    size: int


def loads(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[Load]:
    """The plan's copies cut into tiles and packed into slots, in the order of the files."""
    pieces: list[Piece] = []
    tiles: list[Tile] = []
    size = 0
    for batch in plan.batches():
        for reads, tile, need in _tiles(plan, batch, tensors):
            if size + need > SLOT and tiles:
                yield Load(tuple(pieces), tuple(tiles), size)
                pieces, tiles, size = [], [], 0
            pieces += [piece._replace(at=piece.at + size) for piece in reads]
            tiles.append(tile._replace(at=size))
            size += -(-need // ALIGN) * ALIGN
    if tiles:
        yield Load(tuple(pieces), tuple(tiles), size)


def _tiles(
    plan: Plan, batch: Sequence[Copy], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[list[Piece], Tile, int]]:
    copy = batch[0]
    part, pattern = plan.parts[copy.source], plan.patterns[copy.pattern]
    dtype = torch_dtype(part.dtype)
    width = dtype.itemsize
    sizes, steps = pattern.sizes, pattern.source
    landings = [landing_of(plan, one, tensors) for one in batch]
    how = spans(sizes, steps, width)
    axis, length = tile_axis(sizes, width, how, landings[0].strides, SLOT)
    for index in product(*(range(n) for n in sizes[:axis])):
        for first in range(0, sizes[axis] if sizes else 1, length):
            place = (*index, first)[: len(sizes)]
            shape = (min(length, sizes[axis] - first), *sizes[axis + 1 :]) if sizes else ()
            begin = part.begin + width * (copy.at + _dot(place, steps))
            to = tuple((one, one.offset + _dot(place, one.strides)) for one in landings)
            to = tuple((one._replace(strides=one.strides[axis:]), at) for one, at in to)
            if how.rows:
                need = (shape[0] - 1) * steps[axis] * width + how.run
                reads, strides = [Piece(part.file, begin, need, 0)], steps[axis:]
            else:
                loops = max(0, how.outer - axis)
                run = width * prod(shape[loops:])
                reads = [
                    Piece(part.file, begin + width * _dot(i, steps[axis:]), run, n * run)
                    for n, i in enumerate(product(*(range(k) for k in shape[:loops])))
                ]
                need, strides = width * prod(shape), _packed(shape)
            yield reads, Tile(0, dtype, shape, strides, to), need


def on_one_device(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is a plan of ours: files only, into one CUDA device only."""
    filled = {plan.targets[copy.target].name for copy in plan.copies}
    devices = {tensors[name].device for name in filled}
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and all(part.file for part in plan.parts)


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
        files = Files(stack, root, stamps)
        read, written = _pump(plan, tensors, files, threads, progress)
        files.check()
    return Booked(read, compared(plan, written))


def _pump(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    files: Files,
    threads: int,
    progress: Progress | None,
) -> tuple[int, dict[int, int]]:
    device = tensors[plan.targets[plan.copies[0].target].name].device
    total = plan.bytes
    read, written = 0, dict[int, int]()
    host = [torch.empty(SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
    views = [raw(slot) for slot in host]
    there = [torch.empty(SLOT, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    sent, moved = torch.cuda.Stream(device), torch.cuda.Stream(device)
    moved.wait_stream(torch.cuda.current_stream(device))
    left = [torch.cuda.Event() for _ in range(SLOTS)]  # the host slot may be filled again
    taken = [torch.cuda.Event() for _ in range(SLOTS)]  # the device slot may be overwritten
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        queue: list[tuple[int, Load, list[object]]] = []

        def send(slot: int, load: Load, reads: Sequence[object]) -> int:
            got = sum(future.result() for future in reads)  # type: ignore[attr-defined]
            with torch.cuda.stream(sent):
                sent.wait_event(taken[slot])
                there[slot][: load.size].copy_(host[slot][: load.size], non_blocking=True)
                left[slot].record(sent)
            with torch.cuda.stream(moved):
                moved.wait_event(left[slot])
                for tile in load.tiles:
                    _move(tile, there[slot], written)
                taken[slot].record(moved)
            if progress is not None:
                progress(min(read + got, total), total)
            return got

        for number, load in enumerate(loads(plan, tensors)):
            slot = number % SLOTS
            if len(queue) == SLOTS:
                read += send(*queue.pop(0))
            left[slot].synchronize()
            reads = [pool.submit(_fill, files, part, views[slot]) for part in _shares(load.pieces, threads)]
            queue.append((slot, load, list(reads)))
            while queue and all(future.done() for future in queue[0][2]):  # type: ignore[attr-defined]
                read += send(*queue.pop(0))
        for item in queue:
            read += send(*item)
    torch.cuda.current_stream(device).wait_stream(moved)
    torch.cuda.synchronize(device)
    return read, written


def _move(tile: Tile, slot: torch.Tensor, written: dict[int, int]) -> None:
    count = prod(tile.shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(tile.shape, tile.strides, strict=True))
    raw = slot[tile.at : tile.at + span * tile.dtype.itemsize].view(tile.dtype)
    box = raw.as_strided(tile.shape, tile.strides)
    for landing, offset in tile.landings:
        landing.tensor.as_strided(tile.shape, landing.strides, offset).copy_(box)
        written[landing.target] = written.get(landing.target, 0) + count


def _shares(pieces: Sequence[Piece], threads: int) -> list[list[Piece]]:
    """Pieces cut to bounded reads and dealt out in runs, so that a thread's reads follow each other in the file."""
    cut = [
        piece._replace(begin=piece.begin + at, length=min(PIECE, piece.length - at), at=piece.at + at)
        for piece in pieces
        for at in range(0, piece.length, PIECE)
    ]
    step = max(1, -(-len(cut) // (threads * 2)))
    return [cut[i : i + step] for i in range(0, len(cut), step)]


def _fill(files: Files, pieces: Sequence[Piece], slot: memoryview) -> int:
    return sum(
        files.get(piece.file).preadv(piece.begin, [slot[piece.at : piece.at + piece.length]]) for piece in pieces
    )


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(i * step for i, step in zip(index, steps, strict=False))
