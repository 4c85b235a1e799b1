"""Block-FP8 and MXFP4 checkpoints decoded on the way: against formulas of our own and transformers' functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import restow
from coded import E2M1, E, State, codes, config, expand, fp8_config, fp8_split, grouped, nibbles, rest, write
from restow import errors
from restow.boxes import whole
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.planning import make_plan
from restow.plans import Plan
from restow.targets import Shard, Target
from restow.torch.read import run_plan
from restow.torch.values import judge_scales

EXPERTS = "model.layers.0.mlp.experts"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
IN, OUT = f"{EXPERTS}.gate_and_up_projs", f"{EXPERTS}.down_projs"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A ragged block-FP8 checkpoint, scales in another file than their weights, and its values."""
    stored, values = fp8_split()
    scales = [name for name in stored if name.endswith("_scale_inv")]
    files = {"model-00001-of-00002.safetensors": scales, "model-00002-of-00002.safetensors": []}
    folder = write(tmp_path_factory.mktemp("fp8"), stored, config(fp8_config()), files)
    return folder, {**grouped(values), **rest(), O_PROJ: values[O_PROJ]}


def filled(source: Path, into: Mapping[str, torch.Tensor], **more: Any) -> Any:
    """A load whose plan says the bytes that it reads, and survives JSON."""
    made = restow.plan(source, into, **more)
    assert Plan.from_json(made.to_json()) == made
    report = restow.load(source, into, **more)
    assert report.bytes_read == made.bytes
    assert sum(read.end - read.begin for read in made.reads) <= made.bytes
    return report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_decodes_to_the_formulas_bits(fp8: tuple[Path, State], dtype: torch.dtype) -> None:
    folder, values = fp8
    into = {name: torch.full_like(value, 7, dtype=dtype) for name, value in values.items()}
    report = filled(folder, into)
    for name, value in values.items():
        assert torch.equal(into[name], value.to(dtype)), name
    size = sum(
        len(load_file(file)) and sum(t.nbytes for t in load_file(file).values())
        for file in folder.glob("*.safetensors")
    )
    assert report.bytes_read == size
    assert (IN in report.narrowed) == (dtype != torch.float32)


def test_equals_transformers_dequantizer(tmp_path: Path) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    stored, _ = fp8_split(2, 256, 384)  # multiples of the block, where its derived block size is right
    folder = write(tmp_path / "a", stored, config(fp8_config(), 2, 256, 384))
    into = {f"{EXPERTS}.{i}.{k}_proj.weight": torch.empty(stored[f"{EXPERTS}.{i}.{k}_proj.weight"].shape)
            for i in range(2) for k in ("gate", "up", "down")}  # fmt: skip
    restow.load(folder, into, part=True)
    decoder = finegrained.Fp8Dequantize(None)
    for name, value in into.items():
        theirs = decoder._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.float32)
        assert torch.equal(value, theirs), name


@pytest.mark.parametrize(
    ("axis", "of"), [("e", 2), ("e", 8), ("f", 3), ("f", 7), ("d", 2), ("d", 13)], ids=lambda v: str(v)
)
def test_shards_that_cut_blocks(fp8: tuple[Path, State], axis: str, of: int) -> None:
    folder, values = fp8
    for rank in range(of):
        shard = Shard(axis, rank, of)
        parts = {}
        for name in (IN, OUT):
            value = values[name]
            if axis == "f" and name == IN:
                pieces = value.unflatten(2, (2, -1))
                start, count = shard.run(pieces.shape[3])
                parts[name] = pieces[..., start : start + count].flatten(2)
            else:
                dim = {"e": 0, "f": 1, "d": 1 if name == IN else 2}[axis]
                start, count = shard.run(value.shape[dim])
                parts[name] = value.narrow(dim, start, count)
        into = {name: torch.full_like(part, 7, dtype=torch.bfloat16) for name, part in parts.items()}
        if not any(part.numel() for part in parts.values()):
            continue
        report = filled(folder, into, shard=restow.Shard(axis, rank, of), part=True)
        for name, part in parts.items():
            assert torch.equal(into[name], part.to(torch.bfloat16)), (name, rank)
        if axis == "e":
            assert (
                report.bytes_read
                < 1.1 * sum(part.numel() * (1 + 8 / 128**2 * 2) for part in parts.values()) + 4096
            )


def test_any_placement_reads_its_own_boxes(fp8: tuple[Path, State]) -> None:
    """Runs as DTensor's strided placements give them: rows {1, 2} and {4}, columns that begin inside blocks."""
    folder, values = fp8
    source = open_checkpoint(folder)
    shape = tuple(values[IN].shape)
    runs = (((1, 2), (4, 1)), ((5, 140), (290, 3)), ((100, 50), (199, 130)))
    target = Target(IN, shape, "F32", runs)
    down = Target(OUT, tuple(values[OUT].shape), "F32", whole((0, 200, 300)))
    made = make_plan(source, [target, down], Wish(layout="grouped", part=True))
    local = torch.full(target.local_shape, 7.0)
    into = {IN: local, OUT: torch.empty(down.local_shape)}
    booked = run_plan(made, into, root=source.path, stamps=source.stamps, threads=3)
    picked = values[IN]
    for dim, dim_runs in enumerate(runs):
        picked = picked.index_select(dim, torch.cat([torch.arange(a, a + n) for a, n in dim_runs]))
    assert torch.equal(local, picked)
    assert booked.bytes_read == made.bytes


def test_expert_lists_repeat_and_prune(fp8: tuple[Path, State]) -> None:
    folder, values = fp8
    chosen = [4, 1, 1]
    into = {name: torch.empty_like(values[name][:3]) for name in (IN, OUT)}
    filled(folder, into, experts=chosen, part=True)
    for name, tensor in into.items():
        assert torch.equal(tensor, values[name][chosen])


def test_convert_decodes_and_verify_agrees(fp8: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = fp8
    report = restow.convert(folder, tmp_path / "g", to="grouped")
    assert set(report.narrowed) == {IN, OUT, O_PROJ}
    made = load_file(tmp_path / "g" / "model.safetensors")
    assert made.keys() == values.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, values[name].to(torch.bfloat16)), name
    assert "quantization_config" not in json.loads((tmp_path / "g" / "config.json").read_text())
    assert restow.open(tmp_path / "g").problems == ()
    assert restow.verify(folder, tmp_path / "g").equal
    assert restow.verify(tmp_path / "g", folder).equal
    assert restow.verify(folder, folder).equal
    assert restow.fingerprint(folder) == restow.fingerprint(tmp_path / "g")
    for kept in (False, True):
        with pytest.raises(errors.UsageError, match="found values were decoded from fp8"):
            restow.convert(tmp_path / "g", tmp_path / "s", to="source", keep_quantized=kept)
    assert not (tmp_path / "s").exists()


def test_verify_finds_one_changed_scale(fp8: tuple[Path, State], tmp_path: Path) -> None:
    stored, _ = fp8_split()
    name = f"{EXPERTS}.3.up_proj.weight"
    stored[f"{name}_scale_inv"][1, 2] *= 2
    other = write(tmp_path / "other", stored, config(fp8_config()))
    report = restow.verify(fp8[0], other)
    assert not report.equal
    (difference,) = report.differences
    assert difference.name == name
    assert difference.index == (128, 256)


def test_keep_quantized_takes_codes_and_scales_along(fp8: tuple[Path, State], tmp_path: Path) -> None:
    folder, _ = fp8
    stored, _ = fp8_split()
    restow.convert(folder, tmp_path / "k", to="split", experts=[3, 0], keep_quantized=True)
    kept = load_file(tmp_path / "k" / "model.safetensors")
    for now, before in enumerate([3, 0]):
        for end in ("gate_proj.weight", "down_proj.weight_scale_inv"):
            theirs, ours = stored[f"{EXPERTS}.{before}.{end}"], kept[f"{EXPERTS}.{now}.{end}"]
            assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8))
    assert restow.open(tmp_path / "k").problems == ()
    restow.convert(folder, tmp_path / "all", to="stacked", keep_quantized=True)
    assert restow.verify(folder, tmp_path / "all").equal
    restow.convert(tmp_path / "all", tmp_path / "back", to="source")
    for file in folder.glob("*.safetensors*"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_keep_quantized_refuses_what_has_no_place(fp8: tuple[Path, State], tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="fp8 codes"):
        restow.convert(fp8[0], tmp_path / "g", to="grouped", keep_quantized=True)
    with pytest.raises(errors.RolesError, match=r"in\.scale"):
        restow.convert(fp8[0], tmp_path / "f", to="fused", keep_quantized=True)
    with pytest.raises(errors.UsageError, match="dtype="):
        restow.convert(fp8[0], tmp_path / "s", to="split", keep_quantized=True, dtype=torch.float32)
    assert not any((tmp_path / name).exists() for name in "gfs")


def test_a_destination_with_scales_gets_the_codes(fp8: tuple[Path, State]) -> None:
    stored, _ = fp8_split()
    into = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    filled(fp8[0], into)
    for name, tensor in stored.items():
        assert torch.equal(into[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_codes_alone_have_no_value(fp8: tuple[Path, State]) -> None:
    into = {O_PROJ: torch.zeros(300, 384, dtype=torch.float8_e4m3fn)}
    with pytest.raises(errors.QuantizationError, match="a place for the scales"):
        restow.load(fp8[0], into, part=True)


# gpt-oss in MXFP4


def mxfp4(e: int = 4, f: int = 96, d: int = 64) -> tuple[State, dict[str, Any]]:
    base = "model.layers.0.mlp.experts"
    state = {**rest(e, d)}
    del state["model.layers.0.mlp.gate.weight"]
    state["model.layers.0.mlp.router.weight"] = torch.randn(e, d).to(torch.bfloat16)
    state["model.layers.0.mlp.router.bias"] = torch.randn(e).to(torch.bfloat16)
    for role, (rows, columns) in {"gate_up_proj": (2 * f, d), "down_proj": (d, f)}.items():
        state[f"{base}.{role}_blocks"] = torch.randint(
            0, 256, (e, rows, columns // 32, 16), dtype=torch.uint8
        )
        state[f"{base}.{role}_scales"] = torch.randint(110, 135, (e, rows, columns // 32), dtype=torch.uint8)
        state[f"{base}.{role}_bias"] = torch.randn(e, rows).to(torch.bfloat16)
    about = {
        "model_type": "gpt_oss", "num_local_experts": e, "intermediate_size": f, "hidden_size": d,
        "num_hidden_layers": 1, "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }  # fmt: skip
    return state, about


@pytest.mark.parametrize(("f", "d"), [(96, 64), (64, 64)], ids=["oblong", "square"])
def test_mxfp4_equals_transformers_and_the_formula(tmp_path: Path, f: int, d: int) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    state, about = mxfp4(f=f, d=d)
    folder = write(tmp_path / "a", state, about)
    assert restow.open(folder).problems == ()
    into = {f"{EXPERTS}.{role}": torch.empty(4, *shape, dtype=torch.bfloat16)
            for role, shape in {"gate_up_proj": (d, 2 * f), "down_proj": (f, d)}.items()}  # fmt: skip
    biases = [f"{EXPERTS}.{role}_bias" for role in ("gate_up_proj", "down_proj")]
    into |= {name: torch.empty_like(state[name]) for name in biases}
    filled(folder, into, part=True, layout="hf")
    for role in ("gate_up_proj", "down_proj"):
        blocks, scales = state[f"{EXPERTS}.{role}_blocks"], state[f"{EXPERTS}.{role}_scales"]
        assert torch.equal(into[f"{EXPERTS}.{role}"], theirs(blocks, scales, dtype=torch.bfloat16)), role
        values = (E2M1[nibbles(blocks).long()] * torch.exp2(scales.double() - 127)[..., None]).flatten(2)
        assert torch.equal(into[f"{EXPERTS}.{role}"], values.transpose(1, 2).to(torch.bfloat16)), role


def test_mxfp4_converts_and_shards(tmp_path: Path) -> None:
    state, about = mxfp4()
    folder = write(tmp_path / "a", state, about)
    restow.convert(folder, tmp_path / "hf", to="hf")
    assert restow.open(tmp_path / "hf").problems == ()
    assert restow.verify(folder, tmp_path / "hf").equal
    plain, source = load_file(tmp_path / "hf" / "model.safetensors"), open_checkpoint(folder)
    name = f"{EXPERTS}.gate_up_proj"
    for dim, start, count in (
        (1, 13, 13),
        (1, 52, 1),
        (1, 7, 50),
        (0, 1, 2),
        (2, 39, 41),
    ):  # odd nibbles, parts of pairs
        targets = {n: Target(n, tuple(t.shape), "BF16", whole(t.shape)) for n, t in plain.items()}
        cut = tuple(((start, count),) if i == dim else runs for i, runs in enumerate(targets[name].runs))
        targets[name] = targets[name]._replace(runs=cut)
        made = make_plan(source, list(targets.values()), Wish(layout="hf"))
        assert Plan.from_json(made.to_json()) == made
        into = {n: torch.empty(t.local_shape, dtype=torch.bfloat16) for n, t in targets.items()}
        booked = run_plan(made, into, root=source.path)
        assert booked.bytes_read == made.bytes
        for n, tensor in into.items():
            assert torch.equal(tensor, plain[n].narrow(dim, start, count) if n == name else plain[n]), (
                n,
                dim,
                start,
            )
    restow.convert(folder, tmp_path / "k", to="fused", experts=[2, 1], keep_quantized=True)
    kept = load_file(tmp_path / "k" / "model.safetensors")
    assert torch.equal(kept[f"{EXPERTS}.down_proj_blocks"], state[f"{EXPERTS}.down_proj_blocks"][[2, 1]])
    assert kept.keys() == state.keys()


def test_helpers() -> None:
    assert expand(torch.tensor([[1.0, 2.0]]), (2, 2), (2, 3)).tolist() == [[1, 1, 2], [1, 1, 2]]
    assert nibbles(torch.tensor([0x21], dtype=torch.uint8)).tolist() == [1, 2]
    assert int((codes(1, 4096) & 127).max()) < 127
    assert E == 5


def test_scales_that_adjoin_are_judged_in_one_run_and_odd_ones_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinity, zero and what is below it; the good ones beside them are passed once they are looked at alone."""
    from restow.torch import scale_values

    stored, _ = fp8_split(2, 130, 140)
    scales_ = sorted(name for name in stored if name.endswith("_scale_inv"))
    good = write(tmp_path / "good", stored, config(fp8_config(), 2, 130, 140))
    assert scale_values.suspects(restow.open(good), scales_) == set()
    for number, value in enumerate((float("nan"), float("inf"), 0.0, -1.0)):
        odd = scales_[2 + number]
        spoilt = {**stored, odd: stored[odd].clone()}
        spoilt[odd][1, 1] = value
        folder = write(tmp_path / str(number), spoilt, config(fp8_config(), 2, 130, 140))
        opened = restow.open(folder)
        assert scale_values.suspects(opened, scales_) == set(scales_)
        with monkeypatch.context() as small:
            small.setattr(scale_values, "RUN", 2 * stored[odd].nbytes)
            few = scale_values.suspects(opened, scales_)
            assert odd in few and len(few) <= 2
        (problem,) = judge_scales(opened, 2)
        assert odd in str(problem.error) and problem.fatal == (value != 0)
