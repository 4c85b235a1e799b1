"""Elements times the scales that belong to them, as products in which each axis has one stride in either.

A scale's place follows from an element's by divisions; an axis that is cut where they step has them as strides, so that a
device multiplies whole experts in one launch, without a table of places. Integers only. `products` gives None for a
box that would take too many launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from restow.boxes import strides_of
from restow.coding import Coding, Term, dim_of, index_of
from restow.torch.strides import dot

PRODUCTS = 64  # launches that a tile is worth at most

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # first element, sizes, steps
Segment = tuple[int, int, int, int]  # first, blocks, length of one, quotient of the first


class Product(NamedTuple):
    """Elements times factors: sizes, strides of both in elements, the first of both."""

    sizes: tuple[int, ...]
    values: tuple[int, ...]
    factors: tuple[int, ...]
    at: int
    factor: int


class _Digit(NamedTuple):
    """A term that does not step evenly along an axis: its digit where the box begins, and how many a step is worth."""

    term: Term
    digit: int
    each: int = 0


class _Steps(NamedTuple):
    """How a box's axes step in the factors. Each `cut` axis has one uneven term; those of `loops` have terms whose steps
    another axis cuts too, and are gone through place by place."""

    along: tuple[int, ...]  # by axis: how far a step goes by the terms that step evenly
    cut: Mapping[int, _Digit]
    loops: Mapping[int, Sequence[_Digit]]
    fixed: Sequence[_Digit]  # terms that step only as loops do
    grid: tuple[int, ...]  # the strides of the factors

    def quotient(self, one: _Digit) -> int:
        """How far a term's quotient goes in the factors."""
        return one.digit // one.term.divisor * self.unit(one)

    def unit(self, one: _Digit) -> int:
        return one.term.step * self.grid[one.term.to]

    def at(self, one: _Digit, loop: Mapping[int, int]) -> _Digit:
        """A term where the loops stand."""
        more = (i * d.each for axis, i in loop.items() for d in self.loops[axis] if d.term is one.term)
        return one._replace(digit=one.digit + sum(more))


def products(
    coding: Coding, box: Box, low: Sequence[int], shape: tuple[int, ...], values: tuple[int, ...], lead: int
) -> tuple[Product, ...] | None:
    """A tile's values, strided by `values` from `lead` on, times factors of `shape` that begin at `low`."""
    sizes = box[1]
    how = _steps(coding, box, shape)
    if how is None or prod(sizes[axis] for axis in how.loops) > PRODUCTS:
        return None
    first = -dot(low, how.grid)
    found = []
    for index in product(*(range(sizes[axis]) for axis in how.loops)):
        loop = dict(zip(how.loops, index, strict=True))
        value = lead + sum(i * values[axis] for axis, i in loop.items())
        factor = first + sum(i * how.along[axis] for axis, i in loop.items())
        factor += sum(how.quotient(how.at(one, loop)) for one in how.fixed)
        cut = {axis: how.at(one, loop) for axis, one in how.cut.items()}
        pieces = [_segments(sizes[axis], d.term.divisor, d.each, d.digit) for axis, d in cut.items()]
        whole = [axis for axis in range(len(sizes)) if axis not in loop]
        for segments in product(*pieces):
            chosen = dict(zip(cut, segments, strict=True))
            found.append(_product(sizes, values, how, whole, chosen, (value, factor)))
    return tuple(found) if len(found) <= PRODUCTS else None


def _steps(coding: Coding, box: Box, shape: tuple[int, ...]) -> _Steps | None:
    """How the axes of a box step in factors of `shape`; None where an axis is cut by two terms."""
    at, sizes, steps = box
    places, strides, grid = index_of(coding, at), strides_of(coding.shape), strides_of(shape)
    along = [0] * len(sizes)
    cut: dict[int, _Digit] = {}
    loops: dict[int, list[_Digit]] = {}
    fixed: list[_Digit] = []
    for term in coding.grids[0].terms:
        digit = places[term.dim] // term.stride % term.size
        uneven = []
        for axis, step in enumerate(steps):
            local = step // strides[term.dim]
            here = dim_of(coding.shape, strides, step) == term.dim
            if not here or not term.stride <= local < term.stride * term.size:
                continue
            each = local // term.stride
            if each % term.divisor == 0:
                along[axis] += each // term.divisor * term.step * grid[term.to]
            else:
                uneven.append((axis, each))
        whole = (one for one in uneven if term.divisor % one[1] == 0)
        main = max(whole, key=lambda one: sizes[one[0]], default=None)
        for axis, each in uneven:
            if (axis, each) != main:
                loops.setdefault(axis, []).append(_Digit(term, digit, each))
        if main is None:
            fixed.append(_Digit(term, digit))
        elif main[0] in cut:
            return None
        else:
            cut[main[0]] = _Digit(term, digit, main[1])
    return None if cut.keys() & loops.keys() else _Steps(tuple(along), cut, loops, fixed, grid)


def _product(
    sizes: Sequence[int], values: Sequence[int], how: _Steps, axes: Sequence[int],
    chosen: Mapping[int, Segment], begin: tuple[int, int],
) -> Product:  # fmt: skip
    """The product of one segment of every axis that is cut; `axes` are those that are gone through as a whole."""
    value, factor = begin
    dims: list[tuple[int, int, int]] = []
    for axis in axes:
        far, by = values[axis], how.along[axis]
        if axis not in chosen:
            dims.append((sizes[axis], far, by))
            continue
        start, blocks, length, quotient = chosen[axis]
        unit = how.unit(how.cut[axis])
        value += start * far
        factor += start * by + quotient * unit
        dims += [(blocks, length * far, length * by + unit), (length, far, by)]
    dims = [dim for dim in dims if dim[0] != 1]
    count, far_of, by_of = (tuple(dim[i] for dim in dims) for i in range(3))
    return Product(count, far_of, by_of, value, factor)


def _segments(size: int, divisor: int, each: int, digit: int) -> list[Segment]:
    """The segments of an axis whose digits step by `each`: runs of whole blocks, and what lies before and after them.

    >>> _segments(300, 128, 1, 100)
    [(0, 1, 28, 0), (28, 2, 128, 1), (284, 1, 16, 3)]
    """
    length, over = divisor // each, digit % divisor
    head = 0 if over < each else min(size, -(-(divisor - over) // each))
    found = [(0, 1, head, digit // divisor)] if head else []
    quotient, blocks = (digit + head * each) // divisor, (size - head) // length
    if blocks:
        found.append((head, blocks, length, quotient))
    if tail := size - head - blocks * length:
        found.append((head + blocks * length, 1, tail, quotient + blocks))
    return found
