"""Boxes: runs of groups split into boxes of axes, and overlaps, against enumeration."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from restow.boxes import boxes_of, held, overlap, split_run, strides_of
from restow.notation import parse_row
from strategies import Role, part_of, roles, rows, sizes_of, stored

FACTORS = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def elements(box: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    return list(product(*(range(start, start + length) for start, length in box)))


@given(FACTORS, st.data())
def test_the_boxes_of_a_run_hold_its_elements_in_order(sizes: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(sizes) - 1))
    length = data.draw(st.integers(0, prod(sizes) - start))
    boxes = split_run(sizes, start, length)
    found = [index for box in boxes for index in elements(box)]
    assert found == [tuple(map(int, np.unravel_index(i, sizes))) for i in range(start, start + length)]
    assert len(boxes) <= 2 * len(sizes) - 1


@pytest.mark.parametrize(
    ("sizes", "start", "length", "boxes"),
    [
        pytest.param((6,), 2, 3, (((2, 3),),), id="one axis"),
        pytest.param((2, 3), 0, 6, (((0, 2), (0, 3)),), id="whole"),
        pytest.param((2, 3), 1, 4, (((0, 1), (1, 2)), ((1, 1), (0, 2))), id="across the middle"),
        pytest.param((4, 3), 1, 10, (((0, 1), (1, 2)), ((1, 2), (0, 3)), ((3, 1), (0, 2))),
                     id="head, body, tail"),
        pytest.param((2, 3), 4, 0, (), id="nothing"),
    ],
)  # fmt: skip
def test_split_run(sizes: tuple[int, ...], start: int, length: int, boxes: object) -> None:
    assert split_run(sizes, start, length) == boxes


BOXES = st.integers(1, 3).flatmap(
    lambda rank: st.lists(
        st.tuples(*[st.tuples(st.integers(0, 5), st.integers(1, 4))] * rank), min_size=0, max_size=7
    )
)


@given(BOXES)
@example([((0, 2), (0, 2)), ((2, 2), (0, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2))])
def test_overlap_finds_a_pair_exactly_where_there_is_one(boxes: list[tuple[tuple[int, int], ...]]) -> None:
    pairs = {
        (i, j)
        for i in range(len(boxes))
        for j in range(i + 1, len(boxes))
        if set(elements(boxes[i])) & set(elements(boxes[j]))
    }
    found = overlap(boxes)
    assert (found is None) == (not pairs)
    assert found is None or found in pairs


@given(st.data())
def test_the_boxes_of_a_tensor_lie_where_they_say(data: st.DataObject) -> None:
    role: Role = data.draw(roles())
    row = data.draw(rows(role))
    for array in stored(row, role)[:2]:
        cuts = [data.draw(st.integers(0, n)) for n in array.shape]
        runs = tuple(((cut, n - cut), (0, cut)) for cut, n in zip(cuts, array.shape, strict=True))
        local = part_of(array, runs)
        assert held(runs) == local.shape
        seen = np.zeros(local.shape, int)
        for box in boxes_of(row, sizes_of(role), runs):
            for offset in product(*(range(length) for _, length in box.runs)):
                at = list(box.start)
                for (dim, step), i in zip(box.steps, offset, strict=True):
                    at[dim] += i * step
                seen[tuple(at)] += 1
                index = {a: s + i for a, (s, _), i in zip(box.axes, box.runs, offset, strict=True)}
                index.update(zip(row.name_axes, np.unravel_index(0, [1] * len(row.name_axes)), strict=True))
                if array is stored(row, role)[0] or not row.name_axes:
                    assert local[tuple(at)] == role.values[tuple(index[axis] for axis in role.axes)]
        assert (seen == 1).all()


def test_strides_are_row_major() -> None:
    assert strides_of((2, 3, 5)) == (15, 5, 1)
    assert strides_of(()) == ()


def test_a_divided_group_is_one_axis() -> None:
    row = parse_row("in x (p f)/4 d")
    (box,) = boxes_of(row, {"p": 2, "f": 5, "d": 2}, (((1, 2),), ((0, 2),)))
    assert box.axes == ("(p f)/4", "d")
    assert box.runs == ((1, 2), (0, 2))
