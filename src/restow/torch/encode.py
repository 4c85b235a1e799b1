"""Encoding: blocks of values into codes and a scale each, by the table that decoding reads.

A block's scale is the least by which its largest value is an element: `largest / M`, as it is where scales multiply,
rounded up to a power of two where they are exponents; a block of zeros has scale 1. A value's code is the element
nearest to value / scale. Values that decoding gave back are given back again. Rejected are values that are none
(`NonFiniteError`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import NamedTuple

import torch

from restow.elements import ELEMENTS
from restow.errors import NonFiniteError, show
from restow.torch.dtypes import torch_dtype

BAND = 1 << 18  # elements that are encoded at once: they and what is made of them stay in a cache
TINY = torch.finfo(torch.float32).tiny  # a smaller scale has a reciprocal beyond float32
_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Encoded(NamedTuple):
    """The codes of some values, as bytes in their row-major order, and a scale per block: one dim for each of the
    values'."""

    codes: torch.Tensor
    scales: torch.Tensor


def encode(
    values: torch.Tensor,
    blocks: Sequence[int],
    element: str,
    scale_dtype: str,
    *,
    name: str = "",
    pool: ThreadPoolExecutor | None = None,
) -> Encoded:
    """Float32 `values`, whose first element begins a block, in `element`s with a scale of `scale_dtype` per block.

    The last block along a dim may be short. `name` is what an error says; `pool` encodes bands at once.
    """
    if not values.dim():
        return encode(values.reshape(1), (1,), element, scale_dtype, name=name)
    bits = 8 if element in _FLOATS else 4
    grid = tuple(-(-n // block) for n, block in zip(values.shape, blocks, strict=True))
    if values.dim() > 1 and blocks[0] == 1 and values.shape[1] % blocks[1] == 0:
        # No block straddles what a stack holds: as one tall matrix it is cut into bands that a cache can hold.
        made = encode(values.flatten(0, 1), blocks[1:], element, scale_dtype, name=name, pool=pool)
        return made._replace(scales=made.scales.view(grid))
    codes = torch.empty(values.numel() * bits // 8, dtype=torch.uint8)
    scales = torch.empty(grid, dtype=torch_dtype(scale_dtype))
    per = max(1, prod(values.shape[1:]))

    def band(first: int) -> None:
        last = min(first + step, values.shape[0])
        part, factors = _band(values[first:last], blocks, element, scale_dtype, name)
        codes[first * per * bits // 8 : last * per * bits // 8] = part.reshape(-1)
        scales[first // blocks[0] : -(-last // blocks[0])] = factors

    step = blocks[0] * max(1, BAND // (per * blocks[0]))
    if bits == 4 and step * per % 2:
        step *= 2  # a band begins with a byte
    firsts = range(0, values.shape[0], step)
    if pool is None:
        for first in firsts:
            band(first)
    else:
        list(pool.map(band, firsts))
    return Encoded(codes, scales)


def _band(
    values: torch.Tensor, blocks: Sequence[int], element: str, scale_dtype: str, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as bytes, and scales, of some whole blocks."""
    short = [-n % block for n, block in zip(values.shape, blocks, strict=True)]
    whole = values
    if any(short):
        ends = [end for n in reversed(short) for end in (0, n)]
        whole = torch.nn.functional.pad(values, ends)
    split = [n for size, block in zip(whole.shape, blocks, strict=True) for n in (size // block, block)]
    apart = whole.reshape(split)
    largest = apart.abs().amax(dim=tuple(range(1, len(split), 2)), keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise NonFiniteError(
            "finite values to encode", "NaN or infinite ones", tensor=name or None,
            sections=[("tensor", [show(name)])] if name else (),
            hint="a block with one has no scale: correct the source",
        )  # fmt: skip
    scales, factors = _scales(largest, element, scale_dtype)
    scaled = (apart * factors).reshape(whole.shape)
    if any(short):
        scaled = scaled[tuple(slice(0, n) for n in values.shape)]
    return _codes(scaled, element), scales.reshape(split[::2])


def _scales(largest: torch.Tensor, element: str, scale_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of blocks as they are stored, and what values are multiplied by."""
    most = _most(element)
    least, zero = largest / most, largest == 0
    if scale_dtype == "F32":
        least = torch.where(zero, 1.0, least.clamp_(min=TINY))
        return least, torch.where(zero | (least == TINY), 1 / least, most / largest)
    part, power = torch.frexp(least)  # least = part * 2 ** power, part from 0.5 on
    power = torch.where(zero, 0, (power - (part == 0.5).to(power.dtype)).clamp_(-127, 127))
    stored = (power + 127).to(torch.uint8)
    return stored.view(torch_dtype(scale_dtype)), torch.ldexp(torch.ones_like(least), -power)


def _codes(scaled: torch.Tensor, element: str) -> torch.Tensor:
    """The codes of scaled values, packed into bytes."""
    if element in _FLOATS:
        most = _most(element)
        return scaled.clamp(-most, most).to(_FLOATS[element]).view(torch.uint8)
    bounds, table = _nearest(element)
    flat = scaled.contiguous().reshape(-1)
    keys = (flat.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    above = flat > bounds.index_select(0, keys)
    codes = table.index_select(0, keys.mul_(2).add_(above))
    first, second = codes[0::2], codes[1::2]
    return first << 4 | second if ELEMENTS[element].high else second << 4 | first


def _most(element: str) -> float:
    """The largest value of an element."""
    return torch.finfo(_FLOATS[element]).max if element in _FLOATS else max(ELEMENTS[element].values)


@cache
def _nearest(element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By the upper 16 bits of a float: a bound, and the codes of floats up to it and above it.

    Floats that agree in these bits lie so close that at most one bound is between them.
    """
    values, even = ELEMENTS[element].values, ELEMENTS[element].even
    codes = sorted(
        (i for i, value in enumerate(values) if value or values.index(0.0) == i), key=values.__getitem__
    )
    found = torch.tensor([values[code] for code in codes], dtype=torch.float32)
    between = (found[1:] + found[:-1]) / 2
    if even:  # what is not above a bound goes down: where the even code is above it, the bound itself must be
        odd = torch.tensor([code % 2 == 1 for code in codes[:-1]])
        between = torch.where(odd, torch.nextafter(between, torch.tensor(-torch.inf)), between)
    keys = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([keys.view(torch.float32), (keys | 0xFFFF).view(torch.float32)])
    ends = torch.where(ends.isfinite().all(0), ends, 0.0)  # no code is asked for what is no number
    places = torch.bucketize(ends, between).sort(0).values
    assert int((places[1] - places[0]).max()) <= 1, element
    bounds = torch.cat([between, torch.tensor([torch.inf])])[places[0]]
    bounds = torch.where(places[0] == places[1], torch.inf, bounds)
    return bounds, torch.tensor(codes, dtype=torch.uint8)[places.T.reshape(-1)]
