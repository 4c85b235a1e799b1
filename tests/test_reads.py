"""Reads: what is read covers what is wanted, and what is read beyond it keeps to the rule for gaps."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restow.boxes import strides_of
from restow.reads import GAP, WINDOW, Spans, merged, read_bytes, read_runs, spans

LENGTHS = (1, 2, 3, 5, 16, 40, 511, 512, 513, 2048, 4095, 4096, 5000)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """A box inside a row-major tensor: sizes, steps, itemsize. Patterns leave out axes of length 1."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    rank = draw(st.integers(1, 4))
    shape: list[int] = []
    for _ in range(rank):
        room = 400_000 // (prod(shape) * itemsize)
        shape.insert(0, draw(st.sampled_from([n for n in LENGTHS if n <= max(1, room)])))
    sizes = [draw(st.sampled_from(sorted({1, n, max(1, n - 1), max(1, n // 2)}))) for n in shape]
    axes = [(n, step) for n, step in zip(sizes, strides_of(shape), strict=True) if n > 1]
    return tuple(n for n, _ in axes), tuple(step for _, step in axes), itemsize


def wanted_runs(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> np.ndarray:
    at = np.zeros(1, np.int64)
    for n, step in zip(sizes, steps, strict=True):
        at = (at[:, None] + np.arange(n) * step).ravel()
    mask = np.zeros((int(at.max()) + 1) * itemsize, bool)
    for byte in range(itemsize):
        mask[at * itemsize + byte] = True
    return mask


@settings(max_examples=150)
@given(boxes())
def test_reads_cover_what_is_wanted_once_and_gaps_only_where_runs_are_short(
    box: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    mask = wanted_runs(*box)
    seen = np.zeros(len(mask), np.int8)
    runs = list(read_runs(*box))
    for offset, length in runs:
        assert offset >= 0
        assert offset + length <= len(mask), "read behind the last wanted byte"
        seen[offset : offset + length] += 1
    assert (seen[mask] == 1).all()
    assert seen.max() == 1
    assert runs == sorted(runs)
    assert sum(length for _, length in runs) == read_bytes(*box)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    shortest = (edges[1::2] - edges[::2]).min()
    if shortest >= GAP:
        assert not seen[~mask].any(), "a gap was read though the runs are long"
    how = spans(*box)
    assert all(length <= max(WINDOW, how.run) for _, length in runs)


def test_the_rule_above_can_fail() -> None:
    mask = wanted_runs((2, 4), (8, 1), 1)
    assert mask.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert list(read_runs((2, 4), (8, 1), 1)) == [(0, 12)]  # four bytes nobody asked for


TABLE = [
    # sizes, steps, itemsize, spans, bytes, runs
    pytest.param((), (), 2, Spans(0, 0, 2), 2, [(0, 2)], id="a scalar"),
    pytest.param((4, 8), (8, 1), 2, Spans(0, 0, 64), 64, [(0, 64)], id="contiguous"),
    pytest.param((3, 4096), (5000, 1), 1, Spans(1, 0, 4096), 12288,
                 [(0, 4096), (5000, 4096), (10000, 4096)], id="runs of 4 KiB are read alone"),
    pytest.param((3, 4095), (5000, 1), 1, Spans(0, 3, 4095), 14095, [(0, 14095)],
                 id="shorter ones in one window"),
    pytest.param((2, 3, 10), (1000, 20, 1), 1, Spans(1, 3, 10), 100, [(0, 50), (1000, 50)],
                 id="windows inside an outer loop"),
    pytest.param((3, 10), (600_000, 1), 1, Spans(0, 1, 10), 30, [(0, 10), (600_000, 10), (1_200_000, 10)],
                 id="a gap wider than the window is not read"),
    pytest.param((5, 100), (400_000, 1), 1, Spans(0, 2, 100), 800_300,
                 [(0, 400_100), (800_000, 400_100), (1_600_000, 100)], id="windows of two and a rest"),
    pytest.param((7,), (2,), 4, Spans(0, 7, 4), 52, [(0, 52)], id="every other element"),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "steps", "itemsize", "how", "count", "runs"), TABLE)
def test_spans(
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    itemsize: int,
    how: Spans,
    count: int,
    runs: list[tuple[int, int]],
) -> None:
    assert spans(sizes, steps, itemsize) == how
    assert read_bytes(sizes, steps, itemsize) == count
    assert list(read_runs(sizes, steps, itemsize)) == runs


def test_only_adjacent_runs_of_one_file_merge() -> None:
    runs = [("a", 0, 4), ("a", 4, 8), ("a", 9, 10), ("a", 9, 12), ("b", 12, 16), ("b", 16, 16)]
    assert merged(runs) == (("a", 0, 8), ("a", 9, 10), ("a", 9, 12), ("b", 12, 16))
    assert merged([]) == ()
