"""Experts whose gate, up and down are three parameters: PEFT wraps the experts once for each, the last one outermost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_adapters as adapters
import restow.lora
import tiny
from restow.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path
SHAPES = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
NAMES = [f"mlp.experts.{word}" for word in SHAPES]
LAYERS = (1, 2)


class Experts(nn.Module):
    def __init__(self, words: list[str], e: int) -> None:
        super().__init__()
        for word in words:
            self.register_parameter(word, nn.Parameter(torch.zeros(e, *SHAPES[word])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def model(words: Any = tuple(SHAPES), e: int = 12) -> nn.Module:
    """A tree with the paths of qwen3_moe; weights are zero, so that merged weights are deltas."""
    root = nn.Module()
    root.model = nn.Module()
    root.model.layers = nn.ModuleList(nn.Module() for _ in range(3))
    for layer in LAYERS:
        root.model.layers[layer].mlp = nn.Module()
        root.model.layers[layer].mlp.experts = Experts(list(words), e)
    return root


def make(folder: Path, words: Any = tuple(SHAPES), e: int = 12, **config: Any) -> Path:
    """An adapter of the synthetic model, written by PEFT."""
    settings: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": NAMES,
        **config,
    }
    with adapters.quiet():
        peft.get_peft_model(model(words, e), peft.LoraConfig(**settings)).save_pretrained(folder)
    state = adapters.fill(adapters.tensors(folder))
    return adapters.write(folder, state, **adapters.config(folder))


def merged(folder: Path, words: Any = tuple(SHAPES), e: int = 12) -> dict[str, torch.Tensor]:
    """What PEFT makes of it: every key of the file must arrive."""
    with adapters.quiet():
        wrapped = peft.PeftModel.from_pretrained(model(words, e), folder)
        have = {n.replace(".default", "") for n in wrapped.state_dict() if "lora_" in n}
        assert have == set(adapters.tensors(folder))
        return {k: v.detach() for k, v in wrapped.merge_and_unload().state_dict().items()}


def native(folder: Path) -> dict[str, torch.Tensor]:
    """The deltas of a grouped adapter by its formula, in the places of the three parameters."""
    state, config = adapters.tensors(folder), adapters.config(folder)
    out: dict[str, torch.Tensor] = {}
    for name, a in state.items():
        if not name.endswith("_A"):
            continue
        path = name.removeprefix("base_model.model.").rpartition(".")[0]
        role = "gate_up_proj" if "gate" in name else "down_proj"
        patterns = config["alpha_pattern"]
        alpha = next(
            (v for k, v in patterns.items() if f"{path}.{role}".endswith(k.replace("\\", ""))),
            config["lora_alpha"],
        )
        delta = (a @ state[f"{name[:-1]}B"]).transpose(1, 2) * alpha / a.shape[2]
        if role == "down_proj":
            out[f"{path}.down_proj"] = delta
        else:
            out[f"{path}.gate_proj"], out[f"{path}.up_proj"] = delta.split(24, 1)
    return out


CASES: dict[str, dict[str, Any]] = {
    "all": {}, "gate and up": {"target_parameters": NAMES[:2]}, "gate and down": {"target_parameters": NAMES[::2]},
    "gate": {"target_parameters": NAMES[:1]}, "up": {"target_parameters": NAMES[1:2]},
    "patterns": {"rank_pattern": {"experts.up_proj": 5}, "alpha_pattern": {"experts.gate_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_three_parameters(tmp_path: Path, case: str) -> None:
    source = make(tmp_path / "a", **CASES[case])
    state = adapters.tensors(source)
    path = "base_model.model.model.layers.1.mlp.experts"
    depths = {"all": 3, "patterns": 3, "gate": 1, "up": 1}.get(case, 2)
    assert f"{path}.{'base_layer.' * (depths - 1)}lora_A.weight" in state
    want = merged(source)
    base = adapters.config_of("qwen3_moe", tmp_path / "base")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    have = native(tmp_path / "g")
    for name, tensor in want.items():
        torch.testing.assert_close(have.get(name, torch.zeros_like(tensor)), tensor, atol=1e-5, rtol=1e-5)
    for via in ("grouped", "peft", "peft-0.18", "peft-per-expert", "sglang", "megatron-3d", "vllm"):
        restow.lora.convert(source, tmp_path / f"{via}1", to=via, base=base)
        restow.lora.convert(tmp_path / f"{via}1", tmp_path / f"{via}2", to="peft-separate", base=base)
        adapters.same(source, tmp_path / f"{via}2")


@pytest.mark.parametrize("words", [tuple(SHAPES), tuple(reversed(SHAPES))])
def test_written_for_a_model_that_has_three(tmp_path: Path, words: tuple[str, ...]) -> None:
    """A fused adapter, trained on gate_up_proj, in PEFT on a model with three parameters; registered either way round."""
    source = adapters.make(tmp_path / "a", "qwen3_moe", target_modules=[])
    full, before = adapters.merged(source, "qwen3_moe"), adapters.base_state("qwen3_moe")
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "s", to="peft-separate", base=base)
    assert adapters.config(tmp_path / "s")["target_parameters"] == NAMES
    assert adapters.config(tmp_path / "s")["target_modules"] == []
    have = merged(tmp_path / "s")
    for layer in LAYERS:
        path = f"model.layers.{layer}.mlp.experts"
        fused = full[f"{path}.gate_up_proj"] - before[f"{path}.gate_up_proj"]
        down = full[f"{path}.down_proj"] - before[f"{path}.down_proj"]
        for word, want in (("gate_proj", fused[:, :24]), ("up_proj", fused[:, 24:]), ("down_proj", down)):
            torch.testing.assert_close(have[f"{path}.{word}"], want, atol=1e-5, rtol=1e-5)
    restow.lora.convert(tmp_path / "s", tmp_path / "b", to="peft", base=base)
    adapters.same(source, tmp_path / "b")
    if words != tuple(SHAPES):  # the wrappers of a module that registers down first lie the other way round
        other = make(tmp_path / "o", words)
        with pytest.raises(AdapterError, match=r"mlp\.experts"):
            restow.lora.convert(other, tmp_path / "x", to="grouped", base=base)
        restow.lora.convert(other, tmp_path / "y", to="grouped", base=base, outer="in")
        want, found = merged(other, words), native(tmp_path / "y")
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_two_names_of_three(tmp_path: Path) -> None:
    """A config that names fewer parameters than there are wrappers: nothing says which is which."""
    source = make(tmp_path / "a")
    config = {**adapters.config(source), "target_parameters": NAMES[:2]}
    adapters.write(source, adapters.tensors(source), **config)
    with pytest.raises(AdapterError, match=r"2 that match below model\.layers\.1\.mlp\.experts"):
        restow.lora.convert(source, tmp_path / "x", to="grouped", base=adapters.base("qwen3_moe"))
    deep = {
        n.replace("base_layer.base_layer.", "base_layer." * 3): t for n, t in adapters.tensors(source).items()
    }
    fourth = adapters.write(
        tmp_path / "d", {n: t.clone() for n, t in (adapters.tensors(source) | deep).items()}
    )
    with pytest.raises(AdapterError, match=r"base_layer\.base_layer\.base_layer\.lora_"):
        restow.lora.convert(fourth, tmp_path / "x", to="grouped", base=adapters.base("qwen3_moe"))


def test_not_gated_is_as_ever(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "nemotron_h")
    restow.lora.convert(source, tmp_path / "s", to="peft-separate", base=adapters.base("nemotron_h"))
    assert all(
        torch.equal(t, adapters.tensors(source)[n]) for n, t in adapters.tensors(tmp_path / "s").items()
    )


def test_wrong_sizes_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base("qwen3_moe", "2f == d"))
    assert "model.layers.1.mlp.experts" in str(caught.value)
    assert "f = 16" in str(caught.value)
    assert tiny.SIZES["plain"]["f"] == 24
