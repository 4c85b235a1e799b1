"""Moves: any row of a role to any other, whatever both sides hold, against einops and an element loop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restow.boxes import held, whole
from restow.errors import CoverageError, RolesError, ShapeMismatchError
from restow.moves import Side, freeze, moves
from restow.notation import Row, parse_row
from restow.proof import Move, Pattern, decode, digits_of, prove
from strategies import Role, held_runs, part_of, pieces, roles, rows, sizes_of, stored


def side(row: Row, role: Role, held: Sequence[Sequence[object]]) -> Side:
    return Side(row, freeze(sizes_of(role)), tuple(map(tuple, held)))  # type: ignore[arg-type]


def whole_side(row: Row, role: Role) -> Side:
    return side(row, role, [[whole(array.shape)] for array in stored(row, role)])


def run(made: Sequence[Move], source: Side, arrays: Sequence[np.ndarray], target: Side) -> list[np.ndarray]:
    """Do the moves element by element; a place that is written twice fails here."""
    flat = [[part_of(a, runs).ravel() for runs in held] for a, held in zip(arrays, source.held, strict=True)]
    out = [np.full(held(h[0]), -1) if h else np.full((0,), -1) for h in target.held]
    for move in made:
        for index in product(*map(range, move.pattern.sizes)):
            at = move.at + sum(i * step for i, step in zip(index, move.pattern.source, strict=True))
            to = list(move.start)
            for i, (dim, step) in zip(index, move.pattern.target, strict=True):
                to[dim] += i * step
            assert out[move.target][tuple(to)] == -1, "written twice"
            out[move.target][tuple(to)] = flat[move.source][move.piece][at]
    return out


@settings(max_examples=200)
@given(st.data())
def test_a_move_is_what_einops_says(data: st.DataObject) -> None:
    role = data.draw(roles())
    a, b = data.draw(rows(role)), data.draw(rows(role))
    have, want = stored(a, role), stored(b, role)
    source = side(a, role, [[tuple((r,) for r in box) for box in data.draw(pieces(x.shape))] for x in have])
    parts = [tuple(data.draw(held_runs(n)) for n in x.shape) for x in want]
    there = [data.draw(st.integers(0, 4)) > 0 for _ in want]
    target = side(b, role, [[runs] if t else [] for runs, t in zip(parts, there, strict=True)])
    made = moves(source, target)
    found = run(made, source, have, target)
    for got, array, runs, t in zip(found, want, parts, there, strict=True):
        if t:
            np.testing.assert_array_equal(got, part_of(array, runs))
    for move in made:
        digits = digits_of(target.row, dict(target.sizes))
        assert len(decode(digits, target.held[move.target][0], [move])) == 1


@given(st.data())
def test_there_and_back_is_the_source(data: st.DataObject) -> None:
    role = data.draw(roles())
    a, b = data.draw(rows(role)), data.draw(rows(role))
    one, two = whole_side(a, role), whole_side(b, role)
    have = stored(a, role)
    there = run(moves(one, two), one, have, two)
    for got, array in zip(run(moves(two, one), two, there, one), have, strict=True):
        np.testing.assert_array_equal(got, array)


@given(st.data())
def test_a_list_of_experts_chooses_orders_and_repeats(data: st.DataObject) -> None:
    role = data.draw(roles(fixed=False))
    assume("e" in role.axes)
    a, b = data.draw(rows(role)), data.draw(rows(role))
    chosen = tuple(data.draw(st.lists(st.integers(0, role.sizes["e"] - 1), min_size=1, max_size=6)))
    small = Role({**role.sizes, "e": len(chosen)})
    source, have = whole_side(a, role), stored(a, role)
    target = whole_side(b, small)
    made = moves(source, target, (("e", chosen),))
    picked = np.take(role.values, chosen, axis=role.axes.index("e"))
    for got, array in zip(run(made, source, have, target), stored(b, small), strict=True):
        np.testing.assert_array_equal(got, picked.ravel()[array])


ROWS = [
    pytest.param("{e}.{p:gate|up}_proj f d", "gate_and_up_projs e d (p f)", id="split to grouped"),
    pytest.param("{e}.{p:gate|up}_proj f d", "gate_up_proj e (f p) d", id="split to interleaved"),
    pytest.param("gate_up_proj e (p f) d", "w{p:1|3} e f d", id="fused to stacked"),
    pytest.param("gate_up_proj e (p f) d", "{e}.w{p:1|3} d f", id="fused to split, transposed"),
    pytest.param("w13 e p f d", "gate_up_proj e d (f p)", id="p on a dim of its own to gpt_oss"),
    pytest.param("{p:w1|v1} (e f) d", "gate_up_proj e (p f) d", id="dbrx to fused"),
    pytest.param("{e}.{p:up}_proj f d", "gate_and_up_projs e d (p f)", id="ungated to grouped"),
    pytest.param("{e}.{p:up}_proj f d", "up_proj e f d", id="ungated to a row without p"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), ROWS)
def test_named_rows(a: str, b: str) -> None:
    one, two = parse_row("in " + a), parse_row("in " + b)
    role = Role({"e": 3, "p": 1 if "{p:up}" in a else 2, "f": 5, "d": 7})
    source = whole_side(one, role)
    assert len(two.axes | {"p"}) == 4
    wide = role if "p" in two.axes else Role({a: n for a, n in role.sizes.items() if a != "p"})
    target = whole_side(two, wide)
    have = stored(one, role)
    for got, array in zip(run(moves(source, target), source, have, target), stored(two, wide), strict=True):
        np.testing.assert_array_equal(got, array)


def test_words_decide_where_both_names_carry_them() -> None:
    role = Role({"e": 2, "p": 2, "f": 3})
    one, two = parse_row("in {e}.{p:gate|up} f"), parse_row("in {p:up|gate} e f")
    source, target = whole_side(one, role), whole_side(two, role)
    up, gate = run(moves(source, target), source, stored(one, role), target)
    np.testing.assert_array_equal(gate, role.values[:, 0])
    np.testing.assert_array_equal(up, role.values[:, 1])


def test_rows_of_a_strided_shard_are_two_runs() -> None:
    role = Role({"e": 4, "f": 1, "d": 2})
    one, two = parse_row("out {e}.w d f"), parse_row("out w e f d")
    source = whole_side(one, role)
    target = side(two, role, [[(((0, 1), (2, 1)), ((0, 1),), ((0, 2),))]])
    (got,) = run(moves(source, target), source, stored(one, role), target)
    np.testing.assert_array_equal(got, role.values[[0, 2]])


# What is refused.


@pytest.mark.parametrize(
    ("a", "b", "sizes", "error", "text"),
    [
        pytest.param(
            "x e f d", "y e f", {"e": 2, "f": 3, "d": 5}, RolesError,
            "expected the same axes for role 'in' on both sides, found 'd' on one only\n"
            "  source    in x e f d\n"
            "  target    in y e f\n"
            "  try       only layouts of the same roles and axes convert",
            id="other axes",
        ),
        pytest.param(
            "x e (p f)", "y e f", {"e": 2, "p": 2, "f": 3}, RolesError,
            "expected the same axes for role 'in' on both sides, found 'p' on one only\n"
            "  source    in x e (p f)\n"
            "  target    in y e f\n"
            "  try       only layouts of the same roles and axes convert",
            id="gated and ungated",
        ),
    ],
)  # fmt: skip
def test_rows_of_other_axes_are_refused(
    a: str, b: str, sizes: dict[str, int], error: type[Exception], text: str
) -> None:
    one, two = parse_row("in " + a), parse_row("in " + b)
    source, target = (Side(row, freeze(sizes), ((whole([1] * len(row.dims)),),)) for row in (one, two))
    with pytest.raises(error) as caught:
        moves(source, target)
    assert str(caught.value) == text


def test_sizes_that_differ_are_refused() -> None:
    row = parse_row("in x e f")
    source = whole_side(row, Role({"e": 4, "f": 3}))
    target = whole_side(row, Role({"e": 2, "f": 3}))
    with pytest.raises(ShapeMismatchError) as caught:
        moves(source, target)
    assert str(caught.value) == (
        "expected 4 along axis 'e' of role 'in', as the source has, found 2\n"
        "  source    in x e f\n"
        "  target    in x e f"
    )


# The proof can fail.


@settings(max_examples=150)
@given(st.data())
def test_a_planted_defect_is_found(data: st.DataObject) -> None:
    role = data.draw(roles())
    a, b = data.draw(rows(role)), data.draw(rows(role))
    target = whole_side(b, role)
    made = [m for m in moves(whole_side(a, role), target) if m.target == 0]
    runs = target.held[0][0]
    at = data.draw(st.integers(0, len(made) - 1))
    kind = data.draw(st.sampled_from(["lost", "twice", "shifted", "longer", "stride"]))
    move = made[at]
    if kind == "lost":
        made.pop(at)
    elif kind == "twice":
        made.append(move)
    elif kind == "shifted":
        assume(move.start)
        dim = data.draw(st.integers(0, len(move.start) - 1))
        by = data.draw(st.sampled_from([-1, 1]))
        made[at] = move._replace(start=tuple(s + by * (i == dim) for i, s in enumerate(move.start)))
    else:
        assume(move.pattern.sizes)
        axis = data.draw(st.integers(0, len(move.pattern.sizes) - 1))
        sizes, to = list(move.pattern.sizes), list(move.pattern.target)
        if kind == "longer":
            sizes[axis] += 1
        else:
            to[axis] = (to[axis][0], to[axis][1] + 1)
        made[at] = move._replace(pattern=Pattern(tuple(sizes), move.pattern.source, tuple(to)))
    with pytest.raises(CoverageError):
        prove(target.row, digits_of(target.row, dict(target.sizes)), 0, runs, made)


def test_a_source_with_a_hole_fills_not_everything() -> None:
    row = parse_row("in x e f")
    role = Role({"e": 4, "f": 3})
    source = side(row, role, [[(((0, 2),), ((0, 3),)), (((3, 1),), ((0, 3),))]])
    with pytest.raises(CoverageError) as caught:
        moves(source, whole_side(row, role))
    assert str(caught.value) == (
        "expected each of 12 elements of 'in x e f' written once, found 9 written\n"
        "  tensor    number 0, held [4, 3]\n"
        "  try       this is a defect of restow or of the layout's rows: please report the layouts and sizes"
    )


def test_source_pieces_that_overlap_are_found() -> None:
    row = parse_row("in x e f")
    role = Role({"e": 4, "f": 3})
    source = side(row, role, [[(((0, 3),), ((0, 3),)), (((2, 2),), ((0, 3),))]])
    with pytest.raises(CoverageError, match="some written twice"):
        moves(source, whole_side(row, role))
