"""Moves: two rows of one role, the runs held on each side, and the strided copies between them; `proof` proves them.

It rejects roles whose axes or sizes differ, and raises `CoverageError` where a destination element would be written never
or twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from restow.boxes import Box, Run, boxes_of, held, strides_of
from restow.errors import RolesError, ShapeMismatchError
from restow.layout import axis_size
from restow.notation import Row
from restow.proof import Move, Pattern, Runs, digits_of, prove

Frozen = tuple[tuple[str, int], ...]  # sizes as sorted pairs, so that they can be a key


class Side(NamedTuple):
    """One role on one side: its row, its sizes, and what is held of each of its stored tensors, piece by piece.

    Each piece is runs per dim, stored row-major by itself. A source may hold a tensor in many pieces (sharded files); a
    destination holds one, or none.
    """

    row: Row
    sizes: Frozen
    held: tuple[tuple[Runs, ...], ...]


def freeze(sizes: Mapping[str, int]) -> Frozen:
    return tuple(sorted(sizes.items()))


def moves(source: Side, target: Side, take: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> tuple[Move, ...]:
    """Every move that fills what the target side holds from what the source side holds.

    `take` maps an axis to the source's index for each destination index (an expert list); axes not named map one to
    one. Raises `RolesError` (axes differ), `ShapeMismatchError` (sizes differ), `CoverageError` (never or twice).
    """
    maps = dict(take)
    maps.update(_label_map(source.row, target.row))
    _check(source, target, maps)
    there, here = _Boxes(source), _Boxes(target)
    digits = digits_of(target.row, here.sizes)
    found: list[Move] = []
    for position, index in enumerate(product(*map(range, here.lengths))):
        if not target.held[position]:
            continue
        (runs,) = target.held[position]
        fixed = {axis: (i, 1) for axis, i in zip(target.row.name_axes, index, strict=True)}
        made: list[Move] = []
        for box in here.of(runs)[0]:
            made += _fill(there, box, fixed, position, maps)
        prove(target.row, digits, position, runs, made)
        found += made
    return tuple(found)


class _Boxes:
    """A side's boxes, worked out once for all tensors of which the same runs are held, and its sizes."""

    def __init__(self, side: Side) -> None:
        self.side, self.sizes = side, dict(side.sizes)
        self.lengths = [axis_size(side.row, axis, self.sizes) for axis in side.row.name_axes]
        self._known: dict[Runs, tuple[tuple[Box, ...], tuple[int, ...]]] = {}

    def of(self, runs: Runs) -> tuple[tuple[Box, ...], tuple[int, ...]]:
        """The boxes of a tensor of which these runs are held, and the strides of its local storage."""
        found = self._known.get(runs)
        if found is None:
            found = self._known[runs] = boxes_of(self.side.row, self.sizes, runs), strides_of(held(runs))
        return found


def _label_map(source: Row, target: Row) -> dict[str, tuple[int, ...]]:
    """Where both names carry the same words in another order, words decide, not places."""
    ours, theirs = source.labels, target.labels
    return {
        axis: tuple(ours[axis].index(word) for word in words)
        for axis, words in theirs.items()
        if axis in ours and ours[axis] != words and set(ours[axis]) == set(words)
    }


def _check(source: Side, target: Side, maps: Mapping[str, Sequence[int]]) -> None:
    have, want = dict(source.sizes), dict(target.sizes)
    for axis in sorted(source.row.axes | target.row.axes):
        n_have = axis_size(source.row, axis, have) if axis in source.row.axes else 1
        n_want = axis_size(target.row, axis, want) if axis in target.row.axes else 1
        if (axis in source.row.axes) != (axis in target.row.axes) and n_have * n_want != 1:
            raise RolesError(
                f"the same axes for role '{source.row.role}' on both sides",
                f"'{axis}' on one only",
                sections=[("source", [str(source.row)]), ("target", [str(target.row)])],
                hint="only layouts of the same roles and axes convert",
            )
        if axis in maps:
            n_have = len(maps[axis])
        if n_have != n_want:
            raise ShapeMismatchError(
                f"{n_have} along axis '{axis}' of role '{source.row.role}', as the source has",
                f"{n_want}",
                sections=[("source", [str(source.row)]), ("target", [str(target.row)])],
            )


class _Span(NamedTuple):
    """A run of one axis: where it begins in the source and in the destination, and its length."""

    source: int
    target: int
    length: int


def _fill(
    source: _Boxes, box: Box, fixed: Mapping[str, Run], position: int, maps: Mapping[str, Sequence[int]]
) -> list[Move]:
    ranges: dict[str, Run] = dict(fixed)
    ranges.update(zip(box.axes, box.runs, strict=True))
    axes = list(ranges)
    found: list[Move] = []
    for choice in product(*(_spans(ranges[axis], maps.get(axis)) for axis in axes)):
        found += _from_source(source, box, dict(zip(axes, choice, strict=True)), position)
    return found


def _spans(run: Run, mapping: Sequence[int] | None) -> list[_Span]:
    """A destination run as runs that are contiguous in the source too."""
    start, length = run
    if mapping is None:
        return [_Span(start, start, length)]
    spans: list[_Span] = []
    for i in range(start, start + length):
        if spans and mapping[i] == spans[-1].source + spans[-1].length:
            spans[-1] = spans[-1]._replace(length=spans[-1].length + 1)
        else:
            spans.append(_Span(mapping[i], i, 1))
    return spans


def _from_source(source: _Boxes, box: Box, spans: Mapping[str, _Span], position: int) -> list[Move]:
    places = dict(zip(box.axes, zip((run[0] for run in box.runs), box.steps, strict=True), strict=True))
    named = source.side.row.name_axes
    outer = [spans.get(axis, _Span(0, 0, 1)) for axis in named]
    there = [  # which name axes lie in the destination: dim, step, and what comes before the first index
        (i, dim, step, span.target - first)
        for i, (axis, span) in enumerate(zip(named, outer, strict=True))
        if axis in places
        for first, (dim, step) in (places[axis],)
    ]
    found: list[Move] = []
    templates: dict[object, list[tuple[int, tuple[int, ...], Pattern]]] = {}
    for offsets in product(*(range(span.length) for span in outer)):
        flat = 0
        for offset, span, length in zip(offsets, outer, source.lengths, strict=True):
            flat = flat * length + span.source + offset
        for piece, runs in enumerate(source.side.held[flat]):
            if runs not in templates:
                boxes, strides = source.of(runs)
                templates[runs] = [
                    _cut(inner, strides, spans, places, box) for inner in boxes if _meets(inner, spans)
                ]
            for at, start, pattern in templates[runs]:
                moved = list(start)
                for i, dim, step, before in there:
                    moved[dim] += (before + offsets[i]) * step
                found.append(Move(flat, piece, at, position, tuple(moved), pattern))
    return found


def _meets(inner: Box, spans: Mapping[str, _Span]) -> bool:
    for axis, (start, length) in zip(inner.axes, inner.runs, strict=True):
        span = spans.get(axis, _Span(0, 0, 1))
        if span.source >= start + length or start >= span.source + span.length:
            return False
    return True


def _cut(
    inner: Box,
    strides: tuple[int, ...],
    spans: Mapping[str, _Span],
    places: Mapping[str, tuple[int, tuple[int, int]]],
    box: Box,
) -> tuple[int, tuple[int, ...], Pattern]:
    """One source box against one destination box: the first element, the local place, and the pattern."""
    at = sum(start * stride for start, stride in zip(inner.start, strides, strict=True))
    moved = list(box.start)
    axes: list[tuple[int, int, tuple[int, int]]] = []
    for axis, (start, length), (dim, step) in zip(inner.axes, inner.runs, inner.steps, strict=True):
        span = spans.get(axis, _Span(0, 0, 1))
        first = max(start, span.source)
        count = min(start + length, span.source + span.length) - first
        at += (first - start) * step * strides[dim]
        if axis in places:
            place, (to_dim, to_step) = places[axis]
            moved[to_dim] += (span.target + first - span.source - place) * to_step
            if count > 1:
                axes.append((step * strides[dim], count, (to_dim, to_step)))
    axes.sort(key=lambda item: -item[0])
    return at, tuple(moved), Pattern(
        tuple(count for _, count, _ in axes), tuple(step for step, *_ in axes), tuple(to for *_, to in axes)
    )  # fmt: skip
