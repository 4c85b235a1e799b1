"""Quantised checkpoints for tests: random codes and scales, and what they mean by formulas of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

E, F, D = 5, 200, 300  # f and d are no multiples of 128
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
State = dict[str, torch.Tensor]


def config(quantization: dict[str, Any], e: int = E, f: int = F, d: int = D, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "num_experts": e, "moe_intermediate_size": f, "hidden_size": d,
        "num_hidden_layers": 1, "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        "quantization_config": quantization, **more,
    }  # fmt: skip


def fp8_config(block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(block),
        "activation_scheme": "dynamic",
    }


def codes(seed: int, *shape: int) -> torch.Tensor:
    """Every byte but the NaNs of e4m3."""
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return torch.where((found & 127) == 127, found & 254, found)


def scales(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def expand(grid: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """A scale for every element, by the element's place."""
    rows = torch.arange(shape[-2]) // block[0]
    columns = torch.arange(shape[-1]) // block[1]
    return grid.to(torch.float32)[..., rows, :][..., columns]


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, low first, of packed words of any width."""
    flat = packed.contiguous().view(torch.uint8)
    both = torch.stack([flat & 15, flat >> 4], -1)
    return both.reshape(*flat.shape[:-1], 2 * flat.shape[-1])


def rest(e: int = E, d: int = D) -> State:
    """What a checkpoint holds besides its experts, in plain floats."""
    make = torch.Generator().manual_seed(7)
    shapes = {
        "model.embed_tokens.weight": (32, d), "model.norm.weight": (d,), "lm_head.weight": (32, d),
        "model.layers.0.mlp.gate.weight": (e, d), "model.layers.0.input_layernorm.weight": (d,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=make).to(torch.bfloat16) for name, shape in shapes.items()}


def write(
    folder: Path, state: State, about: dict[str, Any], files: dict[str, list[str]] | None = None
) -> Path:
    """A folder with these tensors, in one file or in the files given (all others in the last)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    if files is None:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: file for file, names in files.items() for name in names}
    last = list(files)[-1]
    weight_map = {name: where.get(name, last) for name in state}
    for file in files:
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def fp8_split(e: int = E, f: int = F, d: int = D, block: tuple[int, int] = (128, 128)) -> tuple[State, State]:
    """(stored, decoded in float32 under the weights' names), experts split, one attention weight in FP8 too."""
    stored, values, seed = rest(e, d), State(), 0
    shapes = {f"model.layers.0.mlp.experts.{i}.{k}_proj.weight": (d, f) if k == "down" else (f, d)
              for i in range(e) for k in ("gate", "up", "down")}  # fmt: skip
    shapes["model.layers.0.self_attn.o_proj.weight"] = (d, 384)
    for name, shape in shapes.items():
        seed += 2
        grid = scales(seed, -(-shape[0] // block[0]), -(-shape[1] // block[1]))
        stored[name] = codes(seed + 1, *shape).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = grid
        values[name] = stored[name].to(torch.float32) * expand(grid, block, shape)
    return stored, values


def grouped(values: State, e: int = E, path: str = "model.layers.0.mlp.experts") -> State:
    """Split experts as grouped ones: `e d (p f)` and `e f d`."""

    def one(i: int, k: str) -> torch.Tensor:
        return values[f"{path}.{i}.{k}_proj.weight"].T

    return {
        f"{path}.gate_and_up_projs": torch.stack(
            [torch.cat([one(i, "gate"), one(i, "up")], 1) for i in range(e)]
        ),
        f"{path}.down_projs": torch.stack([one(i, "down") for i in range(e)]),
    }
