"""Integer arithmetic of boxes: a run of a grouped dim as boxes of its axes, and the proof of exact cover.

A `Run` is (start, length) along a dim or an axis. A `Box` says which part of each axis a piece of storage holds, and
where it lies there. It rejects nothing: callers hand in sizes and runs that were checked. No tensors, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from restow.layout import Sizes, axis_size
from restow.notation import Row

Run = tuple[int, int]  # start, length


class Box(NamedTuple):
    """A product of axis runs inside one stored tensor (or one local part of it).

    `axes` names the axes, slowest in storage first; `runs` is the global run of each. `start` is where the box's first
    element lies, per dim of the local storage; `steps` gives (dim, step) per axis: one step along the axis moves
    `step` places along `dim`.
    """

    axes: tuple[str, ...]
    runs: tuple[Run, ...]
    start: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]


@lru_cache(maxsize=4096)
def split_run(sizes: tuple[int, ...], start: int, length: int) -> tuple[tuple[Run, ...], ...]:
    """A run of a flattened group as boxes over its factors (left slowest), in order; at most 2 n - 1 of them.

    >>> split_run((2, 3), 1, 4)
    (((0, 1), (1, 2)), ((1, 1), (0, 2)))
    """
    if length <= 0:
        return ()
    if len(sizes) == 1:
        return (((start, length),),)
    inner = 1
    for size in sizes[1:]:
        inner *= size
    first, last = start // inner, (start + length - 1) // inner
    if first == last:
        return tuple(((first, 1), *box) for box in split_run(sizes[1:], start - first * inner, length))
    boxes: list[tuple[Run, ...]] = []
    head, tail = start - first * inner, start + length - last * inner
    whole_from = first + (head > 0)
    whole_to = last + (tail == inner)
    if head:
        boxes += [((first, 1), *box) for box in split_run(sizes[1:], head, inner - head)]
    if whole_to > whole_from:
        boxes.append(((whole_from, whole_to - whole_from), *((0, size) for size in sizes[1:])))
    if tail != inner:
        boxes += [((last, 1), *box) for box in split_run(sizes[1:], 0, tail)]
    return tuple(boxes)


def boxes_of(row: Row, sizes: Sizes, runs: Sequence[Sequence[Run]]) -> tuple[Box, ...]:
    """The boxes of one stored tensor of `row` of which `runs` (per dim) are held, one after another, locally."""
    per_dim: list[list[tuple[tuple[str, ...], tuple[Run, ...], int, tuple[int, ...]]]] = []
    for dim, dim_runs in zip(row.dims, runs, strict=True):
        keys = dim.keys
        lengths = tuple(axis_size(row, key, sizes) for key in keys)
        strides = _strides(lengths)
        local, parts = 0, []
        for start, length in dim_runs:
            for box in split_run(lengths, start, length):
                flat = sum(run[0] * stride for run, stride in zip(box, strides, strict=True))
                parts.append((keys, box, local + flat - start, strides))
            local += length
        per_dim.append(parts)
    found = []
    for choice in product(*per_dim):
        axes = tuple(key for keys, *_ in choice for key in keys)
        axis_runs = tuple(run for _, box, *_ in choice for run in box)
        steps = tuple((i, step) for i, (*_, strides) in enumerate(choice) for step in strides)
        found.append(Box(axes, axis_runs, tuple(at for *_, at, _ in choice), steps))
    return tuple(found)


def whole(shape: Sequence[int]) -> tuple[tuple[Run, ...], ...]:
    """The runs per dim of a tensor that is held whole."""
    return tuple(((0, length),) for length in shape)


def held(runs: Sequence[Sequence[Run]]) -> tuple[int, ...]:
    """The local shape that runs per dim give."""
    return tuple(sum(length for _, length in dim_runs) for dim_runs in runs)


def _strides(lengths: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(lengths):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major element strides of a shape."""
    return _strides(shape)


def overlap(boxes: Sequence[tuple[Run, ...]]) -> tuple[int, int] | None:
    """Two boxes (by position) that share an element, or None: a sweep along the dim that cuts best.

    Regular grids, which nearly all plans are, are settled by their cells: where on each dim the distinct runs do not
    cut each other, different cells are disjoint.
    """
    if len(boxes) < 2:
        return None
    seen: dict[tuple[Run, ...], int] = {}
    for i, box in enumerate(boxes):
        if box in seen:
            return seen[box], i
        seen[box] = i
    rank = len(boxes[0])
    cut = []
    for dim in range(rank):
        runs = sorted({box[dim] for box in boxes})
        if any(a[0] + a[1] > b[0] for a, b in pairwise(runs)):
            cut.append(dim)
    if not cut:
        return None
    dim = max(range(rank), key=lambda k: len({box[k][0] for box in boxes}))
    order = sorted(range(len(boxes)), key=lambda i: boxes[i][dim][0])
    active: list[int] = []
    for i in order:
        start = boxes[i][dim][0]
        active = [j for j in active if sum(boxes[j][dim]) > start]
        for j in active:
            if all(
                a[0] < b[0] + b[1] and b[0] < a[0] + a[1] for a, b in zip(boxes[i], boxes[j], strict=True)
            ):
                return min(i, j), max(i, j)
        active.append(i)
    return None
