"""The notation: every construct as text, value and the same text again; every refusal in full."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restow.errors import NotationError
from restow.notation import Dim, Factor, Labels, Number, Row, parse_row
from strategies import roles, rows


def axes(*names: str) -> tuple[Dim, ...]:
    return tuple(Dim((Factor(name),)) for name in names)


E, GATE_UP, UP = Number("e"), Labels("p", ("gate", "up")), Labels("p", ("up",))

ROWS = {
    "a number and labels": (
        "in {e}.{p:gate|up}_proj.weight f d",
        Row("in", (E, ".", GATE_UP, "_proj.weight"), axes("f", "d")),
    ),
    "no axis in the name": ("out down_proj e d f", Row("out", ("down_proj",), axes("e", "d", "f"))),
    "up comes first": (
        "in {p:up|gate}.{e} f d",
        Row("in", (Labels("p", ("up", "gate")), ".", E), axes("f", "d")),
    ),
    "ungated": ("in {e}.{p:up}_proj f d", Row("in", (E, ".", UP, "_proj"), axes("f", "d"))),
    "a second bank": ("in {e+E}.w f d", Row("in", (Number("e", "E"), ".w"), axes("f", "d"))),
    "a number inside a segment": (
        "in linear_fc1.weight{e} (p f) d",
        Row("in", ("linear_fc1.weight", E), (Dim((Factor("p"), Factor("f"))), *axes("d"))),
    ),
    "labels of digits": ("in w{p:1|3} e f d", Row("in", ("w", Labels("p", ("1", "3"))), axes("e", "f", "d"))),
    "an axis of its own": ("in w13 e p f d", Row("in", ("w13",), axes("e", "p", "f", "d"))),
    "interleaved": (
        "in x e (f p) d",
        Row("in", ("x",), (*axes("e"), Dim((Factor("f"), Factor("p"))), *axes("d"))),
    ),
    "a fixed size": (
        "in.codes x e d/32 16",
        Row("in.codes", ("x",), (*axes("e"), Dim((Factor("d", 32),)), Dim((Factor("", 1, 16),)))),
    ),
    "a fixed size in a group": (
        "in x (f 16) d",
        Row("in", ("x",), (Dim((Factor("f"), Factor("", 1, 16))), *axes("d"))),
    ),
    "a scalar": ("in.scale2 {e}.s -", Row("in.scale2", (E, ".s"), ())),
    "a grid": (
        "in.scale x f/128 d/128",
        Row("in.scale", ("x",), (Dim((Factor("f", 128),)), Dim((Factor("d", 128),)))),
    ),
    "a grid a projection": (
        "in.scale x (p f/128) d",
        Row("in.scale", ("x",), (Dim((Factor("p"), Factor("f", 128))), *axes("d"))),
    ),
    "one grid over both": (
        "in.scale x (p f)/128 d",
        Row("in.scale", ("x",), (Dim((Factor("p"), Factor("f")), 128), *axes("d"))),
    ),
    "lora": (
        "in.A {p:gate|up}.lora_A (e r) d",
        Row("in.A", (GATE_UP, ".lora_A"), (Dim((Factor("e"), Factor("r"))), *axes("d"))),
    ),
    "dbrx": (
        "in {p:w1|v1} (e f) d",
        Row("in", (Labels("p", ("w1", "v1")),), (Dim((Factor("e"), Factor("f"))), *axes("d"))),
    ),
    "exact": ("router.bias gate.bias e exact", Row("router.bias", ("gate.bias",), axes("e"), exact=True)),
    "an exact scalar": ("a b - exact", Row("a", ("b",), (), exact=True)),
}  # fmt: skip


@given(st.data())
def test_any_row_is_its_text_again(data: st.DataObject) -> None:
    row = data.draw(rows(data.draw(roles())))
    assert parse_row(str(row)) == row
    spaced = str(row).replace(" ", "  \t").replace("(", "( ").replace(")", " )")
    assert parse_row(f"  {spaced}  ") == row


@pytest.mark.parametrize(("text", "row"), ROWS.values(), ids=ROWS)
def test_text_is_value_is_text(text: str, row: Row) -> None:
    assert parse_row(text) == row
    assert str(row) == text


def test_what_a_row_has_worked_out_stays_as_it_is() -> None:
    """Rows are shared by all who parse the same text, and go to other processes."""
    row = parse_row("in {e}.{p:gate|up}_proj.weight f/128 d")
    known = row.labels, row.axes, row.name_axes, row.base, [dim.keys for dim in row.dims]
    with pytest.raises(TypeError):
        row.labels["p"] = ("up", "gate")  # type: ignore[index]
    for word in ("role", "labels", "axes"):
        with pytest.raises(FrozenInstanceError):
            setattr(row, word, "out")
    for same in (copy.copy(row), copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert (same, hash(same)) == (row, hash(row))
        assert (same.labels, same.axes, same.name_axes, same.base, [d.keys for d in same.dims]) == known
    other = replace(row, role="in.scale", name=("x",))
    assert (other.base, dict(other.labels), other.name_axes) == ("in", {}, ())


def test_what_a_row_says_about_itself() -> None:
    row = parse_row("in.scale {e+E}.{p:gate|up}.s (f r)/4 d/2 16")
    assert row.base == "in"
    assert row.name_axes == ("e", "p")
    assert row.labels == {"p": ("gate", "up")}
    assert row.axes == {"e", "p", "(f r)/4", "d/2", "16"}
    assert [dim.keys for dim in row.dims] == [("(f r)/4",), ("d/2",), ("16",)]


NAME = "an axis as in {e}, {p:gate|up} or {e+E}"
DIM = "an axis, a fixed size or a group"
ONCE = "each axis once in a row"

REFUSED = [
    # text, carets below the row, expected, found
    ("", "^", "ROLE NAME DIMS", "nothing"),
    ("in", "^^", "ROLE NAME DIMS", "1 of 3 columns"),
    ("in x", "^^^^", "ROLE NAME DIMS", "2 of 3 columns"),
    ("in. x e", "^^^", "a role of words joined by dots", "'in.'"),
    ("in! x e", "^^^", "a role of words joined by dots", "'in!'"),
    ("in {e.x f", "   ^^^^^^", "'}' after '{'", "the end of the name"),
    ("in a.{e.x}.y f", "      ^^^", NAME, "'e.x'"),
    ("in {} f", "    ^", NAME, "''"),
    ("in {e+} f", "    ^^", NAME, "'e+'"),
    ("in {1e} f", "    ^^", NAME, "'1e'"),
    ("in { e } f", "    ^^^", NAME, "' e '"),
    ("in {:a|b} f", "    ^", "an axis before ':'", "''"),
    ("in {p:} f", "      ^", "different words separated by '|'", "''"),
    ("in {p:gate|gate} f", "      ^^^^^^^^^", "different words separated by '|'", "'gate|gate'"),
    ("in {p:a b} f", "      ^^^", "different words separated by '|'", "'a b'"),
    ("in x/y f", "    ^", "letters, digits, '.', '_', '-' or an axis in braces", "'/'"),
    ("in x*y f", "    ^", "letters, digits, '.', '_', '-' or an axis in braces", "'*'"),
    ("in \u00e9 f", "   ^", "letters, digits, '.', '_', '-' or an axis in braces", "'?'"),
    ("in {e}{f} d", "   ^^^^^^", "at most one number between two dots", "2"),
    ("in a..b f", "   ^^^^", "a name whose segments are not empty", "'a..b'"),
    ("in .a f", "   ^^", "a name whose segments are not empty", "'.a'"),
    ("in {e}. f", "   ^^^^", "a name whose segments are not empty", "'{e}.'"),
    ("in x (p f", "     ^^^^", "')' after '('", "the end of the row"),
    ("in x () f", "     ^^", "axes between '(' and ')'", "none"),
    ("in x ((p f))", "      ^", DIM, "'('"),
    ("in x f)", "      ^", DIM, "')'"),
    ("in x (p f)d", "          ^", "a space after a group", "'d'"),
    ("in x f-d", "      ^", DIM, "'-'"),
    ("in x -x", "     ^", DIM, "'-'"),
    ("in x 3f", "     ^^", DIM, "'3f'"),
    ("in x 0", "     ^", "a fixed size of at least 1", "0"),
    ("in x 16/2", "       ^", DIM, "'/'"),
    ("in x f/0", "      ^^", "'/' and a whole number of at least 1", "'/0'"),
    ("in x f/", "      ^", "'/' and a whole number of at least 1", "'/'"),
    ("in x f/d", "      ^", "'/' and a whole number of at least 1", "'/'"),
    ("in x f/2/2", "      ^^", "'/' and a whole number of at least 1", "'/2'"),
    ("in x (p f)/0", "          ^^", "'/' and a whole number of at least 1", "'/0'"),
    ("in x f f", "       ^", ONCE, "'f' twice"),
    ("in {e}.w e f", "         ^", ONCE, "'e' twice"),
    ("in {e}.{e} f", "   ^", ONCE, "'e' twice"),
    ("in x (p f) p", "           ^", ONCE, "'p' twice"),
    ("in x f/2 f/2", "         ^^^", ONCE, "'f/2' twice"),
    ("in x 2 f 2", "         ^", ONCE, "'2' twice"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "carets", "expected", "found"), REFUSED, ids=[row[0] or "empty" for row in REFUSED]
)
def test_a_row_that_is_none_is_refused(text: str, carets: str, expected: str, found: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_row(text)
    shown = text.encode("ascii", "replace").decode()
    hint = "\n  try       write a scalar's dims as -" if "ROLE" in expected else ""
    assert str(caught.value) == (
        f"expected {expected}, found {found}\n  row       {shown}\n            {carets}{hint}"
    )


def test_one_refusal_to_the_letter() -> None:
    with pytest.raises(NotationError) as caught:
        parse_row("in    {e}.{p:gate|up_proj.weight   f d")
    assert str(caught.value) == (
        "expected '}' after '{', found the end of the name\n"
        "  row       in    {e}.{p:gate|up_proj.weight   f d\n"
        "                      ^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


@given(st.text("in xefd(){}/:|+.-12 \t\u00b2", max_size=24))
def test_any_text_is_a_row_or_is_refused(text: str) -> None:
    try:
        row = parse_row(text)
    except NotationError as error:
        assert str(error).isascii()
    else:
        assert parse_row(str(row)) == row
