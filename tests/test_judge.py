"""Findings about tensors and configs: the corpus's T and C levels, and what must not be found."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import corpus_quant
import corpus_tensors
import restow
from corpus import CASES, Case, says
from corpus_bytes import E7, good, write
from moe import Model
from restow import errors
from restow.checkpoint import Checkpoint, survey
from restow.entries import Entry, Piece
from restow.errors import MissingTensorError, RestowError
from restow.judge import judge
from restow.known import FAMILIES
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.planning import make_plan
from restow.prepare import raise_fatal
from restow.problems import Problem
from restow.wanted import default_targets

HERE = corpus_tensors.__name__
OURS = [case for case in CASES.values() if case.build.__module__ == HERE]
CODED = [case for case in CASES.values() if case.build.__module__ == corpus_quant.__name__]
CONTROLS = [
    case for name, case in CASES.items() if name[:3] in ("G00", "G01", "G02", "G03", "G04", "G05", "G06")
]
NEED_DATA = {"T10", "T11", "T12", "T13"}  # NaN, zeros, exchanged experts: only the values show them


def findings(case: Case, folder: Path) -> tuple[Problem, ...]:
    return open_checkpoint(case.build(folder) or folder).problems


def check(case: Case, found: tuple[Problem, ...]) -> None:
    if case.error is None:
        assert not found, [str(problem.error) for problem in found]
        return
    assert len(found) == 1, [str(problem.error) for problem in found]  # one cause, one finding
    error, fatal = found[0]
    assert type(error) is case.error
    assert fatal == case.fatal
    text = str(error)
    assert text.isascii()
    for part in case.holds:
        assert says(text, part), (part, text)
    if case.tensor is not None:
        assert error.tensor == case.tensor


def test_the_table_is_whole() -> None:
    wanted = {f"T{i:02}" for i in range(1, 25)} | {f"C{i:02}" for i in range(1, 13)}
    assert {case.id[:3] for case in OURS} >= wanted - NEED_DATA


@pytest.mark.parametrize("case", [*OURS, *CODED, *CONTROLS], ids=lambda case: case.id)
def test_corpus(case: Case, tmp_path: Path) -> None:
    check(case, findings(case, tmp_path / case.id))


@pytest.mark.parametrize(
    "name", ["T01_part_of_expert", "T08_mixed_dtype", "T22_head_missing", "C07_hidden_size"]
)
def test_the_oracle_can_fail(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wrong = [
        (dataclasses.replace(case, build=CASES["G00_good"].build), "good"),
        (dataclasses.replace(case, build=CASES["T19_empty_tensor"].build), "other"),
        (dataclasses.replace(case, holds=("not there",)), "words"),
        (dataclasses.replace(case, tensor="x"), "tensor"),
        (dataclasses.replace(case, fatal=not case.fatal), "fatal"),
        (dataclasses.replace(CASES["G00_good"], build=case.build), "control"),
    ]
    for changed, folder in wrong:
        with pytest.raises(AssertionError):
            check(changed, findings(changed, tmp_path / folder))


@pytest.mark.parametrize(
    "case", [case for case in OURS if case.error and case.fatal], ids=lambda case: case.id
)
def test_a_plan_is_refused(case: Case, tmp_path: Path) -> None:
    """Fatal findings stop a plan; what is only missing stops who needs it."""
    opened = open_checkpoint(case.build(tmp_path / case.id) or tmp_path / case.id)
    wish = Wish()
    if case.error is not MissingTensorError:
        with pytest.raises(case.error):
            raise_fatal(opened)
        with pytest.raises(case.error):
            make_plan(opened, [], wish)
    elif any(None in names for module in opened.modules.values() for names in module.tensors.values()):
        experts = [t for t in default_targets(opened, None, wish) if t.name not in opened.tensors]
        with pytest.raises(MissingTensorError):
            make_plan(opened, experts, wish)


def test_a_report_stops_nothing(tmp_path: Path) -> None:
    case = CASES["T08_mixed_dtype"]
    case.build(tmp_path / "x")
    raise_fatal(open_checkpoint(tmp_path / "x"))


# What must not be found, and what a corpus of one family does not show.


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    return {
        name: Entry("BF16", shape, (Piece(tuple((0, n) for n in shape), "memory", 0, 0),))
        for name, shape in shapes.items()
    }


def seen(
    model_type: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], **dtypes: str
) -> tuple[Checkpoint, list[Problem]]:
    found = survey(entries(shapes), family=FAMILIES[model_type], config=config)
    told = judge(found, {name: dtypes.get(name.rpartition(".")[2], "BF16") for name in shapes})
    return found, [*found.problems, *told]


def split_layer(at: str, experts: int = 4, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{at}.input_layernorm.weight": (16,)}
    shapes[f"{at}.mlp.gate.weight"] = (experts, 16)
    if bias:
        shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (experts,)
    for e in range(experts):
        shapes |= {f"{at}.mlp.experts.{e}.{p}_proj.weight": (8, 16) for p in ("gate", "up")}
        shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (16, 8)
    return shapes


ENDS = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
V3 = {"n_routed_experts": 4, "moe_intermediate_size": 8, "hidden_size": 16, "num_hidden_layers": 3}


def deepseek(*layers: int) -> dict[str, tuple[int, ...]]:
    dense = {"model.layers.0.input_layernorm.weight": (16,), "model.layers.0.mlp.up_proj.weight": (9, 16)}
    shapes: dict[str, tuple[int, ...]] = {**ENDS, **dense}
    for n in layers:
        shapes |= split_layer(f"model.layers.{n}", bias=True)
    return shapes


def test_prediction_layers_are_not_extra_and_not_alike() -> None:
    shapes = deepseek(1, 2) | split_layer("model.layers.3", bias=True)
    shapes["model.layers.3.eh_proj.weight"] = (16, 32)
    assert not seen("deepseek_v3", V3, shapes)[1]
    without_router = {name: s for name, s in shapes.items() if name != "model.layers.3.mlp.gate.weight"}
    assert not seen("deepseek_v3", V3, without_router)[1]


def test_a_dense_layer_is_no_layer_without_experts() -> None:
    assert not seen("deepseek_v3", V3, deepseek(1, 2))[1]


def test_a_bias_that_only_one_layer_lacks() -> None:
    shapes = deepseek(1, 2)
    del shapes["model.layers.2.mlp.gate.e_score_correction_bias"]
    _, (problem,) = seen("deepseek_v3", V3, shapes)
    assert problem.error.tensor == "model.layers.2.mlp.gate.e_score_correction_bias"


def test_kinds_that_the_config_tells_apart_are_not_alike() -> None:
    """Gemma4's full-attention layers may have no v_proj; a list in its config says which these are."""
    config = {"num_experts": 4, "moe_intermediate_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for n in (0, 1):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.experts.gate_up_proj": (4, 16, 16), f"{at}.experts.down_proj": (4, 16, 8)}
        shapes |= {f"{at}.router.proj.weight": (4, 16), f"{at}.router.per_expert_scale": (4,)}
        shapes[f"{at}.self_attn.k_proj.weight"] = (8, 16)
    shapes["model.layers.0.self_attn.v_proj.weight"] = (8, 16)
    assert not seen("gemma4_text", config | kinds | {"tie_word_embeddings": False}, shapes)[1]
    _, (problem,) = seen("gemma4_text", config | {"tie_word_embeddings": False}, shapes)
    assert problem.error.tensor == "model.layers.1.self_attn.v_proj.weight"


def test_names_are_spelled_as_the_checkpoint_spells_them() -> None:
    """A Mixtral in the runtime's names that lacks one router: the missing name is the runtime's."""
    config = {"num_local_experts": 4, "intermediate_size": 8, "hidden_size": 16, "num_hidden_layers": 3}
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for n in range(3):
        at = f"model.layers.{n}.mlp"
        shapes |= {f"{at}.experts.gate_up_proj": (4, 16, 16), f"{at}.experts.down_proj": (4, 16, 8)}
        shapes[f"{at}.gate.weight"] = (4, 16)
    assert not seen("mixtral", config, shapes)[1]
    del shapes["model.layers.1.mlp.gate.weight"], shapes["model.layers.2.mlp.gate.weight"]
    _, (problem,) = seen("mixtral", config, shapes)
    assert str(problem.error) == (
        "expected a router beside model.layers.1.mlp.experts, found none, and none in 1 more layers\n"
        "  missing   model.layers.1.mlp.gate.weight\n"
        "            model.layers.2.mlp.gate.weight\n"
        "  try       get the checkpoint again: nothing is filled in their place"
    )


def test_a_headless_export_of_a_model_with_an_outer_module() -> None:
    config = {"text_config": {"num_experts": 4, "moe_intermediate_size": 8, "hidden_size": 16}}
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.embed_tokens.weight": (32, 16),
        "language_model.norm.weight": (16,),
        **split_layer("language_model.layers.0"),
    }
    _, (problem,) = seen("qwen3_5_moe", config, shapes)
    assert not problem.fatal
    assert problem.error.expected.startswith("names that begin with model. ")
    del shapes["language_model.norm.weight"]
    _, told = seen("qwen3_5_moe", config, shapes)
    assert (
        next(problem.error.tensor for problem in told if problem.fatal)
        == "model.language_model.embed_tokens.weight"
    )


@pytest.mark.parametrize(
    ("model_type", "config", "needed"),
    [
        ("mixtral", {}, True),
        ("mixtral", {"tie_word_embeddings": True}, False),
        ("gemma4_text", {}, False),
        ("gemma4_text", {"tie_word_embeddings": False}, True),
        ("qwen3_moe", {"text_config": {"tie_word_embeddings": True}}, True),
        ("nemotron_h", {"tie_word_embeddings": True}, True),
    ],
)
def test_when_a_head_is_needed(model_type: str, config: dict[str, Any], needed: bool) -> None:
    family = FAMILIES[model_type]
    first, norm = (name for name in family.required if not name.startswith("?"))
    at = "model.layers.0." + family.containers[0][-1]
    form = family.form("grouped")
    sizes = {"e": 4, "f": 8, "d": 16, "p": len(family.labels)}
    shapes = {f"{at}.{name}": shape for name, shape in form.shapes(sizes).items()}
    shapes |= {first: (32, 16), norm: (16,)}
    router = family.canonical("".join(map(str, family.routers[0].name)))
    shapes[f"model.layers.0.{router}"] = (4, 16)
    _, told = seen(model_type, config, shapes)
    assert [problem.error.tensor for problem in told] == (["lm_head.weight"] if needed else [])


def test_a_tied_head_that_may_be_equal_is_not_judged() -> None:
    shapes = {**ENDS, **split_layer("model.layers.0")}
    config = {"tie_word_embeddings": True}
    assert not seen("qwen3_moe", config, shapes)[1]
    _, (problem,) = seen("qwen3_moe", config, {**shapes, "lm_head.weight": (40, 16)})
    assert isinstance(problem.error, errors.AmbiguousTensorError)
    assert not problem.fatal


def test_codes_that_the_config_announces_are_let_pass() -> None:
    shapes = {**ENDS, **split_layer("model.layers.0")}
    config = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    found = survey(entries(shapes), family=FAMILIES["qwen3_moe"], config=config)
    dtypes = {name: "F8_E4M3" if ".experts." in name else "BF16" for name in shapes}
    assert not judge(found, dtypes)
    told = judge(dataclasses.replace(found, config={}), dtypes)
    assert [type(problem.error) for problem in told] == [errors.DtypeMismatchError]
    assert "F8_E4M3" in str(told[0].error)


def test_biases_of_experts_are_judged_as_their_weights(tmp_path: Path) -> None:
    """One bias in I32 among floats: a conversion would have stacked its numbers with the others."""
    model = Model(e=3, family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))
    name = "model.layers.1.mlp.experts.2.up_proj.bias"
    state = model.spelled("split")
    path = model.written(tmp_path / "a", **{name: state[name].to(torch.int32)})
    with pytest.raises(errors.DtypeMismatchError) as caught:
        restow.convert(path, tmp_path / "b", to="fused")
    assert str(caught.value) == (
        "expected experts in BF16, F16, F32, F64, since config.json has no quantization_config, found I32\n"
        f"  tensors   {name} I32\n"
        f"  in        {path}/model-00002-of-00002.safetensors\n"
        "  try       get the config.json that belongs to these files: without it nobody can decode them"
    )
    assert not (tmp_path / "b").exists()


def test_a_block_may_have_a_dtype_of_its_own() -> None:
    """A prediction block in float32 beside a bfloat16 trunk: dtypes are compared inside one module."""
    shapes = {**ENDS, **split_layer("model.layers.0"), **split_layer("mtp.layers.0")}
    found = survey(entries(shapes), family=FAMILIES["qwen3_next"], config={"num_hidden_layers": 1})
    assert not found.problems
    assert not judge(found, {name: "F32" if name.startswith("mtp.") else "BF16" for name in shapes})


def test_one_cause_in_many_modules_is_one_finding() -> None:
    config = {**V3, "num_experts": 6, "num_hidden_layers": 30}
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for n in range(30):
        shapes |= split_layer(f"model.layers.{n}")
    _, (problem,) = seen("qwen3_moe", config, shapes)
    text = str(problem.error)
    assert text.startswith("expected 6 experts in model.layers.0.mlp.experts, found 4\n")
    assert "  and in    model.layers.1.mlp.experts\n" in text
    assert "            ... 9 more\n" in text


def test_a_flag_in_one_layer_is_none_that_others_lack() -> None:
    shapes = {
        **ENDS,
        **split_layer("model.layers.0"),
        **split_layer("model.layers.1"),
        "model.layers.1.flags": (8,),
    }
    config = {**V3, "num_experts": 4, "num_hidden_layers": 2}
    for dtype, lost in (("BOOL", []), ("BF16", ["model.layers.0.flags"])):
        held = entries(shapes)
        held["model.layers.1.flags"] = held["model.layers.1.flags"]._replace(dtype=dtype)
        found = survey(held, family=FAMILIES["qwen3_moe"], config=config)
        told = [*found.problems, *judge(found, {name: entry.dtype for name, entry in held.items()})]
        assert [problem.error.tensor for problem in told] == lost


# Numbers that would be bombs, and time.


def test_a_number_out_of_all_proportion_is_a_stray() -> None:
    shapes = {**ENDS, **split_layer("model.layers.0")}
    shapes["model.layers.0.mlp.experts.999999999.up_proj.weight"] = (8, 16)
    tracemalloc.start()
    found, told = seen("qwen3_moe", {}, shapes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert found.modules["model.layers.0.mlp.experts"].sizes["e"] == 4
    assert [type(problem.error) for problem in told] == [errors.UnexpectedTensorError]


def test_as_many_experts_as_a_config_may_say() -> None:
    config = {**V3, "num_experts": 65536, "num_hidden_layers": 10}
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for n in range(10):
        shapes |= split_layer(f"model.layers.{n}")
    start = time.monotonic()
    _, (problem,) = seen("qwen3_moe", config, shapes)
    assert time.monotonic() - start < 2
    assert problem.error.sections[1] == ("in all", ("196596 tensors",))
    assert len(str(problem.error).splitlines()) < 40


def test_seventy_thousand_tensors_are_judged_quickly() -> None:
    """Kimi K2's number of tensors; the bound is loose, since it must hold on a busy machine."""
    config = {**V3, "n_routed_experts": 384, "num_hidden_layers": 61}
    shapes = deepseek()
    for n in range(1, 61):
        shapes |= split_layer(f"model.layers.{n}", 384, bias=True)
        shapes |= {f"model.layers.{n}.self_attn.{i}.weight": (16, 16) for i in range(12)}
    assert len(shapes) > 69_000
    found = survey(entries(shapes), family=FAMILIES["kimi_k2"], config=config)
    assert not found.problems
    dtypes = dict.fromkeys(shapes, "BF16")
    found.others  # noqa: B018  who plans needs this too
    start = time.monotonic()
    assert not judge(found, dtypes)
    assert time.monotonic() - start < 0.3


GOLDEN = {
    "T01_part_of_expert": """\
expected 12 experts in model.layers.1.mlp.experts, found 11
  missing   model.layers.1.mlp.experts.7.gate_proj.weight
  looked in model-00002-of-00003.safetensors
  in        ROOT
  try       get the checkpoint again, or name the experts it holds: nothing is filled in their place""",
    "T05_number_gap": """\
expected 12 experts in model.layers.1.mlp.experts, found 3 of their tensors missing
  missing   model.layers.1.mlp.experts.6.gate_proj.weight
            model.layers.1.mlp.experts.6.up_proj.weight
            model.layers.1.mlp.experts.6.down_proj.weight
  extra     model.layers.1.mlp.experts.12.gate_proj.weight
            model.layers.1.mlp.experts.12.up_proj.weight
            model.layers.1.mlp.experts.12.down_proj.weight
  looked in model-00002-of-00003.safetensors
  in        ROOT/model-00002-of-00003.safetensors
  try       get the checkpoint again, or name the experts it holds: nothing is filled in their place""",
    "T06_one_shape": """\
expected shape [8, 16] for model.layers.1.mlp.experts.7.gate_proj.weight, found [6, 16]
  tensors   model.layers.1.mlp.experts.7.gate_proj.weight [6, 16], expected [8, 16]
  layout    in   {e}.{p:gate|up}_proj.weight  f d
            out  {e}.down_proj.weight         d f
  sizes     d = 16, e = 12, f = 8, p = 2
  in        ROOT/model-00002-of-00003.safetensors
  try       check config.json against the files: sizes come from the config first, shapes must agree""",
    "T08_mixed_dtype": """\
expected experts of one module in one dtype, BF16, found F32
  tensors   model.layers.1.mlp.experts.7.gate_proj.weight F32, among BF16
  in        ROOT/model-00002-of-00003.safetensors
  try       get the file again if this is no choice of who wrote it; the values are read as they are""",
    "T09_one_int8": """\
expected experts in BF16, F16, F32, F64, since config.json has no quantization_config, found I8
  tensors   model.layers.1.mlp.experts.7.gate_proj.weight I8
  in        ROOT/model-00002-of-00003.safetensors
  try       get the config.json that belongs to these files: without it nobody can decode them""",
    "T14_fused_and_split": """\
expected the experts of model.layers.1.mlp.experts in one layout, found in parts of 2
  layouts   hf/split: 36 tensors, such as model.layers.1.mlp.experts.0.gate_proj.weight
            fused: 2 tensors, such as model.layers.1.mlp.experts.gate_up_proj
  in        ROOT/model-00002-of-00003.safetensors
  try       keep one of them: which values count is not for a reader to decide""",
    "T15_fused_transposed": """\
expected shape [12, 16, 8] for model.layers.1.mlp.experts.down_proj, found [12, 8, 16]
  tensors   model.layers.1.mlp.experts.down_proj [12, 8, 16], expected [12, 16, 8]
            model.layers.1.mlp.experts.gate_up_proj [12, 16, 16], as expected
  layout    in   gate_up_proj  e (p f) d
            out  down_proj     e d f
  sizes     d = 16, e = 12, f = 8, p = 2
  in        ROOT/model-00002-of-00003.safetensors
  try       check config.json against the files: sizes come from the config first, shapes must agree""",
    "T17_no_prefix": """\
expected names that begin with model. in a whole qwen3_moe model, found none: an export without its head
  missing   model.embed_tokens.weight
            model.norm.weight
  found     embed_tokens.weight
            norm.weight
  in        ROOT
  try       a model without a head loads them as they are; for a whole one say rename=""",
    "T22_head_missing": """\
expected lm_head.weight, since tie_word_embeddings does not tie it to the embedding, found none
  missing   lm_head.weight
  in        ROOT
  try       get the checkpoint again, or correct tie_word_embeddings in config.json""",
    "T24_router_missing": """\
expected a router beside model.layers.1.mlp.experts, found none
  missing   model.layers.1.mlp.gate.weight
  in        ROOT
  try       get the checkpoint again: nothing is filled in their place""",
    "C06_more_layers": """\
expected 3 layers below model.layers, as num_hidden_layers says, found 2
  missing   model.layers.2.*
  in        ROOT
  try       get the checkpoint again, or the config.json that belongs to it""",
    "C08_family_disagrees": """\
expected the experts of a mixtral model, found none under its names
  wanted    block_sparse_moe.experts.{e}.w{p:1|3}.weight
            block_sparse_moe.experts.{e}.w2.weight
  there are model.layers.0.mlp.experts.0.gate_proj.weight
            model.layers.0.mlp.experts.0.up_proj.weight
            model.layers.0.mlp.experts.0.down_proj.weight
  in        ROOT
  try       check model_type in config.json; if the files are another family's, say family= (--family)""",
    "C12_experts_huge": """\
expected num_experts as a whole number from 1 to 65536, found 1000000000000
  in        ROOT/config.json
  try       get the config.json that belongs to these files""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_full_text(name: str, tmp_path: Path) -> None:
    (problem,) = findings(CASES[name], tmp_path / "ROOT")
    assert str(problem.error).replace(str(tmp_path) + "/", "") == GOLDEN[name]


def test_several_causes_are_all_told(tmp_path: Path) -> None:
    """Three things wrong at once: three findings, and a plan's error that names them all."""
    shards = good()
    for shard in shards.values():
        shard.pop("lm_head.weight", None)
        shard.pop("model.layers.0.mlp.gate.weight", None)
    shards["model-00002-of-00003.safetensors"][E7] = corpus_tensors.fill("BF16", (6, 16), 3)
    write(tmp_path / "x", shards)
    told = open_checkpoint(tmp_path / "x").problems
    assert {type(problem.error).__name__ for problem in told} == {"ShapeMismatchError", "MissingTensorError"}
    assert len(told) == 3
    assert isinstance(told[0].error, RestowError)
