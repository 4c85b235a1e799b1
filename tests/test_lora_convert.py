"""Conversions of adapters between every two formats, in folders and in memory; configs; sharded models."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import lora_adapters as adapters
import restow
import restow.lora
import tiny
from restow.errors import AdapterError, MissingShardError, MissingTensorError, ShapeMismatchError
from save_ranks import ranks

FORMATS = tuple(name for name in restow.lora.formats if name not in ("vllm-shared-outer", "peft-0.19.1"))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path
SIZES = ("plain", "2f == d", "f == d")
CASES = ("plain", "rank 1", "rank is experts", "rslora", "patterns")
# one walk a family, so that every case and all sizes come by default; the slow job goes through all of them
WALKS = [
    ("qwen3_moe", "patterns", "2f == d"), ("mixtral", "rank 1", "plain"), ("deepseek_v3", "rank is experts", "f == d"),
    ("gpt_oss", "patterns", "f == d"), ("llama4_text", "rslora", "2f == d"), ("nemotron_h", "patterns", "f == d"),
    ("qwen2_moe", "plain", "plain"), ("llama4_text", "patterns", "f == d"),
]  # fmt: skip


def settings(family: str, case: str = "patterns") -> dict[str, Any]:
    """Ranks of 5, 3 and 2, scales that are no powers of two, a pattern that matches nothing; or one thing alone."""
    one, two = adapters.parameters(family)
    patterns = {
        "rank_pattern": {one: 5, "q_proj": 2, "unused": 9},
        "alpha_pattern": {two: 7},
        "use_rslora": True,
    }
    cases = {"plain": {}, "rank 1": {"r": 1}, "rank is experts": {"r": 12}, "rslora": {"use_rslora": True}}
    return {**cases, "patterns": patterns}[case]


def places(folder: Path, family: str) -> dict[str, torch.Tensor]:
    known = restow.families[family]
    state = adapters.tensors(folder)
    found = {
        known.canonical(name.removeprefix("base_model.model.")): tensor for name, tensor in state.items()
    }
    assert len(found) == len(state)
    return found


def every_pair(
    tmp_path: Path, family: str, case: str, sizes: str, formats: tuple[str, ...] = FORMATS
) -> None:
    """source -> one -> two -> source: bits and config. And one -> two has the bits of source -> two, whatever the way."""
    source = adapters.make(tmp_path / "a", family, sizes, **settings(family, case))
    base = adapters.base(family, sizes)
    for one in formats:
        restow.lora.convert(source, tmp_path / one, to=one, base=base)
    for one, two in product(formats, formats):
        restow.lora.convert(tmp_path / one, tmp_path / "x", to=two, base=base, replace=True)
        # `grouped` keeps the container of its source, the hub's or the runtime's: names are compared whatever it is called
        direct, have = (places(tmp_path / folder, family) for folder in (two, "x"))
        assert sorted(have) == sorted(direct), (one, two)
        assert all(torch.equal(have[n], t) for n, t in direct.items()), (one, two)
        restow.lora.convert(tmp_path / "x", tmp_path / "back", to="peft", base=base, replace=True)
        adapters.same(source, tmp_path / "back")


def test_every_pair_of_formats(tmp_path: Path) -> None:
    """One of each kind; the walks below and the slow job go through all of them."""
    kinds = ("grouped", "peft", "peft-0.18", "peft-separate", "peft-per-expert", "vllm", "megatron")
    every_pair(tmp_path, "qwen3_moe", "patterns", "plain", kinds)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_every_pair_of_formats_in_every_family(tmp_path: Path, family: str, case: str, sizes: str) -> None:
    every_pair(tmp_path, family, case, sizes)


@pytest.mark.parametrize(("family", "case", "sizes"), WALKS)
def test_a_walk_through_all_formats(tmp_path: Path, family: str, case: str, sizes: str) -> None:
    """Through each format into the next, in an order of the family's own, and home: bits and config."""
    source = here = adapters.make(tmp_path / "a", family, sizes, **settings(family, case))
    base = adapters.base(family, sizes)
    order = list(FORMATS)
    random.Random(f"{family} {case}").shuffle(order)
    for i, to in enumerate(order):
        restow.lora.convert(here, tmp_path / f"{i}", to=to, base=base)
        here = tmp_path / f"{i}"
    restow.lora.convert(here, tmp_path / "back", to="peft", base=base)
    adapters.same(source, tmp_path / "back")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = adapters.make(tmp_path / "a", family)
    state = {name: tensor.to(dtype) for name, tensor in adapters.tensors(source).items()}
    adapters.write(source, state, **adapters.config(source))
    for to in ("grouped", "peft-per-expert", "sglang"):
        restow.lora.convert(source, tmp_path / to, to=to, base=adapters.base(family))
        assert {t.dtype for t in adapters.tensors(tmp_path / to).values()} == {dtype}
        restow.lora.convert(tmp_path / to, tmp_path / f"{to}b", to="peft", base=adapters.base(family))
        adapters.same(source, tmp_path / f"{to}b")


def test_names_and_shapes_of_grouped(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base("qwen3_moe"))
    state = adapters.tensors(tmp_path / "g")
    path = "base_model.model.model.layers.2.mlp.experts"
    assert {n: tuple(t.shape) for n, t in state.items() if n.startswith(path)} == {
        f"{path}.lora_gate_and_up_A": (12, 32, 3), f"{path}.lora_gate_and_up_B": (12, 3, 48),
        f"{path}.lora_down_A": (12, 24, 3), f"{path}.lora_down_B": (12, 3, 32),
    }  # fmt: skip
    config, before = adapters.config(tmp_path / "g"), adapters.config(source)
    assert config["restow_layout"] == "grouped"
    for field in (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "base_model_name_or_path",
    ):
        assert config[field] == before[field]
    with safe_open(tmp_path / "g" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["restow.adapter"])["format"] == "grouped"


def test_grouped_formula(tmp_path: Path) -> None:
    """y = x @ (W + s A B): the native formula, by hand, against PEFT's merged weights."""
    for family in ("qwen3_moe", "gpt_oss", "llama4_text"):
        source = adapters.make(tmp_path / family, family)
        want, before = adapters.merged(source, family), adapters.base_state(family)
        restow.lora.convert(source, tmp_path / f"{family}g", to="grouped", base=adapters.base(family))
        state = adapters.tensors(tmp_path / f"{family}g")
        for name in [n for n in want if n.endswith("experts.gate_up_proj")]:
            path = f"base_model.model.{name.removesuffix('.gate_up_proj')}"
            delta = 2 * state[f"{path}.lora_gate_and_up_A"] @ state[f"{path}.lora_gate_and_up_B"]
            delta = delta.transpose(1, 2) if family == "qwen3_moe" else delta
            torch.testing.assert_close(before[name] + delta, want[name], atol=1e-5, rtol=1e-5)


def test_vllm_knows_one_scale(tmp_path: Path) -> None:
    """Patterns are folded into B: with one alpha / r, the deltas are the same."""
    source = adapters.make(tmp_path / "a", "qwen3_moe", alpha_pattern={"down_proj": 24})
    report = restow.lora.convert(source, tmp_path / "v", to="vllm", base=adapters.base("qwen3_moe"))
    config, state = adapters.config(tmp_path / "v"), adapters.tensors(tmp_path / "v")
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    want, before = adapters.merged(source, "qwen3_moe"), adapters.base_state("qwen3_moe")
    path = "base_model.model.model.layers.1.mlp.experts.7.down_proj"
    delta = (
        state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"] * config["lora_alpha"] / config["r"]
    )
    name = "model.layers.1.mlp.experts.down_proj"
    torch.testing.assert_close(before[name][7] + delta, want[name][7], atol=1e-5, rtol=1e-5)
    assert any("multiplied into B" in note for note in report.notes)
    assert not report.rounded


def test_scales_that_round_come_back_from_beside(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe", alpha_pattern={"down_proj": 7})
    base = adapters.base("qwen3_moe")
    report = restow.lora.convert(source, tmp_path / "v", to="vllm", base=base)
    assert report.rounded
    assert (tmp_path / "v" / "restow_unscaled.safetensors").is_file()
    restow.lora.convert(tmp_path / "v", tmp_path / "b", to="peft", base=base)
    adapters.same(source, tmp_path / "b")
    # trained on in between: what lies beside is another's, and is not taken
    state = {n: t * 1.5 for n, t in adapters.tensors(tmp_path / "v").items()}
    adapters.write(tmp_path / "v", state, **adapters.config(tmp_path / "v"))
    restow.lora.convert(tmp_path / "v", tmp_path / "c", to="peft", base=base)
    assert restow.lora.check(tmp_path / "c", base).ok


def test_a_changed_alpha_is_not_undone(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    config = adapters.config(tmp_path / "g")
    (tmp_path / "g" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 12}))
    restow.lora.convert(tmp_path / "g", tmp_path / "p", to="peft", base=base)
    assert adapters.config(tmp_path / "p")["lora_alpha"] == 12


def test_fresh_adapters_keep_their_factors(tmp_path: Path) -> None:
    """B of zeros: nothing in the values says whose column is whose; the stamp does."""
    from test_lora_peft import per_expert

    state = {
        n: t if "lora_A" in n else torch.zeros_like(t)
        for n, t in per_expert("qwen3_moe", shared=False).items()
    }
    source = adapters.write(tmp_path / "e", state, target_modules=["gate_proj", "up_proj", "down_proj"])
    base = adapters.base("qwen3_moe")
    for via in ("peft", "grouped"):
        restow.lora.convert(source, tmp_path / via, to=via, base=base)
        restow.lora.convert(tmp_path / via, tmp_path / f"{via}-b", to="peft-per-expert", base=base)
        adapters.same(source, tmp_path / f"{via}-b")


def test_scales_of_gate_and_up_that_differ(tmp_path: Path) -> None:
    from test_lora_peft import hand, per_expert

    state = per_expert("qwen3_moe", shared=False)
    source = adapters.write(tmp_path / "e", state, alpha_pattern={"up_proj": 7},
                            target_modules=["gate_proj", "up_proj", "down_proj"])  # fmt: skip
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "p", to="peft", base=base)
    want = hand(state, {"gate_proj": 2, "up_proj": 7 / 3, "down_proj": 2}.__getitem__)
    have = adapters.merged(tmp_path / "p", "qwen3_moe")
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)
    restow.lora.convert(tmp_path / "p", tmp_path / "g", to="grouped", base=base)
    restow.lora.convert(tmp_path / "g", tmp_path / "b", to="peft-per-expert", base=base)
    adapters.same(source, tmp_path / "b")


@pytest.mark.parametrize(
    "words", ["gate_proj", "up_proj", "gate_proj up_proj", "gate_proj up_proj down_proj"]
)
@pytest.mark.parametrize("to", ["peft", "grouped", "vllm"])
def test_scales_of_0(to: str, words: str, tmp_path: Path) -> None:
    """An alpha of 0 adds nothing (PEFT takes it), and no other scale is a multiple of it."""
    from test_lora_peft import hand, per_expert

    off = words.split()
    state = per_expert("qwen3_moe", shared=False)
    source = adapters.write(tmp_path / "e", state, lora_alpha=0,
                            alpha_pattern={word: 6 for word in ("gate_proj", "up_proj", "down_proj") if word not in off},
                            target_modules=["gate_proj", "up_proj", "down_proj"])  # fmt: skip
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "t", to=to, base=base)
    restow.lora.convert(tmp_path / "t", tmp_path / "p", to="peft", base=base)
    want = hand(state, lambda word: 0 if word in off else 2)
    have = adapters.merged(tmp_path / "p", "qwen3_moe")
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)
    restow.lora.convert(tmp_path / "t", tmp_path / "b", to="peft-per-expert", base=base)
    adapters.same(source, tmp_path / "b")


def test_in_memory(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "mixtral")
    base = adapters.base("mixtral")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    state = adapters.tensors(source)
    have = restow.lora.relayout(state, to="grouped", config=adapters.config(source), base=base)
    want = adapters.tensors(tmp_path / "g")
    assert sorted(have) == sorted(want)
    assert all(torch.equal(have[n], want[n]) for n in want)
    assert have.config["r"] == 3
    back = restow.lora.relayout(have, to="peft", config=have.config, base=base)
    assert all(torch.equal(back[n], state[n]) for n in state)
    pointers = [t.untyped_storage().data_ptr() for t in back.values() if "experts" in "".join(back)]
    assert len(set(pointers)) == len(pointers), "no shared storage"
    native = {n: t for n, t in have.items() if "experts" in n}
    bare = restow.lora.relayout(native, to="peft-per-expert", family="mixtral")
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight" in bare


def test_shared_outer_expands_and_collapses(tmp_path: Path) -> None:
    base = adapters.base("qwen3_moe")
    path = "base_model.model.model.layers.1.mlp.experts"
    state = {f"{path}.{n}": tiny.values(n, torch.Size(s)) for n, s in {
        "w1.lora_A.weight": (1, 3, 32), "w1.lora_B.weight": (12, 24, 3), "w3.lora_A.weight": (1, 3, 32),
        "w3.lora_B.weight": (12, 24, 3), "w2.lora_A.weight": (12, 3, 24), "w2.lora_B.weight": (1, 32, 3)}.items()}  # fmt: skip
    source = adapters.write(tmp_path / "o", state)
    restow.lora.convert(source, tmp_path / "e", to="peft-per-expert", base=base)
    per = adapters.tensors(tmp_path / "e")
    assert torch.equal(per[f"{path}.7.gate_proj.lora_A.weight"], state[f"{path}.w1.lora_A.weight"][0])
    assert torch.equal(per[f"{path}.7.up_proj.lora_B.weight"], state[f"{path}.w3.lora_B.weight"][7])
    restow.lora.convert(tmp_path / "e", tmp_path / "b", to="vllm-shared-outer", base=base)
    back = adapters.tensors(tmp_path / "b")
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[n], state[n]) for n in state)
    with pytest.raises(AdapterError, match="one A for all experts"):
        restow.lora.convert(
            adapters.make(tmp_path / "a", "qwen3_moe"), tmp_path / "x", to="vllm-shared-outer", base=base
        )


def test_the_outermost_wrapper_may_be_the_input(tmp_path: Path) -> None:
    """A module that registers down_proj first: its wrappers lie the other way round."""
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    state = {}
    for name, tensor in adapters.tensors(source).items():
        if "experts" in name:
            inner = "experts.base_layer." in name
            name = (
                name.replace("experts.base_layer.", "experts.")
                if inner
                else name.replace("experts.", "experts.base_layer.")
            )
        state[name] = tensor
    turned = adapters.write(tmp_path / "t", state, **adapters.config(source))
    base = adapters.base("qwen3_moe")
    restow.lora.convert(turned, tmp_path / "x", to="grouped", base=base, outer="in")
    restow.lora.convert(source, tmp_path / "y", to="grouped", base=base)
    one, two = adapters.tensors(tmp_path / "x"), adapters.tensors(tmp_path / "y")
    assert all(torch.equal(one[n], two[n]) for n in two)
    with pytest.raises(AdapterError):
        restow.lora.convert(turned, tmp_path / "z", to="grouped", base=base)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.language_model."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    source, state = grouped_parameters(tmp_path, "qwen3_moe")
    config = adapters.config(tmp_path / "g")
    given = adapters.write(tmp_path / "p", {f"{prefix}{n}": t for n, t in state.items()}, **config)
    restow.lora.convert(given, tmp_path / "q", to="peft", base=adapters.base("qwen3_moe"))
    want = adapters.tensors(source)
    have = {n.replace("language_model.", ""): t for n, t in adapters.tensors(tmp_path / "q").items()}
    assert sorted(have) == sorted(want)
    assert all(torch.equal(have[n], want[n]) for n in want)


def test_one_expert_alone() -> None:
    shapes = {"lora_gate_and_up_A": (1, 32, 3), "lora_gate_and_up_B": (1, 3, 48), "lora_down_A": (1, 24, 3),
              "lora_down_B": (1, 3, 32)}  # fmt: skip
    state = {f"model.layers.0.mlp.experts.{n}": tiny.values(n, torch.Size(s)) for n, s in shapes.items()}
    config = {"r": 3, "lora_alpha": 6}
    for to in FORMATS:
        one = restow.lora.relayout(state, to=to, config=config, family="qwen3_moe")
        back = restow.lora.relayout(one, to="grouped", config=one.config, family="qwen3_moe")
        assert all(torch.equal(back[f"base_model.model.{n}"], t) for n, t in state.items()), to


def test_names_that_go_along(tmp_path: Path) -> None:
    """modules_to_save, biases and routers are taken along to the byte, and merge puts them where they belong."""
    source = adapters.make(tmp_path / "a", "qwen3_moe", modules_to_save=["lm_head"],
                           target_parameters=[*adapters.parameters("qwen3_moe"), "mlp.gate.weight"])  # fmt: skip
    extra = [n for n in adapters.tensors(source) if "lm_head" in n or "mlp.gate." in n]
    assert len(extra) >= 5
    base = adapters.base("qwen3_moe")
    for to in ("grouped", "peft-per-expert", "megatron-3d"):
        restow.lora.convert(source, tmp_path / to, to=to, base=base)
        have, want = adapters.tensors(tmp_path / to), adapters.tensors(source)
        assert all(torch.equal(have[n], want[n]) for n in extra)
        restow.lora.convert(tmp_path / to, tmp_path / f"{to}b", to="peft", base=base)
        adapters.same(source, tmp_path / f"{to}b")
        report = restow.lora.merge(base, tmp_path / to, tmp_path / f"{to}m")
        assert report.replaced == 1
        merged, state = (
            adapters.merged(source, "qwen3_moe"),
            tiny.reload(tmp_path / f"{to}m", "qwen3_moe")[0].state_dict(),
        )
        for name, tensor in merged.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="lm_head"):
        restow.lora.convert(source, tmp_path / "v", to="vllm", base=base)


def test_replace_and_existing_targets(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    (source / "README.md").write_text("mine")
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    assert (tmp_path / "g" / "README.md").read_text() == "mine"
    with pytest.raises(restow.errors.DestinationExistsError):
        restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    restow.lora.convert(source, tmp_path / "g", to="peft", base=base, replace=True)
    assert adapters.config(tmp_path / "g")["peft_version"]


def grouped_parameters(tmp_path: Path, family: str) -> tuple[Path, dict[str, torch.Tensor]]:
    source = adapters.make(tmp_path / "a", family)
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=adapters.base(family))
    state = {n.removeprefix("base_model.model."): t for n, t in adapters.tensors(tmp_path / "g").items()}
    return source, state


@pytest.mark.parametrize(("axis", "of"), [("e", 5), ("f", 4)])
def test_load_a_part(tmp_path: Path, axis: str, of: int) -> None:
    source, state = grouped_parameters(tmp_path, "qwen3_moe")
    dims = {"e": {"": 0}, "f": {"lora_gate_and_up_B": 2, "lora_down_A": 1}}[axis]
    for rank in range(of):
        shard = restow.Shard(axis, rank, of)
        into, want = {}, {}
        for name, whole in state.items():
            end = name.rpartition(".")[2]
            part = whole
            if "experts" in name and axis == "e":
                start, n = shard.run(12)
                part = whole.narrow(0, start, n)
            elif "experts" in name and end in dims:
                start, n = shard.run(24)
                if end == "lora_down_A":
                    part = whole.narrow(1, start, n)
                else:
                    part = whole.unflatten(2, (2, 24)).narrow(3, start, n).flatten(2)
            want[name], into[name] = part, torch.full(part.shape, float("nan"))
        restow.lora.load(source, into, base=adapters.base("qwen3_moe"), shard=shard)
        assert all(torch.equal(into[n], want[n]) for n in want)


def test_load_refuses_holes_ranks_and_strangers(tmp_path: Path) -> None:
    source, state = grouped_parameters(tmp_path, "qwen3_moe")
    base = adapters.base("qwen3_moe")
    name = "model.layers.1.mlp.experts.lora_down_A"
    with pytest.raises(AdapterError, match="a parameter of the model"):
        restow.lora.load(source, {n: t for n, t in state.items() if n != name}, base=base)
    with pytest.raises(MissingTensorError, match=r"layers\.7"):
        restow.lora.load(
            source, {**state, "model.layers.7.mlp.experts.lora_down_A": state[name].clone()}, base=base
        )
    with pytest.raises(ShapeMismatchError, match="12, 24, 3"):
        restow.lora.load(source, {**state, name: torch.zeros(12, 24, 4)}, base=base)


LOADED = ("peft", "grouped", "peft-per-expert", "vllm", "peft-0.18", "sglang", "megatron-3d", "peft-separate")
MESHES = [((4,), ("e",)), ((4,), ("last",)), ((2, 2), ("e", "middle"))]


def _rank(rank: int, root: Path) -> list[str]:
    """One rank: its part of an adapter from every format, against the whole; then all save into several formats."""
    dims = {"e": 0, "middle": 1, "last": 2}
    whole = {n.removeprefix("base_model.model."): t for n, t in adapters.tensors(root / "grouped").items()}
    wrong: list[str] = []
    config: dict[str, Any] = {}
    for i, to in enumerate(LOADED):
        shape, axes = MESHES[i % len(MESHES)]
        mesh = init_device_mesh("cpu", shape)
        cuts = {n: [Shard(dims[a] if "experts" in n else 0) for a in axes] for n in whole}
        into = {n: distribute_tensor(torch.zeros_like(t), mesh, cuts[n]) for n, t in whole.items()}
        config = restow.lora.load(root / to, into, base=root / "base")
        wrong += [f"{to} {n}" for n in whole if not torch.equal(into[n].full_tensor(), whole[n])]
    for to in ("peft", "peft-per-expert", "sglang", "peft-separate"):
        restow.lora.save(into, root / f"saved {to}", to=to, config=config, base=root / "base")
    dist.barrier()
    try:
        restow.lora.save(into, root / "saved peft", to="peft", config=config, base=root / "base")
        wrong.append("rank 0's refusal was not told")
    except restow.errors.DestinationExistsError:
        pass
    return wrong


def test_ranks_load_their_part_and_save_together(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "source", "qwen3_moe")
    base = adapters.config_of("qwen3_moe", tmp_path / "base")
    for to in LOADED:
        restow.lora.convert(source, tmp_path / to, to=to, base=base)
    for end in ranks(4, tmp_path, _rank, tmp_path):
        assert end.error is None, end.error
        assert end.value == []
    for to in ("peft", "peft-per-expert", "sglang", "peft-separate"):
        out, want = adapters.tensors(tmp_path / f"saved {to}"), adapters.tensors(tmp_path / to)
        assert sorted(out) == sorted(want)
        assert all(torch.equal(out[n], want[n]) for n in want)


def test_merge_counts_and_measures(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    base = tiny.saved("qwen3_moe", True, "plain", torch.bfloat16)
    report = restow.lora.merge(base, source, tmp_path / "m")
    assert report.deltas == 2 * 12 * 3 + 3
    assert 0.9 < report.kept_all < 1
    assert set(report.kept) == {"in", "out", "q_proj"}
    assert not report.warnings
    state = {n: t * (1e-3 if "lora_B" in n else 1) for n, t in adapters.tensors(source).items()}
    small = adapters.write(tmp_path / "s", state, **adapters.config(source))
    weak = restow.lora.merge(base, small, tmp_path / "n")
    assert weak.kept_all < 0.5
    assert weak.warnings
    assert "wider base" in str(weak)
    names = sorted(p.name for p in base.iterdir())
    assert [n for n in names if not (tmp_path / "m" / n).is_file()] == []
    before, after = restow.open(base), restow.open(tmp_path / "m")
    assert {n: e[:2] for n, e in before.tensors.items()} == {n: e[:2] for n, e in after.tensors.items()}


def test_merge_needs_weights(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_bytes((adapters.base("qwen3_moe") / "config.json").read_bytes())
    with pytest.raises(MissingShardError, match="expected safetensors files, found none in this folder"):
        restow.lora.merge(tmp_path / "c", source, tmp_path / "m")
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=tmp_path / "c")
    restow.lora.convert(tmp_path / "g", tmp_path / "b", to="peft", family="qwen3_moe")
    adapters.same(source, tmp_path / "b")


def test_importing_the_face_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import restow.lora, sys; restow.lora.formats; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
