"""A load plan run the other way: local storage into the places of the files that it would have been read from.

The inverse is not written down anywhere: the same copies, source and destination exchanged. Tiles are gathered in
the order of the file in one buffer a thread and written by position; where memory and file agree in order, memory is
written as it lies. Every element is booked, as in a load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.errors import CoverageError
from restow.plans import Copy, Plan
from restow.torch.dtypes import torch_dtype
from restow.torch.raw import raw
from restow.torch.strides import contiguous_from
from restow.torch.threads import default_threads
from restow.torch.tiles import move
from restow.torch.write_coded import coded_jobs, write_coded

TILE = 4 << 20  # bytes of one write, where the file's order lets it be cut so

Write = Callable[[str, int, memoryview], int]  # file, offset, bytes -> bytes written


class _Job(NamedTuple):
    copy: Copy
    first: int
    length: int


def write_plan(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    write: Write,
    *,
    threads: int | None = None,
    done: Callable[[int], None] | None = None,
) -> int:
    """Write what `tensors` (target name -> local tensor) hold to where the plan's copies come from; the bytes written.

    `write` is called from several threads. Raises the first error by plan order, and `CoverageError` if not every
    planned element was written.
    """
    jobs = _jobs(plan)
    lock = threading.Lock()
    errors: list[tuple[int, BaseException]] = []
    state = {"elements": 0, "bytes": 0, "number": 0}

    def take() -> tuple[int, _Job] | None:
        with lock:
            job = next(jobs, None)
            state["number"] += 1
            return None if job is None or errors else (state["number"], job)

    def work() -> None:
        torch.set_num_threads(1)
        scratch = torch.empty(0, dtype=torch.uint8)
        while (item := take()) is not None:
            number, job = item
            try:
                written, elements, scratch = _run(plan, job, tensors, write, scratch)
            except BaseException as error:
                with lock:
                    errors.append((number, error))
                return
            with lock:
                state["bytes"] += written
                state["elements"] += elements

    before = torch.get_num_threads()
    pool = [threading.Thread(target=work, daemon=True) for _ in range(threads or default_threads())]
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            while thread.is_alive():
                thread.join(0.1 if done else None)
                if done:
                    done(state["bytes"])
        if done:
            done(state["bytes"])
    except BaseException as error:
        with lock:
            errors.append((0, error))  # no job is begun any more; those that run come to their end
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        raise
    finally:
        torch.set_num_threads(before)
    if errors:
        raise min(errors, key=lambda pair: pair[0])[1]
    planned = sum(prod(plan.patterns[copy.pattern].sizes) for copy in plan.copies)
    if planned != state["elements"]:
        raise CoverageError(f"{planned} elements written, as planned", f"{state['elements']}")
    return state["bytes"]


def file_bytes(plan: Plan) -> int:
    """Bytes that writing a plan puts into the files."""
    return sum(prod(plan.patterns[copy.pattern].sizes) * plan.itemsize(copy) for copy in plan.copies)


def _jobs(plan: Plan) -> Iterator[_Job]:
    for copy in plan.copies:
        if plan.parts[copy.source].coding >= 0:
            yield from (_Job(copy, first, length) for first, length in coded_jobs(plan, copy))
            continue
        sizes = plan.patterns[copy.pattern].sizes
        inner = plan.itemsize(copy) * prod(sizes[1:])
        step = max(1, TILE // max(1, inner))
        for first in range(0, sizes[0] if sizes else 1, step):
            yield _Job(copy, first, min(step, sizes[0] - first) if sizes else 1)


def _run(
    plan: Plan, job: _Job, tensors: Mapping[str, torch.Tensor], write: Write, scratch: torch.Tensor
) -> tuple[int, int, torch.Tensor]:
    copy = job.copy
    part, pattern = plan.parts[copy.source], plan.patterns[copy.pattern]
    local = tensors[plan.targets[copy.target].name]
    sizes = (job.length, *pattern.sizes[1:]) if pattern.sizes else ()
    strides = tuple(step * local.stride(dim) for dim, step in pattern.target)
    offset = (
        local.storage_offset() + _dot(copy.start, local.stride()) + (job.first * strides[0] if strides else 0)
    )
    view = local.as_strided(sizes, strides, offset)
    if part.coding >= 0:
        return write_coded(plan, copy, job.first, view, write), prod(sizes), scratch
    dtype = torch_dtype(part.dtype)
    at = part.begin + dtype.itemsize * (copy.at + (job.first * pattern.source[0] if pattern.sizes else 0))
    if local.dtype != dtype or local.device.type != "cpu" or contiguous_from(sizes, strides) > 0:
        size = prod(sizes) * dtype.itemsize
        if scratch.numel() < size:
            scratch = torch.empty(max(size, TILE), dtype=torch.uint8)
        tile = scratch[:size].view(dtype).view(sizes)
        move(tile, view)
    else:
        tile = view
    data = raw(tile)
    run = _packed_from(sizes, pattern.source)
    block = dtype.itemsize * prod(sizes[run:])
    written = 0
    for i, index in enumerate(product(*(range(n) for n in sizes[:run]))):
        to = at + dtype.itemsize * _dot(index, pattern.source)
        written += write(part.file, to, data[i * block : (i + 1) * block])
    return written, prod(sizes), scratch


def _packed_from(sizes: Sequence[int], steps: Sequence[int]) -> int:
    """The first axis from which on the file's order is packed."""
    return contiguous_from(sizes, steps[: len(sizes)])


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(i * step for i, step in zip(index, steps, strict=False))
