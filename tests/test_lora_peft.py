"""Adapters against PEFT itself: merged weights, logits, and files of other PEFT versions.

Of other versions `lora_golden.json` holds what they wrote and made of it, recorded by running them; they run again where
RESTOW_OLD_PEFT names a folder with unpacked ones (`0.18.1/peft`, ...).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_adapters as adapters
import lora_golden
import restow
import restow.lora
import tiny
from restow.errors import AdapterError

CASES = ("plain", "rank 1", "rank is experts", "rslora", "patterns")
BY_DEFAULT = {("qwen3_moe", "patterns"), ("mixtral", "rslora"), ("deepseek_v3", "plain"), ("gpt_oss", "patterns"),
              ("llama4_text", "rank is experts"), ("nemotron_h", "rslora"), ("qwen2_moe", "rank 1")}  # fmt: skip
OLD = Path(os.environ.get("RESTOW_OLD_PEFT", "/nowhere"))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path


def settings(case: str, family: str) -> dict[str, Any]:
    one, two = adapters.parameters(family)
    patterns = {"rank_pattern": {one: 5, "q_proj": 2}, "alpha_pattern": {two: 7}}
    cases = {"plain": {}, "rank 1": {"r": 1}, "rank is experts": {"r": 12}, "rslora": {"use_rslora": True}}
    return {**cases, "patterns": patterns}[case]


def some(cases: list[tuple[str, ...]], by_default: set[tuple[str, ...]]) -> list[Any]:
    """Parameters of a test, of which only some are for every run; the slow job has all."""
    assert by_default <= set(cases)
    return [pytest.param(*case, marks=() if case in by_default else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("family", "case"), some(list(product(adapters.FAMILIES, CASES)), BY_DEFAULT))
def test_merged_weights_are_peft_s(tmp_path: Path, family: str, case: str) -> None:
    source = adapters.make(tmp_path / "a", family, **settings(case, family))
    want = adapters.merged(source, family)
    base = adapters.base(family)
    before = adapters.base_state(family)
    assert max((want[k] - before[k]).abs().max().item() for k in want) > 0.1
    first: dict[str, torch.Tensor] = {}
    for to in (
        "peft",
        "grouped",
        "peft-0.18",
        "peft-separate",
        "peft-per-expert",
        "vllm",
        "sglang",
        "megatron-3d",
    ):
        restow.lora.convert(source, tmp_path / to, to=to, base=base)
        report = restow.lora.merge(base, tmp_path / to, tmp_path / f"{to}-merged")
        assert report.kept_all > 0.999
        merged = load_file(tmp_path / f"{to}-merged" / "model.safetensors")
        if first:  # what came of the first format is read by transformers, and compared with PEFT
            assert sorted(merged) == sorted(first)
            for name, tensor in first.items():
                torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{to} {name}")
            continue
        first = merged
        have = tiny.reload(tmp_path / f"{to}-merged", family)[0].state_dict()
        for name, tensor in want.items():
            torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{to} {name}")


SQUARE = {
    ("qwen3_moe", "2f == d"),
    ("gpt_oss", "f == d"),
    ("llama4_text", "2f == d"),
    ("nemotron_h", "f == d"),
}


@pytest.mark.parametrize(
    ("family", "sizes"), some(list(product(adapters.FAMILIES, ("2f == d", "f == d"))), SQUARE)
)
def test_sizes_that_coincide(tmp_path: Path, family: str, sizes: str) -> None:
    source = adapters.make(tmp_path / "a", family, sizes)
    base = adapters.base(family, sizes)
    restow.lora.convert(source, tmp_path / "g", to="grouped", base=base)
    restow.lora.convert(tmp_path / "g", tmp_path / "b", to="peft", base=base)
    adapters.same(source, tmp_path / "b")
    have, want = (adapters.merged(p, family, sizes) for p in (tmp_path / "b", source))
    assert all(torch.equal(have[k], want[k]) for k in want)
    restow.lora.merge(base, tmp_path / "g", tmp_path / "m")
    state = tiny.reload(tmp_path / "m", family)[0].state_dict()
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_logits_before_and_after(tmp_path: Path, family: str) -> None:
    source = adapters.make(tmp_path / "a", family)
    want = tiny.logits(adapters.loaded(source, family))
    assert (want - tiny.logits(adapters.model(family))).abs().max() > 1e-2
    base = adapters.base(family)
    for via in ("grouped", "peft-per-expert", "peft-0.19.0"):
        restow.lora.convert(source, tmp_path / via, to=via, base=base)
        restow.lora.convert(tmp_path / via, tmp_path / f"{via}-back", to="peft", base=base)
        have = tiny.logits(adapters.loaded(tmp_path / f"{via}-back", family))
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


def old_rule(version: str, shape: tuple[int, ...], transposed: bool) -> bool:
    """Whether lora_A faces axis 2 of the parameter: PEFT's source, 0.18.1, 0.19.0 and 0.19.1."""
    if version == "0.18.1":
        return False
    return transposed if version == "0.19.0" else len(shape) == 3 and not transposed


VERSIONS = {"peft-0.18": "0.18.1", "peft-0.19.0": "0.19.0", "peft-0.19.1": "0.19.1"}


@pytest.mark.slow
@pytest.mark.parametrize("to", VERSIONS)
@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_the_shapes_of_other_versions(tmp_path: Path, family: str, to: str) -> None:
    """By the rule in PEFT's source: (rows of A / E r, columns) are the parameter's axes, and the delta is its own."""
    source = adapters.make(tmp_path / "a", family)
    restow.lora.convert(source, tmp_path / "o", to=to, base=adapters.base(family))
    state = adapters.tensors(tmp_path / "o")
    assert adapters.config(tmp_path / "o")["peft_version"] == VERSIONS[to]
    want, before = adapters.merged(source, family), adapters.base_state(family)
    for i, parameter in enumerate(adapters.parameters(family)):
        for name in [n for n in want if n.endswith(parameter)]:
            below = "base_layer." if i == 0 else ""
            prefix = f"base_model.model.{name.rpartition('.')[0]}.{below}"
            a, b = (state[f"{prefix}lora_{x}.weight"] for x in "AB")
            shape = before[name].shape
            last = old_rule(VERSIONS[to], shape, family == "gpt_oss")
            assert a.shape[1] == shape[2 if last else 1]
            assert b.shape[0] == shape[1 if last else 2]
            a_e, b_e = a.reshape(12, 3, -1), b.reshape(b.shape[0], 3, 12)
            delta = torch.einsum("oke,eki->eoi", b_e, a_e) * 2
            delta = delta if last else delta.transpose(1, 2)
            torch.testing.assert_close(before[name] + delta, want[name], atol=1e-5, rtol=1e-5)


GOLDEN: dict[str, Any] = json.loads(lora_golden.FILE.read_text())
ERAS = {"0.18.1": "peft-0.18", "0.19.0": "peft-0.19.0", "0.19.1": "peft-0.19.1", "0.20.0": "peft-0.19.1"}


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize(
    "version", ["0.18.1", "0.19.0", "0.19.1", pytest.param("0.20.0", marks=pytest.mark.slow)]
)
def test_files_of_other_versions(tmp_path: Path, version: str, family: str) -> None:
    """What each version wrote and what it made of it, as recorded: read, and written again to the bit."""
    base = tmp_path / "base"
    for sizes in tiny.SIZES:
        case = GOLDEN[version]["cases"][f"{family}|{sizes}"]
        state = {
            f"{lora_golden.PREFIX}{path}.{end}": shape
            for path in case["paths"]
            for end, shape in case["files"].items()
        }
        state = {name: lora_golden.numbers(name, tuple(shape)) for name, shape in state.items()}
        config = {**GOLDEN[version]["config"], "target_parameters": case["targets"]}
        at = tmp_path / sizes
        theirs = adapters.write(at / "theirs", state, **config)
        tiny.config(family, sizes).save_pretrained(base)
        restow.lora.convert(theirs, at / "grouped", to="grouped", base=base)
        grouped = adapters.tensors(at / "grouped")
        for name, (shape, want) in case["merged"].items():
            path, _, leaf = name.rpartition(".")
            role = "lora_down" if leaf == "down_proj" else "lora_gate_and_up"
            a, b = (grouped[f"{lora_golden.PREFIX}{path}.{role}_{x}"] for x in "AB")
            delta = 2 * a.double() @ b.double()  # [e, in, out]
            delta = delta if family in ("gpt_oss", "llama4_text") else delta.transpose(1, 2)
            assert list(delta.shape) == shape
            have = torch.tensor(lora_golden.samples(delta))
            torch.testing.assert_close(have, torch.tensor(want), atol=1e-4, rtol=1e-5)
        restow.lora.convert(at / "grouped", at / "again", to=ERAS[version], base=base)
        adapters.same(theirs, at / "again")


@pytest.mark.slow
@pytest.mark.skipif(not OLD.is_dir(), reason="RESTOW_OLD_PEFT names no folder")
@pytest.mark.parametrize("sizes", ["plain", "2f == d", "f == d"])
@pytest.mark.parametrize("to", VERSIONS)
@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_files_that_other_versions_wrote_and_read(tmp_path: Path, family: str, to: str, sizes: str) -> None:
    def run(folder: Path, *given: str) -> dict[str, torch.Tensor]:
        paths = f"{OLD / VERSIONS[to]}:{Path(__file__).parent}"
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "lora_old_peft.py"), str(folder), family, sizes, *given],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-1] == VERSIONS[to]
        return load_file(folder / "merged.safetensors")

    want = run(tmp_path / "theirs")
    base = adapters.base(family, sizes)
    (tmp_path / "theirs" / "merged.safetensors").unlink()
    restow.lora.convert(tmp_path / "theirs", tmp_path / "now", to="peft", base=base)
    have = adapters.merged(tmp_path / "now", family, sizes)
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)
    ours = adapters.make(tmp_path / "ours", family, sizes)
    restow.lora.convert(ours, tmp_path / "old", to=to, base=base)
    have, want = run(tmp_path / "old", "given"), adapters.merged(ours, family, sizes)
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_check_says_what_the_installed_peft_does(tmp_path: Path, family: str) -> None:
    source = adapters.make(tmp_path / "a", family)
    base = adapters.base(family)
    assert restow.lora.check(source, base).ok
    restow.lora.convert(source, tmp_path / "e", to="peft-per-expert", base=base)
    report = restow.lora.check(tmp_path / "e", base)
    if family in ("qwen2_moe", "nemotron_h"):
        assert report.dropped
        assert not report.ok
        assert "dropped: model.layers" in str(report)


def test_check_finds_the_scale_of_rslora(tmp_path: Path) -> None:
    """PEFT doubles alpha where it joins gate and up, which is wrong by sqrt 2 for rsLoRA."""
    state = per_expert("qwen3_moe", shared=False)
    source = adapters.write(tmp_path / "e", state, use_rslora=True,
                            target_modules=["gate_proj", "up_proj", "down_proj"])  # fmt: skip
    report = restow.lora.check(source, adapters.base("qwen3_moe"))
    assert {round(f, 4) for f in report.rescaled.values()} == {1.4142}
    assert all(name.endswith("gate_up_proj") for name in report.rescaled)
    restow.lora.convert(source, tmp_path / "p", to="peft", base=adapters.base("qwen3_moe"))
    assert restow.lora.check(tmp_path / "p", adapters.base("qwen3_moe")).ok


def per_expert(family: str, *, shared: bool, ranks: tuple[int, int, int] = (3, 3, 3), sizes: str = "plain",
               experts: Any = range(12), words: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
               layers: Any = (1, 2)) -> dict[str, torch.Tensor]:  # fmt: skip
    """Per-expert tensors of a qwen3_moe-like model, gate and up with one A or with two."""
    d, f = tiny.SIZES[sizes]["d"], tiny.SIZES[sizes]["f"]
    out: dict[str, torch.Tensor] = {}
    for layer in layers:
        for e in experts:
            path = f"base_model.model.model.layers.{layer}.mlp.experts.{e}"
            for word, rank in zip(("gate_proj", "up_proj", "down_proj"), ranks, strict=True):
                if word not in words:
                    continue
                i, o = (f, d) if word == "down_proj" else (d, f)
                a = f"{path}.gate_proj" if shared and word == "up_proj" else f"{path}.{word}"
                out[f"{path}.{word}.lora_A.weight"] = tiny.values(f"{a}.A", torch.Size((rank, i)))
                out[f"{path}.{word}.lora_B.weight"] = tiny.values(f"{path}.{word}.B", torch.Size((o, rank)))
    return out


def hand(state: dict[str, torch.Tensor], scale: Any, family: str = "qwen3_moe") -> dict[str, torch.Tensor]:
    """The fused parameters that per-expert tensors give, by hand."""
    merged = {k: v.clone() for k, v in adapters.base_state(family).items()}
    for name in [n for n in state if n.endswith("lora_A.weight")]:
        path, _, word = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").rpartition(".")
        module, _, e = path.rpartition(".")
        delta = state[name.replace("lora_A", "lora_B")] @ state[name] * scale(word)
        if word == "down_proj":
            merged[f"{module}.down_proj"][int(e)] += delta
        else:
            half = slice(0, 24) if word == "gate_proj" else slice(24, 48)
            merged[f"{module}.gate_up_proj"][int(e), half] += delta
    return merged


RANKS = ((3, 3, 3), (3, 5, 3), (2, 2, 7))
BY_HAND = [
    case for case in product((True, False), RANKS, (False, True)) if not case[0] or case[1][0] == case[1][1]
]
SOME = {
    (True, (2, 2, 7), True),
    (False, (3, 3, 3), True),
    (False, (3, 5, 3), False),
    (False, (2, 2, 7), False),
}


@pytest.mark.parametrize(("shared", "ranks", "rslora"), some(BY_HAND, SOME))
def test_per_expert_adapters_by_hand(
    tmp_path: Path, shared: bool, ranks: tuple[int, int, int], rslora: bool
) -> None:
    state = per_expert("qwen3_moe", shared=shared, ranks=ranks)
    patterns = {w: r for w, r in zip(("gate_proj", "up_proj", "down_proj"), ranks, strict=True) if r != 3}
    source = adapters.write(tmp_path / "e", state, rank_pattern=patterns, use_rslora=rslora,
                            target_modules=["gate_proj", "up_proj", "down_proj"])  # fmt: skip
    scales = {
        w: 6 / (r**0.5 if rslora else r)
        for w, r in zip(("gate_proj", "up_proj", "down_proj"), ranks, strict=True)
    }
    want = hand(state, scales.__getitem__)
    base = adapters.base("qwen3_moe")
    report = restow.lora.convert(source, tmp_path / "p", to="peft", base=base)
    inner = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    assert adapters.tensors(tmp_path / "p")[inner].shape[0] == 12 * (
        ranks[0] if shared else ranks[0] + ranks[1]
    )
    have = adapters.merged(tmp_path / "p", "qwen3_moe")
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)
    assert shared or any("side by side" in note for note in report.notes)
    for via in ("peft", "grouped", "sglang", "megatron-3d", "peft-0.18", "vllm"):
        restow.lora.convert(source, tmp_path / f"{via}1", to=via, base=base)
        restow.lora.convert(tmp_path / f"{via}1", tmp_path / f"{via}2", to="peft-per-expert", base=base)
        adapters.same(source, tmp_path / f"{via}2")


MIXTRAL = {"mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_equal_to_peft_s_own_conversion(tmp_path: Path, family: str) -> None:
    """Distinct A: the tensors are those that PEFT makes when it reads the per-expert file."""
    state = per_expert(family, shared=False, layers=(0, 1) if family == "mixtral" else (1, 2))
    words = ["gate_proj", "up_proj", "down_proj"]
    if family == "mixtral":
        for ours, hub in MIXTRAL.items():
            state = {name.replace(ours, hub): tensor for name, tensor in state.items()}
        words = [MIXTRAL[word] for word in words]
    source = adapters.write(tmp_path / "e", state, target_modules=words)
    theirs = {
        n.replace(".default", ""): t
        for n, t in adapters.loaded(source, family).state_dict().items()
        if "lora_" in n
    }
    restow.lora.convert(source, tmp_path / "p", to="peft", base=adapters.base(family))
    ours = adapters.tensors(tmp_path / "p")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


SUBSETS: dict[str, dict[str, Any]] = {
    "gate and up": {"words": ("gate_proj", "up_proj")}, "down": {"words": ("down_proj",)},
    "gate": {"words": ("gate_proj",)}, "up": {"words": ("up_proj",)}, "two experts": {"experts": (0, 2)},
    "one layer": {"layers": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("case", SUBSETS)
def test_subsets(tmp_path: Path, case: str) -> None:
    state = per_expert("qwen3_moe", shared=False, **SUBSETS[case])
    words = list(SUBSETS[case].get("words", ("gate_proj", "up_proj", "down_proj")))
    source = adapters.write(tmp_path / "e", state, target_modules=words)
    base = adapters.base("qwen3_moe")
    report = restow.lora.convert(source, tmp_path / "p", to="peft", base=base)
    want = hand(state, lambda word: 2.0)
    have = adapters.merged(tmp_path / "p", "qwen3_moe")
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)
    assert restow.lora.check(tmp_path / "p", base).ok
    if case in ("gate", "up", "two experts"):
        assert any("zeros" in note for note in report.notes)
    restow.lora.convert(tmp_path / "p", tmp_path / "b", to="peft-per-expert", base=base)
    adapters.same(source, tmp_path / "b")


def test_ambiguous_files_are_refused_and_decided(tmp_path: Path) -> None:
    """f == d, down alone, no version: nothing in the file says which side lora_A faces."""
    family, sizes = "qwen3_moe", "f == d"
    source = adapters.make(tmp_path / "a", family, sizes, target_parameters=["mlp.experts.down_proj"])
    base = adapters.base(family, sizes)
    results = {}
    for version in ("0.18.1", "0.21.2", "0.19.1.dev0@abc", None):
        config = adapters.config(source)
        config.pop("peft_version", None)
        if version:
            config["peft_version"] = version
        (source / "adapter_config.json").write_text(json.dumps(config))
        target = tmp_path / str(version)
        if version in (None, "0.19.1.dev0@abc"):
            with pytest.raises(AdapterError) as caught:
                restow.lora.convert(source, target, to="grouped", base=base)
            assert 'faces="input"' in str(caught.value)
            assert "mlp.experts" in str(caught.value)
            restow.lora.convert(source, tmp_path / f"{version} in", to="grouped", base=base, faces="input")
            results[f"{version} in"] = adapters.tensors(tmp_path / f"{version} in")
        else:
            restow.lora.convert(source, target, to="grouped", base=base)
            results[version] = adapters.tensors(target)
    name = "base_model.model.model.layers.1.mlp.experts.lora_down_A"
    assert not torch.equal(results["0.18.1"][name], results["0.21.2"][name])
    assert torch.equal(results["None in"][name], results["0.21.2"][name])


def test_orientation_matters_where_shapes_are_equal(tmp_path: Path) -> None:
    """2f == d, gate and up alone: both orientations have one shape, and the version decides between two results."""
    family, sizes = "qwen3_moe", "2f == d"
    source = adapters.make(tmp_path / "a", family, sizes, target_parameters=["mlp.experts.gate_up_proj"])
    results = {}
    for version in ("0.18.1", "0.21.2"):
        config = {**adapters.config(source), "peft_version": version}
        (source / "adapter_config.json").write_text(json.dumps(config))
        restow.lora.convert(source, tmp_path / version, to="grouped", base=adapters.base(family, sizes))
        results[version] = adapters.tensors(tmp_path / version)
    name = "base_model.model.model.layers.1.mlp.experts.lora_gate_and_up_A"
    assert results["0.18.1"][name].shape == results["0.21.2"][name].shape
    assert not torch.equal(results["0.18.1"][name], results["0.21.2"][name])
    before, have = adapters.base_state(family, sizes), adapters.merged(source, family, sizes)
    a, b = (results["0.21.2"][name.replace("up_A", f"up_{x}")] for x in "AB")
    delta = (
        have["model.layers.1.mlp.experts.gate_up_proj"] - before["model.layers.1.mlp.experts.gate_up_proj"]
    )
    torch.testing.assert_close(2 * (a @ b).transpose(1, 2), delta, atol=1e-5, rtol=1e-5)


def test_one_wrapper_is_what_the_config_says(tmp_path: Path) -> None:
    for i, parameter in enumerate(adapters.parameters("qwen3_moe")):
        source = adapters.make(tmp_path / f"{i}", "qwen3_moe", target_parameters=[parameter])
        restow.lora.convert(source, tmp_path / f"{i}g", to="grouped", base=adapters.base("qwen3_moe"))
        names = [n for n in adapters.tensors(tmp_path / f"{i}g") if "experts" in n]
        assert all(("lora_gate_and_up" if i == 0 else "lora_down") in n for n in names)
        restow.lora.convert(
            tmp_path / f"{i}g", tmp_path / f"{i}b", to="peft", base=adapters.base("qwen3_moe")
        )
        adapters.same(source, tmp_path / f"{i}b")


def test_deepseek_keeps_its_shared_experts(tmp_path: Path) -> None:
    """gate_proj of shared experts and dense layers are modules of their own: none may be lost or taken for experts."""
    state = per_expert("deepseek_v3", shared=False)
    want = {k: v.clone() for k, v in hand(state, lambda word: 2.0, "deepseek_v3").items()}
    linear = [
        n
        for n in want
        if n.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight", "q_b_proj.weight"))
    ]
    for name in linear:
        module, (o, i) = name.removesuffix(".weight"), want[name].shape
        a = state[f"base_model.model.{module}.lora_A.weight"] = tiny.values(f"{name}.A", torch.Size((3, i)))
        b = state[f"base_model.model.{module}.lora_B.weight"] = tiny.values(f"{name}.B", torch.Size((o, 3)))
        want[name] += b @ a * 2
    assert sum("shared_experts" in n for n in linear) == 6
    words = ["gate_proj", "up_proj", "down_proj", "q_b_proj"]
    four = adapters.write(tmp_path / "four", state, target_modules=words)
    base = adapters.base("deepseek_v3")
    report = restow.lora.check(four, base)
    assert any("shared_experts" in name for name in report.dropped), "PEFT itself loses them"
    for via in ("peft", "grouped"):
        restow.lora.convert(four, tmp_path / via, to=via, base=base)
        restow.lora.convert(tmp_path / via, tmp_path / f"{via}-b", to="peft-per-expert", base=base)
        adapters.same(four, tmp_path / f"{via}-b")
    restow.lora.convert(tmp_path / "grouped", tmp_path / "five", to="peft", base=base)
    for path in ("peft", "five"):
        assert restow.lora.check(tmp_path / path, base).ok
        have = adapters.merged(tmp_path / path, "deepseek_v3")
        for name, tensor in want.items():
            torch.testing.assert_close(have[name], tensor, atol=1e-5, rtol=1e-5)


def test_unsloth_s_order_by_marker_and_by_flag(tmp_path: Path) -> None:
    source = adapters.make(tmp_path / "a", "qwen3_moe")
    base = adapters.base("qwen3_moe")
    restow.lora.convert(source, tmp_path / "want", to="grouped", base=base)
    state = adapters.tensors(source)
    for name in [n for n in state if "experts" in n and "lora_B" in n]:
        b = state[name]
        state[name] = b.reshape(b.shape[0], 3, 12).transpose(1, 2).reshape(b.shape)
    plain = adapters.write(tmp_path / "u", state, **adapters.config(source))
    marked = adapters.write(
        tmp_path / "m", state, **adapters.config(source), lora_B_layout="grouped_by_expert"
    )
    restow.lora.convert(plain, tmp_path / "by flag", to="grouped", base=base, expert_major=True)
    restow.lora.convert(marked, tmp_path / "by marker", to="grouped", base=base)
    restow.lora.convert(plain, tmp_path / "wrong", to="grouped", base=base)
    want = adapters.tensors(tmp_path / "want")
    for name in want:
        assert torch.equal(want[name], adapters.tensors(tmp_path / "by flag")[name])
        assert torch.equal(want[name], adapters.tensors(tmp_path / "by marker")[name])
    changed = [n for n in want if not torch.equal(want[n], adapters.tensors(tmp_path / "wrong")[n])]
    assert changed
