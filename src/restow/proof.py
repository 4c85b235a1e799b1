"""A move, and the proof that moves fill a tensor: every element of what is held is written exactly once.

A `Move` is integers only: which stored tensor of the source (by its name's indices), from which element, to which
tensor of the destination at which local place, along a shared `Pattern` of sizes and strides. The proof reads these
integers back into boxes of axes by the destination's row and sizes alone, not by how they were made, and raises
`CoverageError` where volumes, bounds or places do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from restow.boxes import Run, held, overlap, strides_of
from restow.errors import CoverageError
from restow.layout import Sizes, axis_size
from restow.notation import Row


class Pattern(NamedTuple):
    """A strided copy without its place: per axis, slowest in the source first, its length, the step in elements of
    the source's row-major storage, and (dim, step) in the destination."""

    sizes: tuple[int, ...]
    source: tuple[int, ...]
    target: tuple[tuple[int, int], ...]


Runs = tuple[tuple[Run, ...], ...]  # per dim


class Move(NamedTuple):
    """`source` and `target` count the stored tensors of their side; `at` is in elements of the source's `piece`."""

    source: int
    piece: int
    at: int
    target: int
    start: tuple[int, ...]
    pattern: Pattern


def prove(row: Row, digits: Digits, position: int, runs: Runs, made: Sequence[Move]) -> None:
    """Exactly once: every move decoded from its final integers into a box of axes; volumes, bounds, no overlap."""
    local = held(runs)
    alike: dict[int, list[Move]] = {}  # moves share few patterns
    for move in made:
        alike.setdefault(id(move.pattern), []).append(move)
    volume = sum(len(these) * prod(these[0].pattern.sizes) for these in alike.values())
    boxes = [box for these in alike.values() for box in decode(digits, runs, these)]
    outside = len(made) - len(boxes)
    clash = overlap(boxes)
    if volume == prod(local) and clash is None and not outside:
        return
    what = "some written outside it" if outside else "some written twice" if clash else f"{volume} written"
    raise CoverageError(
        f"each of {prod(local)} elements of '{row}' written once",
        what,
        sections=[("tensor", [f"number {position}, held {list(local)}"])],
        hint="this is a defect of restow or of the layout's rows: please report the layouts and sizes",
    )


Digits = tuple[tuple[tuple[int, int], ...], ...]  # per dim, the length and the stride of each axis inside it


def decode(digits: Digits, runs: Sequence[Sequence[Run]], made: Sequence[Move]) -> list[tuple[Run, ...]]:
    """The axes' runs that each of these moves along one pattern fills, read back from its start and steps alone; none
    for a move that leaves what is held.

    Where an axis lies inside a dim follows from the row and the sizes once more, not from how the move was made. Moves of
    a pattern mostly differ in one dim, so each place in a dim is read back once.
    """
    pattern = made[0].pattern
    boxes: list[tuple[Run, ...] | None] = [()] * len(made)
    columns = zip(*(move.start for move in made), strict=True)
    for dim, (column, inside, dim_runs) in enumerate(zip(columns, digits, runs, strict=True)):
        back = {at: _read_back(inside, dim_runs, dim, at, pattern) for at in set(column)}
        boxes = list(map(_joined, boxes, map(back.__getitem__, column)))
    return [box for box in boxes if box is not None]


def _joined(box: tuple[Run, ...] | None, more: tuple[Run, ...] | None) -> tuple[Run, ...] | None:
    return box + more if box is not None and more is not None else None


def _read_back(
    digits: Sequence[tuple[int, int]], runs: Sequence[Run], dim: int, at: int, pattern: Pattern
) -> tuple[Run, ...] | None:
    """The runs of one dim's axes; None where they leave what is held, or are none."""
    here = [(to_step, n) for n, (to, to_step) in zip(pattern.sizes, pattern.target, strict=True) if to == dim]
    steps = dict(here)
    if len(steps) != len(here):  # two axes that step alike would write the same places
        return None
    local, first = 0, -1
    for start, length in runs:
        if local <= at < local + length:
            last = at + sum((n - 1) * step for step, n in steps.items())
            first = start + at - local if last < local + length else -1
            break
        local += length
    if first < 0:
        return None
    found: list[Run] = []
    for length, stride in digits:
        digit = first // stride
        first -= digit * stride
        count = steps.pop(stride, 1) if length > 1 else 1
        if digit + count > length:
            return None
        found.append((digit, count))
    return None if steps else tuple(found)


def digits_of(row: Row, sizes: Sizes) -> Digits:
    lengths = [[axis_size(row, key, sizes) for key in spec.keys] for spec in row.dims]
    return tuple(tuple(zip(dim, strides_of(dim), strict=True)) for dim in lengths)
