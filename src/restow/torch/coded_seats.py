"""A box of codes or scales as it lies in a slot: read as `reads` reads it, its gaps read through where that is fewer reads.

Integers only: the strides of each axis there, and the reads that bring it. Nothing is rejected.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from restow.reads import read_runs, spans
from restow.torch.strides import dot


class Seat(NamedTuple):
    """A box of a file as it lies in a slot: its bytes, the stride of each axis there, and its reads: (byte from the box's
    first one, bytes, byte in the seat)."""

    need: int
    strides: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=4096)
def seat_of(sizes: tuple[int, ...], steps: tuple[int, ...], width: int) -> Seat:
    """A box of a file as `reads` reads it: packed, but for gaps that are read through."""
    how = spans(sizes, steps, width)
    packed = tuple(width * prod(sizes[i + 1 :]) for i in range(len(sizes)))
    if not how.rows:
        runs = enumerate(read_runs(sizes, steps, width))
        return Seat(
            width * prod(sizes), packed, tuple((begin, length, i * length) for i, (begin, length) in runs)
        )
    span = (sizes[how.outer] - 1) * steps[how.outer] * width + how.run
    pitch = -(-span // 8) * 8  # every row of windows as it lies in the file
    outer = tuple(pitch * prod(sizes[i + 1 : how.outer]) for i in range(how.outer))
    strides = (*outer, *(width * step for step in steps[how.outer :]))
    many = -(-sizes[how.outer] // how.rows)
    base = [
        width * dot(index, steps[: how.outer]) for index in product(*(range(n) for n in sizes[: how.outer]))
    ]
    reads = [
        (begin, length, i // many * pitch + begin - base[i // many])
        for i, (begin, length) in enumerate(read_runs(sizes, steps, width))
    ]
    return Seat(pitch * len(base), strides, tuple(reads))
