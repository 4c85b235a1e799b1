"""How a device decodes a box of codes: tiles, as strided views of codes and scales in a slot.

Each tile's values are multiplied as `coded_products` says. Integers only; nothing here touches an element.
`coded_jobs` gives None for what it does not say: codes packed across, nested scales, second scales that vary inside a
job, elements whose values are not exact in the destination's dtype, and what is too large for a slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.boxes import strides_of
from restow.coding import Coding, byte_box, jobs, scale_box, tile_of
from restow.torch.coded_products import Box, Product, products
from restow.torch.coded_seats import Seat, seat_of
from restow.torch.dtypes import torch_dtype
from restow.torch.packing import ALIGN
from restow.torch.strides import dot, even

EXACT = ("e4m3", "e5m2", "e2m1", "int4")  # elements whose values all of `INTO` hold
INTO = (torch.bfloat16, torch.float16, torch.float32)
LINE = 128  # steps of an axis: tiles are cut in whole blocks, where they can be
FOUR = 4  # bytes of a factor, and of a place in a table


class Scale(NamedTuple):
    """A box of scales in a slot: how its bits are read, how it acts, sizes, and strides in elements."""

    dtype: torch.dtype
    how: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Decode(NamedTuple):
    """What alike tiles share: elements, their dtype as values, the bytes' sizes and strides, scales, products."""

    element: str
    per: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    scales: tuple[Scale, ...]
    products: tuple[Product, ...]

    @property
    def room(self) -> tuple[int, int, int]:
        """The bytes of one tile's values, factors and places in a table."""
        count = prod(self.sizes)
        places = FOUR * count if self.per > 1 else 0
        return self.per * count * self.dtype.itemsize, FOUR * prod(self.scales[0].sizes), places


class Tile(NamedTuple):
    """A part of a job: its first byte in the seat of the codes and in those of the scales; where its values go.

    `first` is its first wanted value; `sizes`, `source`, `strides` are the box of values, in itself and in the
    destination, from element `to` of the copy's place on.
    """

    at: tuple[int, ...]
    decode: Decode
    first: int
    sizes: tuple[int, ...]
    source: tuple[int, ...]
    strides: tuple[int, ...]
    to: int


class CodedJob(NamedTuple):
    """What a plan counts as one read of codes and scales: for each of them its first byte in the part, and its seat."""

    begins: tuple[int, ...]
    seats: tuple[Seat, ...]
    tiles: tuple[Tile, ...]


@lru_cache(maxsize=4096)
def coded_jobs(
    coding: Coding,
    box: Box,
    scales: tuple[str, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...],
    room: tuple[int, int],
) -> tuple[CodedJob, ...] | None:
    """The jobs of a copy of `box` into strides of a tensor; `room` is what a slot and the scratch beside it take.

    `scales` are the dtypes of the part's scales.
    """
    acts = [grid.how for grid in coding.grids]
    if (
        coding.element not in EXACT
        or coding.apart != 1
        or dtype not in INTO
        or not 1 <= len(acts) <= 2
        or acts[0] not in ("multiply", "exponent")
        or (len(acts) > 1 and (acts[1] not in ("multiply", "divide") or scales[1] != "F32"))
    ):
        return None
    at, sizes, steps = box
    found = []
    for first, count in jobs(coding, *box):
        mine = (at + first * steps[0], (count, *sizes[1:]), steps) if sizes else box
        job = _job(coding, mine, scales, dtype, strides, first * strides[0] if sizes else 0, room[1])
        if job is None or sum(seat.need + ALIGN for seat in job.seats) > room[0]:
            return None
        found.append(job)
    return tuple(found)


def _job(
    coding: Coding,
    box: Box,
    scales: tuple[str, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...],
    to: int,
    scratch: int,
) -> CodedJob | None:
    codes = byte_box(coding, *box)
    begins, seats, lows = [codes.at], [seat_of(codes.sizes, codes.steps, 1)], []
    for number, name in enumerate(scales):
        width, grid = torch_dtype(name).itemsize, strides_of(coding.grids[number].shape)
        there = scale_box(coding, number, *box)
        lows.append([low for low, _ in there])
        begins.append(width * dot(lows[-1], grid))
        seats.append(seat_of(tuple(n for _, n in there), grid, width))
    at, sizes, steps = box
    if len(codes.sizes) > len(sizes):  # packed, and no axis runs along the packed dim
        sizes, steps, strides = (*sizes, 1), (*steps, 1), (*strides, 0)
    tiles = []
    cost = coding.per * dtype.itemsize + (FOUR if coding.per > 1 else 0)
    for place, shape in _parts(codes.sizes, max(1, scratch // FOUR // cost)):
        axes, first, some, lead = tile_of(codes, coding.per, place, shape)
        mine = at + dot(first, steps), some, tuple(steps[i] for i in axes)
        inner = [prod(shape[i + 1 :]) * coding.per for i in range(len(shape))]
        if codes.packed >= 0:
            inner[-1] = 1
        found = _factors(coding, mine, scales, seats[1:], lows, tuple(inner), lead)
        if found is None:
            return None
        held, begun, products = found
        code = seats[0].strides[len(codes.sizes) - len(shape) :]
        decode = Decode(coding.element, coding.per, dtype, shape, code, held, products)
        if sum(decode.room) + 3 * ALIGN > scratch:
            return None
        where = dot(place, seats[0].strides)
        into = tuple(strides[i] for i in axes)
        tiles.append(Tile((where, *begun), decode, lead, some, tuple(inner), into, to + dot(first, strides)))
    return CodedJob(tuple(begins), tuple(seats), tuple(tiles))


def _parts(sizes: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box as (place, sizes) of at most `limit` places, inner axes whole; the place ends with the axis that is cut."""
    if not sizes:
        yield (), ()
        return
    axis = next((i for i in range(len(sizes)) if prod(sizes[i + 1 :]) <= limit), len(sizes) - 1)
    length = even(sizes[axis], max(1, limit // prod(sizes[axis + 1 :])), LINE)
    for index in product(*(range(n) for n in sizes[:axis])):
        for first in range(0, sizes[axis], length):
            yield (*index, first), (min(length, sizes[axis] - first), *sizes[axis + 1 :])


def _factors(
    coding: Coding,
    box: Box,
    scales: tuple[str, ...],
    seats: Sequence[Seat],
    lows: Sequence[Sequence[int]],
    inner: tuple[int, ...],
    lead: int,
) -> tuple[tuple[Scale, ...], tuple[int, ...], tuple[Product, ...]] | None:
    """The scales of a tile, where they begin in their seats, and the products of its values by them."""
    at, sizes, steps = box
    long = [i for i, n in enumerate(sizes) if n > 1]
    axes = tuple(sizes[i] for i in long), tuple(steps[i] for i in long)
    held, begun, low = [], [], list[int]()
    for number, (name, seat, begin) in enumerate(zip(scales, seats, lows, strict=True)):
        there = scale_box(coding, number, at, *axes)
        how = coding.grids[number].how
        dtype = torch.float8_e8m0fnu if how == "exponent" else torch_dtype(name)
        strides = tuple(stride // dtype.itemsize for stride in seat.strides)
        held.append(Scale(dtype, how, tuple(n for _, n in there), strides))
        begun.append(sum((a - b) * s for (a, _), b, s in zip(there, begin, seat.strides, strict=True)))
        low = low or [start for start, _ in there]
        if number and prod(held[-1].sizes) != 1:
            return None
    values = tuple(inner[i] for i in long)
    made = products(coding, (at, *axes), low, held[0].sizes, values, lead)
    return None if made is None else (tuple(held), tuple(begun), made)
