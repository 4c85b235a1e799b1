"""Which bytes a strided copy reads: whole runs, and gaps only inside one tensor where the wanted runs are short.

Pure arithmetic that the plan counts with and the executor reads by, so that both say the same number. A run of wanted
bytes shorter than `GAP` is not worth a call of its own: neighbouring runs of one tensor are read in one piece, gaps
included, in windows of at most `WINDOW` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

GAP = 4096  # bytes: shorter wanted runs are read through
WINDOW = 1 << 20  # bytes read through at once


class Spans(NamedTuple):
    """How a copy is read: axes before `outer` are loops of separate reads; the axes from `outer` on are one read each.

    `run` is that read's length in bytes. `rows` > 0 cuts axis `outer` itself into windows of that many steps, each
    read in one piece with its gaps; `run` is then the length of one step's wanted bytes.
    """

    outer: int
    rows: int
    run: int


@lru_cache(maxsize=4096)
def spans(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> Spans:
    """How to read the box of `sizes` whose axes step by `steps` elements (slowest first) in row-major storage.

    >>> spans((256, 768), (1024, 1), 2)       # runs of 1,536 bytes, 512 apart: read through, in one window
    Spans(outer=0, rows=256, run=1536)
    """
    run, axis = itemsize, len(sizes)
    while axis and steps[axis - 1] * itemsize == run:
        run *= sizes[axis - 1]
        axis -= 1
    if axis == 0 or run >= GAP:
        return Spans(axis, 0, run)
    step = steps[axis - 1] * itemsize
    return Spans(axis - 1, min(sizes[axis - 1], max(1, WINDOW // step)), run)


def read_bytes(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> int:
    """The bytes that `spans` reads in all, gaps included."""
    outer, rows, run = spans(sizes, steps, itemsize)
    times = prod(sizes[:outer])
    if not rows:
        return times * run
    count, step = sizes[outer], steps[outer] * itemsize
    inner = run
    windows, rest = divmod(count, rows)
    return times * (windows * ((rows - 1) * step + inner) + (((rest - 1) * step + inner) if rest else 0))


def read_runs(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Every (offset, length) in bytes that `spans` reads, in order, from the copy's first element."""
    outer, rows, run = spans(sizes, steps, itemsize)
    for index in product(*(range(n) for n in sizes[:outer])):
        base = itemsize * sum(i * step for i, step in zip(index, steps[:outer], strict=True))
        if not rows:
            yield base, run
            continue
        step = steps[outer] * itemsize
        for first in range(0, sizes[outer], rows):
            taken = min(rows, sizes[outer] - first)
            yield base + first * step, (taken - 1) * step + run


def merged(runs: Sequence[tuple[str, int, int]]) -> tuple[tuple[str, int, int], ...]:
    """Sorted (file, begin, end) with adjacent ones joined; gaps and overlaps are kept as they are."""
    out: list[tuple[str, int, int]] = []
    for file, begin, end in runs:
        if out and out[-1][0] == file and out[-1][2] == begin:
            out[-1] = (file, out[-1][1], end)
        else:
            out.append((file, begin, end))
    return tuple(out)
