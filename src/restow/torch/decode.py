"""Decoding on the way: a tile of codes, times its scales, in the destination's dtype, then moved as any other tile.

Values are looked up (256 entries for a byte of one code, or of two), multiplied in float32 by scales that are expanded
no further than rows by blocks, and rounded once. No buffer is larger than a tile; scales are read once a job. It rejects
nothing: `decoded` and the plan have done so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby, product
from math import prod
from typing import NamedTuple

import torch

from restow.boxes import strides_of
from restow.coding import Coding, byte_box, scale_box, tile_of
from restow.elements import ELEMENTS
from restow.files import SourceFile
from restow.plans import Part
from restow.reads import spans
from restow.torch.dtypes import torch_dtype
from restow.torch.halves import BLOCK as BYTES
from restow.torch.halves import Room, Shape, decode_halves
from restow.torch.nested import unnested
from restow.torch.raw import raw
from restow.torch.scaling import Held, Scaling, scale, scaling
from restow.torch.strides import dot, tile_axis
from restow.torch.tiles import move

TILE = 2 << 20  # bytes of values of one tile: the buffers of 8 threads stay within the window
BLOCK = 1 << 16  # elements that are looked up and multiplied at once: they stay in a second-level cache
SHARED = 1024  # elements to a scale from which on a table of 256 values for it is worth its making
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Landing(NamedTuple):
    """Where decoded elements go: a tensor, the first element in storage, a stride per axis of the box."""

    tensor: torch.Tensor
    offset: int
    strides: tuple[int, ...]


class Decoder:
    """One thread's buffers for decoding; `open_file` gives a source file by its name."""

    def __init__(self, open_file: Callable[[str], SourceFile]) -> None:
        self._open = open_file
        self._codes = self._tile = torch.empty(0, dtype=torch.uint8)
        self._places = torch.empty(0, dtype=torch.int32)
        self._values = torch.empty(0, dtype=torch.float32)

    def run(
        self,
        coding: Coding,
        part: Part,
        scales: Sequence[Part],
        at: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
        landings: Sequence[Landing],
    ) -> int:
        """Read, decode and move one box of elements; the bytes read, scales included."""
        read = 0
        held: list[Held] = []
        boxes = [scale_box(coding, number, at, sizes, steps) for number in range(len(scales))]
        for number, companion in enumerate(scales):
            grid, got = self._scale(companion, coding, number, boxes[number])
            held.append(grid)
            read += got
        if coding.grids[0].how == "coded":
            held = [Held(unnested(coding, [grid.scales for grid in held], boxes, scales[-1].name))]
        origin = (at, sizes, steps)
        codes = byte_box(coding, at, sizes, steps)
        packed = codes.packed
        if len(codes.sizes) > len(sizes):  # packed, and no axis runs along the packed dim
            sizes, steps = _put(sizes, packed, 1), _put(steps, packed, coding.apart)
            landings = [one._replace(strides=_put(one.strides, packed, 0)) for one in landings]
        source, base = self._open(part.file), part.begin + codes.at
        how = spans(codes.sizes, codes.steps, 1)
        width = max(one.tensor.element_size() for one in landings)
        limit = max(TILE // (width * coding.per), codes.sizes[-1] if codes.sizes else 1)
        axis, length = tile_axis(codes.sizes, 1, how, landings[0].strides, limit)
        for index in product(*(range(n) for n in codes.sizes[:axis])):
            for first in range(0, codes.sizes[axis] if sizes else 1, length):
                count = min(length, codes.sizes[axis] - first) if sizes else 1
                place = (*index, first)[: len(sizes)]
                shape = (count, *codes.sizes[axis + 1 :]) if sizes else ()
                tile, got = self._read(source, base + dot(place, codes.steps), shape, codes.steps[axis:], 1)
                read += got
                axes, place, shape, lead = tile_of(codes, coding.per, place, shape)
                across = packed >= 0 and axes[-1] != packed
                box = (at + dot(place, steps), shape, tuple(steps[i] for i in axes))
                scaled = scaling(coding, held, origin, box, across or coding.per == 1)
                for dtype in {one.tensor.dtype for one in landings}:
                    if coding.per == 1 and scaled.factors.numel() * SHARED <= prod(shape):
                        values = self._by_table(coding, tile, shape, scaled, dtype)
                    elif across:
                        values = self._across(coding, tile, lead, shape, axes.index(packed), scaled, dtype)
                    else:
                        values = self._decoded(coding, tile, lead, shape, scaled, dtype)
                    for one in (one for one in landings if one.tensor.dtype == dtype):
                        strides = [one.strides[i] for i in axes]
                        to = one.offset + dot(place, one.strides)
                        move(one.tensor.as_strided(shape, strides, to), values)
        return read

    def _read(
        self, source: SourceFile, base: int, sizes: tuple[int, ...], steps: tuple[int, ...], width: int
    ) -> tuple[torch.Tensor, int]:
        """A box of a file as a packed tensor of integers, in a reused buffer; gaps as `reads` says."""
        how = spans(sizes, steps, width)
        size = prod(sizes) * width
        span = ((how.rows - 1) * steps[how.outer] * width + how.run) if how.rows else 0
        need = -(-size // 8) * 8 + span
        if self._codes.numel() < need:
            self._codes = torch.empty(need, dtype=torch.uint8)
        packed = self._codes[:size].view(_INTS[width]).view(sizes)
        if not how.rows:
            view, run = raw(self._codes), width * prod(sizes[how.outer :])
            read = 0
            for i, index in enumerate(product(*(range(n) for n in sizes[: how.outer]))):
                read += source.preadv(base + width * dot(index, steps), [view[i * run : (i + 1) * run]])
            return packed, read
        gaps = self._codes[need - span :]
        read = 0
        for index in product(*(range(n) for n in sizes[: how.outer])):
            for first in range(0, sizes[how.outer], how.rows):
                count = min(how.rows, sizes[how.outer] - first)
                taken = (count - 1) * steps[how.outer] * width + how.run
                read += source.preadv(base + width * dot((*index, first), steps), [raw(gaps[:taken])])
                loose = gaps[: -(-taken // width) * width].view(_INTS[width])
                inner = loose.as_strided(
                    (count, *sizes[how.outer + 1 :]), steps[how.outer :], loose.storage_offset()
                )
                packed[index].narrow(0, first, count).copy_(inner)
        return packed, read

    def _scale(
        self, part: Part, coding: Coding, number: int, box: tuple[tuple[int, int], ...]
    ) -> tuple[Held, int]:
        """The needed box of a scale tensor."""
        dtype, strides = torch_dtype(part.dtype), strides_of(coding.grids[number].shape)
        base = part.begin + dtype.itemsize * sum(
            low * step for (low, _), step in zip(box, strides, strict=True)
        )
        sizes = tuple(n for _, n in box)
        found, read = self._read(self._open(part.file), base, sizes, strides, dtype.itemsize)
        how = coding.grids[number].how
        if how in ("coded", "offset"):
            return Held(found.clone()), read
        if how == "exponent" or part.dtype == "F8_E8M0":
            return Held(found.clone(), _powers()), read
        if dtype.itemsize == 1:
            return Held(found.clone(), values_of("e4m3" if part.dtype == "F8_E4M3" else "e5m2")), read
        return Held(found.view(dtype).to(torch.float32, copy=True)), read

    def _by_table(
        self, coding: Coding, tile: torch.Tensor, shape: tuple[int, ...], scaled: Scaling, dtype: torch.dtype
    ) -> torch.Tensor:
        """A tile of codes of 8 bits: a table of all values for each scale, rounded once, and one look-up an element."""
        assert scaled.alike is not None
        count = shape[-1] if shape else 1
        codes = tile.reshape(-1, count)
        values = self._room(prod(shape), dtype).view(-1)
        tables = (scaled.factors[:, :, None] * values_of(coding.element)).to(dtype).view(-1)
        blocks = len(scaled.lengths)
        firsts = torch.arange(scaled.factors.numel(), dtype=torch.int32).mul_(256).view(-1, blocks)
        # Of rows that share their scales one row of offsets, so that each band takes few calls of the interpreter.
        shifts = firsts.repeat_interleave(torch.tensor(scaled.lengths), 1).unbind(0)
        step, end = max(1, BLOCK // count), 0
        self._grow(step * count, 0)
        for which, alike in groupby(scaled.alike.tolist()):
            begin, end = end, end + sum(1 for _ in alike)
            for first in range(begin, end, step):
                some = codes[first : min(first + step, end)]
                places = self._places[: some.numel()]
                torch.add(some, shifts[which], out=places.view(some.shape))
                out = values[first * count : first * count + some.numel()]
                torch.index_select(tables, 0, places, out=out)
        return values.view(shape)

    def _decoded(
        self,
        coding: Coding,
        tile: torch.Tensor,
        lead: int,
        shape: tuple[int, ...],
        scaled: Scaling,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A tile of codes as values of `dtype`, in a reused buffer."""
        count = shape[-1] if shape else 1
        codes = tile.reshape(-1, tile.shape[-1] if tile.dim() else 1)
        rows, width = codes.shape
        per = coding.per
        values = self._room(prod(shape), dtype).view(rows, count)
        step = max(1, BLOCK // (width * per))
        self._grow(step * width, step * width * per)
        table = values_of(coding.element)
        for first in range(0, rows, step):
            some = codes[first : first + step]
            places = self._places[: some.numel()]
            places.view(some.shape).copy_(some)
            flat = self._values[: some.numel() * per]
            torch.index_select(table, 0, places, out=flat.view(torch.int64) if per == 2 else flat)
            block = flat.view(len(some), width * per)[:, lead : lead + count]
            band = slice(first, first + step)
            factors = scaled.factors
            factors = factors[band] if scaled.alike is None else factors.index_select(0, scaled.alike[band])
            scale(block, factors, scaled.lengths)
            values[first : first + step].copy_(block)
        return values.view(shape)

    def _across(
        self,
        coding: Coding,
        tile: torch.Tensor,
        lead: int,
        shape: tuple[int, ...],
        packed: int,
        scaled: Scaling,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """As `_decoded`, where bytes hold neighbours along axis `packed`, which is not the last."""
        values = self._room(prod(shape), dtype)
        sizes = Shape(prod(shape[:packed]), shape[packed], prod(shape[packed + 1 : -1]), shape[-1], lead)
        band = max(BYTES, sizes.middle * sizes.inner)
        self._grow(band, band)
        room = Room(self._places, self._values)
        decode_halves(tile, sizes, scaled, halves_of(coding.element), values, room)
        return values.view(shape)

    def _grow(self, places: int, values: int) -> None:
        if self._places.numel() < places:
            self._places = torch.empty(places, dtype=torch.int32)
        if self._values.numel() < values:
            self._values = torch.empty(values, dtype=torch.float32)

    def _room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A reused buffer for that many values."""
        need = count * dtype.itemsize
        if self._tile.numel() < need:
            self._tile = torch.empty(need, dtype=torch.uint8)
        return self._tile[:need].view(dtype)


@cache
def values_of(element: str) -> torch.Tensor:
    """The value of every byte: one code's in float32, or two codes' side by side as one 64-bit integer."""
    codes = torch.arange(256, dtype=torch.uint8)
    if element in ("e4m3", "e5m2"):
        return codes.view(torch.float8_e4m3fn if element == "e4m3" else torch.float8_e5m2).to(torch.float32)
    values, high = torch.tensor(ELEMENTS[element].values, dtype=torch.float32), ELEMENTS[element].high
    halves = [values[(codes & 15).long()], values[(codes >> 4).long()]]
    pairs = torch.stack(halves[::-1] if high else halves, 1)
    return pairs.contiguous().view(torch.int64).reshape(-1)


@cache
def halves_of(element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of both halves of every byte, apart."""
    first, second = values_of(element).view(torch.float32).view(-1, 2).T.contiguous()
    return first, second


@cache
def _powers() -> torch.Tensor:
    """2 ** (byte - 127) of every byte, exact; 255 is NaN."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)


def _put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at:])
