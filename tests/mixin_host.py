"""Hosts of the mixin and native state dicts for its tests; expected values by plain indexing, not by the
library.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from restow.state_dict_mixin import MoESplitExpertsStateDictMixin

Tensors = dict[str, torch.Tensor]
PLACES = {"mlp.experts": "model.layers.{}.mlp.experts", "mixer.experts": "model.layers.{}.mixer.experts"}


def moe_config(e: int, f: int, gated: bool = True, **more: Any) -> SimpleNamespace:
    activation = "swiglu" if gated else "relu2"
    return SimpleNamespace(
        n_routed_experts=e, moe_inter_dim=f, expert_activation=activation, expert_bias=False, **more
    )


class Host(MoESplitExpertsStateDictMixin):
    """The least that a subclass is."""

    def __init__(
        self,
        e: int = 4,
        f: int = 6,
        gated: bool = True,
        *,
        dtype: torch.dtype = torch.float32,
        prefix: bool = True,
    ) -> None:
        self.config = None
        self.moe_config = moe_config(e, f, gated)
        self.backend = SimpleNamespace(experts="gmm", dispatcher="torch")
        self.dtype = dtype
        self._uses_model_prefix = prefix


def numbered(*shape: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose elements are all different, by a hash of their place, exact in fp32."""
    count = int(torch.tensor(shape).prod())
    return ((torch.arange(count) * 7919 + start * 131) % 1048573).to(dtype).view(shape)


def native(
    e: int, d: int, f: int, gated: bool = True, *, layers: int = 2, at: str = PLACES["mlp.experts"]
) -> Tensors:
    """Grouped experts of some layers, and two tensors that are none."""
    out = {
        "model.embed_tokens.weight": numbered(5, d),
        "model.layers.0.mlp.shared_experts.up_proj.weight": numbered(f, d),
    }
    for layer in range(layers):
        out[at.format(layer) + ".gate_and_up_projs"] = numbered(e, d, (1 + gated) * f, start=1 + layer)
        out[at.format(layer) + ".down_projs"] = numbered(e, f, d, start=11 + layer)
    return out


def expected(state: Tensors, f: int, gated: bool = True, experts: Any = None) -> Tensors:
    """What Hugging Face has of a native state dict."""
    out: Tensors = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        for i in experts if experts is not None else range(tensor.shape[0]):
            if last == "gate_and_up_projs":
                words = ("gate", "up") if gated else ("up",)
                for j, word in enumerate(words):
                    out[f"{path}.{i}.{word}_proj.weight"] = tensor[i, :, j * f : (j + 1) * f].T
            elif last == "down_projs":
                out[f"{path}.{i}.down_proj.weight"] = tensor[i].T
        if last not in ("gate_and_up_projs", "down_projs"):
            out[name] = tensor
    return out


def lora(
    e: int, d: int, f: int, r: int, gated: bool = True, *, at: str = "mlp.experts", layer: int = 0
) -> Tensors:
    """Grouped LoRA of one layer below PEFT's prefix."""
    path = f"base_model.model.model.layers.{layer}.{at}"
    return {
        f"{path}.lora_gate_and_up_A": numbered(e, d, r, start=1),
        f"{path}.lora_gate_and_up_B": numbered(e, r, (1 + gated) * f, start=2),
        f"{path}.lora_down_A": numbered(e, f, r, start=3),
        f"{path}.lora_down_B": numbered(e, r, d, start=4),
    }


def same(a: Tensors, b: Tensors) -> list[str]:
    """Names at which two state dicts differ: there, in type, dtype, shape or values."""
    names = [*a.keys(), *(b.keys() - a.keys())]
    return [n for n in names if n not in a or n not in b or not equal(a[n], b[n])]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    if isinstance(a, DTensor) != isinstance(b, DTensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        if a.device_mesh != b.device_mesh or a.placements != b.placements:
            return False
        return torch.equal(a.to_local(), b.to_local())
    return torch.equal(a, b)
