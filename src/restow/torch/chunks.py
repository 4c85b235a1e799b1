"""A planned destination in bounded pieces: each chunk is filled in a reused buffer, handed on, and forgotten.

Chunks are runs of whole tensors, or slices of one that is too large, in the order given. Two buffers let one be handed
on (written, compared, sent) while the next is filled. It rejects nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from restow.boxes import Run, held
from restow.planning import Prepared, plan_of
from restow.targets import Runs, Target
from restow.torch.dtypes import torch_dtype
from restow.torch.read import run_plan

CHUNK = 128 << 20  # bytes of one buffer
ALIGN = 64


class Slice(NamedTuple):
    """A tensor, or a slice of it that is contiguous in row-major order, and where in the whole its bytes begin."""

    target: Target
    offset: int


class Filled(NamedTuple):
    """A slice with its values: `tensor` is a view of a reused buffer, valid until the next chunk is asked for."""

    slice: Slice
    tensor: torch.Tensor


def slices(target: Target, limit: int) -> Iterator[Slice]:
    """A whole target cut into slices of at most `limit` bytes, each contiguous in row-major order."""
    itemsize = torch_dtype(target.dtype).itemsize
    shape = target.shape
    if prod(shape) * itemsize <= limit or not shape:
        yield Slice(target, 0)
        return
    axis = next((i for i in range(len(shape)) if prod(shape[i + 1 :]) * itemsize <= limit), len(shape) - 1)
    inner = prod(shape[axis + 1 :]) * itemsize
    step = max(1, limit // inner)
    for number, index in enumerate(product(*(range(n) for n in shape[:axis]))):
        for first in range(0, shape[axis], step):
            run: Run = (first, min(step, shape[axis] - first))
            runs: Runs = (*(((i, 1),) for i in index), (run,), *(((0, n),) for n in shape[axis + 1 :]))
            yield Slice(target._replace(runs=runs), (number * shape[axis] + first) * inner)


def grouped(parts: Iterator[Slice], limit: int) -> Iterator[list[Slice]]:
    """Slices in groups of at most `limit` bytes, a tensor in one group at most once."""
    group: list[Slice] = []
    size = 0
    for part in parts:
        more = room(part.target)
        if group and (size + more > limit or group[-1].target.name == part.target.name):
            yield group
            group, size = [], 0
        group.append(part)
        size += more
    if group:
        yield group


def room(target: Target) -> int:
    """The bytes that a target's held part takes in a buffer."""
    size = prod(held(target.runs)) * torch_dtype(target.dtype).itemsize
    return -(-size // ALIGN) * ALIGN


def fill(
    prepared: Prepared,
    group: Sequence[Slice],
    buffer: torch.Tensor,
    *,
    memory: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
) -> tuple[list[Filled], int]:
    """Fill one group in `buffer` (bytes); the filled slices, and the bytes read."""
    filled, at = [], 0
    for part in group:
        dtype = torch_dtype(part.target.dtype)
        shape = held(part.target.runs)
        size = prod(shape) * dtype.itemsize
        filled.append(Filled(part, buffer[at : at + size].view(dtype).view(shape)))
        at += room(part.target)
    plan = plan_of(prepared, {part.target.name: part.target for part in group})
    booked = run_plan(
        plan,
        {one.slice.target.name: one.tensor for one in filled},
        root=prepared.source.path,
        memory=memory,
        stamps=prepared.source.stamps,
        threads=threads,
    )
    return filled, booked.bytes_read


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in memory, no copy."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def stream(
    prepared: Prepared,
    parts: Iterator[Slice],
    hand_on: Callable[[Sequence[Filled]], None],
    *,
    memory: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    chunk: int = CHUNK,
) -> int:
    """Fill group after group and give each to `hand_on`, in order, in one other thread; the bytes read in all.

    `progress` receives the bytes filled so far. Raises what filling or `hand_on` raises, after both have stopped.
    """
    read = done = 0
    buffers: list[torch.Tensor] = []
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        try:
            for number, group in enumerate(grouped(parts, chunk)):
                need = sum(room(part.target) for part in group)
                if len(pending) == 2:
                    pending.pop(0).result()
                if len(buffers) < 2:
                    buffers.append(torch.empty(max(need, chunk), dtype=torch.uint8))
                if buffers[number % 2].numel() < need:
                    buffers[number % 2] = torch.empty(need, dtype=torch.uint8)
                filled, got = fill(prepared, group, buffers[number % 2], memory=memory, threads=threads)
                read += got
                pending.append(pool.submit(hand_on, filled))
                done += sum(one.tensor.nbytes for one in filled)
                if progress is not None:
                    progress(done)
            for future in pending:
                future.result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
    return read
