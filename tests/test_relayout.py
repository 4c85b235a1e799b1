"""Relayout in memory: every pair of layouts bit for bit, views where strides allow, the source as it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

import restow
from moe import AT, Model, Tensors, differing
from restow.errors import AmbiguousLayoutError, RolesError, UnexpectedTensorError, UsageError
from restow.layout import Layout

FORMS = [
    "split",
    "fused",
    "grouped",
    "stacked",
    "torchtitan",
    "epfd",
    "megatron",
    "megatron_sequential",
    "mlx",
]
GATED = Model(e=3, f=4, d=5, layers=2)
UNGATED = Model(e=3, f=4, d=5, p=1, layers=1, family="nemotron_h", at="model.layers.{}.mixer.experts")
BIASED = Model(e=3, f=4, d=5, layers=1, family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))
MODELS = {"gated": GATED, "ungated": UNGATED, "gpt_oss": BIASED}


def form(model: Model, name: str) -> Layout:
    return restow.families[model.family].form(name)


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def packed(tensors: Tensors) -> Tensors:
    return {name: t.contiguous() for name, t in tensors.items()}


@pytest.mark.parametrize("dst", FORMS)
@pytest.mark.parametrize("src", FORMS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_pair_there_and_back(model: Model, src: str, dst: str) -> None:
    state = model.spelled(src)
    before = {name: t.clone() for name, t in state.items()}
    there = restow.relayout(state, src=src, dst=dst, family=model.family)
    assert differing(packed(there), model.spelled(dst)) == []
    back = restow.relayout(there, src=dst, dst=src, family=model.family)
    assert differing(packed(back), before) == []
    assert differing(state, before) == [], "the source stays as it is"


def test_the_comparison_can_fail() -> None:
    there = restow.relayout(GATED.spelled("split"), src="split", dst="fused", family="qwen3_moe")
    name = f"{AT.format(0)}.gate_up_proj"
    there[name] = there[name].unflatten(1, (2, 4)).flip(1).flatten(1, 2)
    assert differing(packed(there), GATED.spelled("fused")) == [name]


@pytest.mark.parametrize("dst", FORMS)
@pytest.mark.parametrize("src", FORMS)
@pytest.mark.parametrize("model", [GATED, UNGATED], ids=["gated", "ungated"])
def test_views_wherever_one_tensor_holds_all(model: Model, src: str, dst: str) -> None:
    """In a p-major layout a stride a dim says everything, as soon as no axis moves out of the names."""
    state = model.spelled(src)
    there = restow.relayout(state, src=src, dst=dst, family=model.family)
    a, b = form(model, src), form(model, dst)
    for row in b.rows:
        outside = set(a.row(row.role).name_axes) - set(row.name_axes) - ({"p"} if model.p == 1 else set())
        for name in Layout((row,)).keys({"e": 3, "p": model.p, "f": 4, "d": 5}):
            tensor = there[f"{model.at.format(0)}.{name}"]
            assert any(shares(tensor, t) for t in state.values()) == (not outside), f"{row.role}: {name}"


MUST_BE_VIEWS = [
    ("grouped", "fused"), ("fused", "grouped"), ("fused", "stacked"), ("grouped", "stacked"),
    ("epfd", "stacked"),
    ("fused", "split"), ("grouped", "split"), ("stacked", "split"), ("epfd", "split"), ("epfd", "fused"),
    ("fused", "epfd"), ("grouped", "epfd"), ("epfd", "grouped"), ("fused", "megatron"), ("megatron", "split"),
    ("stacked", "torchtitan"), ("mlx", "stacked"), ("megatron", "megatron_sequential"), ("fused", "fused"),
]  # fmt: skip


@pytest.mark.parametrize(("src", "dst"), MUST_BE_VIEWS)
def test_pairs_that_copy_nothing(src: str, dst: str) -> None:
    state = GATED.spelled(src)
    there = restow.relayout(state, src=src, dst=dst, family="qwen3_moe")
    assert all(any(shares(t, s) for s in state.values()) for t in there.values())


@pytest.mark.parametrize(("src", "dst"), [("grouped", "fused"), ("grouped", "stacked"), ("fused", "split")])
def test_gpt_oss_is_interleaved_and_still_a_view(src: str, dst: str) -> None:
    state = BIASED.spelled(src)
    there = restow.relayout(state, src=src, dst=dst, family="gpt_oss")
    experts = {name: t for name, t in there.items() if ".experts." in name}
    assert all(any(shares(t, s) for s in state.values()) for t in experts.values())


def test_gpt_oss_s_order_stays() -> None:
    state = BIASED.spelled("split")
    there = restow.relayout(state, src="split", dst="grouped", family="gpt_oss")
    weight = there[f"{AT.format(0)}.gate_and_up_projs"]
    gate, up = (state[f"{AT.format(0)}.1.{word}_proj.weight"] for word in ("gate", "up"))
    assert torch.equal(weight[1, :, 0::2], gate.t())
    assert torch.equal(weight[1, :, 1::2], up.t())
    assert torch.equal(
        there[f"{AT.format(0)}.gate_up_proj_bias"][1, 1::2], state[f"{AT.format(0)}.1.up_proj.bias"]
    )


def test_from_interleaved_to_halves_is_a_copy() -> None:
    halves = Layout.parse("in w e (p f) d\nout v e d f")
    turned = Layout.parse("in w e (f p) d\nout v e d f")
    state = GATED.spelled(halves)
    there = restow.relayout(state, src=halves, dst=turned)
    assert differing(packed(there), GATED.spelled(turned)) == []
    name = f"{AT.format(0)}.w"
    assert not shares(there[name], state[name])
    assert shares(there[f"{AT.format(0)}.v"], state[f"{AT.format(0)}.v"])


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "every other": lambda t: torch.stack([t, t * 0], -1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.reshape(-1)[:3], t.reshape(-1)])[3:].view(t.shape),
    "dims reversed": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize(
    ("src", "dst"), list(pairwise(["fused", "grouped", "split", "stacked", "epfd", "fused"]))
)
def test_inputs_may_have_any_strides(src: str, dst: str, how: str) -> None:
    model = GATED.but(dtype=torch.float32)
    state = {name: STRIDED[how](t) for name, t in model.spelled(src).items()}
    there = restow.relayout(state, src=src, dst=dst, family="qwen3_moe")
    assert differing(packed(there), model.spelled(dst)) == []


@pytest.mark.parametrize("src", ["split", "fused", "grouped", "stacked", "epfd", "megatron", "mlx"])
def test_the_source_s_layout_is_found(src: str) -> None:
    there = restow.relayout(GATED.spelled(src), dst="fused", family="qwen3_moe")
    assert differing(packed(there), GATED.spelled("fused")) == []


def test_other_tensors_are_the_same_objects() -> None:
    state = GATED.spelled("split")
    there = restow.relayout(state, dst="grouped", family="qwen3_moe")
    for name in GATED.others:
        assert there[name].data_ptr() == state[name].data_ptr()
        assert torch.equal(there[name], state[name])


def test_writing_into_a_view_reaches_the_source() -> None:
    state = GATED.spelled("grouped")
    there = restow.relayout(state, src="grouped", dst="split", family="qwen3_moe")
    there[f"{AT.format(1)}.2.up_proj.weight"].zero_()
    assert (state[f"{AT.format(1)}.gate_and_up_projs"][2, :, 4:] == 0).all()
    assert (state[f"{AT.format(1)}.gate_and_up_projs"][2, :, :4] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8], ids=str)
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = GATED.but(dtype=dtype)
    there = restow.relayout(model.spelled("split"), src="split", dst="grouped", family="qwen3_moe")
    assert differing(packed(there), model.spelled("grouped")) == []


# Refused.


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        restow.relayout(GATED.spelled("split"), src="split", dst="gruped")
    assert str(caught.value) == f"expected a layout name, one of {', '.join(restow.layouts)}, found 'gruped'"
    with pytest.raises(UsageError, match="found 'sliced'"):
        restow.relayout(GATED.spelled("split"), src="sliced", dst="grouped", family="qwen3_moe")


def test_a_state_of_another_layout_than_said_is_refused() -> None:
    with pytest.raises(AmbiguousLayoutError) as caught:
        restow.relayout(GATED.spelled("fused"), src="grouped", dst="split")
    assert str(caught.value) == (
        "expected experts in the layout that src says, found none among 9 tensors\n"
        "  layout    in   gate_and_up_projs  e d (p f)\n"
        "            out  down_projs         e f d\n"
        "  there are model.embed_tokens.weight\n"
        "            model.layers.0.mlp.gate.weight\n"
        "            model.layers.1.mlp.gate.weight\n"
        "  try       say what they are in with src="
    )


def test_a_state_without_experts_is_refused() -> None:
    with pytest.raises(AmbiguousLayoutError) as caught:
        restow.relayout(GATED.others, dst="split", family="qwen3_moe")
    assert str(caught.value).startswith(
        "expected experts in a layout that restow knows, found none among 5 tensors\n"
    )


def test_a_stack_with_rows_for_experts_that_do_nothing_is_refused_without_a_config() -> None:
    """LongCat's as transformers holds it: gate and up of 5 experts, down of 3. Which of both counts, only a config says."""
    state = {
        "l.0.mlp.experts.gate_up_proj": torch.zeros(5, 8, 6),
        "l.0.mlp.experts.down_proj": torch.zeros(3, 6, 4),
    }
    with pytest.raises(restow.errors.ShapeMismatchError) as caught:
        restow.relayout(state, dst="grouped", family="longcat_flash")
    assert str(caught.value) == (
        "expected shape [5, 6, 4] for l.0.mlp.experts.down_proj, found [3, 6, 4]\n"
        "  tensors   l.0.mlp.experts.down_proj [3, 6, 4], expected [5, 6, 4]\n"
        "            l.0.mlp.experts.gate_up_proj [5, 8, 6], as expected\n"
        "  layout    in   gate_up_proj  e (p f) d\n"
        "            out  down_proj     e d f\n"
        "  sizes     d = 6, e = 5, f = 4, p = 2\n"
        "  try       no config says these sizes, so shapes must agree in all roles; a folder with its config.json may say "
        "otherwise"
    )


def test_layouts_of_other_roles_are_refused() -> None:
    dst = Layout.parse("in w e f d\nout v e d f")
    with pytest.raises(RolesError) as caught:
        restow.relayout(GATED.spelled("fused"), src="fused", dst=dst)
    assert str(caught.value) == (
        "expected the same axes for role 'in' on both sides, found 'p' on one only\n"
        "  source    in gate_up_proj e (p f) d\n"
        "  target    in w e f d\n"
        "  try       only layouts of the same roles and axes convert"
    )


def test_biases_need_a_row_too() -> None:
    dst = Layout.parse("in w e (f p) d\nout v e d f")
    with pytest.raises(UnexpectedTensorError) as caught:
        restow.relayout(BIASED.spelled("grouped"), src="grouped", dst=dst, family="gpt_oss")
    assert str(caught.value) == (
        "expected a row of the destination's layout for every tensor of the experts, found 2 without one\n"
        f"  unused    {AT.format(0)}.gate_up_proj_bias\n"
        f"            {AT.format(0)}.down_proj_bias\n"
        "  try       only layouts of the same roles convert"
    )


def test_a_state_that_fits_two_layouts_is_not_guessed() -> None:
    square = GATED.but(d=4, f=4)
    state = {n: t for n, t in square.spelled("stacked").items() if ".experts." in n}
    twin = Layout.parse("in w{p:1|3} e d f\nout w2 e d f")
    assert differing(packed(restow.relayout(state, src=twin, dst="fused")), {}) != []
    both = restow.relayout(state, dst="fused", family="qwen3_moe")
    assert (
        differing(packed(both), {n: t for n, t in square.spelled("fused").items() if ".experts." in n}) == []
    )


def test_a_missing_expert_is_refused() -> None:
    state = GATED.spelled("split")
    del state[f"{AT.format(0)}.1.up_proj.weight"]
    with pytest.raises((restow.errors.MissingTensorError, AmbiguousLayoutError)) as caught:
        restow.relayout(state, src="split", dst="grouped", family="qwen3_moe")
    assert f"{AT.format(0)}.1.up_proj.weight" in str(caught.value)
