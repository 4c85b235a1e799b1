"""Verification: two forms of one model are equal, whatever the layout; whatever differs is found, named and explained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import restow
import tiny
from moe import AT, AXES, Model, Tensors, raw, spell, write
from restow.errors import NotSafetensorsError, RestowError, TruncatedFileError, UsageError
from restow.torch import explain as explaining
from restow.torch import verify as module
from restow.torch import verify_report as reporting
from test_tiny_oracle import UNGATED, damaged, expert_layers, reverse_experts, swap_gate_and_up
from test_tiny_oracle import read as read_saved

MANIFEST = "checkpoint.manifest.json"
IDS = [
    pytest.param(family_id, marks=pytest.mark.slow if family.slow else ())
    for family_id, family in tiny.FAMILIES.items()
]
FUSED_ELSEWHERE = {
    "step3p7"
}  # its vision tower's queries, keys and values are fused on the hub: no pure rename

# Twelve experts, since text order and the order of numbers agree up to ten.
MODEL = Model(e=12)
SQUARE = Model(e=12, f=8, d=8)
WIDE = Model(e=12, dtype=torch.float32)
LAYOUTS = [
    ("split", "split"), ("split", "grouped"), ("grouped", "fused"), ("fused", "split"), ("stacked", "grouped"),
    ("epfd", "split"), ("megatron", "mlx"),
]  # fmt: skip
ACROSS = pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)

Weights = dict[tuple[str, int], torch.Tensor]
Change = Callable[[Weights, Tensors], object]


def checkpoint(
    folder: Path, model: Model = MODEL, layout: str = "split", change: Change | None = None
) -> Path:
    """A folder of the model in a layout, its weights (by role and layer, over `AXES`) and other tensors changed."""
    weights = {
        (role, layer): model.weight(role, layer).clone()
        for role in model.roles
        for layer in range(model.layers)
    }
    tensors = model.others
    if change is not None:
        change(weights, tensors)
    for (role, layer), whole in weights.items():
        for row in restow.families[model.family].form(layout).rows:
            if row.role == role:
                spelled = spell(row, AXES[role], whole)
                tensors |= {f"{model.at.format(layer)}.{name}": t for name, t in spelled.items()}
    return write(folder, tensors, model.config, files=3)


def nbytes(folder: Path) -> int:
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())


def both(
    folder: Path, layouts: tuple[str, str], change: Change, model: Model = MODEL, other: Model | None = None
) -> restow.VerifyReport:
    """Verify a model against itself with a change, each in its layout."""
    a = checkpoint(folder / "a", model, layouts[0])
    b = checkpoint(folder / "b", other or model, layouts[1], change)
    report = restow.verify(a, b)
    check_bytes(report, a, b)
    return report


def check_bytes(report: restow.VerifyReport, a: Path, b: Path) -> None:
    """Each byte of both sides is read once."""
    assert report.bytes_read == nbytes(a) + nbytes(b)


# One model in two forms.


@pytest.mark.parametrize("family_id", IDS)
def test_the_hubs_form_equals_the_runtimes(family_id: str) -> None:
    hub, runtime = tiny.saved(family_id), tiny.saved(family_id, False)
    for a, b in ((hub, runtime), (runtime, hub)):
        report = restow.verify(a, b, experts_only=True)
        assert report.equal, report
        assert report.differences == report.notes == ()
        held = [restow.open(side).expert_tensors for side in (a, b)]
        assert report.tensors == len(held[1])
        sizes = [sum(t.nbytes for n, t in read_saved(side).items() if n in names)
                 for side, names in zip((a, b), held, strict=True)]  # fmt: skip
        if (family_id, a) != ("step3p7", runtime):  # one projection out of short rows of two
            assert report.bytes_read == sum(sizes) > 0
        whole = restow.verify(a, b)
        assert whole.equal == (family_id not in FUSED_ELSEWHERE), whole
        if whole.equal:
            assert whole.bytes_read == nbytes(a) + nbytes(b)
        else:
            assert all("vision_model" in d.name and d.kind in ("extra", "missing") for d in whole.differences)


CASES = [(family_id, sizes) for family_id in tiny.FAMILIES for sizes in tiny.SIZES if sizes != "plain"]


@pytest.mark.parametrize(
    ("family_id", "sizes"),
    [pytest.param(*case, marks=() if i % 3 == 0 else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_the_forms_are_equal_where_matrices_are_square(family_id: str, sizes: str) -> None:
    assert restow.verify(
        tiny.saved(family_id, sizes=sizes), tiny.saved(family_id, False, sizes), experts_only=True
    ).equal


@pytest.mark.parametrize("family_id", IDS)
def test_exchanged_matrices_are_found_in_every_family(family_id: str, tmp_path: Path) -> None:
    """Files that transformers would load without a word: names, shapes and dtypes are right."""
    hub, runtime = tiny.saved(family_id), tiny.saved(family_id, False)
    layer = expert_layers(read_saved(hub))[-1]
    gated = family_id not in UNGATED
    if gated:
        report = restow.verify(runtime, damaged(hub, tmp_path / "swapped", swap_gate_and_up, layer))
        found = [d for d in report.differences if d.leaf is not None and d.leaf[0] == "in"]
        assert len(found) == 24
        assert {d.why for d in found} == {"gate and up exchanged"}
        assert {d.leaf for d in found} == {("in", e, p) for e in range(12) for p in range(2)}
        assert all(d.name.startswith(layer) for d in found)
    report = restow.verify(
        runtime, damaged(hub, tmp_path / "reversed", reverse_experts, layer), experts_only=True
    )
    found = [d for d in report.differences if d.leaf is not None and d.leaf[0] in ("in", "out")]
    assert len(found) == (36 if gated else 24)
    for difference in found:
        assert difference.leaf is not None
        e = difference.leaf[1]
        assert difference.why == f"expert {e} here is expert {11 - e} there"


# What differs, across layouts.


@ACROSS
def test_equal_across_layouts(layouts: tuple[str, str], tmp_path: Path) -> None:
    report = both(tmp_path, layouts, lambda weights, others: None)
    assert report.equal
    assert report.differences == report.notes == report.warnings == ()
    assert str(report).startswith(f"equal: {report.tensors} tensors, {report.bytes_read:,} bytes read, ")


@ACROSS
@pytest.mark.parametrize("role", ["in", "out"])
def test_one_value(layouts: tuple[str, str], role: str, tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        place = (7, 1, 2, 5) if role == "in" else (7, 2, 5)
        weights[role, 1][place] = -1.5

    report = both(tmp_path, layouts, change)
    (found,) = report.differences
    assert not report.equal
    assert (found.kind, found.leaf, found.count, found.total) == (
        "values",
        (role, 7, int(role == "in")),
        1,
        60,
    )
    assert found.why == ""
    there = MODEL.weight(role, 1)[(7, 1, 2, 5) if role == "in" else (7, 2, 5)].item()
    assert found.values == (there, -1.5)
    assert found.max_abs == there + 1.5
    held = read_saved(tmp_path / "b")[found.name]
    assert held[found.index] == -1.5, "the index is the one in the tensor"
    word = "up" if role == "in" else "down"
    text = f"values  {found.name} (expert 7, {word}): 1 of 60 elements, first at {list(found.index)}: "
    assert str(found).startswith(text)


@ACROSS
def test_two_exchanged_experts(layouts: tuple[str, str], tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        for role in ("in", "out"):
            weights[role, 0][[2, 10]] = weights[role, 0][[10, 2]]

    report = both(tmp_path, layouts, change)
    assert {(d.leaf, d.why) for d in report.differences} == {
        ((role, here, p), f"expert {here} here is expert {there} there")
        for here, there in ((2, 10), (10, 2))
        for role, p in (("in", 0), ("in", 1), ("out", 0))
    }
    assert all(AT.format(0) in d.name for d in report.differences)


@ACROSS
def test_gate_and_up_exchanged(layouts: tuple[str, str], tmp_path: Path) -> None:
    report = both(
        tmp_path, layouts, lambda weights, _: weights["in", 1][4].copy_(MODEL.weight("in", 1)[4].flip(0))
    )
    assert {(d.leaf, d.why) for d in report.differences} == {
        (("in", 4, 0), "gate and up exchanged"), (("in", 4, 1), "gate and up exchanged")
    }  # fmt: skip


@ACROSS
@pytest.mark.parametrize("inverse", [False, True])
def test_text_order(layouts: tuple[str, str], inverse: bool, tmp_path: Path) -> None:
    as_text = sorted(range(12), key=str)
    assert as_text == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    order = [as_text.index(e) for e in range(12)] if inverse else as_text

    def change(weights: Weights, others: Tensors) -> None:
        for key, whole in weights.items():
            weights[key] = whole[order]

    report = both(tmp_path, layouts, change)
    assert len(report.differences) == 2 * 3 * 10
    for difference in report.differences:
        assert difference.leaf is not None
        e = difference.leaf[1]
        assert difference.why == f"expert {e} here is expert {order[e]} there: text order"


@ACROSS
def test_transposed(layouts: tuple[str, str], tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        weights["out", 0][5] = weights["out", 0][5].t().clone()
        weights["in", 1][3, 0] = weights["in", 1][3, 0].t().clone()

    report = both(tmp_path, layouts, change, SQUARE)
    assert {(d.leaf, d.why) for d in report.differences} == {
        (("out", 5, 0), "transposed"), (("in", 3, 0), "transposed")
    }  # fmt: skip


def test_another_roles_values(tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        weights["in", 0][3, 1] = weights["out", 0][9].t()  # as down_proj is stored

    (found,) = both(tmp_path, ("split", "grouped"), change, SQUARE).differences
    assert found.why == "its values are those of role 'out', expert 9 there"


@pytest.mark.parametrize("layouts", LAYOUTS[:4], ids="-".join)
def test_values_out_of_nowhere_are_not_explained(layouts: tuple[str, str], tmp_path: Path) -> None:
    report = both(tmp_path, layouts, lambda weights, _: weights["in", 0][3].neg_())
    assert [d.why for d in report.differences] == ["", ""]
    assert [d.count for d in report.differences] == [60, 60]


def test_more_modules_than_are_explained(tmp_path: Path) -> None:
    model = MODEL.but(layers=11)

    def change(weights: Weights, others: Tensors) -> None:
        for layer in range(11):
            weights["out", layer][[0, 1]] = weights["out", layer][[1, 0]]

    found = both(tmp_path, ("split", "grouped"), change, model).differences
    assert len(found) == 22
    assert sum(d.why != "" for d in found) == 2 * explaining.MODULES == 16


# Numbers.


@pytest.mark.parametrize("layouts", LAYOUTS[:4], ids="-".join)
def test_rounding_is_told(layouts: tuple[str, str], tmp_path: Path) -> None:
    halves = WIDE.but(dtype=torch.bfloat16)
    a = checkpoint(tmp_path / "a", WIDE, layouts[0], fine)
    report = restow.verify(a, checkpoint(tmp_path / "b", halves, layouts[1], rounded))
    assert not report.equal
    kinds = {d.kind for d in report.differences}
    assert kinds == {"values"}
    assert {d.why for d in report.differences} == {"equal after rounding to bfloat16"}
    assert len(report.differences) == 2 * 36 + len(WIDE.others)
    report = restow.verify(a, checkpoint(tmp_path / "c", WIDE, layouts[1], rounded))
    assert {d.why for d in report.differences} == {"equal after rounding to bfloat16"}


def fine(weights: Weights, others: Tensors) -> None:
    """Values that bfloat16 does not have, and that stay different from each other in it."""
    rng = torch.Generator().manual_seed(5)
    for tensor in (*weights.values(), *others.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=rng))


def rounded(weights: Weights, others: Tensors) -> None:
    """The same as bfloat16 has them, in whatever dtype the model has."""
    fine(weights, others)
    for some in (weights, others):
        for key, tensor in some.items():
            some[key] = tensor.bfloat16().to(tensor.dtype)  # type: ignore[index]


@ACROSS
@pytest.mark.parametrize("turned", [False, True])
def test_another_dtype_with_equal_values(layouts: tuple[str, str], turned: bool, tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", MODEL, layouts[0])
    b = checkpoint(tmp_path / "b", WIDE, layouts[1], widened)
    report = restow.verify(*((b, a) if turned else (a, b)))
    assert report.equal, report
    pair = ("F32", "BF16") if turned else ("BF16", "F32")
    assert report.notes == (
        f"{report.tensors} tensors are {pair[0]} there and {pair[1]} here, with equal values",
    )
    assert f"  note: {report.notes[0]}" in str(report)
    check_bytes(report, *((b, a) if turned else (a, b)))


def widened(weights: Weights, others: Tensors) -> None:
    for key in weights:
        weights[key] = MODEL.weight(*key).float()
    others.update({name: tensor.float() for name, tensor in MODEL.others.items()})


def test_text_order_is_seen_through_a_cast(tmp_path: Path) -> None:
    order = sorted(range(12), key=str)

    def change(weights: Weights, others: Tensors) -> None:
        rounded(weights, others)
        for key, whole in weights.items():
            weights[key] = whole[order]

    a = checkpoint(tmp_path / "a", WIDE, "split", fine)
    report = restow.verify(a, checkpoint(tmp_path / "b", WIDE.but(dtype=torch.bfloat16), "grouped", change))
    whys = {d.leaf[1]: d.why for d in report.differences if d.leaf is not None}
    assert whys[2] == "expert 2 here is expert 10 there: text order"
    assert whys[0] == "equal after rounding to bfloat16"


def bits(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int16).view(torch.bfloat16)


NAN, OTHER_NAN = 0x7FC0, 0x7FC1


@ACROSS
def test_nan_is_equal_to_the_same_bits_only(layouts: tuple[str, str], tmp_path: Path) -> None:
    def planted(value: int) -> Change:
        def change(weights: Weights, others: Tensors) -> None:
            weights["in", 0][1, 0, 0, 0] = bits(value)
            others["model.norm.weight"][0] = bits(value)

        return change

    a = checkpoint(tmp_path / "a", MODEL, layouts[0], planted(NAN))
    assert restow.verify(a, checkpoint(tmp_path / "same", MODEL, layouts[1], planted(NAN))).equal
    report = restow.verify(a, checkpoint(tmp_path / "b", MODEL, layouts[1], planted(OTHER_NAN)))
    assert [d.count for d in report.differences] == [1, 1]
    assert {d.max_abs for d in report.differences} == {float("inf")}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layouts", LAYOUTS[:3], ids="-".join)
def test_the_signs_of_zeros_count(layouts: tuple[str, str], wide: bool, tmp_path: Path) -> None:
    def planted(zero: float) -> Change:
        def change(weights: Weights, others: Tensors) -> None:
            weights["out", 1][11, 0, 0] = zero

        return change

    a = checkpoint(tmp_path / "a", MODEL, layouts[0], planted(0.0))
    assert restow.verify(a, checkpoint(tmp_path / "same", MODEL, layouts[1], planted(0.0))).equal

    def cast(weights: Weights, others: Tensors) -> None:
        if wide:
            widened(weights, others)
        planted(-0.0)(weights, others)
        planted_plus = MODEL.weight("out", 1)[11, 0, 0]
        assert planted_plus != 0

    (found,) = restow.verify(
        a, checkpoint(tmp_path / "b", WIDE if wide else MODEL, layouts[1], cast)
    ).differences
    assert (found.leaf, found.count, found.max_abs, found.values) == (("out", 11, 0), 1, 0.0, (0.0, -0.0))


def test_nan_across_dtypes_is_equal_whatever_its_payload(tmp_path: Path) -> None:
    def nan(value: float) -> Change:
        def change(weights: Weights, others: Tensors) -> None:
            if weights["in", 0].dtype == torch.float32:
                widened(weights, others)
            weights["in", 0][0, 0, 0, 0] = value

        return change

    a = checkpoint(tmp_path / "a", MODEL, "split", nan(float("nan")))
    assert restow.verify(a, checkpoint(tmp_path / "b", WIDE, "grouped", nan(float("nan")))).equal
    assert not restow.verify(a, checkpoint(tmp_path / "c", WIDE, "grouped", nan(1.0))).equal


def test_integers_against_floats(tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        others["model.norm.weight"] = torch.arange(10)

    (found,) = (d for d in both_unread(tmp_path, change).differences)
    assert (found.kind, found.name, found.why) == ("dtype", "model.norm.weight", "BF16 there, I64 here")


def both_unread(folder: Path, change: Change, model: Model = MODEL) -> restow.VerifyReport:
    a, b = checkpoint(folder / "a", model), checkpoint(folder / "b", model, "grouped", change)
    return restow.verify(a, b)


# Names and shapes.


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        others["model.extra"] = torch.zeros(3)
        del others["model.norm.weight"]

    report = both_unread(tmp_path, change)
    assert [(d.kind, d.name, d.why) for d in report.differences] == [
        ("extra", "model.extra", "not in the first checkpoint"),
        ("missing", "model.norm.weight", "not in the second checkpoint"),
    ]
    assert restow.verify(tmp_path / "a", tmp_path / "b", experts_only=True).equal


def test_a_missing_layer_and_a_missing_role(tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        del weights["in", 1], weights["out", 1]

    report = both_unread(tmp_path, change)
    assert [(d.kind, d.name, d.why) for d in report.differences] == [
        ("missing", AT.format(1), "experts that the second checkpoint does not have")
    ]
    turned = restow.verify(tmp_path / "b", tmp_path / "a")
    assert [(d.kind, d.name, d.why) for d in turned.differences] == [
        ("extra", AT.format(1), "experts that the first checkpoint does not have")
    ]


def test_a_missing_expert_is_named_and_the_rest_compared(tmp_path: Path) -> None:
    gone = f"{AT.format(0)}.3.down_proj.weight"
    a = checkpoint(tmp_path / "a", MODEL, "grouped")
    b = checkpoint(tmp_path / "b", MODEL, "split", lambda weights, _: weights["in", 0][[1, 2]].neg_())

    for file in b.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if n != gone}, file)
    index = json.loads((b / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (b / "model.safetensors.index.json").write_text(json.dumps(index))
    for one, other, where in ((a, b, "here"), (b, a, "there")):
        report = restow.verify(one, other)
        assert [(d.kind, d.name, d.why) for d in report.differences] == [
            (
                "missing", gone,
                f"missing {where}; the other tensors of role 'out' of {AT.format(0)} were not compared",
            )
        ]  # fmt: skip
        assert any("3.down_proj.weight" in text for text in report.warnings)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_tensor_of_another_shape_is_named(rows: int, tmp_path: Path) -> None:
    """One without elements, too: it has none that could be unlike."""
    name = f"{AT.format(0)}.3.gate_proj.weight"
    a, b = checkpoint(tmp_path / "a", MODEL, "grouped"), checkpoint(tmp_path / "b", MODEL, "split")
    for file in b.glob("*.safetensors"):
        save_file({n: t[:rows] if n == name else t for n, t in load_file(file).items()}, file)
    for one, other, where in ((a, b, "here"), (b, a, "there")):
        report = restow.verify(one, other)
        assert [(d.kind, d.name, d.why) for d in report.differences] == [
            (
                "shape", name, f"[{rows}, {MODEL.d}] {where}, [{MODEL.f}, {MODEL.d}] by the sizes of "
                f"{AT.format(0)}; its role 'in' was not compared",
            )
        ]  # fmt: skip
        assert not report.equal


def test_biases_on_one_side_only(tmp_path: Path) -> None:
    biased = Model(e=12, family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))

    def change(weights: Weights, others: Tensors) -> None:
        for layer in range(2):
            del weights["in.bias", layer]

    a = checkpoint(tmp_path / "a", biased, "grouped")
    b = checkpoint(tmp_path / "b", biased, "split", change)
    assert restow.verify(a, a).equal
    for sides, kind, which in (((a, b), "missing", "second"), ((b, a), "extra", "first")):
        assert [(d.kind, d.name, d.why) for d in restow.verify(*sides).differences] == [
            (kind, AT.format(i), f"no role 'in.bias' in the {which} checkpoint") for i in (0, 1)
        ]
    assert restow.verify(b, b).equal, "what neither has is no difference"
    rows = [row for row in restow.families["gpt_oss"].form("split").rows if row.role != "in.bias"]
    without = restow.open(b, layout=restow.Layout(tuple(rows)))
    for sides, kind, which in (
        ((a, without), "missing", "second"),
        ((without, a), "extra", "first"),
    ):  # said so
        assert [(d.kind, d.name, d.why) for d in restow.verify(*sides).differences] == [
            (kind, AT.format(i), f"no role 'in.bias' in the {which} checkpoint") for i in (0, 1)
        ]


def test_interleaved_places_are_those_of_the_tensor(tmp_path: Path) -> None:
    biased = Model(e=12, family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))

    def change(weights: Weights, others: Tensors) -> None:
        weights["in", 1][6, 1, 4, 3] = -2.0
        weights["in.bias", 0][2, 0, 5] = -3.0

    a = checkpoint(tmp_path / "a", biased, "split")
    for layout in ("hf", "grouped", "fused"):
        b = checkpoint(tmp_path / layout, biased, layout, change)
        found = {d.leaf: d for d in restow.verify(a, b).differences}
        assert found.keys() == {("in", 6, 1), ("in.bias", 2, 0)}
        for difference in found.values():
            assert read_saved(b)[difference.name][difference.index] == difference.values[1] < -1.5


def test_a_pruned_checkpoint_is_another(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a")
    restow.convert(a, tmp_path / "b", to="grouped", experts=range(8))
    report = restow.verify(a, tmp_path / "b")
    assert sorted((d.kind, d.name, d.why) for d in report.differences) == sorted([
        *(("shape", AT.format(layer), "e = 12 there, 8 here") for layer in (0, 0, 1, 1)),
        *(("shape", f"model.layers.{i}.mlp.gate.weight", "[12, 10] there, [8, 10] here") for i in (0, 1)),
    ])  # fmt: skip


@pytest.mark.parametrize(
    "rename",
    [
        [("model", "transformer.h"), ("lm_head", "head")],
        {
            **{
                name: f"transformer.h{name.removeprefix('model')}"
                for name in (
                    *(f"model.layers.{{}}.mlp.experts.{{}}.{p}_proj.weight" for p in ("gate", "up", "down")),
                    "model.layers.{}.mlp.gate.weight", "model.norm.weight", "model.embed_tokens.weight",
                )
            },
            "lm_head.weight": "head.weight",
        },
    ],
    ids=["runs", "table"],
)  # fmt: skip
def test_other_names(rename: object, tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a")
    there = {
        re.sub("^model", "transformer.h", re.sub("^lm_head", "head", n)): t for n, t in read_saved(a).items()
    }
    b = write(tmp_path / "b", there, MODEL.config)
    assert not restow.verify(a, b).equal
    report = restow.verify(a, b, rename=rename)  # type: ignore[arg-type]
    assert report.equal, report
    assert report.bytes_read == nbytes(a) + nbytes(b)
    with pytest.raises(UsageError):
        restow.verify(a, b, rename=[("one",)])  # type: ignore[list-item]


def test_a_table_may_say_that_a_name_has_no_place(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", change=lambda _, others: others.update({"rope.inv_freq": torch.ones(2)}))
    b = checkpoint(tmp_path / "b")
    assert [d.name for d in restow.verify(a, b).differences] == ["rope.inv_freq"]
    assert restow.verify(a, b, rename={"rope.inv_freq": None}).equal


# Folders of which nobody knows the family.


@pytest.mark.parametrize("config", [None, {"model_type": "nobody"}], ids=["no config", "unknown"])
@pytest.mark.parametrize(
    "layouts", [("split", "split"), ("split", "grouped"), ("fused", "stacked")], ids="-".join
)
def test_folders_of_an_unknown_family(
    layouts: tuple[str, str], config: Mapping[str, object] | None, tmp_path: Path
) -> None:
    sides = [checkpoint(tmp_path / str(i), MODEL, layout) for i, layout in enumerate(layouts)]
    other = checkpoint(tmp_path / "other", MODEL, layouts[1], lambda weights, _: weights["out", 0][3].neg_())
    for folder in (*sides, other):
        (folder / "config.json").unlink()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
    report = restow.verify(*sides)
    assert report.equal, report
    check_bytes(report, *sides)
    assert len(report.warnings) == 2, "that the family is unknown is told"
    found = restow.verify(sides[0], other).differences
    assert [(d.kind, d.leaf) for d in found] == [("values", ("out", 3, 0))]
    assert restow.verify(sides[0]).equal
    with pytest.raises(RestowError):
        restow.verify(*sides, strict=True)


def test_names_that_no_layout_explains_are_compared_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "a.w": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([1, 2]),
        "c.empty": torch.empty(0, 3),
    }
    for name in "ab":
        write(tmp_path / name, tensors, {})
        (tmp_path / name / "config.json").unlink()
    report = restow.verify(tmp_path / "a", tmp_path / "b")
    assert (report.equal, report.tensors, report.bytes_read) == (True, 3, 2 * (24 + 16))
    write(tmp_path / "c", {**tensors, "b": torch.tensor([1, 3])}, {})
    (found,) = restow.verify(tmp_path / "a", tmp_path / "c").differences
    assert (found.name, found.leaf, found.index, found.values) == ("b", None, (1,), (2.0, 3.0))
    assert str(found) == "values  b: 1 of 2 elements, first at [1]: 2 and 3, at most 1 apart"


def test_one_side_that_knows_its_family_is_enough(tmp_path: Path) -> None:
    hub, runtime = tiny.saved("mixtral"), tiny.saved("mixtral", False)
    shutil.copytree(hub, tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    assert restow.verify(tmp_path / "a", runtime).equal
    assert restow.verify(runtime, tmp_path / "a").equal


# One checkpoint alone.


def test_a_converted_folder_is_what_its_manifest_says(tmp_path: Path) -> None:
    restow.convert(tiny.saved("qwen3_moe"), tmp_path / "a", to="grouped", max_shard_bytes=30_000)
    report = restow.verify(tmp_path / "a")
    assert report.equal, report
    assert report.bytes_read == nbytes(tmp_path / "a")
    assert report.tensors == len(read_saved(tmp_path / "a"))
    assert "no manifest" not in str(report)
    assert "no manifest: headers, cover and values were checked" in str(
        restow.verify(tiny.saved("qwen3_moe"))
    )


def test_one_flipped_bit_anywhere_in_the_data(tmp_path: Path) -> None:
    restow.convert(checkpoint(tmp_path / "s"), tmp_path / "a", to="grouped")
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entries = restow.open(tmp_path / "a").tensors
    for at in range(start, len(data), (len(data) - start) // 13):
        (name,) = (n for n, e in entries.items() if e.pieces[0].begin <= at < e.pieces[0].end)
        data[at] ^= 0x10
        file.write_bytes(data)
        report = restow.verify(tmp_path / "a")
        assert not report.equal
        assert {(d.kind, d.name) for d in report.differences} == {("digest", name)}
        data[at] ^= 0x10
    file.write_bytes(data)
    assert restow.verify(tmp_path / "a").equal


def test_files_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "s")
    (source / "tokenizer.json").write_text("{}")
    restow.convert(source, tmp_path / "a", to="grouped")
    config = tmp_path / "a" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_experts": 12', '"num_experts":  12'))
    (tmp_path / "a" / "tokenizer.json").write_text("[]")
    found = [(d.kind, d.name) for d in restow.verify(tmp_path / "a").differences]
    assert found == [("digest", "config.json"), ("digest", "tokenizer.json")]
    config.write_text(text)
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "a" / "mine.txt").write_text("what is not listed is not ours to judge")
    (found_,) = restow.verify(tmp_path / "a").differences
    assert (found_.kind, found_.name, found_.why) == ("missing", "tokenizer.json", "by the manifest")


def test_tensors_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    restow.convert(checkpoint(tmp_path / "s"), tmp_path / "a", to="grouped")
    file = tmp_path / "a" / "model.safetensors"
    held = load_file(file)
    held["model.norm2.weight"] = held.pop("model.norm.weight")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
    opened = restow.open(tmp_path / "a", family="qwen3_moe")
    with pytest.raises(RestowError, match=re.escape("model.norm.weight")):
        restow.verify(opened)
    for path in (tmp_path / "a").glob("config.json"):
        path.unlink()
    kinds = {d.name: d.kind for d in restow.verify(tmp_path / "a").differences if "safetensors" not in d.name}
    assert kinds == {
        "config.json": "missing", "model.norm.weight": "missing", "model.norm2.weight": "extra", "lm_head.weight": "digest",
    }  # fmt: skip


def test_values_that_are_no_numbers_are_warned_of(tmp_path: Path) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        weights["in", 0][3, 0, 1, 2] = float("inf")
        weights["out", 1][0, 0, :2] = float("nan")
        others["model.norm.weight"][4] = float("-inf")

    report = restow.verify(checkpoint(tmp_path / "a", MODEL, "grouped", change))
    assert report.equal
    for name in (f"{AT.format(0)}.gate_and_up_projs", f"{AT.format(1)}.down_projs", "model.norm.weight"):
        assert any(name in text for text in report.warnings), name
    assert not any("embed_tokens" in text for text in report.warnings)
    with pytest.raises(RestowError):
        restow.verify(tmp_path / "a", strict=True)


def test_what_cannot_be_read_is_no_difference(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    file = sorted(b.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])
    for sides in ((a, b), (b, a), (b,)):
        with pytest.raises(TruncatedFileError):
            restow.verify(*sides)
    file.write_bytes(b"<html> no such file </html>")
    with pytest.raises(NotSafetensorsError):
        restow.verify(a, b)


# Samples, chunks, progress.


def test_a_sample_reads_less_and_always_the_same(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a", MODEL, "split"), checkpoint(tmp_path / "b", MODEL, "grouped")
    whole = restow.verify(a, b)
    reports = [restow.verify(a, b, sample=0.25) for _ in range(3)]
    assert {r.bytes_read for r in reports} == {reports[0].bytes_read}
    assert 0 < reports[0].bytes_read < whole.bytes_read / 2
    assert all(r.equal for r in reports)
    assert f", a sample of 25.0% (seed {reporting.SEED})" in str(reports[0])
    assert restow.verify(a, b, sample=1.0).bytes_read == whole.bytes_read
    assert restow.verify(a, b, sample=1e-9).bytes_read > 0
    alone = restow.verify(a, sample=0.25)
    assert 0 < alone.bytes_read < restow.verify(a).bytes_read / 2
    for bad in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="sample as a part, above 0 and at most 1"):
            restow.verify(a, b, sample=bad)


def test_a_sample_finds_what_lies_in_it(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", MODEL, "split")
    b = checkpoint(tmp_path / "b", MODEL, "grouped", lambda weights, _: [w.neg_() for w in weights.values()])
    found = restow.verify(a, b, sample=0.3, experts_only=True).differences
    assert 0 < len(found) < 2 * 12 * 3
    assert found == restow.verify(a, b, sample=0.3, experts_only=True).differences


@pytest.mark.parametrize("chunk", [64, 300, 4096])
def test_chunks_of_any_size_find_the_same(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(weights: Weights, others: Tensors) -> None:
        weights["in", 0][[2, 10]] = weights["in", 0][[10, 2]]
        weights["out", 1][11, -1, -1] = -1.25
        others["lm_head.weight"][12, 9] = 3.0

    for layouts in (("split", "grouped"), ("grouped", "fused"), ("fused", "epfd")):
        folder = tmp_path / "-".join(layouts)
        a = checkpoint(folder / "a", MODEL, layouts[0])
        b = checkpoint(folder / "b", MODEL, layouts[1], change)
        monkeypatch.undo()
        whole = restow.verify(a, b)
        for place in (module, reporting):
            monkeypatch.setattr(place, "CHUNK", chunk)
        parts = restow.verify(a, b)
        assert parts.bytes_read >= whole.bytes_read == nbytes(a) + nbytes(b)
        assert totals(parts.differences) == totals(whole.differences)
        assert len(whole.differences) == 6
        held = read_saved(b)
        for difference in parts.differences:
            if difference.leaf is None or difference.leaf[0] == "out":
                assert held[difference.name][difference.index].item() == difference.values[1]


def totals(found: Sequence[restow.torch.verify_report.Difference]) -> dict[object, tuple[int, str]]:  # type: ignore[name-defined]
    """Elements and reason by tensor and leaf: a leaf that lies in two chunks is told twice."""
    out: dict[object, tuple[int, str]] = {}
    for d in found:
        out[d.name, d.leaf] = (out.get((d.name, d.leaf), (0, ""))[0] + d.count, d.why)
    return out


def test_progress_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", MODEL, "fused")
    for place in (module, reporting):
        monkeypatch.setattr(place, "CHUNK", 1024)
    for sides in ((a, b), (a,)):
        calls: list[tuple[int, int]] = []
        one = restow.verify(*sides, threads=1)
        two = restow.verify(*sides, threads=2, progress=lambda *call, calls=calls: calls.append(call))
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1] == sum(map(nbytes, sides))
        assert one.bytes_read == two.bytes_read


def test_what_the_report_prints(tmp_path: Path) -> None:
    report = both_unread(tmp_path, lambda weights, _: [w.neg_() for w in weights.values()])
    lines = str(report).splitlines()
    assert re.fullmatch(r"72 differences: 9 tensors, [\d,]+ bytes read, \d+\.\d s \(\d+\.\d GB/s\)", lines[0])
    assert len(lines) == 22
    assert lines[-1] == "  ... 52 more"
    assert all(line.isascii() for line in lines)


def test_the_check_that_follows_a_conversion_can_fail(tmp_path: Path) -> None:
    """Every layout of every pair, one wrong value in each: equal must mean equal."""
    a = checkpoint(tmp_path / "a")
    for layout, (role, layer) in product(
        ("grouped", "fused", "stacked", "mlx"), product(("in", "out"), range(2))
    ):
        folder = tmp_path / f"{layout} {role} {layer}"
        restow.convert(a, folder, to=layout)
        assert restow.verify(a, folder).equal
        (file,) = folder.glob("*.safetensors")
        held = load_file(file)
        wanted = restow.open(folder).modules[AT.format(layer)].tensors[role][-1]
        assert wanted is not None
        raw(held[wanted])[-1] ^= 1
        save_file(held, file, metadata={"format": "pt"})
        (found,) = restow.verify(a, folder).differences
        assert (found.name, found.count) == (wanted, 1)
