"""The tests' oracle, tested: its values tell tensors apart, it reads back what it wrote, it can fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny

IDS = [
    pytest.param(family_id, marks=pytest.mark.slow if family.slow else ())
    for family_id, family in tiny.FAMILIES.items()
]
UNGATED = {"nemotron_h", "nemotron_h-latent"}
FORMS_ALIKE = {"qwen3_vl_moe", "gpt_oss", "llama4_text", "llama4", "dbrx", "gemma4_text", "gemma4"}
FLOAT32_KEPT = {"deepseek_v3", "deepseek_v3-deep", "glm4_moe", "nemotron_h", "nemotron_h-latent"}

Tensors = dict[str, torch.Tensor]


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold all routed experts of a layer, by path."""
    return {path: module for path, module in model.named_modules() if re.search(r"\bexperts$", path)}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family_id", IDS)
def test_every_tensor_has_values_of_its_own(family_id: str) -> None:
    state = tiny.build(family_id).state_dict()
    for name, tensor in state.items():
        assert tensor.unique().numel() == tensor.numel(), name
        assert tensor.all(), f"{name} holds a zero"
    storages = {t.data_ptr(): t for t in state.values()}  # tied tensors once
    contents = {t.numpy().tobytes() for t in storages.values()}
    assert len(contents) == len(storages)


@pytest.mark.parametrize("family_id", IDS)
def test_no_two_experts_are_equal_even_in_bfloat16(family_id: str) -> None:
    for path, module in experts_modules(tiny.build(family_id, dtype=torch.bfloat16)).items():
        for name, parameter in module.named_parameters():
            rows = parameter.detach().reshape(tiny.EXPERTS, -1)
            assert rows.unique(dim=0).shape[0] == tiny.EXPERTS, f"{path}.{name}"


@pytest.mark.parametrize("sizes", tiny.SIZES)
@pytest.mark.parametrize("family_id", IDS)
def test_an_experts_module_holds_twelve_experts_of_the_stated_sizes(family_id: str, sizes: str) -> None:
    modules = experts_modules(tiny.build(family_id, sizes))
    assert modules
    d, f = tiny.SIZES[sizes]["d"], tiny.SIZES[sizes]["f"]
    for path, module in modules.items():
        weights = [p.numel() for name, p in module.named_parameters() if not name.endswith("_bias")]
        assert sum(weights) == 12 * d * f * (2 if family_id in UNGATED else 3), path


def test_the_sizes_are_what_they_are_called() -> None:
    plain, fused_square, down_square = tiny.SIZES.values()
    assert len({plain["d"], plain["f"], 2 * plain["f"]}) == 3
    assert 2 * fused_square["f"] == fused_square["d"]
    assert down_square["f"] == down_square["d"]


@pytest.mark.parametrize("original_format", [True, False], ids=["hub", "runtime"])
@pytest.mark.parametrize("family_id", IDS)
def test_a_saved_model_reads_back_bit_for_bit(family_id: str, original_format: bool) -> None:
    model = tiny.build(family_id)
    again, info = tiny.reload(tiny.saved(family_id, original_format), family_id)
    assert not any(info.values()), info
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("sizes", [name for name in tiny.SIZES if name != "plain"])
@pytest.mark.parametrize("family_id", IDS)
def test_square_sizes_read_back_bit_for_bit(family_id: str, sizes: str) -> None:
    again, info = tiny.reload(tiny.saved(family_id, sizes=sizes), family_id)
    assert not any(info.values()), info
    assert same(again.state_dict(), tiny.build(family_id, sizes).state_dict())


@pytest.mark.parametrize("family_id", IDS)
def test_a_bfloat16_model_keeps_the_dtypes_that_loading_gives(family_id: str) -> None:
    model = tiny.build(family_id, dtype=torch.bfloat16)
    again, info = tiny.reload(tiny.saved(family_id, dtype=torch.bfloat16), family_id)
    assert not any(info.values()), info
    assert same(again.state_dict(), model.state_dict())
    wide = {name.rpartition(".")[2] for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert wide == ({"e_score_correction_bias"} if family_id in FLOAT32_KEPT else set())


@pytest.mark.parametrize("family_id", IDS)
def test_the_two_forms_differ_where_they_should(family_id: str) -> None:
    hub, runtime = read(tiny.saved(family_id, True)), read(tiny.saved(family_id, False))
    assert same(hub, runtime) == (family_id in FORMS_ALIKE)
    model = tiny.build(family_id)
    untied = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert same(runtime, untied)


def test_shards_are_written_where_asked_for(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert same(read(tmp_path), read(tiny.saved("mixtral")))


def test_values_follow_from_name_and_shape() -> None:
    shape = torch.Size([3, 5])
    assert torch.equal(tiny.values("a", shape), tiny.values("a", shape))
    assert not torch.equal(tiny.values("a", shape).sort().values, tiny.values("b", shape).sort().values)


# The oracle can fail: wrong files must be noticed. Each damage below keeps names, shapes and dtypes.


def swap_gate_and_up(tensors: Tensors, layer: str) -> Tensors:
    """The same file with gate and up exchanged in the routed experts of one layer."""
    out = dict(tensors)
    for gate, up in (("w1", "w3"), ("gate_proj", "up_proj"), ("w1", "v1")):
        for name in routed(tensors, layer):
            if re.search(rf"\b{gate}\b", name) and (partner := re.sub(rf"\b{gate}\b", up, name)) in tensors:
                out[name], out[partner] = tensors[partner], tensors[name]
    for name in routed(tensors, layer):
        if not re.search(r"gate_up_proj|input_linear|fc1", name):
            continue
        if "gate_up_proj_bias" in routed_kinds(tensors, layer):  # gpt_oss: even columns are the gate
            out[name] = tensors[name].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            dim = tensors[name].shape.index(2 * tiny.SIZES["plain"]["f"])
            out[name] = torch.cat(tensors[name].chunk(2, dim)[::-1], dim)
    return out


def reverse_experts(tensors: Tensors, layer: str) -> Tensors:
    """The same file with the routed experts of one layer in reverse order, the router as it was."""
    out = dict(tensors)
    for name in routed(tensors, layer):
        if number := re.search(r"(?<=\.experts\.)\d+(?=\.)", name):
            partner = tiny.EXPERTS - 1 - int(number[0])
            out[name] = tensors[name[: number.start()] + str(partner) + name[number.end() :]]
        else:
            whole = tensors[name]
            out[name] = whole.unflatten(0, (tiny.EXPERTS, -1)).flip(0).reshape(whole.shape)
    return out


def routed(tensors: Tensors, layer: str) -> list[str]:
    """The names of the routed experts' tensors of a layer."""
    inside = re.compile(r"\bexperts\.|\.moe\.(gate|up|down)_proj\.|\.(in|out)put_linear\.")
    return [name for name in tensors if name.startswith(layer) and inside.search(name[len(layer) - 1 :])]


def routed_kinds(tensors: Tensors, layer: str) -> set[str]:
    return {name.rpartition(".")[2] for name in routed(tensors, layer)}


def expert_layers(tensors: Tensors) -> list[str]:
    layers = {found[0] for name in tensors if (found := re.match(r".*?\.(layers|blocks)\.\d+\.", name))}
    return sorted(layer for layer in layers if routed(tensors, layer))


def damaged(source: Path, target: Path, damage: Callable[[Tensors, str], Tensors], layer: str) -> Path:
    shutil.copytree(source, target)
    tensors = {name: t.contiguous() for name, t in damage(read(source), layer).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("damage", [swap_gate_and_up, reverse_experts])
@pytest.mark.parametrize("family_id", IDS)
def test_misplaced_experts_change_the_logits(
    family_id: str, damage: Callable[[Tensors, str], Tensors], tmp_path: Path
) -> None:
    if damage is swap_gate_and_up and family_id in UNGATED:
        pytest.skip("no gate")
    source = tiny.saved(family_id)
    right = tiny.logits(tiny.build(family_id))
    assert right.isfinite().all()
    layers = expert_layers(read(source))
    assert len(layers) == len(experts_modules(tiny.build(family_id)))
    for number, layer in enumerate(layers):
        folder = damaged(source, tmp_path / str(number), damage, layer)
        model, info = tiny.reload(folder, family_id)
        assert not any(info.values()), "the loader must not notice: only values are wrong"
        assert (tiny.logits(model) - right).abs().max() > 1e-3, layer


@pytest.mark.parametrize("family_id", ["mixtral", "gpt_oss", "step3p7", "dbrx", "nemotron_h"])
def test_a_rewritten_file_that_is_right_changes_nothing(family_id: str, tmp_path: Path) -> None:
    source = tiny.saved(family_id)
    model, _ = tiny.reload(damaged(source, tmp_path / "copy", lambda tensors, _: tensors, ""), family_id)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.build(family_id)))
