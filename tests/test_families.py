"""Families that transformers does not build, other spellings on disk, and traps of detection, on made-up headers.

Names and shapes are those of the vendors' files as public adapters and issues tell them; no value is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from restow.checkpoint import Checkpoint, survey
from restow.entries import Entry, Piece
from restow.errors import MissingTensorError, UsageError
from restow.family import parse_family
from restow.judge import judge
from restow.known import FAMILIES
from restow.layout import shape_of
from restow.opening import by_config

E, F, D, V = 12, 24, 32, 56
Shapes = dict[str, tuple[int, ...]]
SPLIT = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
W = {"w1": (F, D), "w3": (F, D), "w2": (D, F)}


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    return {
        n: Entry("BF16", s, (Piece(tuple((0, k) for k in s), "memory", 0, 0),)) for n, s in shapes.items()
    }


def opened(shapes: Shapes, config: dict[str, Any]) -> Checkpoint:
    """What `open` would make of a folder with these headers and this config."""
    family, doubt = by_config(config, "memory")
    assert doubt is None
    found = survey(entries(shapes), family=family, config=config)
    return replace(found, problems=(*found.problems, *judge(found, dict.fromkeys(shapes, "BF16"))))


def experts(at: str, each: Mapping[str, tuple[int, ...]], suffix: str = ".weight") -> Shapes:
    return {f"{at}.{e}.{name}{suffix}": shape for e in range(E) for name, shape in each.items()}


def around(embed: str, norm: str, head: str, width: int = D) -> Shapes:
    return {embed: (V, width), norm: (width,), head: (V, width)}


COMMON = around("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
MOE = {"hidden_size": D, "moe_intermediate_size": F, "num_hidden_layers": 1}
TALKER = {  # a second model in the same files, of other sizes
    **{f"talker.model.layers.0.mlp.experts.{e}.{name}.weight": shape for e in range(14)
       for name, shape in {"gate_proj": (16, 20), "up_proj": (16, 20), "down_proj": (20, 16)}.items()},
    "talker.model.layers.0.mlp.gate.weight": (14, 20), "talker.model.layers.0.mlp.shared_expert_gate.weight": (1, 20),
}  # fmt: skip
H = 40  # the model's width, where experts work in another

CASES: dict[str, tuple[dict[str, Any], Shapes, str, tuple[str, ...], int]] = {
    # name: config, shapes, the experts module, what its layout is called, router tensors
    "kimi_k3": (
        {"model_type": "kimi_k3", "text_config": {
            "model_type": "kimi_linear", **MOE, "hidden_size": H, "num_experts": E, "routed_expert_hidden_size": D}},
        {**around("language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
                  "language_model.lm_head.weight", H),
         **experts("language_model.model.layers.0.block_sparse_moe.experts", W),
         "language_model.model.layers.0.block_sparse_moe.gate.weight": (E, H),
         "language_model.model.layers.0.block_sparse_moe.gate.e_score_correction_bias": (E,),
         "language_model.model.layers.0.block_sparse_moe.routed_expert_down_proj.weight": (D, H),
         "language_model.model.layers.0.block_sparse_moe.routed_expert_up_proj.weight": (H, D),
         "language_model.model.layers.0.block_sparse_moe.routed_expert_norm.weight": (D,)},
        "language_model.model.layers.0.block_sparse_moe.experts", ("hf", "split"), 2),
    "bailing_moe_v2": (
        {"model_type": "bailing_moe_v2", **MOE, "num_experts": E},
        {**around("model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"),
         **experts("model.layers.0.mlp.experts", SPLIT), "model.layers.0.mlp.gate.weight": (E, D),
         "model.layers.0.mlp.gate.expert_bias": (E,), "model.layers.1.eh_proj.weight": (D, 2 * D)},
        "model.layers.0.mlp.experts", ("hf", "split"), 2),
    "step3p5": (
        {"model_type": "step3p5", **MOE, "moe_num_experts": E},
        {**COMMON, "model.layers.0.moe.gate_proj.weight": (E, F, D), "model.layers.0.moe.up_proj.weight": (E, F, D),
         "model.layers.0.moe.down_proj.weight": (E, D, F), "model.layers.0.moe.gate.weight": (E, D),
         "model.layers.0.moe.router_bias": (E,), "model.layers.0.share_expert.up_proj.weight": (20, D)},
        "model.layers.0.moe", ("hf", "stacked_linear"), 2),
    "nemo_speechlm": (
        {"model_type": "nemo_speechlm", "text_config": {**MOE, "n_routed_experts": E}},
        {**around("llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"),
         "llm.model.layers.0.mixer.experts.gate_and_up_projs": (E, D, F),
         "llm.model.layers.0.mixer.experts.down_projs": (E, F, D), "llm.model.layers.0.mixer.gate.weight": (E, D)},
        "llm.model.layers.0.mixer.experts", ("hf", "grouped"), 1),
    "nemotron omni": (
        {"model_type": "nemotron_omni", "text_config": {"model_type": "nemotron_h", **MOE, "n_routed_experts": E}},
        {**around("language_model.backbone.embeddings.weight", "language_model.backbone.norm_f.weight",
                  "language_model.lm_head.weight"),
         **experts("language_model.backbone.layers.0.mixer.experts", {"up_proj": (F, D), "down_proj": (D, F)}),
         "language_model.backbone.layers.0.mixer.gate.weight": (E, D)},
        "language_model.backbone.layers.0.mixer.experts", ("hf", "split"), 1),
    "kimi_k25, vendor": (
        {"model_type": "kimi_k25", "text_config": {**MOE, "n_routed_experts": E}},
        {**around("language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
                  "language_model.lm_head.weight"),
         **experts("language_model.model.layers.0.mlp.experts", SPLIT),
         "language_model.model.layers.0.mlp.gate.weight": (E, D)},
        "language_model.model.layers.0.mlp.experts", ("hf", "split"), 1),
    "deepseek_v4, vendor": (
        {"model_type": "deepseek_v4", **MOE, "n_routed_experts": E},
        {**around("embed.weight", "norm.weight", "head.weight"), **experts("layers.0.ffn.experts", W),
         "layers.0.ffn.gate.weight": (E, D), "layers.0.ffn.gate.bias": (E,),
         **experts("mtp.0.ffn.experts", W), "mtp.0.ffn.gate.weight": (E, D)},
        "layers.0.ffn.experts", ("hf", "split"), 3),
    "minimax_m3_vl, requantised": (
        {"model_type": "minimax_m3_vl", "text_config": {
            "hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_hidden_layers": 1}},
        {**around("language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
                  "language_model.lm_head.weight"),
         **experts("language_model.model.layers.0.mlp.experts", SPLIT),
         "language_model.model.layers.0.mlp.gate.weight": (E, D)},
        "language_model.model.layers.0.mlp.experts", ("renamed",), 1),
    "mistral4 in mistral3": (
        {"model_type": "mistral3", "text_config": {"model_type": "mistral4", **MOE, "n_routed_experts": E}},
        {**around("language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
                  "language_model.lm_head.weight"),
         "language_model.model.layers.0.mlp.experts.gate_up_proj": (E, 2 * F, D),
         "language_model.model.layers.0.mlp.experts.down_proj": (E, D, F),
         "language_model.model.layers.0.mlp.gate.weight": (E, D)},
        "language_model.model.layers.0.mlp.experts", ("hf", "fused"), 1),
    "gemma4, quantised names": (
        {"model_type": "gemma4", "text_config": {**MOE, "num_experts": E}, "tie_word_embeddings": True},
        {"model.language_model.embed_tokens.weight": (V, D), "model.language_model.norm.weight": (D,),
         **experts("model.language_model.layers.0.moe.experts", SPLIT),
         "model.language_model.layers.0.router.proj.weight": (E, D),
         "model.language_model.layers.0.router.per_expert_scale": (E,)},
        "model.language_model.layers.0.moe.experts", ("split",), 2),
    "granite, requantised": (
        {"model_type": "granitemoe", "hidden_size": D, "intermediate_size": F, "num_local_experts": E,
         "num_hidden_layers": 1},
        {**COMMON, **experts("model.layers.0.block_sparse_moe.experts", SPLIT),
         "model.layers.0.block_sparse_moe.router.layer.weight": (E, D)},
        "model.layers.0.block_sparse_moe.experts", ("split",), 1),
    "privacy filter": (
        {"model_type": "openai_privacy_filter", "hidden_size": D, "intermediate_size": D, "num_local_experts": E,
         "num_hidden_layers": 1},
        {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "score.weight": (33, D),
         "model.layers.0.mlp.experts.gate_up_proj": (E, D, 2 * D),
         "model.layers.0.mlp.experts.gate_up_proj_bias": (E, 2 * D),
         "model.layers.0.mlp.experts.down_proj": (E, D, D), "model.layers.0.mlp.experts.down_proj_bias": (E, D),
         "model.layers.0.mlp.router.weight": (E, D), "model.layers.0.mlp.router.bias": (E,)},
        "model.layers.0.mlp.experts", ("hf",), 2),
    "qwen3_omni_moe, whole": (
        {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {**MOE, "num_experts": E}},
         "talker_config": {"text_config": {"hidden_size": 20, "moe_intermediate_size": 16, "num_experts": 14}}},
        {**around("thinker.model.embed_tokens.weight", "thinker.model.norm.weight", "thinker.lm_head.weight"),
         **experts("thinker.model.layers.0.mlp.experts", SPLIT), "thinker.model.layers.0.mlp.gate.weight": (E, D),
         **TALKER},
        "thinker.model.layers.0.mlp.experts", ("hf", "split"), 1),
    "qwen3_omni_moe_thinker, whole files": (
        {"model_type": "qwen3_omni_moe_thinker", "text_config": {**MOE, "num_experts": E}},
        {**around("thinker.model.embed_tokens.weight", "thinker.model.norm.weight", "thinker.lm_head.weight"),
         **experts("thinker.model.layers.0.mlp.experts", SPLIT), "thinker.model.layers.0.mlp.gate.weight": (E, D),
         **TALKER},
        "thinker.model.layers.0.mlp.experts", ("hf", "split"), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_found(case: str) -> None:
    config, shapes, path, called, routers = CASES[case]
    found = opened(shapes, config)
    assert not [str(p.error) for p in found.problems if p.fatal]
    module = found.modules[path]
    assert module.names == called
    assert (module.sizes["e"], module.sizes["d"]) == (E, D)
    assert len(found.routers) == routers
    for name, row in found.routers.items():
        assert found.tensors[name].shape == shape_of(row, found.sizes)


@pytest.mark.parametrize("case", CASES)
def test_what_is_found_can_be_missed(case: str) -> None:
    """One expert weight less is an error that names it."""
    config, shapes, path, _, _ = CASES[case]
    lost = [name for name in shapes if name.startswith(f"{path}.") and re.search(r"down|w2", name)][-1]
    found = opened({name: shape for name, shape in shapes.items() if name != lost}, config)
    assert any(isinstance(p.error, MissingTensorError) and lost in str(p.error) for p in found.problems)


def test_privacy_filter_is_not_gpt_oss() -> None:
    """The same names and shapes, another order of gate and up: the family says so, nothing else can."""
    config, shapes, path, _, _ = CASES["privacy filter"]
    own = opened(shapes, config).modules[path].layout
    other = (
        opened({**shapes, "lm_head.weight": (V, D)}, {**config, "model_type": "gpt_oss"}).modules[path].layout
    )
    assert str(own.row("in")) == "in gate_up_proj e d (p f)"
    assert str(other.row("in")) == "in gate_up_proj e d (f p)"
    assert str(own.row("in.bias")) == "in.bias gate_up_proj_bias e (p f)"
    assert (
        str(FAMILIES["openai_privacy_filter"].form("grouped").row("in")) == "in gate_and_up_projs e d (p f)"
    )


@pytest.mark.parametrize(
    ("names", "called"),
    [({"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}, ("hf", "fused")), (None, ("split",))],
)
def test_a_layout_that_changes_with_precision(names: Shapes | None, called: tuple[str, ...]) -> None:
    """Qwen3.5: stacked in bfloat16, split where it is quantised or saved again."""
    at = "model.language_model.layers.0.mlp.experts"
    held = experts(at, SPLIT) if names is None else {f"{at}.{name}": shape for name, shape in names.items()}
    config = {"model_type": "qwen3_5_moe", "text_config": {**MOE, "num_experts": E}}
    assert survey(entries(held), family=FAMILIES["qwen3_5_moe"], config=config).modules[at].names == called


def banks(vision: int) -> Shapes:
    at = "model.layers.0.mlp.experts"
    first = experts(at, SPLIT)
    wide = {"gate_proj": (vision, D), "up_proj": (vision, D), "down_proj": (D, vision)}
    second = {f"{at}.{E + e}.{name}.weight": shape for e in range(E) for name, shape in wide.items()}
    return {**first, **second}


BANKS = {"model_type": "ernie4_5_vl_moe", "text_config": {
    "moe_num_experts": [E, E], "moe_intermediate_size": [F, 20], "hidden_size": D, "num_hidden_layers": 1}}  # fmt: skip


def test_two_banks_in_one_numbering() -> None:
    found = survey(entries(banks(20)), family=FAMILIES["ernie4_5_vl_moe"], config=BANKS)
    module = found.modules["model.layers.0.mlp.experts"]
    assert not found.problems
    assert len(module.tensors["in"]) == len(module.tensors["in2"]) == 2 * E
    assert module.tensors["out2"][0] == f"model.layers.0.mlp.experts.{E}.down_proj.weight"
    lost = {n: s for n, s in banks(20).items() if f".{2 * E - 1}.up_proj" not in n}
    problems = survey(entries(lost), family=FAMILIES["ernie4_5_vl_moe"], config=BANKS).problems
    assert f"model.layers.0.mlp.experts.{2 * E - 1}.up_proj.weight" in str(problems[0].error)
    shapes = survey(entries(banks(24)), family=FAMILIES["ernie4_5_vl_moe"], config=BANKS).problems
    assert "[20, 32]" in str(shapes[0].error)
    grouped = FAMILIES["ernie4_5_vl_moe"].form("grouped")
    assert str(grouped.row("in2")) == "in2 bank2.gate_and_up_projs e d (p f)"


def test_experts_that_do_nothing_have_rows_in_gate_and_up_only() -> None:
    config = {"n_routed_experts": 12, "zero_expert_num": 4}
    sizes = FAMILIES["longcat_flash"].read_sizes(config)
    assert (sizes["e"], sizes["e@in"], sizes["e@router"]) == (12, 16, 16)
    assert FAMILIES["longcat_flash"].read_sizes({**config, "zero_expert_num": 0})["e@in"] == 12


def test_numbers_in_renames_go_both_ways() -> None:
    family = FAMILIES["inkling2_text"]
    assert family.canonical("model.llm.attn_res.attn_queries.4") == "model.layers.5.attention_input.query"
    assert family.on_hub("model.layers.5.attention_input.query") == "model.llm.attn_res.attn_queries.4"
    assert family.canonical("model.layers.0.attention_input.query") == "model.layers.0.attention_input.query"


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("laguna", "model.layers.0.mlp.experts.e_score_correction_bias"),
        ("muse_spark", "model.language_model.layers.0.mlp.experts.post_expert_norm.weight"),
        ("jetmoe", "model.layers.0.self_attention.experts.router.layer.weight"),
        ("longcat_flash", "model.layers.0.mlps.1.down_proj.weight"),
        ("inkling_text", "model.layers.0.mlp.shared_experts.down_proj"),
    ],
)
def test_what_is_no_expert_though_it_is_called_so(model_type: str, name: str) -> None:
    shape = (E,) if name.endswith("bias") else (E, D) if name.endswith("router.layer.weight") else (D,)
    found = survey(entries({name: shape}), family=FAMILIES[model_type], config={"hidden_size": D})
    assert (dict(found.modules), found.problems, found.others) == ({}, (), (name,))


def test_an_alias_is_read_and_never_written() -> None:
    family = FAMILIES["kimi_k25"]
    for spelled in ("layers", "blocks"):
        name = f"language_model.model.{spelled}.3.mlp.gate.weight"
        assert family.canonical(name) == "model.language_model.layers.3.mlp.gate.weight"
    assert family.on_hub("model.language_model.layers.3.mlp.gate.weight").endswith(
        "model.layers.3.mlp.gate.weight"
    )


def test_every_rename_leads_back() -> None:
    """Each table's renames are undone in their order, so that saving finds the vendor's names."""
    for model_type, family in FAMILIES.items():
        for hub, _ in family.renames:
            name = re.sub(r"\{l(\+1)?\}", "7", hub.lstrip("^")) + ".weight"
            try:
                assert family.canonical(family.on_hub(family.canonical(name))) == family.canonical(name), (
                    model_type
                )
            except UsageError as error:
                raise AssertionError(f"{model_type}: {hub}") from error


def test_a_table_that_says_nothing_known_is_refused() -> None:
    with pytest.raises(Exception, match="a line of a family's table"):
        parse_family("    family x\n    module m\n    weird y\n")
