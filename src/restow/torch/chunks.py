"""A planned destination in bounded pieces: each chunk is filled in a reused buffer, handed on, and forgotten.

Chunks are runs of whole tensors, or slices of one that is too large, in the order given. Two buffers let one be handed
on (written, compared, sent) while the next is filled. It rejects nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.boxes import Run, held
from restow.joining import Joined, joined
from restow.layout import axis_size
from restow.planning import plan_of
from restow.prepare import Prepared
from restow.targets import Runs, Target
from restow.torch.dtypes import torch_dtype
from restow.torch.read import Watch, run_plan
from restow.torch.threads import as_before

CHUNK = 128 << 20  # bytes of one buffer
ALIGN = 64


class Slice(NamedTuple):
    """A tensor, or a slice of it that is contiguous in row-major order, and where in the whole its bytes begin.

    `after` counts the buffer's bytes of the slices that follow and are to be filled together with this one.
    """

    target: Target
    offset: int
    after: int = 0


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


def side_by_side(prepared: Prepared, targets: Iterable[Target], limit: int) -> Iterator[Slice]:
    """The slices of all targets in their order, but those that differ in `p` alone (gate, up) next to each other.

    A source may hold both in one row. Rows that are short are read whole, and both slices want the same rows: filled
    together they are read once.
    """
    bundles: dict[object, list[Target]] = {}
    for target in targets:
        bundles.setdefault(_but_p(prepared, target), []).append(target)
    for bundle in bundles.values():
        for parts in zip(*(slices(target, limit // len(bundle)) for target in bundle), strict=True):
            rooms = [room(part.target) for part in parts]
            yield from (part._replace(after=sum(rooms[i + 1 :])) for i, part in enumerate(parts))


def _but_p(prepared: Prepared, target: Target) -> object:
    """What a target of the experts has in common with those of the other projections; its name where there are none."""
    if target.name not in prepared.owners:
        return target.name
    path, role, place = prepared.owners[target.name]
    module = prepared.modules[path]
    row = module.layout.row(role)
    if "p" not in row.name_axes:
        return target.name
    below = row.name_axes[row.name_axes.index("p") + 1 :]
    inner = prod(axis_size(row, axis, module.sizes) for axis in below)
    return path, role, place // (inner * axis_size(row, "p", module.sizes)), place % inner, target.dtype


def grouped(parts: Iterator[Slice], limit: int) -> Iterator[list[Slice]]:
    """Slices in groups of at most `limit` bytes, a tensor in one group at most once, bundles undivided."""
    group: list[Slice] = []
    names: set[str] = set()
    size = 0
    for part in parts:
        more = room(part.target)
        if group and (size + more + part.after > limit or part.target.name in names):
            yield group
            group, names, size = [], set(), 0
        group.append(part)
        names.add(part.target.name)
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
    joint: Joined | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
    watch: Watch | None = None,
) -> tuple[list[Filled], int]:
    """Fill one group in `buffer` (bytes); the filled slices, and the bytes read. Bundles that `joint` knows are one."""
    filled: list[Filled] = []
    at = 0
    whole: dict[str, tuple[Target, torch.Tensor]] = {}
    apart: dict[str, tuple[Target, torch.Tensor]] = {}
    for bundle in _bundles(group):
        target = joint.one([part.target for part in bundle]) if joint is not None else None
        if target is not None:
            tensor = _place(buffer, at, target)
            filled += [Filled(part, tensor[i]) for i, part in enumerate(bundle)]
            whole[target.name] = target, tensor
            at += room(target)
            continue
        for part in bundle:
            filled.append(Filled(part, _place(buffer, at, part.target)))
            apart[part.target.name] = part.target, filled[-1].tensor
            at += room(part.target)
    read = 0
    for known, chosen in ((joint.prepared if joint is not None else prepared, whole), (prepared, apart)):
        if chosen:
            booked = run_plan(
                plan_of(known, {name: target for name, (target, _) in chosen.items()}),
                {name: tensor for name, (_, tensor) in chosen.items()},
                root=prepared.source.path,
                memory=memory,
                stamps=prepared.source.stamps,
                threads=threads,
                watch=watch,
            )
            read += booked.bytes_read
    return filled, read


def _bundles(group: Sequence[Slice]) -> Iterator[list[Slice]]:
    bundle: list[Slice] = []
    for part in group:
        bundle.append(part)
        if not part.after:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _place(buffer: torch.Tensor, at: int, target: Target) -> torch.Tensor:
    """A target's held part in the buffer, from byte `at`."""
    dtype, shape = torch_dtype(target.dtype), held(target.runs)
    return buffer[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def stream(
    prepared: Prepared,
    parts: Iterator[Slice],
    hand_on: Callable[[Sequence[Filled]], None],
    *,
    memory: Mapping[str, torch.Tensor] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    chunk: int = CHUNK,
    watch: Watch | None = None,
) -> int:
    """Fill group after group and give each to `hand_on`, in order, in one other thread; the bytes read in all.

    `progress` receives the bytes filled so far, `watch` what `run_plan` tells it. Raises what
    filling or `hand_on` raises, after both have stopped.
    """
    read = done = 0
    buffers: list[torch.Tensor] = []
    pending: list[Future[None]] = []
    joint = joined(prepared)
    with as_before(), ThreadPoolExecutor(1) as pool:
        try:
            for number, group in enumerate(grouped(parts, chunk)):
                need = sum(room(part.target) for part in group)
                if len(pending) == 2:
                    pending.pop(0).result()
                if len(buffers) < 2:
                    buffers.append(torch.empty(max(need, chunk), dtype=torch.uint8))
                if buffers[number % 2].numel() < need:
                    buffers[number % 2] = torch.empty(need, dtype=torch.uint8)
                filled, got = fill(
                    prepared,
                    group,
                    buffers[number % 2],
                    joint=joint,
                    memory=memory,
                    threads=threads,
                    watch=watch,
                )
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
