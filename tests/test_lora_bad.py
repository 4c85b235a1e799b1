"""Adapters that cannot mean what they say: each is refused by name, with both numbers, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from typer.testing import CliRunner

import corpus_quant  # noqa: F401  its cases come into the table
import corpus_tensors  # noqa: F401
import lora_adapters as adapters
import restow.lora
import tiny
from corpus import CASES, says
from restow.adapter_base import base_of
from restow.adapter_config import adapter_config
from restow.adapter_keys import Sorted
from restow.adapter_scope import judge_scope
from restow.cli import app
from restow.errors import AdapterError, RestowError, UsageError

PREFIX = "base_model.model."
LINEAR = "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.7.gate_proj"
State = dict[str, torch.Tensor]


def pair(module: str, i: int, o: int, r: int = 2) -> State:
    return {f"{PREFIX}{module}.lora_A.weight": tiny.values(f"{module}.A", torch.Size((r, i))),
            f"{PREFIX}{module}.lora_B.weight": tiny.values(f"{module}.B", torch.Size((o, r)))}  # fmt: skip


def good() -> State:
    state = pair(LINEAR, 32, 64)
    for layer in (1, 2):
        for e in range(12):
            path = f"model.layers.{layer}.mlp.experts.{e}"
            state |= (
                pair(f"{path}.gate_proj", 32, 24)
                | pair(f"{path}.up_proj", 32, 24)
                | pair(f"{path}.down_proj", 24, 32)
            )
    return state


def refused(tmp_path: Path, state: State, *holds: str, config: dict[str, Any] | None = None) -> AdapterError:
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        **(config or {}),
    }
    source = adapters.write(tmp_path / "a", state, **settings)
    with pytest.raises(AdapterError) as caught:
        restow.lora.convert(source, tmp_path / "out", to="peft", base=adapters.base("qwen3_moe"))
    text = str(caught.value)
    for word in holds:
        assert says(text, word), text
    assert text.isascii()
    assert not (tmp_path / "out").exists()
    return caught.value


def test_the_good_one_passes(tmp_path: Path) -> None:
    source = adapters.write(tmp_path / "a", good(), r=2, lora_alpha=4)
    restow.lora.convert(source, tmp_path / "out", to="peft", base=adapters.base("qwen3_moe"))
    restow.lora.convert(
        tmp_path / "out", tmp_path / "back", to="peft-per-expert", base=adapters.base("qwen3_moe")
    )
    before, after = adapters.tensors(source), adapters.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in (name for name in before if ".lora_A." in name):
        found, wanted = (
            state[name.replace(".lora_A.", ".lora_B.")].double() @ state[name].double()
            for state in (after, before)
        )
        assert bool(wanted.any()) and torch.equal(found, wanted), name


@pytest.mark.parametrize("module", [LINEAR, EXPERT])
def test_l01_half_pair(tmp_path: Path, module: str) -> None:
    state = good()
    del state[f"{PREFIX}{module}.lora_B.weight"]
    refused(tmp_path, state, f"{module}.lora_B")


@pytest.mark.parametrize("module", [LINEAR, EXPERT])
def test_l02_rank_differs(tmp_path: Path, module: str) -> None:
    refused(tmp_path, good(), module.rpartition(".")[0].replace(".7", ".0") if module == EXPERT else module, "4", "2",
            config={"r": 4})  # fmt: skip
    one = tmp_path / "one"
    one.mkdir()
    refused(one, pair(module, 32, 64 if module == LINEAR else 24), module, "4", "2", config={"r": 4})


@pytest.mark.parametrize(
    "module", ["model.layers.9.self_attn.q_proj", "model.layers.9.mlp.experts.0.gate_proj"]
)
def test_l03_no_such_module(tmp_path: Path, module: str) -> None:
    refused(tmp_path, good() | pair(module, 32, 24), "layers.9")


def test_l04_no_such_expert(tmp_path: Path) -> None:
    refused(tmp_path, good() | pair("model.layers.1.mlp.experts.12.gate_proj", 32, 24), "experts.12")


def test_l05_no_adapter_config(tmp_path: Path) -> None:
    source = adapters.write(tmp_path / "a", good())
    (source / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        restow.lora.convert(source, tmp_path / "out", to="peft", base=adapters.base("qwen3_moe"))


@pytest.mark.parametrize("module", [LINEAR, EXPERT])
def test_l06_swapped_ab(tmp_path: Path, module: str) -> None:
    state = good()
    a, b = (f"{PREFIX}{module}.lora_{x}.weight" for x in "AB")
    state[a], state[b] = state[b], state[a]
    refused(tmp_path, state, module, "exchanged")


@pytest.mark.parametrize("value", ["16", None, True, float("nan")])
def test_l07_alpha_is_no_number(tmp_path: Path, value: object) -> None:
    refused(tmp_path, good(), "lora_alpha", config={"lora_alpha": value})


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_l08_rank_is_none(tmp_path: Path, value: object) -> None:
    refused(tmp_path, good(), "r as a whole number", str(value), config={"r": value})


def test_l09_slow_pattern(tmp_path: Path) -> None:
    started = time.perf_counter()
    refused(tmp_path, good(), "rank_pattern", "(a", config={"rank_pattern": {"(a|a)*$(.*.*)*x": 4}})
    (tmp_path / "n").mkdir()
    refused(tmp_path / "n", good(), "alpha_pattern", config={"alpha_pattern": {"([a-z_.0-9]+)+!": 4}})
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("module", [LINEAR, EXPERT])
def test_l10_wider_base(tmp_path: Path, module: str) -> None:
    refused(tmp_path, good() | pair(module, 48, 64 if module == LINEAR else 24), module, "48", "32")


def test_a_wider_base_in_every_fused_format(tmp_path: Path) -> None:
    for to in ("peft", "grouped", "sglang"):
        source = adapters.make(tmp_path / f"s{to}", "qwen3_moe", "plain")
        restow.lora.convert(source, tmp_path / to, to=to, base=adapters.base("qwen3_moe"))
        with pytest.raises(AdapterError) as caught:
            restow.lora.convert(tmp_path / to, tmp_path / "x", to="grouped" if to != "grouped" else "peft",
                                base=adapters.base("qwen3_moe", "2f == d"))  # fmt: skip
        assert "mlp.experts" in str(caught.value)


CORRUPT: dict[str, tuple[Callable[[State], object], str]] = {
    "nan": (lambda s: s[f"{PREFIX}{EXPERT}.lora_B.weight"].fill_(float("nan")), f"{EXPERT}.lora_B.weight"),
    "strange name": (lambda s: s.update({f"{PREFIX}model.layers.1.mlp.experts.lora_C.weight": torch.ones(2)}), "lora_C"),
    "two formats": (lambda s: s.update({f"{PREFIX}model.layers.1.mlp.experts.lora_down_A": torch.ones(12, 24, 2)}),
                    "one format"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(tmp_path: Path, case: str) -> None:
    state = {name: tensor.clone() for name, tensor in good().items()}
    change, word = CORRUPT[case]
    change(state)
    refused(tmp_path, state, word)


def test_rows_that_experts_do_not_divide(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    state = adapters.tensors(source)
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    state[name] = state[name][:-1]
    adapters.write(source, state, **adapters.config(source))
    with pytest.raises(AdapterError) as caught:
        restow.lora.convert(source, tmp_path / "b", to="grouped", base=adapters.base("qwen3_moe"))
    assert name in str(caught.value)


def test_dora_on_experts_is_refused_and_dropout_is_reset(tmp_path: Path) -> None:
    refused(tmp_path, good(), "use_dora", config={"use_dora": True})
    source = adapters.write(tmp_path / "d", good(), r=2, lora_alpha=4, lora_dropout=0.1, made_up_field=[1])
    report = restow.lora.convert(source, tmp_path / "p", to="peft", base=adapters.base("qwen3_moe"))
    config = adapters.config(tmp_path / "p")
    assert config["lora_dropout"] == 0
    assert config["made_up_field"] == [1]
    assert any("lora_dropout" in note for note in report.notes)


def test_formats_and_bases_that_nobody_knows(tmp_path: Path) -> None:
    source = adapters.write(tmp_path / "a", good(), r=2, lora_alpha=4)
    with pytest.raises(UsageError, match="grouped, peft"):
        restow.lora.convert(source, tmp_path / "b", to="made_up", base=adapters.base("qwen3_moe"))
    with pytest.raises(AdapterError, match="base="):
        restow.lora.convert(source, tmp_path / "b", to="peft")
    restow.lora.convert(source, tmp_path / "b", to="peft", family="qwen3_moe")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("text", [b'{"moe_rank_scaling": tr', b"\xff\xfe", b"[" * 100_000])
def test_a_config_beside_the_config_that_is_none(text: bytes, tmp_path: Path) -> None:
    """What NeMo writes beside it is judged as it is; the other keys of a damaged file are not guessed."""
    source = adapters.write(tmp_path / "a", good(), r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"])
    (source / "automodel_peft_config.json").write_bytes(text)
    with pytest.raises(AdapterError) as caught:
        restow.lora.convert(source, tmp_path / "out", to="peft", base=adapters.base("qwen3_moe"))
    assert str(caught.value) == (
        f"expected a config of strict JSON, found {caught.value.found}\n"
        f"  in        {source}/automodel_peft_config.json\n"
        "  try       get the config that belongs to this adapter"
    )


A, B = (f"{PREFIX}{LINEAR}.lora_{x}.weight" for x in "AB")
WRONG: dict[str, tuple[Callable[[State], object], dict[str, Any] | None]] = {
    "L01": (lambda s: s.pop(B), {}),
    "L02": (lambda s: None, {"r": 4}),
    "L03": (lambda s: s.update(pair("model.layers.9.self_attn.q_proj", 32, 64)), {}),
    "L04": (lambda s: s.update(pair("model.layers.1.mlp.experts.12.gate_proj", 32, 24)), {}),
    "L05": (lambda s: None, None),
    "L06": (lambda s: s.update({A: s[B], B: s[A]}), {}),
    "L07": (lambda s: None, {"lora_alpha": "16"}),
    "L08": (lambda s: None, {"r": 0}),
    "L09": (lambda s: None, {"rank_pattern": {"(a|a)*$(.*.*)*x": 4}}),
    "L10": (lambda s: s.update(pair(EXPERT, 48, 24)), {}),
}


@pytest.mark.parametrize("case", WRONG)
def test_adapters_are_judged_before_torch_is_imported(case: str, tmp_path: Path) -> None:
    """By every verb that takes one, in the words of Python."""
    change, config = WRONG[case]
    state = good()
    change(state)
    source = adapters.write(tmp_path / "a", state, **{"r": 2, "lora_alpha": 4, **(config or {})})
    if config is None:
        (source / "adapter_config.json").unlink()
    base, out = str(adapters.base("qwen3_moe")), str(tmp_path / "out")
    with pytest.raises(RestowError) as caught:
        restow.lora.convert(source, out, to="peft", base=base)
    calls = [["lora", str(source), out, "--to", "peft", "--base", base], ["merge", base, str(source), out],
             ["lora", str(source), "--check", "--base", base]]  # fmt: skip
    code = f"""
import sys
from restow.cli import app
for call in {calls!r}:
    try:
        app(call, prog_name="restow")
    except SystemExit as end:
        print(end.code, "torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "1 False False\n" * 3, done.stderr
    assert done.stderr == f"restow.errors.AdapterError: {caught.value}\n" * 3
    assert not (tmp_path / "out").exists()


BASES = ["T01_part_of_expert", "T03_layer_experts_missing", "T05_number_gap", "T06_one_shape", "T22_head_missing",
         "T24_router_missing", "C01_no_config", "C03_unknown_family", "C06_more_layers", "C08_family_disagrees",
         "P01_pickle_only", "Q10_scale_orphan"]  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_not_whole_is_not_merged_into(name: str, tmp_path: Path) -> None:
    """It is refused as it is for a conversion: what it lacks the merged checkpoint would lack, too."""
    base = CASES[name].build(tmp_path / "base") or tmp_path / "base"
    source = adapters.write(
        tmp_path / "a", pair(LINEAR, 16, 16), r=2, lora_alpha=4, target_modules=["q_proj"]
    )
    with pytest.raises(RestowError) as caught:
        restow.convert(base, tmp_path / "out", to="grouped")
    told = caught.value
    with pytest.raises(type(told)) as caught:
        restow.lora.merge(base, source, tmp_path / "out")
    assert str(caught.value) == str(told)
    done = CliRunner().invoke(app, ["merge", str(base), str(source), str(tmp_path / "out")])
    assert (done.exit_code, done.stderr) == (1, f"restow.errors.{type(told).__name__}: {told}\n")
    assert not (tmp_path / "out").exists()


def test_what_is_odd_about_a_base_is_told_and_strict_refuses_it(tmp_path: Path) -> None:
    CASES["I17_total_size"].build(tmp_path / "base")
    source = adapters.write(
        tmp_path / "a", pair(LINEAR, 16, 16), r=2, lora_alpha=4, target_modules=["q_proj"]
    )
    done = CliRunner().invoke(
        app, ["merge", str(tmp_path / "base"), str(source), str(tmp_path / "out"), "--strict"]
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("restow.errors.IndexMismatchError: expected total_size ")
    assert not (tmp_path / "out").exists()
    told = restow.lora.merge(tmp_path / "base", source, tmp_path / "out").warnings[0]
    assert done.stderr == f"restow.errors.IndexMismatchError: {told}\n"


A_OF, B_OF = (f"{PREFIX}{LINEAR}.lora_{x}.weight" for x in "AB")
ODD: dict[str, tuple[Callable[[State], Any], dict[str, Any], str]] = {
    "one dim": (
        lambda s: s.update({B_OF: s[B_OF].reshape(-1)}), {},
        f"expected shape [out, 2] for {B_OF}, which the base gives, found [128]\n"
        f"  tensor    {B_OF}\n  module    {LINEAR}\n  in        @/adapter_config.json\n"
        "  try       this adapter was trained on a base of other sizes"),
    "a dim more": (
        lambda s: s.update({A_OF: s[A_OF][None]}), {},
        f"expected shape [2, in] for {A_OF}, which the base gives, found [1, 2, 32]\n"
        f"  tensor    {A_OF}\n  module    {LINEAR}\n  in        @/adapter_config.json\n"
        "  try       this adapter was trained on a base of other sizes"),
    "integers": (
        lambda s: s.update({A_OF: s[A_OF].to(torch.int32)}), {},
        f"expected factors in BF16, F16, F32, F64, found I32\n  tensors   {A_OF} I32\n"
        "  in        @/adapter_model.safetensors\n  try       save the adapter again in one of these dtypes"),
    "a factor that nobody has": (
        lambda s: s.update({A_OF.replace("_A", "_E"): s[A_OF].clone()}), {},
        f"expected factors that LoRA has, found {LINEAR}.lora_E.weight\n  tensor    {PREFIX}{LINEAR}.lora_E.weight\n"
        "  in        @/adapter_config.json\n  try       tell us which program wrote this adapter"),
    "another norm": (
        lambda s: s.update({f"{PREFIX}model.norm.weight": torch.ones(3, 32)}), {},
        f"expected shape [32] for {PREFIX}model.norm.weight, which takes the place of the base's, found [3, 32]\n"
        f"  tensor    {PREFIX}model.norm.weight\n  in        @/adapter_config.json\n"
        "  try       this adapter was trained on a base of other sizes"),
    "a layer left out": (
        lambda s: None, {"layers_to_transform": [0, 2]},
        f"expected pairs of modules that layers_to_transform does not leave out, found 1 that it does\n"
        f"  modules   {LINEAR}\n  in        @/adapter_config.json\n"
        "  try       PEFT would drop them without a word: correct layers_to_transform in the config, or the file is "
        "another adapter's"),
    "a module left out": (
        lambda s: None, {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        f"expected pairs of modules that exclude_modules does not leave out, found 1 that it does\n"
        f"  modules   {LINEAR}\n  in        @/adapter_config.json\n"
        "  try       PEFT would drop them without a word: correct exclude_modules in the config, or the file is "
        "another adapter's"),
    "no layers": (
        lambda s: None, {"layers_to_transform": "1"},
        "expected layers_to_transform as numbers of layers, found '1'\n  in        @/adapter_config.json\n"
        "  try       get the config that belongs to this adapter"),
    "layers by an expression": (
        lambda s: None, {"layers_to_transform": [1], "layers_pattern": "(a+)+"},
        "expected layers_pattern as names of modules, found '(a+)+'\n  in        @/adapter_config.json\n"
        "  try       regular expressions of an adapter are never run"),
    "strange bias": (
        lambda s: None, {"bias": None},
        "expected bias as one of 'none', 'all', 'lora_only', found None\n  in        @/adapter_config.json\n"
        "  try       get the config that belongs to this adapter"),
    "layers repeated": (
        lambda s: None, {"layer_replication": [[0, 2], [1, 3]]},
        "expected an adapter for the base's own layers, found layer_replication [[0, 2], [1, 3]]\n"
        "  in        @/adapter_config.json\n"
        "  try       PEFT repeats layers of the base first: merge it with PEFT"),
}  # fmt: skip


NESTED, HEAD = "model.layers.1.mlp.shared.0.up", "lm_head"
SCOPES: list[dict[str, Any]] = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0},
    {"layers_to_transform": []},
    {"layers_to_transform": [1], "layers_pattern": ""},
    {"layers_to_transform": [0], "layers_pattern": "shared"},
    {"layers_to_transform": [0], "layers_pattern": ["blocks", "shared"]},
    {"layers_to_transform": [1], "layers_pattern": "model.layers"},
    {"layers_to_transform": [0], "target_modules": [NESTED, LINEAR]},
    {"layers_to_transform": [1], "target_modules": ["q_proj", "up", HEAD]},
    {"exclude_modules": ["up"]},
    {"exclude_modules": ["shared.0.up", "proj"]},
]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_what_a_config_leaves_out_is_what_peft_leaves_out(scope: dict[str, Any]) -> None:
    base = base_of(adapters.base("qwen3_moe"), None)
    for module in (LINEAR, NESTED, HEAD, f"model.{HEAD}"):
        said = {"target_modules": ["q_proj", "up", module.rpartition(".")[2]], **scope}
        if not any(f".{module}".endswith(f".{end}") for end in said["target_modules"]):
            continue
        errors = judge_scope(Sorted(pairs={module: {}}), {}, adapter_config(said), base)
        taken = check_target_module_exists(peft.LoraConfig(**said), module)
        assert [says(str(e), "does not leave out") for e in errors] == [True] * (not taken), module


def test_parameters_are_left_out_by_no_field(tmp_path: Path) -> None:
    """PEFT asks neither field about target_parameters (0.21.2, _inject_parameters)."""
    gate = "model.layers.1.mlp.gate"
    said = {"layers_to_transform": [0], "exclude_modules": ["gate"], "target_parameters": ["mlp.gate.weight"]}
    source = adapters.write(tmp_path / "a", pair(gate, 32, 12), r=2, lora_alpha=4, **said, target_modules=[])
    report = restow.lora.convert(source, tmp_path / "b", to="peft", base=adapters.base("qwen3_moe"))
    assert adapters.tensors(tmp_path / "b").keys() == pair(gate, 32, 12).keys(), report


@pytest.mark.parametrize("case", ODD)
def test_odd_ones_in_full(case: str, tmp_path: Path) -> None:
    """Found by mutation: each was an exception of Python's, or passed and was read otherwise by PEFT."""
    change, config, text = ODD[case]
    state = good()
    change(state)
    error = refused(tmp_path, state, config=config)
    assert str(error) == text.replace("@", str(tmp_path / "a"))
    with pytest.raises(AdapterError) as caught:
        restow.lora.merge(adapters.base("qwen3_moe"), tmp_path / "a", tmp_path / "m")
    assert str(caught.value) == str(error)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "word", ["use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"]
)
def test_variants_that_add_something_else(word: str, tmp_path: Path) -> None:
    value = True if word == "use_qalora" else [1]
    source = adapters.write(tmp_path / "a", pair(LINEAR, 32, 64), r=2, lora_alpha=4, **{word: value})
    with pytest.raises(AdapterError) as caught:
        restow.lora.merge(adapters.base("qwen3_moe"), source, tmp_path / "m")
    said = ("false", "true") if value is True else ("null", "[1]")
    assert str(caught.value) == (
        f"expected {word} {said[0]}, found {said[1]}\n  in        {source}/adapter_config.json\n"
        "  try       merge it with PEFT"
    )


def test_a_wrapper_without_its_b(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    state = adapters.tensors(source)
    name = f"{PREFIX}model.layers.1.mlp.experts.lora_B.weight"
    del state[name]
    adapters.write(source, state, **adapters.config(source))
    with pytest.raises(AdapterError) as caught:
        restow.lora.convert(source, tmp_path / "b", to="grouped", base=adapters.base("qwen3_moe"))
    assert str(caught.value) == (
        "expected both factors of every module, found lora_A of model.layers.1.mlp.experts alone\n"
        f"  missing   {name}\n  found     {name.replace('lora_B', 'lora_A')}\n  in        {source}/adapter_config.json\n"
        "  try       the file was cut or filtered; save the adapter again"
    )


def test_a_stamp_whose_targets_catch_nothing_is_not_believed(tmp_path: Path) -> None:
    """What a conversion noted of the first config lies in the header, and may be damaged as any text."""
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base("qwen3_moe"))
    path = tmp_path / "g" / "adapter_model.safetensors"
    raw = path.read_bytes()
    assert raw.count(b'[\\"q_proj\\"]') == 1
    path.write_bytes(raw.replace(b'[\\"q_proj\\"]', b'[\\"q_@roj\\"]'))
    restow.lora.convert(tmp_path / "g", tmp_path / "p", to="peft", base=adapters.base("qwen3_moe"))
    assert adapters.config(tmp_path / "p")["target_modules"] == ["q_proj"]
