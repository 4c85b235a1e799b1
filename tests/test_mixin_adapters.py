"""Our own adapters: names of three families both ways, without the peer; test_mixin_nemo compares them with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mixin_host import lora, moe_config, native, numbered, same
from restow.errors import QuantizationError
from restow.torch.adapters import Adapter, DeepSeekV3Adapter, NemotronHAdapter, Qwen3MoeAdapter

E, D, F = 4, 10, 6


def made(kind: type[Adapter], **more: object) -> Adapter:
    return kind(SimpleNamespace(**more), moe_config(E, F, kind is not NemotronHAdapter), None, torch.float32)


@pytest.mark.parametrize("kind", [Qwen3MoeAdapter, DeepSeekV3Adapter])
def test_the_gated_families(kind: type[Adapter]) -> None:
    adapter, state = made(kind), native(E, D, F)
    hf = adapter.to_hf(state, device_mesh=None, unknown=1)
    assert len(hf) == 2 + 2 * E * 3
    assert same(adapter.from_hf(dict(hf), whatever=1), state) == []
    few = adapter.to_hf(state, exclude_key_regex=r"model\.layers|nothing")
    assert list(few) == ["model.embed_tokens.weight"]
    bare = {name.replace("model.layers", "layers"): t for name, t in hf.items()}
    back = adapter.from_hf(bare)
    assert "layers.0.mlp.experts.0.up_proj.weight" in adapter.to_hf(back)


def test_nemotron_h_names() -> None:
    adapter = made(NemotronHAdapter, num_hidden_layers=2)
    at = "model.layers.{}.mixer.experts"
    state = native(E, D, F, False, at=at)
    del state["model.layers.0.mlp.shared_experts.up_proj.weight"]
    state["model.norm.weight"] = numbered(D)
    state["model.layers.0.mixer._fp32_params.A_log"] = numbered(3)
    state["mtp.layers.0.mixer.experts.down_projs"] = numbered(E, F, D)
    state["mtp.layers.0.mixer.experts.gate_and_up_projs"] = numbered(E, D, F)
    hf = adapter.to_hf(dict(state))
    wanted = {
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.1.mixer.experts.3.up_proj.weight",
        "mtp.layers.0.mixer.experts.0.down_proj.weight",
    }
    assert wanted <= set(hf)
    later = {"backbone.layers.2.norm.weight": numbered(D)}
    assert same(adapter.from_hf({**hf, **later}), state) == []
    native_names = {name.replace("backbone.", "model."): t for name, t in hf.items()}
    assert same(adapter.from_hf(native_names), state) == []
    assert "model.norm_f.weight" in adapter.to_hf(dict(state))
    adapters = lora(E, D, F, 2, False, at="mixer.experts")
    assert same(adapter.from_hf(adapter.to_hf(adapters)), adapters) == []
    dense = made(NemotronHAdapter)
    dense.moe_config = None
    rest = {name: t for name, t in state.items() if ".experts." not in name}
    assert same(dense.from_hf(dense.to_hf(rest)), rest) == []


def test_a_dense_adapter_makes_no_fp8_templates() -> None:
    with pytest.raises(QuantizationError, match="reads fp8 checkpoints"):
        made(DeepSeekV3Adapter).to_hf(native(E, D, F), quantization=True)
