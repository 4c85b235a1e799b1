"""bitsandbytes' 4 bits, per expert and stacked: against published values, and against the package where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import restow
from coded import State, config, grouped, rest, write
from restow import Layout, errors
from restow.plans import Plan

E, F, D = 3, 128, 192
EXPERTS = "model.layers.0.mlp.experts"
BROKEN = f"{EXPERTS}.1.up_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
TABLES = {"nf4": NF4, "fp4": FP4}


def about(kind: str = "nf4", **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"], **more,
    }  # fmt: skip


def four(kind: str, seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bytes [.., n/2], absmax [.., n/64], values [.., rows, columns] in float32) of matrices; high half first."""
    make = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    size = rows * columns
    codes = torch.randint(0, 256, (*stack, size // 2), dtype=torch.uint8, generator=make)
    absmax = torch.rand(*stack, size // 64, generator=make) + 0.01
    halves = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
    values = TABLES[kind][halves.long()] * absmax.repeat_interleave(64, -1)
    return codes, absmax, values.view(shape)


def linear(kind: str, seed: int, name: str, rows: int, columns: int) -> tuple[State, torch.Tensor]:
    """A weight as `Linear4bit` stores it."""
    codes, absmax, values = four(kind, seed, rows, columns)
    note = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    return {
        name: codes[:, None], f"{name}.absmax": absmax, f"{name}.quant_map": TABLES[kind].clone(),
        f"{name}.quant_state.bitsandbytes__{kind}": text,
    }, values  # fmt: skip


def split(folder: Path, kind: str = "nf4", f: int = F, d: int = D) -> tuple[Path, State, State]:
    """(folder, stored, values): one `Linear4bit` per expert and projection, and one outside the experts."""
    stored, values = rest(E, d), State()
    shapes = {
        f"{EXPERTS}.{e}.{k}_proj.weight": (d, f) if k == "down" else (f, d)
        for e in range(E)
        for k in ("gate", "up", "down")
    }
    for seed, (name, shape) in enumerate({**shapes, Q_PROJ: (96, d)}.items()):
        parts, values[name] = linear(kind, seed, name, *shape)
        stored |= parts
    return write(folder, stored, config(about(kind), E, f, d)), stored, values


def stacked(folder: Path, kind: str = "nf4") -> tuple[Path, State, State]:
    """(folder, stored, values): experts as `Experts4bit` keeps them."""
    stored, values = rest(E, D), State()
    for seed, (name, shape) in enumerate({"gate_up": (2 * F, D), "down": (D, F)}.items()):
        codes, absmax, value = four(kind, seed, E, *shape)
        stored |= {f"{EXPERTS}.{name}_proj": codes, f"{EXPERTS}.{name}_absmax": absmax}
        values[f"{EXPERTS}.{name}_proj"] = value
    return write(folder, stored, config(about(kind), E, F, D)), stored, values


def wanted(values: State) -> State:
    """Values in the grouped layout."""
    if f"{EXPERTS}.down_proj" in values:
        return {
            f"{EXPERTS}.gate_and_up_projs": values[f"{EXPERTS}.gate_up_proj"].transpose(1, 2).contiguous(),
            f"{EXPERTS}.down_projs": values[f"{EXPERTS}.down_proj"].transpose(1, 2).contiguous(),
        }
    return {**grouped(values, E), Q_PROJ: values[Q_PROJ]}


def double(folder: Path, kind: str = "nf4", **note: Any) -> tuple[Path, State, State]:
    """As `split`, with scales that are bytes: a place in a table, times a scale per 256, plus an offset.

    `note` is what the note of one weight says instead.
    """
    stored, values = rest(E, D), State()
    shapes = {
        f"{EXPERTS}.{e}.{k}_proj.weight": (D, F) if k == "down" else (F, D)
        for e in range(E)
        for k in ("gate", "up", "down")
    }
    for seed, (name, shape) in enumerate({**shapes, Q_PROJ: (96, D)}.items()):
        parts, _ = linear(kind, seed, name, *shape)
        make = torch.Generator().manual_seed(seed)
        places = torch.randint(0, 256, (shape[0] * shape[1] // 64,), dtype=torch.uint8, generator=make)
        table = torch.rand(256, generator=make) * 2 - 1
        nested = torch.rand(-(-len(places) // 256), generator=make) + 0.01
        # Notes have lengths of their own: so has the text of a number.
        offset = float(torch.tensor(0.1 + seed / (1 if seed % 2 else 7)))
        scales = table[places.long()] * nested.repeat_interleave(256)[: len(places)] + torch.tensor(offset)
        text = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": shape, "nested_blocksize": 256,
                "nested_dtype": "float32", "nested_offset": offset}  # fmt: skip
        text |= note if name == BROKEN else {}
        parts |= {
            f"{name}.absmax": places, f"{name}.nested_quant_map": table, f"{name}.nested_absmax": nested,
            f"{name}.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8),
        }  # fmt: skip
        stored |= parts
        halves = torch.stack([parts[name] >> 4, parts[name] & 15], -1).flatten().long()
        values[name] = (TABLES[kind][halves] * scales.repeat_interleave(64)).view(shape)
    about_it = about(kind, bnb_4bit_use_double_quant=True)
    return write(folder, stored, config(about_it, E, F, D)), stored, values


FORMS = {"split": split, "stacked": stacked, "double": double}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("form", FORMS)
def test_decodes_by_the_published_values(tmp_path: Path, kind: str, form: str) -> None:
    folder, _, values = FORMS[form](tmp_path / "a", kind)
    assert restow.open(folder).problems == ()
    want = {**wanted(values), **rest(E, D)}
    for dtype in (torch.float32, torch.bfloat16):
        into = {name: torch.full_like(value, 7, dtype=dtype) for name, value in want.items()}
        made = restow.plan(folder, into)
        report = restow.load(folder, into)
        assert report.bytes_read == made.bytes
        for name, value in want.items():
            assert torch.equal(into[name], value.to(dtype)), name
    for axis, of in (("f", 3), ("d", 5), ("e", 2)):
        shard = restow.Shard(axis, 1, of)
        gate, down = (want[f"{EXPERTS}.{n}_projs"] for n in ("gate_and_up", "down"))
        start, count = shard.run(gate.unflatten(2, (2, F)).shape["edpf".index(axis)])
        cut = gate.unflatten(2, (2, F)).narrow("edpf".index(axis), start, count).flatten(2)
        parts = {
            f"{EXPERTS}.gate_and_up_projs": cut,
            f"{EXPERTS}.down_projs": down.narrow("efd".index(axis), start, count),
        }
        into = {name: torch.empty(part.shape) for name, part in parts.items()}
        restow.load(folder, into, shard=shard, part=True)
        assert all(torch.equal(into[name], part) for name, part in parts.items()), axis


@pytest.mark.parametrize("form", ["split", "stacked"])
def test_converts_verifies_and_is_kept(tmp_path: Path, form: str) -> None:
    folder, stored, _ = FORMS[form](tmp_path / "a")
    restow.convert(folder, tmp_path / "g", to="grouped")
    assert "quantization_config" not in json.loads((tmp_path / "g" / "config.json").read_text())
    assert restow.open(tmp_path / "g").problems == ()
    assert restow.verify(folder, tmp_path / "g").equal
    same = {"split": "split", "stacked": "fused"}[form]
    restow.convert(folder, tmp_path / "k", to=same, keep_quantized=True, experts=[2, 0])
    kept = load_file(tmp_path / "k" / "model.safetensors")
    if form == "split":
        for now, before in enumerate([2, 0]):
            for end in ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"):
                name = f"{EXPERTS}.{{}}.up_proj.weight{end}"
                assert torch.equal(kept[name.format(now)], stored[name.format(before)])
    else:
        assert torch.equal(kept[f"{EXPERTS}.down_absmax"], stored[f"{EXPERTS}.down_absmax"][[2, 0]])
    assert torch.equal(kept.get(Q_PROJ, torch.zeros(1)), stored.get(Q_PROJ, torch.zeros(1)))
    assert restow.open(tmp_path / "k").problems == ()
    other = {"split": "fused", "stacked": "split"}[form]
    with pytest.raises(errors.RestowError):
        restow.convert(folder, tmp_path / "o", to=other, keep_quantized=True)
    assert not (tmp_path / "o").exists()


def test_double_quantised_is_carried_note_by_note(tmp_path: Path) -> None:
    """Notes differ in length from expert to expert; each goes with its weight."""
    folder, stored, _ = double(tmp_path / "a")
    restow.convert(folder, tmp_path / "g", to="grouped")
    assert restow.open(tmp_path / "g").problems == ()
    assert restow.verify(folder, tmp_path / "g").equal
    notes = {name: t for name, t in stored.items() if name.startswith(EXPERTS) and "quant_state" in name}
    assert len({t.numel() for name, t in notes.items() if "down" not in name}) > 1
    chosen = [2, 0, 2]
    restow.convert(folder, tmp_path / "k", to="split", experts=chosen, keep_quantized=True)
    kept = load_file(tmp_path / "k" / "model.safetensors")
    for name, tensor in kept.items():
        first, _, rest_of_it = name.removeprefix(f"{EXPERTS}.").partition(".")
        before = f"{EXPERTS}.{chosen[int(first)]}.{rest_of_it}" if name.startswith(EXPERTS) else name
        if before in stored and "gate.weight" not in name:
            assert torch.equal(tensor, stored[before]), name
    assert sum(name.startswith(EXPERTS) for name in kept) == sum(name.startswith(EXPERTS) for name in stored)
    restow.convert(folder, tmp_path / "all", to=Layout.parse("""
        in    linear.{p:0|1}.{e}.weight   f d
        out   linear.2.{e}.weight         d f
    """), keep_quantized=True)  # fmt: skip
    assert restow.verify(folder, tmp_path / "all").equal
    restow.convert(tmp_path / "all", tmp_path / "back", to="source")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    into = {name: torch.full_like(tensor, 7) for name, tensor in stored.items()}
    made = restow.plan(folder, into)
    assert Plan.from_json(made.to_json()) == made
    assert restow.load(folder, into).bytes_read == made.bytes == sum(t.nbytes for t in stored.values())
    assert all(torch.equal(into[name], tensor) for name, tensor in stored.items())


def test_double_quantised_is_not_carried_elsewhere(tmp_path: Path) -> None:
    folder, stored, _ = double(tmp_path / "a")
    with pytest.raises(errors.QuantizationError) as caught:
        restow.convert(folder, tmp_path / "k", to="fused", keep_quantized=True)
    assert str(caught.value) == (
        f"expected a tensor for each of the nf4_double weights of {EXPERTS}, to carry them along: each has a note of its own, "
        "found 'in.scale4 gate_up_proj.quant_state.bitsandbytes__nf4 e sin'\n"
        "  try       take a layout such as split, or decode them: without keep_quantized any layout can hold them"
    )
    assert not (tmp_path / "k").exists()
    into = {name: torch.empty_like(tensor) for name, tensor in stored.items()}
    note = f"{BROKEN}.quant_state.bitsandbytes__nf4"
    into[note] = torch.empty(99, dtype=torch.uint8)
    with pytest.raises(errors.QuantizationError) as caught:
        restow.load(folder, into)
    assert str(caught.value) == (
        f"expected {stored[note].numel()} bytes in {note}, as {note} of the source has, found [99]\n"
        f"  tensor    {note}\n"
        "  try       make the destination of this source: notes have lengths of their own"
    )


def test_stacked_experts_beside_double_quantised_linears(tmp_path: Path) -> None:
    """`Experts4bit` has plain scales whatever the config says of the linear layers."""
    folder, stored, values = stacked(tmp_path / "a")
    _, others, others_values = double(tmp_path / "b")
    stored |= {name: t for name, t in others.items() if name.startswith(Q_PROJ)}
    values[Q_PROJ] = others_values[Q_PROJ]
    about_it = config(about(bnb_4bit_use_double_quant=True), E, F, D)
    write(folder, stored, about_it)
    assert restow.open(folder).problems == ()
    into = {n: torch.full(v.shape, 7.0) for n, v in {**wanted(values), Q_PROJ: values[Q_PROJ]}.items()}
    restow.load(folder, into, part=True)
    assert all(torch.equal(into[name], value) for name, value in wanted(values).items())
    assert torch.equal(into[Q_PROJ], values[Q_PROJ])
    restow.convert(folder, tmp_path / "k", to="fused", keep_quantized=True, experts=[1, 0])
    assert restow.open(tmp_path / "k").problems == ()
    stored[f"{EXPERTS}.down_absmax"] = torch.zeros(E, F * D // 64, dtype=torch.uint8)
    write(folder, stored, about_it)
    (error,) = [p.error for p in restow.open(folder).problems if p.fatal]
    assert type(error) is errors.QuantizationError
    assert str(error) == (
        "expected codes of nf4_experts in U8, scales in F32, as quant_method bitsandbytes is read, found U8\n"
        f"  tensors   {EXPERTS}.down_absmax U8\n"
        f"  in        {folder}"
    )


def test_broken_notes_of_double_quantisation(tmp_path: Path) -> None:
    for number, (note, text) in enumerate((
        ({"nested_offset": None}, "expected JSON with nested_offset in {0}, found TypeError"),
        ({"nested_offset": 1e999}, "expected a finite nested_offset and nested_blocksize 256 in {0}, found inf and 256"),
        ({"nested_blocksize": 128, "nested_offset": 0.5}, "expected a finite nested_offset and nested_blocksize 256 in {0}, found 0.5 and 128"),
    )):  # fmt: skip
        folder, _, values = double(tmp_path / f"{number}", **note)
        with pytest.raises(errors.QuantizationError) as caught:
            restow.load(folder, {n: torch.empty_like(value) for n, value in values.items()}, part=True)
        assert text.format(f"{BROKEN}.quant_state.bitsandbytes__nf4") in str(caught.value)
    folder, stored, _ = double(tmp_path / "lost")
    del stored[f"{BROKEN}.nested_absmax"]
    write(folder, stored, config(about(bnb_4bit_use_double_quant=True), E, F, D))
    (error,) = [p.error for p in restow.open(folder).problems if p.fatal]
    assert type(error) is errors.QuantizationError
    assert f"{BROKEN}.nested_absmax" in str(error)


def test_what_is_refused(tmp_path: Path) -> None:
    def fatal(folder: Path, **more: Any) -> list[str]:
        path = folder / "config.json"
        body = json.loads(path.read_text())
        path.write_text(json.dumps({**body, "quantization_config": about(**more)}))
        return [str(p.error) for p in restow.open(folder).problems if p.fatal]

    folder, *_ = split(tmp_path / "a")
    expected = "expected bitsandbytes weights in 4 bits (nf4 or fp4) in uint8, their scales in float32 or double-quantised"
    for more, found in (
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant 'yes'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit False"),
        ({"kind": "af4"}, "bnb_4bit_quant_type 'af4'"),
    ):
        assert f"{expected}, found {found}" in fatal(folder, **more)[0]
    assert fatal(folder) == []
    odd, *_ = split(tmp_path / "odd", d=160)
    with pytest.raises(errors.QuantizationError, match="rows of whole blocks of 64 that share a nf4 scale"):
        restow.convert(odd, tmp_path / "x", to="grouped")


# Encoding.


def plain(folder: Path) -> tuple[Path, State]:
    """A checkpoint of bfloat16."""
    state = rest(E, D)
    for e in range(E):
        for n, k in enumerate(("gate", "up", "down")):
            make = torch.Generator().manual_seed(3 * e + n)
            weight = torch.randn((D, F) if k == "down" else (F, D), generator=make)
            state[f"{EXPERTS}.{e}.{k}_proj.weight"] = weight.to(torch.bfloat16)
    body = config({}, E, F, D)
    del body["quantization_config"]
    return write(folder, state, body), state


def nearest(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    """Codes are the nearest of the published values times the largest of each 64."""
    blocks = weight.float().reshape(-1, 64)
    assert torch.equal(absmax.reshape(-1), blocks.abs().amax(1))
    halves = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], -1).reshape(-1, 64).long()
    scaled = blocks.double() / absmax.reshape(-1, 1).double()
    off = (NF4.double()[halves] - scaled).abs()
    best = (NF4.double() - scaled[..., None]).abs().amin(-1)
    assert float((off - best).max()) < 1e-6


def test_nf4_is_the_nearest_published_value(tmp_path: Path) -> None:
    folder, state = plain(tmp_path / "a")
    report = restow.convert(folder, tmp_path / "q", to="hf", quantize="nf4")
    assert restow.open(tmp_path / "q").problems == ()
    assert restow.verify(tmp_path / "q").equal
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for e in range(E):
        for k in ("gate", "up", "down"):
            name = f"{EXPERTS}.{e}.{k}_proj.weight"
            assert tuple(stored[name].shape) == (F * D // 2, 1)
            nearest(state[name], stored[name], stored[f"{name}.absmax"])
            assert torch.equal(stored[f"{name}.quant_map"], NF4)
            note = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            shape = list(state[name].shape)
            assert note == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said.pop("llm_int8_skip_modules") == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"]
    assert said.items() <= about().items()
    assert set(report.narrowed.values()) == {"BF16 -> nf4"}


@pytest.mark.parametrize("to", ["split", "fused"])
def test_nf4_loads_saves_and_is_stacked(tmp_path: Path, to: str) -> None:
    """A destination in NF4, and a save in it, hold what a conversion writes, the notes too."""
    folder, state = plain(tmp_path / "a")
    restow.convert(folder, tmp_path / "q", to=to, quantize="nf4")
    assert restow.open(tmp_path / "q").problems == ()
    stored = load_file(tmp_path / "q" / "model.safetensors")
    if to == "fused":
        assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items() if ".experts." in n} == {
            f"{EXPERTS}.gate_up_proj": (torch.uint8, (E, F * D)),
            f"{EXPERTS}.gate_up_absmax": (torch.float32, (E, 2 * F * D // 64)),
            f"{EXPERTS}.down_proj": (torch.uint8, (E, F * D // 2)),
            f"{EXPERTS}.down_absmax": (torch.float32, (E, F * D // 64)),
        }
        for e in range(E):
            down = state[f"{EXPERTS}.{e}.down_proj.weight"]
            nearest(down, stored[f"{EXPERTS}.down_proj"][e], stored[f"{EXPERTS}.down_absmax"][e])
    into = {name: torch.ones_like(tensor) for name, tensor in stored.items()}
    report = restow.load(folder, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in stored.items())
    assert set(report.staged) == {name for name in stored if ".experts." in name}
    assert report.bytes_written == sum(t.nbytes for t in stored.values())
    restow.convert(folder, tmp_path / "g", to="grouped")
    body = json.loads((folder / "config.json").read_text())
    values = load_file(tmp_path / "g" / "model.safetensors")
    restow.save(values, tmp_path / "s", layout=to, quantize="nf4", config=body)
    saved = load_file(tmp_path / "s" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


def test_a_note_of_another_length_is_refused(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path / "a")
    restow.convert(folder, tmp_path / "q", to="split", quantize="nf4")
    into = load_file(tmp_path / "q" / "model.safetensors")
    for name in [name for name in into if name.endswith("__nf4")]:
        into[name] = torch.zeros(79, dtype=torch.uint8)
    name = f"{EXPERTS}.0.gate_proj.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(errors.QuantizationError) as caught:
        restow.load(folder, into)
    assert str(caught.value) == (
        f"expected 80 bytes in {name}: what goes with a weight of this shape, found 79\n  tensor    {name}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["split", "fused"])
def test_nf4_equals_bitsandbytes_own_quantizer(tmp_path: Path, to: str) -> None:
    """To the byte, names and notes included; and `Linear4bit` takes what was written."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Linear4bit, Params4bit

    folder, state = plain(tmp_path / "a")
    restow.convert(folder, tmp_path / "q", to=to, quantize="nf4")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for e in range(E):
        name = f"{EXPERTS}.{e}.down_proj.weight"
        codes, about_it = functional.quantize_4bit(state[name], blocksize=64, quant_type="nf4")
        if to == "fused":
            assert torch.equal(stored[f"{EXPERTS}.down_proj"][e], codes.reshape(-1))
            assert torch.equal(stored[f"{EXPERTS}.down_absmax"][e], about_it.absmax)
            continue
        theirs = {name: codes, **{f"{name}.{k}": t for k, t in about_it.as_dict(packed=True).items()}}
        for key, tensor in theirs.items():
            assert torch.equal(stored[key], tensor), key
        beside = {key: stored[key] for key in theirs if key != name}
        module = Linear4bit(F, D, bias=False, compute_dtype=torch.float32, device="meta")
        module.weight = Params4bit.from_prequantized(stored[name], beside, device="cpu", module=module)
        into = {n: torch.empty_like(t) for n, t in state.items()}
        restow.load(tmp_path / "q", into)
        weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, into[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("twice", [False, True])
def test_equals_bitsandbytes(tmp_path: Path, kind: str, twice: bool) -> None:
    """Its own quantiser made the files, its own dequantiser says what they mean."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored, values = rest(E, D), State()
    for e in range(E):
        for k in ("gate", "up", "down"):
            name = f"{EXPERTS}.{e}.{k}_proj.weight"
            weight = torch.randn((D, F) if k == "down" else (F, D)).to(torch.bfloat16)
            codes, about_it = functional.quantize_4bit(
                weight, blocksize=64, quant_type=kind, compress_statistics=twice
            )
            stored[name] = codes
            stored |= {f"{name}.{key}": t for key, t in about_it.as_dict(packed=True).items()}
            values[name] = functional.dequantize_4bit(codes, about_it)
    folder = write(tmp_path / "a", stored, config(about(kind, bnb_4bit_use_double_quant=twice), E, F, D))
    assert restow.open(folder).problems == ()
    into = {name: torch.empty_like(value) for name, value in values.items()}
    restow.load(folder, into, part=True)
    assert all(torch.equal(into[name], value) for name, value in values.items())
