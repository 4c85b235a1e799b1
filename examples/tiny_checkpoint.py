"""The checkpoint that the other examples work on: a made-up Qwen3-MoE, one tensor per expert and word."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, D, F = 2, 16, 32, 24


def write(folder: str | Path) -> Path:
    """Write config.json and model.safetensors; every run writes the same."""
    path, noise = Path(folder), torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (64, D), "model.norm.weight": (D,), "lm_head.weight": (64, D)}
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        shapes[f"{mlp}.gate.weight"] = (EXPERTS, D)
        for e in range(EXPERTS):
            shapes[f"{mlp}.experts.{e}.gate_proj.weight"] = (F, D)
            shapes[f"{mlp}.experts.{e}.up_proj.weight"] = (F, D)
            shapes[f"{mlp}.experts.{e}.down_proj.weight"] = (D, F)
    tensors = {name: torch.randn(shape, generator=noise).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "hidden_size": D, "moe_intermediate_size": F,
              "num_hidden_layers": LAYERS}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path
