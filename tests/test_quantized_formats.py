"""Every other way of storing quantised experts that the table of codecs lists: formulas of our own, and its libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import restow
from coded import E2M1, State, codes, config, expand, grouped, nibbles, rest, scales, write
from restow import errors

E, F, D = 3, 160, 224
EXPERTS = "model.layers.0.mlp.experts"
Q_PROJ, SHARED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert.down_proj"
FP8 = torch.float8_e4m3fn


class Format(NamedTuple):
    """`store` gives a weight's tensors by what is added to its name without `.weight`, and its values in float32."""

    about: dict[str, Any]
    store: Callable[[int, int, int], tuple[State, torch.Tensor]]


def packed(seed: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(
        0, 256, (rows, columns // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return words.view(dtype), nibbles(words).long()


def exponents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(110, 140, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def power(bytes_: torch.Tensor) -> torch.Tensor:
    return torch.exp2(bytes_.double() - 127).float()


def fp8_e8m0(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    weight, grid = codes(seed, r, c).view(FP8), exponents(seed, -(-r // 128), -(-c // 128))
    stored = {".weight": weight, ".scale": grid.view(torch.float8_e8m0fnu)}
    return stored, weight.float() * expand(power(grid), (128, 128), (r, c))


def fp4_int8(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    (words, four), grid = packed(seed, r, c, torch.int8), exponents(seed, r, c // 32)
    return {".weight": words, ".scale": grid.view(torch.float8_e8m0fnu)}, E2M1[four] * expand(
        power(grid), (1, 32), (r, c)
    )


def fp8_channel(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    weight, grid = codes(seed, r, c).view(FP8), scales(seed, r, 1).to(torch.bfloat16)
    return {".weight": weight, ".weight_scale": grid}, weight.float() * grid.float()


def mxfp8(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    weight, grid = codes(seed, r, c).view(FP8), exponents(seed, r, c // 32)
    return {".weight": weight, ".weight_scale_inv": grid}, weight.float() * expand(
        power(grid), (1, 32), (r, c)
    )


def mxfp4_packed(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    (words, four), grid = packed(seed, r, c, torch.uint8), exponents(seed, r, c // 32)
    return {".weight_packed": words, ".weight_scale": grid}, E2M1[four] * expand(power(grid), (1, 32), (r, c))


def int4(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    (words, four), grid = packed(seed, r, c, torch.int32), scales(seed, r, c // 32).to(torch.bfloat16)
    shape = torch.tensor([r, c], dtype=torch.int32)
    stored = {".weight_packed": words, ".weight_scale": grid, ".weight_shape": shape}
    return stored, (four - 8).float() * expand(grid, (1, 32), (r, c))


def nvfp4(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    (words, four), grid = packed(seed, r, c, torch.uint8), codes(seed, r, c // 16).view(FP8)
    second = scales(seed, 1).reshape(())
    stored = {
        ".weight": words,
        ".weight_scale": grid,
        ".weight_scale_2": second,
        ".input_scale": torch.tensor(0.5),
    }
    return stored, E2M1[four] * (expand(grid.float(), (1, 16), (r, c)) * second)


def nvfp4_packed(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    (words, four), grid = packed(seed, r, c, torch.uint8), codes(seed, r, c // 16).view(FP8)
    second = 1 / scales(seed, 1)
    stored = {".weight_packed": words, ".weight_scale": grid, ".weight_global_scale": second}
    return stored, E2M1[four] * (expand(grid.float(), (1, 16), (r, c)) / second)


def modelopt_blocks(seed: int, r: int, c: int) -> tuple[State, torch.Tensor]:
    weight, grid = codes(seed, r, c).view(FP8), scales(seed, -(-r // 128), -(-c // 128))
    stored = {".weight": weight, ".weight_scale": grid[:, None, :, None].contiguous()}
    return stored, weight.float() * expand(grid, (128, 128), (r, c))


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FORMATS = {
    "fp8_scale": Format(FP8_BLOCKS, fp8_e8m0),
    "fp4": Format(FP8_BLOCKS, fp4_int8),
    "fp8_channel": Format(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_channel
    ),
    "mxfp8": Format({"quant_method": "mxfp8"}, mxfp8),
    "mxfp8 by its blocks": Format({"quant_method": "fp8", "weight_block_size": [1, 32]}, mxfp8),
    "mxfp4_packed": Format(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4_packed,
    ),
    "int4_packed": Format(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), int4
    ),
    "nvfp4": Format({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "nvfp4_packed": Format(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4_packed,
    ),
    "fp8_modelopt": Format({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, modelopt_blocks),
}


def build(folder: Path, form: Format) -> tuple[Path, State, State]:
    """(folder, stored, values): split experts in a format, and two weights outside them, one named as stacked ones are."""
    stored, values = rest(E, D), State()
    shapes = {
        f"{EXPERTS}.{e}.{k}_proj": (D, F) if k == "down" else (F, D)
        for e in range(E)
        for k in ("gate", "up", "down")
    }
    shapes |= {Q_PROJ: (96, D), SHARED: (D, 96)}
    for seed, (name, shape) in enumerate(shapes.items()):
        parts, values[f"{name}.weight"] = form.store(seed, *shape)
        stored |= {f"{name}{end}": tensor for end, tensor in parts.items()}
    return write(folder, stored, config(form.about, E, F, D)), stored, values


@pytest.mark.parametrize("kind", FORMATS)
def test_decodes_like_its_formula(tmp_path: Path, kind: str) -> None:
    folder, _, values = build(tmp_path / "a", FORMATS[kind])
    assert restow.open(folder).problems == ()
    want = {**grouped(values, E), **rest(E, D)}
    want |= {f"{name}.weight": values[f"{name}.weight"] for name in (Q_PROJ, SHARED)}
    for dtype in (torch.float32, torch.bfloat16):
        into = {name: torch.full_like(value, 7, dtype=dtype) for name, value in want.items()}
        made = restow.plan(folder, into)
        report = restow.load(folder, into)
        assert report.bytes_read == made.bytes
        for name, value in want.items():
            assert torch.equal(into[name], value.to(dtype)), name
    for axis, of in (("f", 3), ("d", 4), ("e", 2)):
        shard = restow.Shard(axis, 1, of)
        down = want[f"{EXPERTS}.down_projs"]
        dim = "efd".index(axis)
        start, count = shard.run(down.shape[dim])
        part = {f"{EXPERTS}.down_projs": torch.empty_like(down.narrow(dim, start, count))}
        gate = want[f"{EXPERTS}.gate_and_up_projs"].unflatten(2, (2, F))
        cut = gate.narrow("edpf".index(axis), start, count).flatten(2)
        part[f"{EXPERTS}.gate_and_up_projs"] = torch.empty_like(cut)
        restow.load(folder, part, shard=shard, part=True)
        assert torch.equal(part[f"{EXPERTS}.down_projs"], down.narrow(dim, start, count)), axis
        assert torch.equal(part[f"{EXPERTS}.gate_and_up_projs"], cut), axis


@pytest.mark.parametrize("kind", FORMATS)
def test_converts_verifies_and_is_kept(tmp_path: Path, kind: str) -> None:
    folder, _, _ = build(tmp_path / "a", FORMATS[kind])
    restow.convert(folder, tmp_path / "g", to="grouped")
    assert restow.verify(folder, tmp_path / "g").equal
    assert restow.verify(folder).equal
    restow.convert(folder, tmp_path / "k", to="split", keep_quantized=True)
    assert restow.verify(folder, tmp_path / "k").equal
    restow.convert(folder, tmp_path / "two", to="split", experts=[2, 0], keep_quantized=True)
    assert restow.open(tmp_path / "two").problems == ()


@pytest.mark.parametrize("where", [f"{EXPERTS}.1.up_proj", Q_PROJ], ids=["experts", "others"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_scale_that_is_no_number_is_told(tmp_path: Path, kind: str, where: str) -> None:
    """255 among exponents, NaN among floats: by every scale that acts on a weight, whatever codec."""
    folder, stored, _ = build(tmp_path / "a", FORMATS[kind])
    assert restow.verify(folder).problems == ()
    acting = [n for n in stored if n.startswith(f"{where}.") and "scale" in n and "input" not in n]
    assert len(acting) == (2 if kind.startswith("nvfp4") else 1)
    for name in acting:
        scale = stored[name].clone()
        scale.view(-1)[-1:] = (
            255 if scale.dtype == torch.uint8 else torch.tensor([float("nan")]).to(scale.dtype)
        )
        write(folder, {**stored, name: scale}, config(FORMATS[kind].about, E, F, D))
        with pytest.raises(errors.QuantizationError) as caught:
            restow.verify(folder)
        assert str(caught.value) == (
            "expected scales that are finite and not below 0, found NaN\n"
            f"  scales    {name}: NaN\n"
            f"  in        {folder}/model.safetensors\n"
            "  try       get the file again: by such a scale a weight has no value"
        )


def test_several_formats_in_one_checkpoint(tmp_path: Path) -> None:
    """NVFP4 made from a checkpoint that was quantised before: what it was not made from stays in the old formats."""
    about = config(FORMATS["nvfp4"].about, E, F, D, num_hidden_layers=2)
    kinds = {"layers.0.mlp.experts": nvfp4, "layers.1.mlp.experts": fp4_int8}
    stored, values, want = rest(E, D), State(), rest(E, D)
    for at, store in kinds.items():
        for e, k in ((e, k) for e in range(E) for k in ("gate", "up", "down")):
            name = f"model.{at}.{e}.{k}_proj"
            parts, values[f"{name}.weight"] = store(len(values), *((D, F) if k == "down" else (F, D)))
            stored |= {f"{name}{end}": tensor for end, tensor in parts.items()}
        want |= grouped(values, E, f"model.{at}")
    for name, store in ((Q_PROJ, mxfp8), (SHARED, fp8_e8m0)):
        for layer in ("layers.0", "layers.1"):
            name = name.replace("layers.0", layer)
            parts, want[f"{name}.weight"] = store(len(stored), 96, D)
            stored |= {f"{name}{end}": tensor for end, tensor in parts.items()}
    for name in ("mlp.gate", "input_layernorm"):
        stored[f"model.layers.1.{name}.weight"] = stored[f"model.layers.0.{name}.weight"].clone()
        want[f"model.layers.1.{name}.weight"] = stored[f"model.layers.1.{name}.weight"]
    folder = write(tmp_path / "a", stored, about)
    assert restow.open(folder).problems == ()
    into = {name: torch.full_like(value, 7, dtype=torch.float32) for name, value in want.items()}
    restow.load(folder, into)
    for name, value in want.items():
        assert torch.equal(into[name], value.float()), name


@pytest.mark.parametrize("said", ["nvfp4", "int4_packed", None])
@pytest.mark.parametrize("scale", [".weight_scale", ".scale", ".weight_scale_inv"])
def test_codes_that_nothing_announces_are_no_values(tmp_path: Path, said: str | None, scale: str) -> None:
    """Outside the experts a file may hold more formats than its config tells: never cast as if there were no scale."""
    form = FORMATS[said or "int4_packed"]
    folder, stored, _ = build(tmp_path / "a", form)
    stored = {name: t for name, t in stored.items() if not name.startswith((Q_PROJ, SHARED))}
    about = config(form.about, E, F, D)
    if said is None:
        plain = {f"{EXPERTS}.{e}.{k}_proj.weight": torch.zeros((D, F) if k == "down" else (F, D))
                 for e in range(E) for k in ("gate", "up", "down")}  # fmt: skip
        stored = {name: t for name, t in stored.items() if EXPERTS not in name} | plain
        del about["quantization_config"]
    stored[f"{Q_PROJ}.weight"] = codes(1, 96, D).view(FP8)
    stored[f"{Q_PROJ}{scale}"] = torch.tensor(0.5)
    write(folder, stored, about)
    into = {f"{Q_PROJ}.weight": torch.full((96, D), 7.0)}
    with pytest.raises(errors.QuantizationError) as e:
        restow.load(folder, into, part=True)
    method = f"quant_method {form.about['quant_method']}" if said else "no quantization_config"
    assert str(e.value) == (
        f"expected weights in a codec that config.json announces ({method}), where plain values are wanted, "
        f"found F8_E4M3 with {Q_PROJ}{scale} F32 [] beside it\n"
        f"  tensor    {Q_PROJ}.weight\n"
        f"  in        {folder}\n"
        "  try       take a checkpoint with plain weights, or decode this one with the tool that wrote it; "
        "inspect and verify read it as it is"
    )
    assert (into[f"{Q_PROJ}.weight"] == 7).all()
    if said is not None:  # its new config would announce nothing
        with pytest.raises(errors.QuantizationError, match="beside it"):
            restow.convert(folder, tmp_path / "g", to="grouped")
        assert not (tmp_path / "g").exists()
        restow.convert(folder, tmp_path / "k", to="split", keep_quantized=True)
    same = {f"{Q_PROJ}.weight": torch.zeros(96, D, dtype=FP8)}
    restow.load(folder, same, part=True)
    assert torch.equal(same[f"{Q_PROJ}.weight"].view(torch.uint8), codes(1, 96, D))


def test_equals_compressed_tensors(tmp_path: Path) -> None:
    """Its own unpacking and dequantising, where the package is there."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    folder, stored, _ = build(tmp_path / "a", FORMATS["int4_packed"])
    name = f"{EXPERTS}.1.down_proj"
    into = {f"{name}.weight": torch.empty(D, F)}
    made = restow.plan(folder, {f"{EXPERTS}.{e}.{k}_proj.weight": torch.empty((D, F) if k == "down" else (F, D))
                                for e in range(E) for k in ("gate", "up", "down")}, part=True)  # fmt: skip
    assert made.bytes > 0
    every = {target.name: torch.empty(target.shape) for target in made.targets}
    restow.load(folder, every, part=True)
    into = {f"{name}.weight": every[f"{name}.weight"]}
    numbers = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size([D, F]))
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    theirs = dequantize(numbers, stored[f"{name}.weight_scale"].float(), args=args)
    assert torch.equal(into[f"{name}.weight"], theirs.float())


@pytest.mark.parametrize("kind", ["nvfp4_packed", "mxfp4_packed", "fp8_channel"])
def test_formulas_are_those_of_compressed_tensors(kind: str) -> None:
    """The values above, which the tests compare with, are what its own code computes in float32."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored, values = FORMATS[kind].store(3, 64, 128)
    about = next(iter(FORMATS[kind].about["config_groups"].values()))["weights"]
    if kind == "fp8_channel":
        numbers = stored[".weight"].float()
    else:
        numbers = unpack_fp4_from_uint8(stored[".weight_packed"], 64, 128, dtype=torch.float32)
    grid = power(stored[".weight_scale"]) if kind == "mxfp4_packed" else stored[".weight_scale"].float()
    second = stored.get(".weight_global_scale")
    theirs = dequantize(numbers, grid, global_scale=second, args=QuantizationArgs(**about))
    assert torch.equal(theirs.float(), values)


def test_per_expert_scales_of_stacked_weights(tmp_path: Path) -> None:
    state, values = rest(E, D), State()
    for name, shape in {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}.items():
        weight, grid = codes(len(name), *shape).view(FP8), scales(3, E, 1, 1)
        state |= {f"{EXPERTS}.{name}": weight, f"{EXPERTS}.{name}_scale_inv": grid}
        state[f"{EXPERTS}.{name}_activation_scale"] = torch.ones(E, 1, 1)
        values[f"{EXPERTS}.{name}"] = weight.float() * grid
    folder = write(tmp_path / "a", state, config({"quant_method": "fp8"}, E, F, D))
    assert restow.open(folder).problems == ()
    into = {name: torch.empty_like(value) for name, value in values.items()}
    restow.load(folder, into, part=True)
    for name, value in values.items():
        assert torch.equal(into[name], value)


@pytest.mark.parametrize("about", [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": ["mxfp8"]},
    {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group"),
    compressed("marlin-24", num_bits=4, type="int", strategy="channel"),
], ids=["gptq", "a list", "awq", "actorder", "marlin"])  # fmt: skip
def test_unknown_formats_are_refused_by_name(tmp_path: Path, about: dict[str, Any]) -> None:
    folder, _, _ = build(tmp_path / "a", FORMATS["int4_packed"]._replace(about=about))
    fatal = [problem.error for problem in restow.open(folder).problems if problem.fatal]
    assert any(isinstance(error, errors.QuantizationError) for error in fatal)
    with pytest.raises(errors.RestowError):
        restow.convert(folder, tmp_path / "g", to="grouped")
    assert not (tmp_path / "g").exists()
