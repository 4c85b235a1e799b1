"""Every model type that transformers builds: found, loaded, converted to each form and back, reloaded, to the bit.

A fixed third of them runs by default, all of them under the `slow` marker. The oracle is transformers: names and
values come from saved files and state dicts, grouped tensors from formulas of our own over parameters in memory.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import einops
import pytest
import torch
from safetensors.torch import load_file

import restow
import tiny
from moe import Tensors, differing
from restow.layout import shape_of
from restow.torch.dtypes import torch_dtype

THIRD = [name for name in tiny.EVERY if zlib.crc32(name.encode()) % 3 == 0]
IDS = [pytest.param(name, marks=() if name in THIRD else pytest.mark.slow) for name in tiny.EVERY]
EACH = pytest.mark.parametrize("family_id", IDS)
FORM = pytest.mark.parametrize("hub", [True, False], ids=["hub", "runtime"])

# What the hub holds in a form that no rename brings about: fused or permuted vision and short convolutions, shared
# experts, transposed routers.
LEFT = {
    "step3p7": "model.vision_model.*.self_attn.?_proj.*",
    "minimax_m3_vl": "*.mlp.shared_experts.gate_up_proj.weight",
    "kimi_linear": "*.self_attn.conv1d.weight",
    "bailing_hybrid": "*.self_attn.conv1d.weight",
    "glm5_next": "*.self_attn.conv1d.weight",
    "mistral_large4": "model.vision_tower.*.attention.[qk]_proj.weight",
    "kimi_k25": "model.vision_tower.*.attn.[qkv]_proj.*",
    "unlimited_ocr": "model.vision_tower.*.self_attn.[qkv]_proj.*",
    "ernie4_5_vl_moe": "*_moe.gate.*",
    "inkling_mm_model": "*.mlp.shared_experts.*_proj",
}
RESET = {"zaya": "*.balancing_biases"}  # transformers writes -1 over the last one whenever it loads them
UNGATED = {"nemotron_h", "nemotron_h-latent", "nllb-moe", "switch_transformers"}
EXPERT = {  # what an expert weight's name looks like, where it is not `.experts.` and something
    "granitemoe": r"block_sparse_moe\.(experts\.|(in|out)put_linear)",
    "granitemoeshared": r"block_sparse_moe\.(experts\.|(in|out)put_linear)",
    "granitemoehybrid": r"block_sparse_moe\.(experts\.|(in|out)put_linear)",
    "jetmoe": r"\.mlp\.(in|out)put_linear",
    "step3p7": r"\.moe\.(gate|up|down)_proj\.weight$|\.mlp\.experts\.",
    "laguna": r"\.experts\.(?!e_score)",
    "muse_spark": r"\.experts\.(?!post_expert)",
}


@cache
def state(family_id: str) -> Tensors:
    return dict(tiny.build(family_id).state_dict())


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def is_expert(name: str, family_id: str) -> bool:
    return re.search(EXPERT.get(family_id, r"\.experts\."), name) is not None


@EACH
@FORM
def test_it_is_found(family_id: str, hub: bool) -> None:
    """No problem, every expert weight in a module, sizes as they were given, routers of the shape that they have."""
    folder = tiny.saved(family_id, hub)
    found = restow.open(folder)
    assert found.problems == (), [str(problem.error) for problem in found.problems]
    names = set(read(folder))
    assert set(found.expert_tensors) == {name for name in names if is_expert(name, family_id)}
    wanted = {"e": tiny.EXPERTS, "p": 1 if family_id in UNGATED else 2, **tiny.SIZES["plain"]}
    for module in found.modules.values():
        assert {axis: module.sizes[axis] for axis in wanted} == wanted
    assert found.modules
    rows = {row for row in found.routers.values() if row.role == "router"}
    assert len(rows) == 1
    for name, row in found.routers.items():
        if not row.role.startswith("attention"):
            assert found.tensors[name].shape == shape_of(row, found.sizes), name


def left_out(family_id: str, hub: bool) -> dict[str, list[str]]:
    """What `load` is told to leave, as bytes say: the names in memory that no tensor of the hub's files equals."""
    if not hub or family_id not in LEFT:
        return {}
    files, memory = read(tiny.saved(family_id)), state(family_id)
    key = {name: (tuple(t.shape), t.contiguous().numpy().tobytes()) for name, t in memory.items()}
    there = {(tuple(t.shape), t.numpy().tobytes()) for t in files.values()}
    lost = [n for n, k in key.items() if k not in there and not is_expert(n, family_id)]
    assert lost
    assert all(fnmatchcase(name, LEFT[family_id]) for name in lost), lost
    held = set(key.values())
    over = [
        n for n, t in files.items()
        if (tuple(t.shape), t.numpy().tobytes()) not in held and not is_expert(n, family_id)
    ]  # fmt: skip
    return {"allow_missing": lost, "allow_unused": over}


@EACH
@FORM
def test_into_its_own_runtime(family_id: str, hub: bool) -> None:
    model = tiny.build(family_id)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(0 if tensor.dtype is torch.bool else 1 if tensor.dtype is torch.uint8 else -1)
    left = left_out(family_id, hub)
    report = restow.load(tiny.saved(family_id, hub), model, **left)
    assert differing(model.state_dict(), state(family_id)) == sorted(left.get("allow_missing", []))
    assert (report.staged, report.narrowed) == ({}, {})


# Grouped, by formulas of our own.

Formula = Callable[[Mapping[str, torch.Tensor]], Tensors]


def transposed(p: Mapping[str, torch.Tensor], into: str, out: str) -> Tensors:
    return {"gate_and_up_projs": p[into].transpose(1, 2), "down_projs": p[out].transpose(1, 2)}


def from_fused(p: Mapping[str, torch.Tensor]) -> Tensors:
    return transposed(p, "gate_up_proj", "down_proj")


def from_ungated(p: Mapping[str, torch.Tensor]) -> Tensors:
    return transposed(p, "up_proj", "down_proj")


def from_linear(p: Mapping[str, torch.Tensor]) -> Tensors:
    return transposed(p, "input_linear.weight", "output_linear.weight")


def from_in_major(p: Mapping[str, torch.Tensor]) -> Tensors:
    biases = {name: p[name] for name in ("gate_up_proj_bias", "down_proj_bias") if name in p}
    return {"gate_and_up_projs": p["gate_up_proj"], "down_projs": p["down_proj"], **biases}


def from_flat(p: Mapping[str, torch.Tensor]) -> Tensors:
    w1, v1 = (einops.rearrange(p[name], "(e f) d -> e d f", e=tiny.EXPERTS) for name in ("w1", "v1"))
    down = einops.rearrange(p["w2"], "(e f) d -> e f d", e=tiny.EXPERTS)
    return {"gate_and_up_projs": torch.cat([w1, v1], dim=2), "down_projs": down}


def from_modules(up: str, down: str, biased: bool) -> Formula:
    def formula(p: Mapping[str, torch.Tensor]) -> Tensors:
        def stack(what: str) -> torch.Tensor:
            return torch.stack([p[f"expert_{e}.{what}"] for e in range(tiny.EXPERTS)])

        grouped = {
            "gate_and_up_projs": stack(f"{up}.weight").transpose(1, 2),
            "down_projs": stack(f"{down}.weight").transpose(1, 2),
        }
        biases = {"gate_up_proj_bias": f"{up}.bias", "down_proj_bias": f"{down}.bias"} if biased else {}
        return {**grouped, **{name: stack(what) for name, what in biases.items()}}

    return formula


def from_two(p: Mapping[str, torch.Tensor]) -> Tensors:
    text = transposed(p, "text_moe.experts.gate_up_proj", "text_moe.experts.down_proj")
    vision = transposed(p, "vision_moe.experts.gate_up_proj", "vision_moe.experts.down_proj")
    return {**text, **{f"bank2.{name}": tensor for name, tensor in vision.items()}}


IN_MAJOR = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
MEMORY: dict[str, tuple[str, Formula]] = {  # what the module is called in memory, and its formula
    **dict.fromkeys(IN_MAJOR, (r"\bexperts$", from_in_major)),
    "nemotron_h": (r"\bexperts$", from_ungated),
    "nemotron_h-latent": (r"\bexperts$", from_ungated),
    "dbrx": (r"\bexperts\.mlp$", from_flat),
    "jetmoe": (r"\d\.mlp$", from_linear),
    "nllb-moe": (r"\bexperts$", from_modules("fc1", "fc2", True)),
    "switch_transformers": (r"\bexperts$", from_modules("wi", "wo", False)),
    "ernie4_5_vl_moe": (r"\d\.mlp$", from_two),
}


def layer_of(name: str) -> str:
    """Which layer of which part: the encoder's and the decoder's are two."""
    found = re.search(r"\.(?:layers|blocks|block)\.(\d+)\.", f".{name}.")
    assert found, name
    return found[1] + ("e" if re.search(r"\bencoder\b", name) else "")


@cache
def grouped_of(family_id: str) -> dict[str, Tensors]:
    """The grouped tensors of every experts module, by layer, from the parameters in memory."""
    pattern, formula = MEMORY.get(family_id, (r"\bexperts$", from_fused))
    found = {}
    for path, module in tiny.build(family_id).named_modules():
        held = {name: p.detach() for name, p in module.named_parameters()}
        tied = family_id == "diffusion_gemma" and "encoder" in path
        experts = family_id == "jetmoe" or any("experts" in f"{path}.{name}" for name in held)
        if re.search(pattern, path) and experts and not tied:
            found[layer_of(path)] = {n: t.contiguous() for n, t in formula(held).items()}
    return found


@EACH
@FORM
def test_into_grouped_tensors(family_id: str, hub: bool) -> None:
    folder = tiny.saved(family_id, hub)
    plan = restow.plan(folder)
    assert (plan.missing, plan.unused) == ((), ())
    into = {t.name: torch.full(t.shape, -1).to(torch_dtype(t.dtype)) for t in plan.targets}
    restow.load(folder, into)
    wanted = grouped_of(family_id)
    found: dict[str, Tensors] = {}
    for path in restow.open(folder).modules:
        for name in wanted[layer_of(f"{path}.")]:
            found.setdefault(layer_of(f"{path}."), {})[name] = into.pop(f"{path}.{name}")
    assert found.keys() == wanted.keys()
    for layer, tensors in wanted.items():
        assert differing(found[layer], tensors) == []
    files = read(folder)
    assert differing(into, {name: files[name] for name in into}) == []


@EACH
@pytest.mark.parametrize("to", ["grouped", "fused", "split"])
def test_there_and_back(family_id: str, to: str, tmp_path: Path) -> None:
    """Names, bytes, metadata and config are what they were; the two forms hold the same experts."""
    hub = tiny.saved(family_id)
    restow.convert(hub, tmp_path / "there", to=to)
    there = restow.open(tmp_path / "there")
    assert there.problems == (), [str(problem.error) for problem in there.problems]
    assert all(m.layout == there.family.form(to) for m in there.modules.values())
    if to == "grouped":
        held = read(tmp_path / "there")
        for path in there.modules:
            for name, tensor in grouped_of(family_id)[layer_of(f"{path}.")].items():
                assert torch.equal(held[f"{path}.{name}"], tensor)
    restow.convert(tmp_path / "there", tmp_path / "back", to="source")
    assert differing(read(tmp_path / "back"), read(hub)) == []
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (hub / "config.json").read_text()
    )
    assert restow.verify(tmp_path / "there", tiny.saved(family_id, False), experts_only=True).equal
    if to == "grouped":
        assert restow.verify(hub, tiny.saved(family_id, False), experts_only=True).equal
        model, info = tiny.reload(tmp_path / "back", family_id)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        changed = differing(model.state_dict(), state(family_id))
        assert all(fnmatchcase(name, RESET.get(family_id, "")) for name in changed), changed


RESAVED = {  # where transformers writes names that are not the vendor's: what is written, what is the vendor's
    "deepseek_v4": [(r"^model\.(layers|norm)\b", r"\1"), (r"^model\.embed_tokens", "embed"),
                    (r"^model\.hc_head\.", ""), ("hc_(fn|base|scale)$", r"hc_head_\1")],
    "kimi_k25": [(r"model\.blocks", "model.layers"), (r"encoder\.patch_embed", "patch_embed")],
    "kimi_linear": [(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj")],
    "hy_v4": [(r"(mlp|shared_experts)\.linear_gate", r"\1.gate_proj")],
}  # fmt: skip


def vendor(hub: str, family_id: str) -> str:
    for written, name in RESAVED.get(family_id, ()):
        hub = re.sub(written, name, hub)
    return hub


@EACH
def test_names_lead_both_ways(family_id: str) -> None:
    """Tensors of equal bytes on the hub and in memory have names that the family's renames bring together."""
    files, memory = read(tiny.saved(family_id)), state(family_id)
    family = restow.families[tiny.config(family_id).model_type]
    by_bytes = {(tuple(t.shape), t.numpy().tobytes()): name for name, t in files.items()}
    tied = tiny.build(family_id).all_tied_weights_keys
    wrong = []
    for name, tensor in memory.items():
        assert family.canonical(name) == name or family_id == "diffusion_gemma"
        hub = by_bytes.get((tuple(tensor.shape), tensor.contiguous().numpy().tobytes()))
        if hub is None or is_expert(name, family_id) or name in tied or tensor.dtype is torch.int64:
            continue
        if family.canonical(hub) != name or family.on_hub(name) != vendor(hub, family_id):
            wrong.append((name, hub, family.canonical(hub), family.on_hub(name)))
    assert wrong == []
