"""Decoding on a device: codes and scales of a slot become values in a scratch beside it, alike tiles in one launch each.

Scales are turned into float32 as `decode` has them; codes into values of the destination's dtype, which are exact in it
(a cast of an 8-bit float, else a look-up of a byte's two values); then one multiplication in float32 rounds once. From the
scratch on values are moved as plain tiles are from a slot. Nothing here waits for the device, or rejects anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from restow.torch.coded_slots import Coded
from restow.torch.coded_tiles import Decode
from restow.torch.decode import values_of
from restow.torch.packing import ALIGN, Ints

TABLES = 1 << 14  # bytes of the scratch that are kept for the values of all bytes
_CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_WORDS = {2: torch.int32, 4: torch.int64}  # a byte's two values, by the width of one


class Decoding(NamedTuple):
    """Alike tiles at even distances: how many, (byte in the slot, step) of codes and scales, and bytes in the scratch."""

    decode: int
    times: int
    at: tuple[tuple[int, int], ...]
    values: int
    factors: int
    places: int


class Scratch(NamedTuple):
    """Memory on the device, and in it the values of a byte by element and dtype."""

    room: torch.Tensor
    tables: Mapping[tuple[str, torch.dtype], torch.Tensor]


def scratch_of(room: torch.Tensor, decodes: Sequence[Decode]) -> Scratch:
    """The scratch with the tables that these need, at its end."""
    tables = {}
    at = room.numel() - TABLES
    for element, dtype in sorted({(d.element, d.dtype) for d in decodes if d.per > 1}, key=str):
        values = values_of(element).view(torch.float32).to(dtype)
        there = room[at : at + values.nbytes].view(dtype)
        there.copy_(values)
        tables[element, dtype] = there.view(_WORDS[dtype.itemsize])
        at += values.nbytes
    return Scratch(room, tables)


def scheduled(coded: Coded, size: int) -> tuple[list[tuple[int, list[Decoding]]], Ints, Ints]:
    """Batches as (slot, decodings), and of every tile its batch and the byte of its first wanted value in the scratch."""
    batches: list[tuple[int, list[Decoding]]] = []
    at, unit = np.zeros(len(coded.to), np.int64), np.zeros(len(coded.to), np.int64)
    rooms = [decode.room for decode in coded.decodes]
    items = [decode.dtype.itemsize for decode in coded.decodes]
    seats = [1 + len(decode.scales) for decode in coded.decodes]
    used, now = size, -1
    for first, times, steps in _alike(coded):
        slot, decode = int(coded.slot[first]), int(coded.decode[first])
        values, factors, places = rooms[decode]
        each = values + factors + places
        most = (size - 3 * ALIGN) // each
        while times:
            many = min(times, (size - used - 3 * ALIGN) // each)
            if slot != now or many < min(times, max(1, most // 2)):  # few launches rather than a full scratch
                batches.append((slot, []))
                used, now, many = 0, slot, min(times, most)
            beside = used + -(-many * values // ALIGN) * ALIGN
            looked = beside + -(-many * factors // ALIGN) * ALIGN
            lies = tuple(
                (int(coded.at[first, i]), steps[i] if times > 1 else 0) for i in range(seats[decode])
            )
            batches[-1][1].append(Decoding(decode, many, lies, used, beside, looked))
            some = slice(first, first + many)
            at[some] = used + values * np.arange(many) + items[decode] * coded.first[some]
            unit[some] = len(batches) - 1
            used, first, times = beside, first + many, times - many
    return batches, unit, at


def _alike(coded: Coded) -> Iterator[tuple[int, int, list[int]]]:
    """(first, how many, steps) of tiles of one decoding and kin whose codes and scales lie at even distances."""
    if not len(coded.to):
        return
    keys = np.stack([coded.slot, coded.decode, coded.kin, coded.shape], 1)
    same = (np.diff(keys, axis=0) == 0).all(1).tolist()
    steps = np.diff(coded.at, axis=0).tolist()
    first = 0
    for i in range(1, len(coded.to) + 1):
        even = i < len(coded.to) and same[i - 1] and (i == first + 1 or steps[i - 1] == steps[first])
        if even and steps[i - 1][0] > 0 and min(steps[i - 1]) >= 0:
            continue
        yield first, i - first, steps[first] if i > first + 1 else []
        first = i


def decode_there(one: Decoding, what: Decode, slot: torch.Tensor, scratch: Scratch) -> None:
    """Values of alike tiles, from a slot into the scratch."""
    room, times, held = scratch.room, one.times, what.scales
    (at, step), *others = one.at
    size, shape = prod(held[0].sizes), (times, *held[0].sizes)
    factors = room[one.factors : one.factors + 4 * times * size].view(torch.float32)
    for number, (scale, (begin, far)) in enumerate(zip(held, others, strict=True)):
        width = scale.dtype.itemsize
        stored = _strided(slot, scale.dtype, (times, *scale.sizes), (far // width, *scale.strides), begin)
        if not number:
            factors.view(shape).copy_(stored)
        elif scale.how == "divide":
            factors.view(times, size).div_(stored.reshape(times, 1))
        else:
            factors.view(times, size).mul_(stored.reshape(times, 1))
    count = times * prod(what.sizes)
    values = room[one.values : one.values + count * what.per * what.dtype.itemsize].view(what.dtype)
    dtype = _CODES.get(what.element, torch.uint8)
    codes = _strided(slot, dtype, (times, *what.sizes), (step, *what.strides), at)
    if what.per == 1:
        values.view(codes.shape).copy_(codes)
    else:
        places = room[one.places : one.places + 4 * count].view(torch.int32)
        places.view(codes.shape).copy_(codes)
        table = scratch.tables[what.element, what.dtype]
        torch.index_select(table, 0, places, out=values.view(table.dtype))
    whole = what.per * prod(what.sizes)
    for part in what.products:
        sizes = (times, *part.sizes)
        some = _strided(values, what.dtype, sizes, (whole, *part.values), part.at * what.dtype.itemsize)
        some.mul_(_strided(factors, torch.float32, sizes, (size, *part.factors), 4 * part.factor))


def _strided(
    memory: torch.Tensor, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], at: int
) -> torch.Tensor:
    """A view of memory from byte `at` on, with strides in elements."""
    flat = memory.view(dtype)
    return flat.as_strided(sizes, strides, int(flat.storage_offset()) + at // dtype.itemsize)
