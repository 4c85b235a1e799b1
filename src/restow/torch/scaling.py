"""The factors of a tile of decoded elements, gathered from the scales of its job: one for each run that shares a scale.

Scales of one byte stay bytes until they are gathered, so that a job's scales are no larger than they are in the file.
It rejects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from restow.boxes import strides_of
from restow.coding import Coding, dim_of, index_of, scale_box

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # first element, sizes, steps


class Held(NamedTuple):
    """The scales that a job needs: float32, or bytes and the value of each."""

    scales: torch.Tensor
    table: torch.Tensor | None = None


class Scaling(NamedTuple):
    """The factors of a tile's rows: [rows, blocks], and how many elements of a row each block covers.

    Where `alike` is given, rows that follow each other share theirs: it says which row of `factors` is a row's own.
    """

    factors: torch.Tensor
    lengths: tuple[int, ...]
    alike: torch.Tensor | None = None


class _Places(NamedTuple):
    """Where the scales of a tile lie: by row, and by block of a row; the elements of each block."""

    rows: torch.Tensor
    blocks: torch.Tensor
    lengths: tuple[int, ...]


def scaling(coding: Coding, held: Sequence[Held], origin: Box, tile: Box, join: bool) -> Scaling:
    """The factors of a tile, from the scales that the job `origin` needs; like rows once where they may `join`."""
    shapes = tuple(tuple(one.scales.shape) for one in held)
    places, alike = (_joined if join else _found)(coding, shapes, origin, tile, join)
    factors = torch.empty(0)
    lengths: tuple[int, ...] = ()
    for number, (one, (rows, blocks, runs)) in enumerate(zip(held, places, strict=True)):
        found = _gathered(one.scales.reshape(-1), rows, blocks)
        if one.table is not None:
            found = one.table.index_select(0, found.reshape(-1).to(torch.int32)).view(found.shape)
        if not number:
            factors, lengths = found, runs
            continue
        if len(runs) > 1 and runs != lengths:
            found = found.repeat_interleave(torch.tensor(runs), 1)
            factors = factors.repeat_interleave(torch.tensor(lengths), 1)
            lengths = (1,) * sum(lengths)
        factors = factors / found if coding.grids[number].how == "divide" else factors * found
    return Scaling(factors, lengths, alike)


def _found(
    coding: Coding, shapes: tuple[tuple[int, ...], ...], origin: Box, tile: Box, join: bool
) -> tuple[list[_Places], torch.Tensor | None]:
    """The places of a tile's scales, of which nothing depends on their values; and which rows are alike."""
    _, sizes, _ = tile
    places: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, shape in enumerate(shapes):
        low = [start for start, _ in scale_box(coding, number, *origin)]
        outer, last = _places(coding, number, low, shape, tile)
        places.append((outer.expand(*(sizes[:-1] or (1,)), 1).reshape(-1, 1), last))
    alike: torch.Tensor | None = None
    if join:
        every = torch.cat([outer for outer, _ in places], 1)
        new = torch.ones(len(every), dtype=torch.bool)
        new[1:] = (every[1:] != every[:-1]).any(1)
        alike = new.cumsum(0) - 1
        places = [(outer[new], last) for outer, last in places]
    found = []
    for outer, last in places:
        blocks, counts = torch.unique_consecutive(last, return_counts=True)
        found.append(_Places(outer, blocks, tuple(counts.tolist())))
    return found, alike


_joined = lru_cache(32)(_found)  # matrices of one shape are alike, and rows that are joined are few


def _gathered(scales: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """scales[rows + columns], of which a row is one run where columns follow each other."""
    first, count = int(columns[0]), len(columns)
    if int(columns[-1]) - first + 1 != count:
        return scales[rows + columns]
    runs = scales.as_strided((scales.numel() - count + 1, count), (1, 1))
    return runs.index_select(0, rows.reshape(-1) + first)


def scale(values: torch.Tensor, factors: torch.Tensor, lengths: Sequence[int]) -> None:
    """Multiply [rows, n] in place by [rows, blocks], whose blocks cover `lengths` of a row."""
    for run, some in _runs(values, factors, lengths):
        run.mul_(some)


def _runs(
    values: torch.Tensor, blocks: torch.Tensor, lengths: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """[rows, n] as [rows, blocks, length] beside [rows, blocks, 1]: neighbours of one length in one go."""
    at = first = 0
    while first < len(lengths):
        length, last = lengths[first], first + 1
        while last < len(lengths) and lengths[last] == length:
            last += 1
        run = values.narrow(1, at, length * (last - first))
        shape, strides = (len(values), last - first, length), (values.stride(0), length, 1)
        yield run.as_strided(shape, strides), blocks[:, first:last, None]
        at += length * (last - first)
        first = last


def _places(
    coding: Coding, number: int, low: Sequence[int], shape: tuple[int, ...], tile: Box
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a tile's scales lie in the job's box of them: by all axes but the last, and by the last, to be added."""
    at, sizes, steps = tile
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
