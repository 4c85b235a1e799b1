"""Integer arithmetic of strided boxes: where elements really lie, how far a box is packed, how it is cut into tiles.

Nothing here touches an element. It rejects nothing: sizes, strides and steps come from a plan that was proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from operator import mul
from typing import NamedTuple

import torch

from restow.reads import GAP, Spans, spans
from restow.torch.transpose import LINE


def real_places(source: torch.Tensor, at: int, steps: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Where row-major element `at` of a tensor lies in its storage, and the real stride of each row-major step."""
    shape, real = source.shape, source.stride()
    row_major, strides = _real_steps(shape, real, tuple(steps))
    offset = int(source.storage_offset())
    for size, whole_step, stride in zip(shape, row_major, real, strict=True):
        offset += at // whole_step % max(1, size) * stride
    return offset, strides


@lru_cache(1024)  # the leaves of a state are alike
def _real_steps(
    shape: tuple[int, ...], real: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The row-major strides of a shape, and the real stride of each row-major step."""
    row_major = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    strides = []
    for step in steps:
        dim = next(
            i for i, whole in enumerate(row_major) if step >= whole and step % whole == 0 and shape[i] > 1
        )
        strides.append(step // row_major[dim] * real[dim])
    return row_major, tuple(strides)


def contiguous_from(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """The first axis from which on a destination's strides are packed."""
    axis, expected = len(sizes), 1
    while axis and strides[axis - 1] == expected:
        expected *= sizes[axis - 1]
        axis -= 1
    return axis


class Blocks(NamedTuple):
    """What lies in one piece in a file and in storage: axes before `outer` are loops of reads, each of which fills
    blocks of `size` bytes at `places` (elements, from the first)."""

    outer: int
    size: int
    places: tuple[int, ...]


@lru_cache(maxsize=64)
def in_place(
    sizes: tuple[int, ...], steps: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> Blocks | None:
    """How a box is read into its place; None where that would be runs too short to be reads of their own."""
    how, run = spans(sizes, steps, itemsize), contiguous_from(sizes, strides)
    if how.rows or (itemsize * prod(sizes[run:]) < GAP and run > how.outer):
        return None
    inner = max(run, how.outer)
    found = places(sizes[how.outer : inner], strides[how.outer : inner])
    return Blocks(how.outer, itemsize * prod(sizes[inner:]), tuple(found))


def tile_axis(
    sizes: Sequence[int], itemsize: int, how: Spans, strides: Sequence[int], limit: int
) -> tuple[int, int]:
    """Which axis tiles are cut along, and how long they are: inner axes whole, at most `limit` bytes."""
    if not sizes:
        return 0, 1
    if how.rows:
        return how.outer, how.rows
    for axis in range(len(sizes)):
        inner = itemsize * prod(sizes[axis + 1 :])
        if inner <= limit or axis == len(sizes) - 1:
            line = LINE // itemsize if strides[axis] == 1 else 1
            return axis, even(sizes[axis], limit // inner, line)
    raise AssertionError("sizes are not empty")


def even(size: int, limit: int, line: int) -> int:
    """The length of parts of at most `limit` that `size` is cut into: like ones, in whole lines where one fits."""
    if size <= limit:
        return size
    limit = max(1, limit - limit % line if limit >= line else limit)
    length = -(-size // -(-size // limit))
    return -(-length // line) * line if limit >= line else length


def places(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [dot(index, strides) for index in product(*(range(n) for n in sizes))]


def dot(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(map(mul, index, steps))
