"""Every family against transformers: into its own runtime model, and into grouped tensors, to the bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import einops
import pytest
import torch
from safetensors.torch import load_file, save_file

import restow
import tiny
from moe import Tensors, differing
from restow.errors import PrecisionError, RestowError
from restow.torch.dtypes import torch_dtype

FAMILIES = [
    pytest.param(name, marks=pytest.mark.slow if family.slow else ())
    for name, family in tiny.FAMILIES.items()
]
FORMS = {"hub": True, "runtime": False}
VISION = {  # fused and permuted on the hub: no rename can say that, so both sides are left out by name
    ("step3p7", True): {
        "allow_missing": [
            f"model.vision_model.layers.0.self_attn.{x}_proj.{kind}"
            for x in "qkv"
            for kind in ("weight", "bias")
        ],
        "allow_unused": [
            f"vision_model.transformer.resblocks.0.attn.in_proj_{kind}" for kind in ("weight", "bias")
        ],
    }
}  # fmt: skip


def emptied(model: torch.nn.Module) -> torch.nn.Module:
    """The model with -1 in every parameter and persistent buffer."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(-1)
    return model


def options(family_id: str, original: bool) -> dict[str, list[str]]:
    return VISION.get((family_id, original), {})


@pytest.mark.parametrize("sizes", tiny.SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family_id", FAMILIES)
def test_into_the_model_s_own_runtime(family_id: str, form: str, sizes: str) -> None:
    left = options(family_id, FORMS[form])
    wanted = tiny.build(family_id, sizes).state_dict()
    model = emptied(tiny.build(family_id, sizes))
    report = restow.load(tiny.saved(family_id, FORMS[form], sizes), model, **left)
    found = model.state_dict()
    assert differing(found, wanted) == sorted(left.get("allow_missing", []))
    assert all((found[name] == -1).all() for name in left.get("allow_missing", []))
    assert report.staged == {}
    assert report.narrowed == {}
    buffers = [name for name, _ in model.named_buffers() if name not in found]
    assert len(report.warnings) == bool(buffers)
    assert all(name in report.warnings[0] for name in buffers)


# Grouped, by formulas of our own.

Formula = Callable[[Mapping[str, torch.Tensor]], Tensors]


def from_fused(p: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        "gate_and_up_projs": einops.rearrange(p["gate_up_proj"], "e pf d -> e d pf"),
        "down_projs": einops.rearrange(p["down_proj"], "e d f -> e f d"),
    }


def from_ungated(p: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        "gate_and_up_projs": einops.rearrange(p["up_proj"], "e f d -> e d f"),
        "down_projs": einops.rearrange(p["down_proj"], "e d f -> e f d"),
    }


def from_in_major(p: Mapping[str, torch.Tensor]) -> Tensors:
    biases = {name: p[name] for name in ("gate_up_proj_bias", "down_proj_bias") if name in p}
    return {"gate_and_up_projs": p["gate_up_proj"], "down_projs": p["down_proj"], **biases}


def from_flat(p: Mapping[str, torch.Tensor]) -> Tensors:
    w1, v1 = (einops.rearrange(p[name], "(e f) d -> e d f", e=tiny.EXPERTS) for name in ("mlp.w1", "mlp.v1"))
    return {
        "gate_and_up_projs": torch.cat([w1, v1], dim=2),
        "down_projs": einops.rearrange(p["mlp.w2"], "(e f) d -> e f d", e=tiny.EXPERTS),
    }


FORMULAS: dict[str, Formula] = {
    "nemotron_h": from_ungated, "nemotron_h-latent": from_ungated, "dbrx": from_flat,
    "gpt_oss": from_in_major, "llama4": from_in_major, "llama4_text": from_in_major,
    "aria": from_in_major, "aria_text": from_in_major,
}  # fmt: skip


def grouped_of(model: torch.nn.Module, family_id: str) -> dict[int, Tensors]:
    """The grouped tensors of every experts module, by layer, from the parameters in memory."""
    formula = FORMULAS.get(family_id, from_fused)
    return {
        layer_of(path): {
            name: t.clone(memory_format=torch.contiguous_format)
            for name, t in formula(dict(module.named_parameters())).items()
        }
        for path, module in model.named_modules()
        if re.search(r"\bexperts$", path)
    }


def layer_of(name: str) -> int:
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    assert found, name
    return int(found[1])


@pytest.mark.parametrize("sizes", tiny.SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family_id", FAMILIES)
def test_into_grouped_tensors(family_id: str, form: str, sizes: str) -> None:
    folder = tiny.saved(family_id, FORMS[form], sizes)
    plan = restow.plan(folder)
    assert (plan.missing, plan.unused) == ((), ())
    into = {t.name: torch.full(t.shape, -1, dtype=torch_dtype(t.dtype)) for t in plan.targets}
    restow.load(folder, into)
    found: dict[int, Tensors] = {}
    with torch.no_grad():
        model = tiny.build(family_id, sizes)
        wanted = grouped_of(model, family_id)
        for path in restow.open(folder).modules:
            for name in wanted[layer_of(f"{path}.")]:
                found.setdefault(layer_of(f"{path}."), {})[name] = into.pop(f"{path}.{name}")
    assert found.keys() == wanted.keys()
    for layer, tensors in wanted.items():
        assert differing(found[layer], tensors) == []
    files = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    assert differing(into, {name: files[name] for name in into}) == [], (
        "other tensors are as they are in the files"
    )


@pytest.mark.parametrize("family_id", ["mixtral", "gpt_oss", "dbrx", "nemotron_h", "llama4_text"])
def test_the_formulas_can_fail(family_id: str) -> None:
    model = tiny.build(family_id)
    right = grouped_of(model, family_id)
    with torch.no_grad():
        for path, module in model.named_modules():
            if re.search(r"\bexperts$", path):
                first = next(iter(module.parameters()))
                first.copy_(first.flip(0))
    wrong = grouped_of(model, family_id)
    assert all(differing(right[layer], wrong[layer]) for layer in right)


@pytest.mark.parametrize("family_id", ["deepseek_v3", "minimax_m2", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_bfloat16_models(family_id: str) -> None:
    folder = tiny.saved(family_id, dtype=torch.bfloat16)
    wanted = tiny.build(family_id, dtype=torch.bfloat16).state_dict()
    model = emptied(tiny.build(family_id, dtype=torch.bfloat16))
    report = restow.load(folder, model)
    assert differing(model.state_dict(), wanted) == []
    assert report.narrowed == {}


@pytest.mark.parametrize(
    ("family_id", "word"),
    [
        ("minimax_m2", "e_score_correction_bias"),
        ("step3p7", "router_bias"),
        ("deepseek_v3", None),
        ("qwen3_moe", None),
    ],
)
def test_float32_files_into_a_bfloat16_model(family_id: str, word: str | None) -> None:
    """Correction biases stay float32 or are refused; all else is narrowed and told."""
    folder = tiny.saved(family_id)
    left = options(family_id, True)
    model = emptied(tiny.build(family_id, dtype=torch.bfloat16))
    exact = [n for n in model.state_dict() if n.endswith("e_score_correction_bias")]
    if word is not None:
        with pytest.raises(PrecisionError) as caught:
            restow.load(folder, model, **left)
        assert word in str(caught.value)
        assert all((t == -1).all() for t in model.state_dict().values()), "nothing was touched"
        for module in model.modules():
            for name, tensor in [*module._buffers.items(), *module._parameters.items()]:
                if name == "e_score_correction_bias" and tensor is not None:
                    tensor.data = tensor.data.float()
    report = restow.load(folder, model, **left)
    source = tiny.build(family_id).state_dict()
    wanted = {n: t if n in exact else t.to(torch.bfloat16) for n, t in source.items()}
    assert differing(model.state_dict(), wanted) == sorted(left.get("allow_missing", []))
    assert set(report.narrowed) == {
        n for n in wanted if n not in exact and n not in left.get("allow_missing", [])
    }


@pytest.mark.parametrize("family_id", ["mixtral", "qwen3_moe", "gpt_oss", "step3p7", "dbrx", "granitemoe"])
def test_a_wrong_number_of_experts_in_the_config_is_found(family_id: str, tmp_path: Path) -> None:
    shutil.copytree(tiny.saved(family_id), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    text = json.dumps(json.loads(file.read_text()), sort_keys=True)
    changed = re.sub(
        r'("(?:moe_num_experts|num_experts|num_local_experts|n_routed_experts)": )12', r"\g<1>13", text
    )
    assert changed != text
    file.write_text(changed)
    with pytest.raises(RestowError, match=r"13|expert"):
        restow.plan(tmp_path / "m")


@pytest.mark.parametrize("family_id", ["mixtral", "gpt_oss", "step3p7"])
def test_one_tensor_less_is_found(family_id: str, tmp_path: Path) -> None:
    shutil.copytree(tiny.saved(family_id), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    names = [n for n in tensors if "expert" in n or ".moe." in n]
    for name in (names[0], names[-1]):
        save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
        with pytest.raises(RestowError):
            restow.load(tmp_path / "m", emptied(tiny.build(family_id)), **options(family_id, True))
