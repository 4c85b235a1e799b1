"""Which bytes stand for a box of coded elements: the codes' own, and the part of every scale that they need.

Integers only, for the plan that counts and the executor that reads alike. Elements are counted in the row-major order of
the decoded tensor; packed ones lie low nibble first, which in little-endian words of any width is the order of their
bits. Those that share a byte are neighbours along one dim, the last or another (`Coding.apart`). A scale's place follows
from an element's place, dim by dim (`Term`), never from a ratio of shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from restow.boxes import strides_of
from restow.reads import read_bytes

JOB = 8 << 20  # bytes of codes in one job, where its outermost axis lets it be cut


class Term(NamedTuple):
    """The digit of `dim` with `stride` and `size` there, divided by `divisor`, counts `step` places of `to`."""

    dim: int
    stride: int
    size: int
    divisor: int
    to: int
    step: int


class Grid(NamedTuple):
    """How a scale is found and acts: a word of the table of codecs; the scale tensor's shape; and its terms."""

    how: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]


class Coding(NamedTuple):
    """A part's codes: what their bits mean, the decoded shape of the piece, where in the whole it begins, its scales.

    Elements that share a byte lie `apart` elements from each other: 1 where they are packed along the last dim, else the
    stride of the dim that they are packed along.
    """

    codec: str
    element: str
    bits: int
    shape: tuple[int, ...]
    start: tuple[int, ...]
    grids: tuple[Grid, ...]
    apart: int = 1

    @property
    def per(self) -> int:
        """Elements in a byte."""
        return 8 // self.bits


class Bytes(NamedTuple):
    """A box of codes as bytes of the part: from byte `at`, sizes and steps.

    Where elements have fewer than 8 bits, axis number `packed` counts bytes: `wanted` elements of each run, but for the
    first `lead`.
    """

    at: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    packed: int = -1
    lead: int = 0
    wanted: int = 0


def byte_box(coding: Coding, at: int, sizes: Sequence[int], steps: Sequence[int]) -> Bytes:
    """The bytes of a box of elements; one more axis where none of the box runs along the packed dim."""
    per, apart = coding.per, coding.apart
    if per == 1:
        return Bytes(at, tuple(sizes), tuple(steps))
    number, beside = divmod(at, apart)
    lead = number % per
    outer = sum(step > apart for step in steps)
    inner = outer < len(steps) and steps[outer] == apart
    count = sizes[outer] if inner else 1
    run = -(-(lead + count) // per)
    rest = slice(outer + inner, None)
    return Bytes(
        number // per * apart + beside,
        (*sizes[:outer], run, *sizes[rest]),
        (*(step // per for step in steps[:outer]), apart, *steps[rest]),
        outer,
        lead,
        count,
    )


class Tile(NamedTuple):
    """A part of a box of codes in elements: the axes of the box that it has, its first place along every axis of the
    box, its sizes; `lead` elements of the first byte of a run are not wanted."""

    axes: tuple[int, ...]
    place: tuple[int, ...]
    sizes: tuple[int, ...]
    lead: int


def tile_of(codes: Bytes, per: int, place: tuple[int, ...], sizes: tuple[int, ...]) -> Tile:
    """The tile of a part of a box of bytes: from `place`, which ends with the axis that tiles are cut along, on.

    One more axis where all its bytes are of one place along the packed one.
    """
    axis, packed = max(0, len(place) - 1), codes.packed
    axes = tuple(range(axis, axis + len(sizes)))
    if packed < 0:
        return Tile(axes, place, sizes, 0)
    if packed < axis:
        axes, sizes = (packed, *axes), (1, *sizes)
    byte, at = (place[packed] if packed <= axis else 0), axes.index(packed)
    begin = max(0, per * byte - codes.lead)
    end = min(codes.wanted, per * (byte + sizes[at]) - codes.lead)
    if packed <= axis:
        place = (*place[:packed], begin, *place[packed + 1 :])
    return Tile(axes, place, (*sizes[:at], end - begin, *sizes[at + 1 :]), begin + codes.lead - per * byte)


@lru_cache(maxsize=4096)
def scale_box(
    coding: Coding, number: int, at: int, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The (start, length) per dim of a scale that a box of elements needs; dims that no term counts are taken whole."""
    grid = coding.grids[number]
    box = [[0, 0] for _ in grid.shape]
    places = index_of(coding, at)
    strides = strides_of(coding.shape)
    for term in grid.terms:
        low = places[term.dim] // term.stride % term.size
        high = low
        for size, step in zip(sizes, steps, strict=True):
            if dim_of(coding.shape, strides, step) == term.dim:
                local = step // strides[term.dim]
                if term.stride <= local < term.stride * term.size:
                    high += (size - 1) * (local // term.stride)
        box[term.to][0] += low // term.divisor * term.step
        box[term.to][1] += high // term.divisor * term.step
    counted = {term.to for term in grid.terms}
    return tuple(
        (low, high - low + 1) if dim in counted else (0, grid.shape[dim])
        for dim, (low, high) in enumerate(box)
    )


def index_of(coding: Coding, at: int) -> tuple[int, ...]:
    """The place in the whole decoded tensor, per dim, of element `at` of the piece."""
    places = []
    for stride, start in zip(strides_of(coding.shape), coding.start, strict=True):
        places.append(at // stride + start)
        at %= stride
    return tuple(places)


def dim_of(shape: Sequence[int], strides: Sequence[int], step: int) -> int:
    """Which dim of a row-major tensor an axis that steps by `step` elements runs along."""
    return next(
        i for i, stride in enumerate(strides) if shape[i] > 1 and step >= stride and step % stride == 0
    )


def jobs(
    coding: Coding, at: int, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """The (first, count) slices of a box along its outermost axis, each a job of its own with its own scales."""
    if not sizes:
        yield 0, 1
        return
    inner = max(1, prod(sizes[1:]) * coding.bits // 8)
    step = max(1, JOB // inner) if len(sizes) > 1 else sizes[0]
    if step < sizes[0]:  # whole blocks: what two jobs need, a scale or a byte of two codes, is read twice
        step -= step % next((n for n in (128, 16, 2) if step > n), 1)
    for first in range(0, sizes[0], step):
        yield first, min(step, sizes[0] - first)


def coded_bytes(
    coding: Coding, widths: Sequence[int], at: int, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> int:
    """The bytes read for a box: codes and scales (of `widths` bytes an element), job by job."""
    total = 0
    for first, count in jobs(coding, at, sizes, steps):
        begin = at + (first * steps[0] if sizes else 0)
        part = (count, *sizes[1:]) if sizes else ()
        total += _job_bytes(coding, tuple(widths), begin, part, steps)
    return total


@lru_cache(maxsize=4096)
def _job_bytes(
    coding: Coding, widths: tuple[int, ...], at: int, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> int:
    codes = byte_box(coding, at, sizes, steps)
    total = read_bytes(codes.sizes, codes.steps, 1)
    for number, width in enumerate(widths):
        box = scale_box(coding, number, at, sizes, steps)
        total += read_bytes(tuple(n for _, n in box), strides_of(coding.grids[number].shape), width)
    return total
