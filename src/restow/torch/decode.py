"""Decoding on the way: a tile of codes, times its scales, in the destination's dtype, then moved as any other tile.

Values are looked up (256 entries for a byte of one code, or of two), multiplied in float32 by scales that are expanded
no further than rows by blocks, and rounded once. No buffer is larger than a tile; scales are read once a job. It rejects
nothing: `decoded` and the plan have done so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.boxes import strides_of
from restow.coding import Coding, byte_box, dim_of, index_of, scale_box
from restow.elements import ELEMENTS
from restow.files import SourceFile
from restow.plans import Part
from restow.reads import spans
from restow.torch.dtypes import torch_dtype
from restow.torch.nested import unnested
from restow.torch.raw import raw
from restow.torch.strides import dot, tile_axis
from restow.torch.tiles import move

TILE = 1 << 20  # elements of one tile
BLOCK = 1 << 16  # elements that are looked up and multiplied at once: they stay in a second-level cache
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Landing(NamedTuple):
    """Where decoded elements go: a tensor, the first element in storage, a stride per axis of the box."""

    tensor: torch.Tensor
    offset: int
    strides: tuple[int, ...]


class Scaling(NamedTuple):
    """The factors of a tile's rows: [rows, blocks], and how many elements of a row each block covers."""

    factors: torch.Tensor
    lengths: tuple[int, ...]


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
        grids: list[torch.Tensor] = []
        for number, scale in enumerate(scales):
            box = scale_box(coding, number, at, sizes, steps)
            grid, got = self._scale(scale, coding, number, box)
            grids.append(grid)
            read += got
        if coding.grids[0].how == "coded":
            boxes = [scale_box(coding, number, at, sizes, steps) for number in range(len(grids))]
            grids = [unnested(coding, grids, boxes, scales[-1].name)]
        origin = (at, sizes, steps)
        codes = byte_box(coding.bits, at, sizes, steps)
        if len(codes.sizes) > len(sizes):  # packed, and no axis runs along the packed one
            sizes, steps = (*sizes, 1), (*steps, 1)
            landings = [one._replace(strides=(*one.strides, 0)) for one in landings]
        source, base = self._open(part.file), part.begin + codes.at
        how = spans(codes.sizes, codes.steps, 1)
        limit = max(TILE * coding.bits // 8, codes.sizes[-1] if codes.sizes else 1)
        axis, length = tile_axis(codes.sizes, 1, how, landings[0].strides, limit)
        for index in product(*(range(n) for n in sizes[:axis])):
            for first in range(0, codes.sizes[axis] if sizes else 1, length):
                count = min(length, codes.sizes[axis] - first) if sizes else 1
                place = (*index, first)[: len(sizes)]
                shape = (count, *codes.sizes[axis + 1 :]) if sizes else ()
                tile, got = self._read(source, base + dot(place, codes.steps), shape, codes.steps[axis:], 1)
                read += got
                if sizes and not (coding.bits != 8 and axis == len(sizes) - 1):
                    shape = (count, *sizes[axis + 1 :])
                elif sizes:
                    shape = (codes.wanted,)
                begin = at + dot(place, steps)
                how_scaled = self._scaling(coding, grids, origin, begin, shape, steps[axis:])
                for dtype in {one.tensor.dtype for one in landings}:
                    values = self._decoded(coding, tile, codes.lead, shape, how_scaled, dtype)
                    for one in (one for one in landings if one.tensor.dtype == dtype):
                        to = one.offset + dot(place, one.strides)
                        move(one.tensor.as_strided(shape, one.strides[axis:], to), values)
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
    ) -> tuple[torch.Tensor, int]:
        """The needed box of a scale tensor in float32."""
        dtype, strides = torch_dtype(part.dtype), strides_of(coding.grids[number].shape)
        base = part.begin + dtype.itemsize * sum(
            low * step for (low, _), step in zip(box, strides, strict=True)
        )
        sizes = tuple(n for _, n in box)
        found, read = self._read(self._open(part.file), base, sizes, strides, dtype.itemsize)
        if coding.grids[number].how in ("coded", "offset"):
            return found.clone(), read
        if coding.grids[number].how == "exponent" or part.dtype == "F8_E8M0":
            return _looked_up(_powers(), found), read
        if dtype.itemsize == 1:
            return _looked_up(values_of("e4m3" if part.dtype == "F8_E4M3" else "e5m2"), found), read
        return found.view(dtype).to(torch.float32, copy=True), read

    def _scaling(
        self,
        coding: Coding,
        grids: Sequence[torch.Tensor],
        origin: tuple[int, tuple[int, ...], tuple[int, ...]],
        at: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
    ) -> Scaling:
        """The factors of a tile that begins at element `at` of the piece, from the job's scales."""
        rows = prod(sizes[:-1])
        found: Scaling | None = None
        for number, grid in enumerate(grids):
            low = [start for start, _ in scale_box(coding, number, *origin)]
            outer, last = _scale_places(coding, number, low, tuple(grid.shape), at, sizes, steps)
            blocks, lengths = torch.unique_consecutive(last, return_counts=True)
            places = (outer + blocks).expand(*(sizes[:-1] or (1,)), len(blocks))
            one = Scaling(
                grid.reshape(-1)[places.reshape(-1)].view(max(rows, 1), len(blocks)), tuple(lengths.tolist())
            )
            if found is None:
                found = one
                continue
            if len(one.lengths) > 1 and one.lengths != found.lengths:
                one = Scaling(one.factors.repeat_interleave(lengths, 1), ())
                every = torch.tensor(found.lengths)
                found = Scaling(found.factors.repeat_interleave(every, 1), (1,) * sum(found.lengths))
            divide = coding.grids[number].how == "divide"
            found = found._replace(
                factors=found.factors / one.factors if divide else found.factors * one.factors
            )
        assert found is not None
        return found

    def _decoded(
        self,
        coding: Coding,
        tile: torch.Tensor,
        lead: int,
        shape: tuple[int, ...],
        scaling: Scaling,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A tile of codes as values of `dtype`, in a reused buffer."""
        count = shape[-1] if shape else 1
        codes = tile.reshape(-1, tile.shape[-1] if tile.dim() else 1)
        rows, width = codes.shape
        per = 8 // coding.bits
        need = prod(shape) * dtype.itemsize
        if self._tile.numel() < need:
            self._tile = torch.empty(need, dtype=torch.uint8)
        values = self._tile[:need].view(dtype).view(rows, count)
        step = max(1, BLOCK // (width * per))
        if self._places.numel() < step * width:
            self._places = torch.empty(step * width, dtype=torch.int32)
        if self._values.numel() < step * width * per:
            self._values = torch.empty(step * width * per, dtype=torch.float32)
        table = values_of(coding.element)
        for first in range(0, rows, step):
            some = codes[first : first + step]
            places = self._places[: some.numel()]
            places.view(some.shape).copy_(some)
            flat = self._values[: some.numel() * per]
            torch.index_select(table, 0, places, out=flat.view(torch.int64) if per == 2 else flat)
            block = flat.view(len(some), width * per)[:, lead : lead + count]
            scale(block, scaling.factors[first : first + step], scaling.lengths)
            values[first : first + step].copy_(block)
        return values.view(shape)


def scale(values: torch.Tensor, factors: torch.Tensor, lengths: Sequence[int]) -> None:
    """Multiply [rows, n] in place by [rows, blocks], whose blocks cover `lengths` of a row: like ones in one go."""
    at = first = 0
    while first < len(lengths):
        length, last = lengths[first], first + 1
        while last < len(lengths) and lengths[last] == length:
            last += 1
        run = values.narrow(1, at, length * (last - first))
        shape, strides = (len(values), last - first, length), (values.stride(0), length, 1)
        run.as_strided(shape, strides).mul_(factors[:, first:last, None])
        at += length * (last - first)
        first = last


def _scale_places(
    coding: Coding,
    number: int,
    low: Sequence[int],
    shape: tuple[int, ...],
    at: int,
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a tile's scales lie in the job's box of them: by all axes but the last, and by the last, to be added."""
    places, strides, box = index_of(coding, at), strides_of(coding.shape), strides_of(shape)
    outer = torch.tensor(-sum(start * step for start, step in zip(low, box, strict=True)))
    last = torch.zeros(sizes[-1] if sizes else 1, dtype=torch.int64)
    rank = max(1, len(sizes))
    outer = outer.view((1,) * rank)
    for term in coding.grids[number].terms:
        digit = torch.tensor(places[term.dim] // term.stride % term.size).view((1,) * rank)
        runs = False
        for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            if size == 1 or dim_of(coding.shape, strides, step) != term.dim:
                continue
            local = step // strides[term.dim]
            if term.stride <= local < term.stride * term.size:
                walk = torch.arange(size) * (local // term.stride)
                digit = digit + walk.view((1,) * axis + (size,) + (1,) * (rank - axis - 1))
                runs = runs or axis == rank - 1
        step = term.step * box[term.to]
        if not runs:
            outer = outer + digit // term.divisor * step
            continue
        # Of one dim in several axes the outer ones step over whole blocks (`coded` has seen to it): they are added.
        first = digit[(0,) * (rank - 1)]
        last = last + first // term.divisor * step
        outer = outer + (digit[..., :1] - first[:1]) // term.divisor * step
    return outer, last


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
def _powers() -> torch.Tensor:
    """2 ** (byte - 127) of every byte, exact; 255 is NaN."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)


def _looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return table[codes.long()]
