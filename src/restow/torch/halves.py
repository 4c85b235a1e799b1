"""Codes packed along an axis that is not the last: a byte's halves are elements of two neighbouring rows.

Each half is looked up by itself, a band of rows that stay in the cache, and lands in every other row of the tile. It
rejects nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from restow.torch.scaling import Scaling

BLOCK = 1 << 16  # bytes that are looked up at once


class Shape(NamedTuple):
    """A tile: `outer` stacks of `rows` elements along the packed axis, each of `middle` x `inner` elements.

    `lead` elements of the first byte of a stack are not wanted.
    """

    outer: int
    rows: int
    middle: int
    inner: int
    lead: int


class Room(NamedTuple):
    """Buffers for a band, of `BLOCK` places at least, or of a row of bytes where that is longer."""

    places: torch.Tensor
    values: torch.Tensor


def decode_halves(
    codes: torch.Tensor,
    shape: Shape,
    scaling: Scaling,
    tables: tuple[torch.Tensor, torch.Tensor],
    into: torch.Tensor,
    room: Room,
) -> None:
    """Decode packed `codes` into `into` (contiguous, in the tile's order); `tables` give a byte's value, half by half."""
    assert scaling.alike is not None
    width = shape.middle * shape.inner
    stacks = codes.reshape(shape.outer, -1, width)
    values = into.view(shape.outer, shape.rows, shape.middle, shape.inner)
    alike = scaling.alike.view(shape.outer, shape.rows, shape.middle)
    factors = scaling.factors
    if 1 < len(scaling.lengths) < shape.inner:
        factors = factors.repeat_interleave(torch.tensor(scaling.lengths), 1)
    step = max(1, BLOCK // width)
    for number, stack in enumerate(stacks):
        for first in range(0, len(stack), step):
            some = stack[first : first + step]
            places = room.places[: some.numel()]
            places.view(some.shape).copy_(some)
            for half, table in enumerate(tables):
                row = 2 * first + half - shape.lead  # of the band's first byte
                skip = int(row < 0)
                count = min(len(some), (shape.rows - row + 1) // 2) - skip
                if count <= 0:
                    continue
                found = room.values[: count * width]
                torch.index_select(table, 0, places[skip * width : (skip + count) * width], out=found)
                rows = slice(row + 2 * skip, row + 2 * (skip + count) - 1, 2)
                scales = factors.index_select(0, alike[number, rows].reshape(-1))
                found.view(count * shape.middle, shape.inner).mul_(scales)
                values[number, rows].copy_(found.view(count, shape.middle, shape.inner))
