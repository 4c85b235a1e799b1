"""The sum behind `restow.fingerprint`: one number of a matrix, whatever its strides, and parts add up.

A leaf W has R rows and C columns (an expert's matrix in the order of `split`; any other tensor with its last dim as
columns). A row is read as words of 8 bytes, little-endian, the last one filled up with zeros, and

    D = sum of word(r, q) * a(r) * b(q)  mod 2**64,   a(r) = mix(2 r) | 1,   b(q) = mix(2 q + 1) | 1

where `mix` is SplitMix64 (Steele, Lea, Flood 2014). Odd factors can be undone, so any single changed element changes D
for certain; exchanged elements, rows, columns, experts or projections meet other factors or other places of a word.
Since D is linear in the elements, the numbers of disjoint parts add up modulo 2**64, wherever a word is cut. It guards
against accidents, not against an attacker. It rejects nothing.

Parts whose columns do not lie in memory one after another are brought into that order block by block. On the CPU the
sums are products of matrices of 64-bit integers, which wrap; elsewhere they are made without such a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch

from restow.targets import Runs
from restow.torch.tiles import move
from restow.torch.transpose import Array, bits, turn

MASK = (1 << 64) - 1
BLOCK = 1 << 20  # bytes that are brought into the order of a leaf at once: they stay in the cache
TURNED, DEEP = 1 << 19, 1 << 12  # bytes, and rows, of a block where columns are what lies in memory
SUMS = 17  # of blocks that are kept apart before they are added
WORD = 8  # bytes

Places = range | torch.Tensor  # of rows or columns in a leaf: neighbours, or any


def plain_sum(shape: tuple[int, ...], runs: Runs, local: torch.Tensor) -> int:
    """A tensor outside the experts: rows are all dims but the last, flattened as in the whole tensor."""
    if not shape:
        return bilinear(local.reshape(1, 1), range(1), range(1))
    index = [torch.cat([torch.arange(a, a + n) for a, n in dim]) for dim in runs]
    rows = torch.zeros(1, dtype=torch.int64)
    for i, dim in enumerate(index[:-1]):
        rows = (rows[:, None] + dim * prod(shape[i + 1 : -1])).reshape(-1)
    return bilinear(local.reshape(-1, local.shape[-1]), rows, index[-1])


def bilinear(matrix: torch.Tensor, rows: Places, cols: Places) -> int:
    """The sum of this module's text over a [rows, cols] matrix of any strides; `rows`, `cols` are places in the leaf."""
    left = _factors(rows, 0)
    total = 0
    for first, start, count in _runs(cols):
        per = max(1, WORD // matrix.element_size())
        inner = min(-start % per, count)  # columns before the first whole word
        whole = (count - inner) // per * per
        for begin, n in ((0, inner), (inner + whole, count - inner - whole)):
            if n:
                total += _edge(matrix[:, first + begin : first + begin + n], left, start + begin, per)
        if whole:
            words = _factors(range((start + inner) // per, (start + inner + whole) // per), 1)
            total += _words(matrix[:, first + inner : first + inner + whole], left, words)
    return total & MASK


def _runs(cols: Places) -> Iterator[tuple[int, int, int]]:
    """Columns as runs of neighbours: (the first's number here, its place in the leaf, how many)."""
    if isinstance(cols, range):
        yield 0, cols.start, len(cols)
        return
    breaks = (torch.diff(cols) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), cols.numel()]
    for a, b in pairwise(starts):
        if b > a:
            yield a, int(cols[a]), b - a


def _words(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> int:
    """Whole words: blocks of rows, or of columns where those lie in memory, as [rows, words] of int64."""
    size = matrix.element_size()
    if matrix.device.type != "cpu":
        deep = max(1, (64 << 20) // (matrix.shape[1] * size))
    elif matrix.stride(1) == 1 and all(
        (int(n) * size) % WORD == 0 for n in (matrix.stride(0), matrix.storage_offset())
    ):
        return _product(matrix.view(torch.int64), left, right)
    elif matrix.stride(0) == 1 and matrix.stride(1) >= matrix.shape[0]:
        return _turned(bits(matrix).T, left.numpy().view(np.uint64), right.numpy().view(np.uint64))
    else:
        deep = max(1, BLOCK // (matrix.shape[1] * size))
    total = 0
    for top in range(0, matrix.shape[0], deep):
        block = _packed(matrix[top : top + deep])
        total += _product(block.view(torch.int64), left[top : top + deep], right)
    return total


def _turned(columns: Array, left: Array, right: Array) -> int:
    """The sum over a matrix whose columns lie in memory, here as the rows of `columns`: a few words of some thousand
    rows at a time, so that what was turned is still in the cache when it is multiplied. Between calls that move or
    multiply a block the interpreter's lock is not given away: two threads that take turns at it wait for each other.
    """
    total, per = 0, WORD // columns.itemsize
    for top in range(0, len(left), DEEP):
        part = columns[:, top : top + DEEP]
        rows = part.shape[1]
        step = (
            TURNED // (rows * WORD) // 8 | 1
        ) * 8  # an odd number of cache lines: they share no set of a cache
        room = np.empty(rows * min(step, len(right)) * per, columns.dtype)
        sums = np.zeros((SUMS, rows), np.uint64)
        for number, at in enumerate(range(0, len(right), step)):
            words = right[at : at + step]
            block = room[: rows * len(words) * per].reshape(rows, -1)
            turn(block, part[at * per : (at + len(words)) * per])
            if number and number % (SUMS - 1) == 0:
                sums[0] = sums.sum(0)
                sums[1:] = 0
            np.matmul(block.view(np.uint64), words, out=sums[number % (SUMS - 1) + 1])
        total += int(np.dot(sums.sum(0), left[top : top + DEEP]))
    return total


def _packed(part: torch.Tensor) -> torch.Tensor:
    room = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    move(room, part)
    return room


def _product(words: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> int:
    if words.device.type == "cpu":
        line = words.numpy().view(np.uint64) @ right.numpy().view(np.uint64)
        return int(np.dot(line, left.numpy().view(np.uint64)))
    sums = (words * right.to(words.device)).sum(1)  # there is no product of integer matrices there
    return int((sums * left.to(words.device)).sum())


def _edge(matrix: torch.Tensor, left: torch.Tensor, start: int, per: int) -> int:
    """Columns of a word that is not here as a whole: each element at its place in the word."""
    bits = _bits(matrix)
    places = torch.arange(start, start + matrix.shape[1])
    factors = _factors(places // per, 1) << (places % per * (8 * WORD // per))
    sums = (bits * factors.to(bits.device)).sum(1)
    return int((sums * left.to(bits.device)).sum())


def _bits(matrix: torch.Tensor) -> torch.Tensor:
    """The bits of every element as a number that is not below 0 (of 8 bytes: as int64)."""
    size = matrix.element_size()
    if size == WORD:
        return matrix.contiguous().view(torch.int64)
    signed = matrix.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).to(torch.int64)
    return signed & ((1 << (8 * size)) - 1)


def _factors(index: Places, odd: int) -> torch.Tensor:
    """mix(2 i + odd) | 1 for every place, as int64 that wraps."""
    if isinstance(index, range):
        return _run_factors(index.start, len(index), odd)
    if index.numel() and bool((torch.diff(index) == 1).all()):
        return _run_factors(int(index[0]), index.numel(), odd)
    return mix(2 * index + odd) | 1


@lru_cache(maxsize=64)
def _run_factors(start: int, count: int, odd: int) -> torch.Tensor:
    return mix(2 * torch.arange(start, start + count) + odd) | 1


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser of int64 numbers, wrapping."""
    z = x + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch shifts signed numbers with their sign


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
