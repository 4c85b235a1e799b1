"""Adapters as other programs leave them: odd ranks, 3-D tensors under PEFT's names, factors that lie apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lora_adapters as adapters
import restow
import restow.lora
import tiny
from restow.errors import AdapterError
from test_lora_peft import per_expert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path
PATH = "base_model.model.model.layers.1.mlp.experts"


def deltas(folder: Path, path: str = PATH) -> dict[str, torch.Tensor]:
    """scale * A @ B of a grouped adapter whose config has no patterns."""
    state, config = adapters.tensors(folder), adapters.config(folder)
    out = {}
    for word in ("gate_and_up", "down"):
        a, b = (state[f"{path}.lora_{word}_{x}"].double() for x in "AB")
        scale = config["lora_alpha"] / (a.shape[2] ** 0.5 if config.get("use_rslora") else a.shape[2])
        out[word] = scale * (a @ b)
    return out


def test_nemo_s_rank_scaling(tmp_path: Path) -> None:
    """The config says the dense rank, the tensors another: the tensors' rank gives the scale, if NeMo's file says so."""
    source = adapters.make(tmp_path / "p", "qwen3_moe", target_modules=[])
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base("qwen3_moe"))
    want = deltas(tmp_path / "g")
    state, config = adapters.tensors(tmp_path / "g"), adapters.config(tmp_path / "g")
    given = adapters.write(tmp_path / "n", state, **{**config, "r": 24})
    with pytest.raises(AdapterError, match="rank 24"):
        restow.lora.convert(given, tmp_path / "x", to="peft", base=adapters.base("qwen3_moe"))
    (given / "automodel_peft_config.json").write_text(json.dumps({"moe_rank_scaling": True}))
    restow.lora.convert(given, tmp_path / "o", to="peft", base=adapters.base("qwen3_moe"))
    have, before = adapters.merged(tmp_path / "o", "qwen3_moe"), adapters.base_state("qwen3_moe")
    for word, parameter in (("gate_and_up", "gate_up_proj"), ("down", "down_proj")):
        name = f"model.layers.1.mlp.experts.{parameter}"
        delta = want[word].transpose(1, 2).float()
        torch.testing.assert_close(have[name] - before[name], delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_down_is_padded_with_its_scale(tmp_path: Path, rslora: bool) -> None:
    """One rank for a module in `grouped`: down gets columns of zeros and alpha by its rule, the product stays."""
    state = per_expert("qwen3_moe", shared=False)
    source = adapters.write(tmp_path / "e", state, use_rslora=rslora,
                            target_modules=["gate_proj", "up_proj", "down_proj"])  # fmt: skip
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base("qwen3_moe"))
    config = adapters.config(tmp_path / "g")
    assert config["r"] == 6
    assert config["lora_alpha"] == pytest.approx(6 * (2**0.5 if rslora else 2))
    assert adapters.tensors(tmp_path / "g")[f"{PATH}.lora_down_A"].shape == (12, 24, 6)
    scale = 6 / (3**0.5 if rslora else 3)
    want = scale * state[f"{PATH}.7.down_proj.lora_B.weight"] @ state[f"{PATH}.7.down_proj.lora_A.weight"]
    torch.testing.assert_close(deltas(tmp_path / "g")["down"][7].T.float(), want, atol=1e-5, rtol=1e-5)


def test_interleaved_rows_per_expert(tmp_path: Path) -> None:
    """gpt_oss: gate is every even row of B, up every odd one."""
    source = adapters.make(tmp_path / "a", "gpt_oss")
    restow.lora.convert(source, tmp_path / "e", to="peft-per-expert", base=adapters.base("gpt_oss"))
    state = adapters.tensors(tmp_path / "e")
    path = "base_model.model.model.layers.1.mlp.experts"
    fused = adapters.tensors(source)[f"{path}.base_layer.lora_B.weight"].reshape(48, 3, 12)
    for start, word in enumerate(("gate_proj", "up_proj")):
        (name,) = [n for n in state if n.startswith(f"{path}.7.") and word in n and "lora_B" in n]
        assert torch.equal(state[name], fused[start::2, :, 7])


@pytest.mark.parametrize("weight", [".weight", ""])
def test_three_dims_under_either_name(tmp_path: Path, weight: str) -> None:
    """Megatron-Bridge: 3-D tensors under the wrappers' names, and under the parameters' own, with or without `.weight`."""
    base = adapters.base("qwen3_moe")
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    state = {}
    for name, t in adapters.tensors(source).items():
        if "experts" in name:
            inner = "gate_up_proj" if "base_layer" in name else "down_proj"
            end = "lora_A" if "lora_A" in name else "lora_B"
            name = f"{name.partition('experts')[0]}experts.{inner}.{end}{weight}"
            t = t.reshape(12, 3, -1) if end == "lora_A" else t.reshape(t.shape[0], 3, 12).permute(2, 0, 1)
        state[name] = t.contiguous()
    stacked = adapters.write(tmp_path / "s", state, **adapters.config(source))
    flat = {n: (t.reshape(12, 3, -1) if "lora_A" in n else t.reshape(t.shape[0], 3, 12)) if "experts" in n else t
            for n, t in adapters.tensors(source).items()}  # fmt: skip
    wrapped = adapters.write(tmp_path / "w", flat, **adapters.config(source))
    for given in (stacked, wrapped):
        restow.lora.convert(given, tmp_path / f"{given.name}o", to="peft", base=base)
        have, want = adapters.tensors(tmp_path / f"{given.name}o"), adapters.tensors(source)
        assert sorted(have) == sorted(want)
        assert all(torch.equal(have[n], want[n]) for n in want)


def test_the_first_of_two_patterns_counts(tmp_path: Path) -> None:
    """Two keys that both match: the file's order decides, as in PEFT once it has read the file."""
    one, _ = adapters.parameters("qwen3_moe")
    source = adapters.make(tmp_path / "a", "qwen3_moe", target_modules=[])
    for keys in ([(r".*\.gate_up_proj", 9), (one, 7)], [(one, 7), (r".*\.gate_up_proj", 9)]):
        config = {**adapters.config(source), "alpha_pattern": dict(keys)}
        given = adapters.write(tmp_path / f"{keys[0][1]}", adapters.tensors(source), **config)
        want = adapters.merged(given, "qwen3_moe")
        restow.lora.merge(adapters.base("qwen3_moe"), given, tmp_path / f"{keys[0][1]}m")
        have = tiny.reload(tmp_path / f"{keys[0][1]}m", "qwen3_moe")[0].state_dict()
        name = f"model.layers.1.{one}"
        torch.testing.assert_close(have[name], want[name], atol=1e-5, rtol=1e-5)


def test_written_files_are_the_same_every_time(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    for i in range(2):
        restow.lora.convert(source, tmp_path / f"{i}", to="vllm", base=adapters.base("qwen3_moe"))
    files = [(tmp_path / f"{i}" / "adapter_model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]


def test_more_experts_in_gate_and_up_than_in_down(tmp_path: Path) -> None:
    """LongCat: zero experts have rows in gate and up alone; there and back, and merged as PEFT merges."""
    family = "longcat_flash"
    source = adapters.make(tmp_path / "a", family, target_modules=[])
    base = adapters.base(family)
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    state = adapters.tensors(tmp_path / "g")
    path = "base_model.model.model.layers.0.mlp.experts"
    assert [state[f"{path}.lora_{word}_A"].shape[0] for word in ("gate_and_up", "down")] == [16, 12]
    restow.lora.convert(tmp_path / "g", tmp_path / "b", to="peft", base=base)
    adapters.same(source, tmp_path / "b")
    restow.lora.merge(base, source, tmp_path / "m")
    model, want = adapters.model(family), adapters.merged(source, family)
    restow.load(tmp_path / "m", model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, want[name], atol=1e-5, rtol=1e-5)
