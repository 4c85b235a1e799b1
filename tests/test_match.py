"""Names found by rows: every name of a layout with its row and indices, and no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import restow
from restow.layout import Layout
from restow.match import Hit, Matcher
from strategies import roles, rows, sizes_of

SIZES = {"e": 12, "p": 2, "f": 3, "d": 5, "E": 64}
PREFIXES = ["", "model.layers.3.mlp.experts.", "base_model.model.model.layers.10.block.", "0.1."]


def found(matcher: Matcher, name: str) -> list[tuple[int, str, str, tuple[int, ...]]]:
    return [(hit.tag, hit.row.role, hit.path, hit.index) for hit in matcher.match(name)]


def matcher_of(*layouts: str, container: str = "") -> Matcher:
    parsed = [Layout.parse(text) for text in layouts]
    return Matcher(((i, container, row) for i, layout in enumerate(parsed) for row in layout.rows), SIZES)


@given(st.data())
def test_every_name_of_a_row_is_found_with_its_indices(data: st.DataObject) -> None:
    role = data.draw(roles())
    row = data.draw(rows(role))
    layout = Layout((row,))
    matcher = Matcher([(7, "", row)], {})
    prefix = data.draw(st.sampled_from(PREFIXES))
    sizes = sizes_of(role)
    lengths = [sizes[axis] for axis in row.name_axes]
    for at, name in enumerate(layout.keys(sizes)):
        index = []
        for length in reversed(lengths):
            at, i = divmod(at, length)
            index.append(i)
        hits = matcher.match(prefix + name)
        assert Hit(7, row, prefix.rstrip("."), tuple(reversed(index))) in hits
        assert len(hits) == 1


@pytest.mark.parametrize("name", list(restow.layouts))
def test_every_name_of_a_named_layout_is_found_once(name: str) -> None:
    layout = restow.layouts[name]
    matcher = Matcher(((0, "", row) for row in layout.rows), SIZES)
    for prefix in PREFIXES[1:3]:
        for key in layout.keys(SIZES):
            (hit,) = matcher.match(prefix + key)
            assert hit.path == prefix.rstrip(".")


SPLIT = "in {e}.{p:gate|up}_proj.weight f d\nout {e}.down_proj.weight d f"
AT = "model.layers.0.mlp.experts"

TABLE = [
    pytest.param(SPLIT, f"{AT}.11.up_proj.weight", [(0, "in", AT, (11, 1))], id="two digits"),
    pytest.param(SPLIT, f"{AT}.0.down_proj.weight", [(0, "out", AT, (0,))], id="zero"),
    pytest.param(SPLIT, f"{AT}.100.up_proj.weight", [(0, "in", AT, (100, 1))], id="beyond the sizes"),
    pytest.param(SPLIT, f"{AT}.07.up_proj.weight", [], id="a leading zero"),
    pytest.param(SPLIT, f"{AT}.00.up_proj.weight", [], id="two zeros"),
    pytest.param(SPLIT, f"{AT}.-1.up_proj.weight", [], id="a sign"),
    pytest.param(SPLIT, f"{AT}.+1.up_proj.weight", [], id="plus"),
    pytest.param(SPLIT, f"{AT}.1_0.up_proj.weight", [], id="an underscore"),
    pytest.param(SPLIT, f"{AT}.\u0661.up_proj.weight", [], id="a digit of another script"),
    pytest.param(SPLIT, f"{AT}.9999999999.up_proj.weight", [], id="a number that no module has"),
    pytest.param(SPLIT, f"{AT}.x.up_proj.weight", [], id="no number"),
    pytest.param(SPLIT, f"{AT}.1.up_proj.weight_scale_inv", [], id="a companion without a row"),
    pytest.param(SPLIT, f"{AT}.1.up_proj.bias", [], id="a bias without a row"),
    pytest.param(SPLIT, f"{AT}.1.gateup_proj.weight", [], id="another label"),
    pytest.param(SPLIT, f"{AT}.1.up_proj", [], id="less"),
    pytest.param(SPLIT, "up_proj.weight", [], id="no number at all"),
    pytest.param("in w{e} f", "a.w3", [(0, "in", "a", (3,))], id="a number inside a segment"),
    pytest.param("in w{e} f", "a.w03", [], id="a leading zero inside a segment"),
    pytest.param("in w{e}w f", "a.w", [], id="before and after overlap"),
    pytest.param("in w{e} f\nout w{p:1|3} f", "a.w1", [(0, "in", "a", (1,)), (0, "out", "a", (0,))],
                 id="two rows"),
    pytest.param("in {e+E}.w f", "a.70.w", [(0, "in", "a", (6,))], id="a second bank"),
    pytest.param("in {e+E}.w f", "a.63.w", [], id="the first bank"),
    pytest.param("in {f}.x.{e} d", "a.2.x.5", [(0, "in", "a", (2, 5))], id="two numbers, outer first"),
    pytest.param("in {e}.{p:gate|up}.{f} d", "a.2.up.5", [(0, "in", "a", (2, 1, 5))],
                 id="numbers around labels"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "hits"), TABLE)
def test_names(text: str, name: str, hits: list[tuple[int, str, str, tuple[int, ...]]]) -> None:
    assert sorted(found(matcher_of(text), name)) == hits


def test_several_candidates_answer() -> None:
    matcher = matcher_of("in gate_up_proj e (p f) d", "in gate_up_proj e d (p f)")
    assert [hit.tag for hit in matcher.match(f"{AT}.gate_up_proj")] == [0, 1]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"{AT}.w", AT),
        ("experts.w", None),
        ("mlp.experts.w", "mlp.experts"),
        ("model.xmlp.experts.w", None),
        ("model.mlp.shared_experts.w", None),
        ("model.mlp.experts.0.w", None),
    ],
)
def test_a_container_is_whole_segments(name: str, path: str | None) -> None:
    hits = matcher_of("in w f", container="mlp.experts").match(name)
    assert [hit.path for hit in hits] == ([] if path is None else [path])
