"""NVFP4 as modelopt stores Llama 4's experts: stacked, the input axis before the last, two of its elements in a byte.

Against a formula of our own, and in the slow job against modelopt's own quantiser and dequantiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import restow
from coded import E2M1, State, codes, config, rest, scales, write
from restow import errors
from restow.boxes import whole
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.planning import make_plan
from restow.plans import Plan
from restow.targets import Target
from restow.torch.read import run_plan

E, F, D = 3, 48, 80  # d is no multiple of 32: a run of blocks ends inside a word of eight
PATH = "model.layers.0.feed_forward.experts"
IN, OUT = f"{PATH}.gate_and_up_projs", f"{PATH}.down_projs"
FP8 = torch.float8_e4m3fn
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def about(e: int = E, f: int = F, d: int = D, **more: Any) -> dict[str, Any]:
    llama = {"model_type": "llama4_text", "num_local_experts": e, "intermediate_size": f}
    return {**config(NVFP4, e, f, d), **llama, "interleave_moe_layer_step": 1, **more}


def values_of(words: torch.Tensor, grid: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[e, in, out] in float32: byte (i // 2) of a column, its low half where i is even; a scale per 16 places."""
    there = torch.arange(2 * words.shape[1])
    four = words[:, there // 2] >> (there % 2 * 4)[:, None].to(torch.uint8) & 15
    return E2M1[four.long()] * (grid.float()[:, there // 16] * second)


def build(folder: Path, e: int = E, f: int = F, d: int = D) -> tuple[Path, State, State]:
    """(folder, stored, values in the layout `grouped`, which is the vendor's under other names)."""
    stored, values = rest(e, d), State()
    stored["model.layers.0.feed_forward.router.weight"] = stored.pop("model.layers.0.mlp.gate.weight")
    for seed, (key, to, inner, outer) in enumerate(
        (("gate_up_proj", IN, d, 2 * f), ("down_proj", OUT, f, d))
    ):
        words = codes(seed, e, inner // 2, outer)
        grid = codes(seed + 5, e, inner // 16, outer).view(FP8)
        second = scales(seed, 1).reshape(())
        stored |= {
            f"{PATH}.{key}": words, f"{PATH}.{key}_weight_scale": grid,
            f"{PATH}.{key}_weight_scale_2": second, f"{PATH}.{key}_input_scale": torch.tensor(0.25),
        }  # fmt: skip
        values[to] = values_of(words, grid, second)
    return write(folder, stored, about(e, f, d)), stored, values


def split(values: State) -> State:
    """Grouped experts, one tensor per expert and projection."""
    gate, up = values[IN].transpose(1, 2).chunk(2, 1)
    parts = {"gate": gate, "up": up, "down": values[OUT].transpose(1, 2)}
    return {f"{PATH}.{e}.{k}_proj.weight": part[e] for k, part in parts.items() for e in range(len(part))}


def filled(folder: Path, into: State, **more: Any) -> None:
    """A load whose plan says the bytes that it reads, and survives JSON."""
    made = restow.plan(folder, into, **more)
    assert Plan.from_json(made.to_json()) == made
    assert restow.load(folder, into, **more).bytes_read == made.bytes
    assert sum(read.end - read.begin for read in made.reads) <= made.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["grouped", "split", "fused"])
def test_decodes_to_the_formulas_bits(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    folder, stored, values = build(tmp_path / "a")
    assert restow.open(folder).problems == ()
    want = {"grouped": values, "split": split(values), "fused": {
        f"{PATH}.gate_up_proj": values[IN].transpose(1, 2), f"{PATH}.down_proj": values[OUT].transpose(1, 2),
    }}[form]  # fmt: skip
    want |= {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    into = {n: torch.full(v.shape, 7, dtype=dtype if "experts" in n else v.dtype) for n, v in want.items()}
    filled(folder, into)
    for name, value in want.items():
        assert torch.equal(into[name], value.to(into[name].dtype)), name
    assert int((values[IN] != 0).sum()) > values[IN].numel() // 2


def test_parts_begin_and_end_inside_bytes_and_blocks(tmp_path: Path) -> None:
    """Any box: rows of odd numbers, single ones, runs that leave a byte's other half, columns apart."""
    folder, _, values = build(tmp_path / "a")
    source = open_checkpoint(folder)
    for runs in (
        (((0, 3),), ((1, 1),), ((0, 96),)),
        (((1, 2),), ((13, 18),), ((5, 50),)),
        (((2, 1),), ((0, 1), (3, 2), (17, 30), (79, 1)), ((47, 2), (90, 6))),
        (((0, 1), (2, 1)), ((15, 50),), ((48, 48),)),
    ):
        target = Target(IN, tuple(values[IN].shape), "F32", runs)
        down = Target(OUT, tuple(values[OUT].shape), "BF16", whole(values[OUT].shape))
        made = make_plan(source, [target, down], Wish(layout="grouped", part=True))
        into = {
            IN: torch.full(target.local_shape, 7.0),
            OUT: torch.empty(down.local_shape, dtype=torch.bfloat16),
        }
        assert run_plan(made, into, root=source.path, threads=2).bytes_read == made.bytes
        picked = values[IN]
        for dim, dim_runs in enumerate(runs):
            picked = picked.index_select(dim, torch.cat([torch.arange(a, a + n) for a, n in dim_runs]))
        assert torch.equal(into[IN], picked), runs
        assert torch.equal(into[OUT], values[OUT].bfloat16())


@pytest.mark.parametrize(("axis", "of"), [("e", 2), ("f", 5), ("f", 16), ("d", 3), ("d", 11)])
def test_shards_that_cut_bytes_and_blocks(tmp_path: Path, axis: str, of: int) -> None:
    folder, _, values = build(tmp_path / "a")
    for rank in range(of):
        shard = restow.Shard(axis, rank, of)
        gate, down = values[IN].unflatten(2, (2, F)), values[OUT]
        start, count = shard.run(gate.shape["edpf".index(axis)])
        want = {
            IN: gate.narrow("edpf".index(axis), start, count).flatten(2),
            OUT: down.narrow("efd".index(axis), start, count),
        }
        if count:
            into = {name: torch.full(part.shape, 7.0) for name, part in want.items()}
            filled(folder, into, shard=shard, part=True)
            assert all(torch.equal(into[name], part) for name, part in want.items()), rank


def test_large_experts_in_tiles_and_jobs(tmp_path: Path) -> None:
    """Sizes at which an expert is many tiles, in the file's order and against it."""
    folder, _, values = build(tmp_path / "a", 2, 96, 16384)
    for want in (values, split(values)):
        into = {name: torch.empty(value.shape, dtype=torch.bfloat16) for name, value in want.items()}
        filled(folder, into, part=True)
        assert all(torch.equal(into[name], value.bfloat16()) for name, value in want.items())


def test_converts_verifies_and_goes_by_experts(tmp_path: Path) -> None:
    folder, _, values = build(tmp_path / "a")
    for form in ("grouped", "split", "hf"):
        restow.convert(folder, tmp_path / form, to=form)
        assert restow.verify(folder, tmp_path / form).equal
        assert restow.open(tmp_path / form).problems == ()
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    made = load_file(tmp_path / "grouped" / "model.safetensors")
    assert torch.equal(made[IN], values[IN].bfloat16())
    assert restow.fingerprint(folder) == restow.fingerprint(tmp_path / "split")
    into = {name: torch.empty(3, *values[name].shape[1:]) for name in (IN, OUT)}
    filled(folder, into, experts=[2, 0, 2], part=True)
    assert all(torch.equal(into[name], values[name][[2, 0, 2]]) for name in (IN, OUT))


def test_verify_finds_one_half_of_a_byte(tmp_path: Path) -> None:
    folder, stored, _ = build(tmp_path / "a")
    assert restow.verify(folder).equal
    stored[f"{PATH}.down_proj"][1, 3, 5] ^= 0x20  # the half of input 7
    other = write(tmp_path / "b", stored, about())
    (difference,) = restow.verify(folder, other).differences
    assert difference.name == f"{PATH}.down_proj"
    assert difference.index == (1, 7, 5)


def test_codes_are_carried_where_the_input_axis_comes_before_the_last(tmp_path: Path) -> None:
    folder, stored, _ = build(tmp_path / "a")
    restow.convert(folder, tmp_path / "k", to="grouped", keep_quantized=True, experts=[2, 0])
    kept = load_file(tmp_path / "k" / "model.safetensors")
    for ours, theirs in ((IN, "gate_up_proj"), (OUT, "down_proj")):
        for end in ("", "_weight_scale"):
            now, before = kept[f"{ours}{end}"], stored[f"{PATH}.{theirs}{end}"][[2, 0]]
            assert torch.equal(now.view(torch.uint8), before.view(torch.uint8)), ours + end
        for end in ("_weight_scale_2", "_input_scale"):
            assert torch.equal(kept[ours + end], stored[f"{PATH}.{theirs}{end}"])
    assert restow.open(tmp_path / "k").problems == ()
    restow.convert(folder, tmp_path / "all", to="grouped", keep_quantized=True)
    assert restow.verify(folder, tmp_path / "all").equal
    restow.convert(tmp_path / "all", tmp_path / "back", to="source")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    into = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    filled(folder, into)
    assert all(
        torch.equal(into[n].view(torch.uint8), t.view(torch.uint8)) for n, t in stored.items() if t.dim()
    )


@pytest.mark.parametrize(("form", "rows"), [
    ("split", "in {e}.{p:gate|up}_proj.weight f d; out {e}.down_proj.weight d f"),
    ("fused", "in gate_up_proj e (p f) d; out down_proj e d f"),
])  # fmt: skip
def test_codes_are_not_carried_elsewhere(tmp_path: Path, form: str, rows: str) -> None:
    folder, _, _ = build(tmp_path / "a")
    with pytest.raises(errors.UsageError) as caught:
        restow.convert(folder, tmp_path / "k", to=form, keep_quantized=True)
    assert str(caught.value) == (
        f"expected a layout with the input axis before the last, as the nvfp4_across codes of {PATH} have it, found {rows}\n"
        "  try       without keep_quantized the weights are decoded, which any layout can hold"
    )
    assert not (tmp_path / "k").exists()


def test_what_is_odd_is_refused_by_name(tmp_path: Path) -> None:
    def fatal(number: int, **changes: torch.Tensor | None) -> str:
        _, stored, _ = build(tmp_path / f"{number}")
        for key, tensor in changes.items():
            stored.pop(f"{PATH}.{key}")
            stored |= {} if tensor is None else {f"{PATH}.{key}": tensor}
        folder = write(tmp_path / f"{number}", stored, about())
        (error,) = [problem.error for problem in restow.open(folder).problems if problem.fatal]
        assert type(error) is errors.QuantizationError
        with pytest.raises(errors.QuantizationError):
            restow.convert(folder, tmp_path / "g", to="grouped")
        assert not (tmp_path / "g").exists()
        return str(error)

    assert f"{PATH}.down_proj_weight_scale_2" in fatal(0, down_proj_weight_scale_2=None)
    assert f"shape [3, 3, 80] for {PATH}.down_proj_weight_scale" in fatal(
        1, down_proj_weight_scale=torch.ones(E, D, F // 16).to(FP8)
    )
    assert f"{PATH}.gate_up_proj_weight_scale F32" in fatal(
        2, gate_up_proj_weight_scale=torch.ones(E, D // 16, 2 * F)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_reads_what_modelopt_exports(tmp_path: Path) -> None:
    """Its own export of a model that it quantised; its own dequantiser says what the files mean."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    export = pytest.importorskip("modelopt.torch.export")
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": D, "intermediate_size": F, "intermediate_size_mlp": 2 * F, "num_local_experts": E}
    about = Llama4TextConfig(
        vocab_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        interleave_moe_layer_step=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    about.architectures = ["Llama4ForCausalLM"]
    torch.manual_seed(0)
    model = Llama4ForCausalLM(about)
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(PATH)}
    model = quantization.quantize(
        model, quantization.NVFP4_DEFAULT_CFG, lambda own: own(torch.arange(32).view(2, 16))
    )
    export.export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(tmp_path / "a"))
    assert restow.open(tmp_path / "a").problems == ()
    stored = load_file(tmp_path / "a" / "model.safetensors")
    want = State()
    for name, words in stored.items():
        if words.dtype is not torch.uint8:
            continue
        scale = f"{name}_weight_scale" if name in before else f"{name}_scale"
        grid, second = stored[scale], stored[f"{scale}_2"]
        if name in before:
            words, grid = words.transpose(1, 2), grid.transpose(1, 2)
        made = tensor(torch.Size([*words.shape[:-1], 2 * words.shape[-1]]), torch.float32, words)
        value = made.dequantize(torch.float32, scale=grid, double_scale=second, block_sizes={-1: 16})
        want[name] = value.transpose(1, 2) if name in before else value
        if name in before:  # half of the step from 4 to 6, and a rounded scale
            assert 0 < float((want[name] - before[name]).abs().max()) < float(before[name].abs().max()) / 5
    assert len(want) == 2 + 3 + 4
    into = {name: torch.full(value.shape, 7.0) for name, value in want.items()}
    restow.load(tmp_path / "a", into, part=True)
    assert all(torch.equal(into[name], value) for name, value in want.items())
    turned = {n: t >> 4 | t << 4 if n == f"{PATH}.down_proj" else t for n, t in stored.items()}
    restow.load(
        write(tmp_path / "b", turned, json.loads((tmp_path / "a" / "config.json").read_text())),
        into,
        part=True,
    )
    assert not torch.equal(into[f"{PATH}.down_proj"], want[f"{PATH}.down_proj"])  # halves exchanged are found
