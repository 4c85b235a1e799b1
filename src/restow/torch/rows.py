"""Matrices that fill whole rows of a destination side by side, transposed: written as one run of memory.

A transpose writes short runs, and a CPU fetches every line of memory that it is to write in part. Where all matrices
that share rows (gate and up) are at hand, blocks of those rows are made in the cache, and one long copy moves each
out, which fetches nothing. Read one after the other, they are one matrix to a transpose. It rejects nothing: the
caller knows that they fill the rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from restow.plans import Copy, Plan
from restow.proof import Pattern
from restow.torch.transpose import LINE, Entry

MANY = 8  # matrices that are taken together at most
ROOM = 1 << 19  # bytes of a block of rows; smaller ones cost more in calls than they spare the cache


def turned(pattern: Pattern, last: int) -> bool:
    """Whether a pattern is a whole matrix whose rows become columns of dim `last`, the last of the target."""
    sizes, steps, to = pattern
    return len(sizes) == 2 and steps == (sizes[1], 1) and to[0] == (last, 1) and to[1][1] == 1


def side_by_side(plan: Plan, batches: Sequence[tuple[Copy, ...]]) -> bool | None:
    """Whether these neighbours are matrices that fill whole rows of a target; None where the next ones may do so yet."""
    first = batches[0][0]
    sizes, place = plan.patterns[first.pattern].sizes, first.start
    last = len(place) - 1
    if not turned(plan.patterns[first.pattern], last):
        return False
    for batch in batches:
        copy, part = batch[0], plan.parts[batch[0].source]
        alike = copy.target == first.target and copy.pattern == first.pattern
        if (
            len(batch) > 1
            or not alike
            or copy.start[:last] != place[:last]
            or not part.file
            or part.coding >= 0
        ):
            return False
    width = sum(length for _, length in plan.targets[first.target].runs[last])
    if width > MANY * sizes[0]:
        return False
    filled = len(batches) * sizes[0]
    if filled < width:
        return None
    return filled == width


def fill_rows(entry: Entry, out: int, tile: int, shape: tuple[int, int], itemsize: int, room: int) -> None:
    """The matrix of `shape` at the address `tile` (several of as many columns, one after the other, are one), transposed
    to the address `out`; `room` is that of `block(...)` bytes. All is counted in addresses: views would hold the
    interpreter's lock for longer than the moves between them last.
    """
    rows, cols = shape
    row = rows * itemsize
    step = block(row) // row
    for first in range(0, cols, step):
        count = min(step, cols - first)
        entry(rows, count, tile + first * itemsize, cols, room, rows)
        ctypes.memmove(out + first * row, room, count * row)


def block(row: int) -> int:
    """The bytes of a block of rows of `row` bytes each: whole lines of what it is made from."""
    return max(LINE, ROOM // row // LINE * LINE) * row
