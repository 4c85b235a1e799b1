"""Layouts: text and value, names, shapes, and sizes from shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import restow
from restow.errors import NotationError, SizeError
from restow.layout import Layout, axis_size, parse_size, rows_text, shape_of, solve_sizes
from restow.notation import parse_row
from strategies import roles, rows, sizes_of, stored

SPLIT = Layout.parse("in {e}.{p:gate|up}_proj.weight f d\nout {e}.down_proj.weight d f")


@given(st.data())
def test_names_and_shapes_are_those_of_what_is_stored(data: st.DataObject) -> None:
    role = data.draw(roles())
    row = data.draw(rows(role))
    layout, sizes = Layout((row,)), sizes_of(role)
    arrays = stored(row, role)
    assert list(layout.shapes(sizes)) == list(layout.keys(sizes))
    assert list(layout.shapes(sizes).values()) == [array.shape for array in arrays]
    assert len(set(layout.keys(sizes))) == len(arrays)


@given(st.data())
def test_sizes_from_a_shape_are_the_inverse_of_the_shape(data: st.DataObject) -> None:
    role = data.draw(roles())
    row = data.draw(rows(role))
    sizes = sizes_of(role)
    known = {axis: n for axis, n in sizes.items() if data.draw(st.booleans())}
    shape = shape_of(row, sizes)
    fresh = solve_sizes(row, shape, known)
    assert fresh is not None
    assert all(sizes[axis] == size for axis, size in fresh.items())
    one_unknown = [
        axis
        for dim in row.dims
        if len(lost := [f.axis for f in dim.factors if not f.fixed and f.axis not in known]) == 1
        for axis in lost
    ]
    assert set(fresh) == set(one_unknown)
    for dim in range(len(shape)):
        wrong = tuple(n + (i == dim) for i, n in enumerate(shape))
        assert solve_sizes(row, wrong, sizes) is None
    assert solve_sizes(row, (*shape, 1), known) is None


def test_a_size_of_nothing_is_none() -> None:
    assert solve_sizes(parse_row("in x e f"), (0, 3), {}) is None
    assert solve_sizes(parse_row("in x (p f)"), (0,), {"p": 2}) is None


def test_derived_axes_only_confirm() -> None:
    row = parse_row("in.scale x f/4 d")
    assert solve_sizes(row, (2, 3), {}) == {"d": 3}
    assert solve_sizes(row, (2, 3), {"f": 8}) == {"d": 3}
    assert solve_sizes(row, (2, 3), {"f": 5}) == {"d": 3}
    assert solve_sizes(row, (2, 3), {"f": 9}) is None
    assert solve_sizes(parse_row("in.scale x (p f)/4"), (3,), {"p": 2, "f": 5}) == {}
    assert solve_sizes(parse_row("in.scale x (p f/4)"), (4,), {"p": 2, "f": 5}) == {}


@pytest.mark.parametrize("name", list(restow.layouts))
def test_every_named_layout_is_its_text(name: str) -> None:
    layout = restow.layouts[name]
    again = Layout.parse(str(layout))
    assert again == layout
    assert str(Layout(layout.rows, layout.sizes)) == "\n".join(map(str, layout.rows))
    assert {"in", "out"} <= set(layout.roles)


def test_text_comes_back_as_it_was_written() -> None:
    text = "  in   w e f  d\n\n  out  v e d f\n  e = config.num_experts\n"
    layout = Layout.parse(text)
    assert str(layout) == text
    assert layout == Layout.parse("in w e f d\nout v e d f\ne = num_experts")
    assert hash(layout) == hash(Layout.parse("in w e f d\nout v e d f\ne = num_experts"))


def test_keys_and_shapes() -> None:
    sizes = {"e": 2, "f": 3, "d": 5}
    assert list(SPLIT.keys(sizes)) == [
        "0.gate_proj.weight", "0.up_proj.weight", "1.gate_proj.weight", "1.up_proj.weight",
        "0.down_proj.weight", "1.down_proj.weight",
    ]  # fmt: skip
    assert SPLIT.shapes(sizes)["1.up_proj.weight"] == (3, 5)
    assert SPLIT.shapes(sizes)["1.down_proj.weight"] == (5, 3)
    assert restow.layouts["grouped"].shapes({**sizes, "p": 2}) == {
        "gate_and_up_projs": (2, 5, 6),
        "down_projs": (2, 3, 5),
    }


def test_a_second_bank_counts_on() -> None:
    layout = Layout.parse("in {e+E}.w f")
    assert list(layout.keys({"e": 2, "E": 64, "f": 1})) == ["64.w", "65.w"]


def test_sizes_may_differ_by_role() -> None:
    layout = Layout.parse("in {e}.w f d\nout {e}.v d f\nout.bias b e")
    shapes = layout.shapes({"e": 2, "e@in": 3, "f": 4, "d": 5})
    assert [name for name in shapes if name.endswith("w")] == ["0.w", "1.w", "2.w"]
    assert shapes["b"] == (2,)
    assert axis_size(layout.row("in"), "e", {"e": 2, "e@in": 3}) == 3


def test_a_row_is_found_by_its_role() -> None:
    assert SPLIT.row("out") == SPLIT.rows[1]
    with pytest.raises(KeyError):
        SPLIT.row("router")


def test_rows_for_people() -> None:
    assert rows_text(SPLIT) == (
        "in   {e}.{p:gate|up}_proj.weight  f d",
        "out  {e}.down_proj.weight         d f",
    )


@pytest.mark.parametrize(
    ("line", "key", "terms"),
    [
        ("e = config.num_experts", "e", ("num_experts",)),
        ("e@in = n_routed_experts + zero_expert_num", "e@in", ("n_routed_experts", "zero_expert_num")),
        ("f = a.b|c", "f", ("a.b|c",)),
        ("L = #layer_types", "L", ("#layer_types",)),
        ("p = 2", "p", ("2",)),
    ],
)
def test_size_lines(line: str, key: str, terms: tuple[str, ...]) -> None:
    found = parse_size(line)
    assert (found.key, found.terms) == (key, terms)
    assert parse_size(str(found)) == found


REFUSED = {
    "nothing": ("", "expected at least one row, found none\n  row       (empty)"),
    "a role twice": (
        "in x f\nin y f",
        "expected each role in one row, found 'in' in two\n  row       in y f\n            ^^",
    ),
    "a size without a path": (
        "e =",
        "expected AXIS = PATH [+ PATH], or AXIS@ROLE = ..., found 'e ='\n  row       e =\n            ^^^",
    ),
    "a size with two words": (
        "e = a b",
        "expected AXIS = PATH [+ PATH], or AXIS@ROLE = ..., found 'e = a b'\n"
        "  row       e = a b\n"
        "            ^^^^^^^",
    ),
}


@pytest.mark.parametrize(("text", "error"), REFUSED.values(), ids=REFUSED)
def test_a_layout_that_is_none_is_refused(text: str, error: str) -> None:
    with pytest.raises(NotationError) as caught:
        Layout.parse(text)
    assert str(caught.value) == error


def test_an_axis_without_a_size_is_refused() -> None:
    with pytest.raises(SizeError) as caught:
        SPLIT.shapes({"e": 2, "f": 3})
    assert str(caught.value) == (
        "expected a size for axis 'd' of role 'in', found none\n"
        "  row       in {e}.{p:gate|up}_proj.weight f d"
    )
