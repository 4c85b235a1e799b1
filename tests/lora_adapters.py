"""Adapters for the tiny models, made by the PEFT that is installed, and what it makes of them: the oracle.

Values follow from names alone, and B is not zero, so that a misplaced factor shows. Bases are float32.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "qwen2_moe")
IN = {"nemotron_h": "up_proj"}
CONTAINER = {"llama4_text": "feed_forward.experts", "nemotron_h": "mixer.experts"}


def parameters(family: str) -> list[str]:
    container = CONTAINER.get(family, "mlp.experts")
    return [f"{container}.{IN.get(family, 'gate_up_proj')}", f"{container}.down_proj"]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: every conversion syncs its files, which costs nothing there."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="restow-", dir=place))
    yield folder
    shutil.rmtree(folder)


def config_of(family: str, folder: Path) -> Path:
    """A base that is a config alone, without weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base(family) / "config.json").read_bytes())
    return folder


def base(family: str, sizes: str = "plain") -> Path:
    """The base model's folder, in the hub's form."""
    return tiny.saved(family, True, sizes)


def model(family: str, sizes: str = "plain") -> Any:
    return tiny.build(family, sizes)


def fill(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New values for LoRA tensors; others stay."""
    return {
        name: tiny.values(name, tensor.shape) if "lora_" in name else tensor.clone()
        for name, tensor in state.items()
    }


def make(folder: Path, family: str, sizes: str = "plain", *, r: int = 3, **config: Any) -> Path:
    """An adapter of fused parameters and q_proj, written by the PEFT that is installed."""
    settings: dict[str, Any] = {
        "r": r, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": parameters(family), **config,
    }  # fmt: skip
    with quiet():
        wrapped = peft.get_peft_model(model(family, sizes), peft.LoraConfig(**settings))
        wrapped.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file(fill(load_file(path)), path, metadata={"format": "pt"})
    return folder


def loaded(folder: Path, family: str, sizes: str = "plain") -> Any:
    """The tiny model with the adapter, as the PEFT that is installed reads it; every key must arrive."""
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(model(family, sizes), folder)
    return wrapped.eval()


def merged(folder: Path, family: str, sizes: str = "plain") -> dict[str, torch.Tensor]:
    with quiet():
        return {
            k: v.detach().clone()
            for k, v in loaded(folder, family, sizes).merge_and_unload().state_dict().items()
        }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def same(one: Path, two: Path) -> None:
    """Two adapters are equal: names, dtypes, bits, config."""
    a, b = tensors(one), tensors(two)
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
    assert config(one) == config(two)


@cache
def base_state(family: str, sizes: str = "plain") -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model(family, sizes).state_dict().items()}


def write(folder: Path, state: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    body = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


class quiet(warnings.catch_warnings):
    """PEFT's warnings that patterns matched no module, which facts and tests show to be wrong."""

    def __init__(self) -> None:
        super().__init__()

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")
