"""Values into codes and scales: against transformers' quantiser, by properties, and every way in which it is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import restow
import tiny
from coded import E2M1, State, config, expand, nibbles, rest, write
from faults import Faults, forked
from restow import errors
from restow.cli import app
from restow.elements import ELEMENTS
from restow.torch.encode import encode

E, F, D = 3, 160, 224  # neither is a multiple of 128
EXPERTS = "model.layers.0.mlp.experts"
QUANTIZE = ("fp8", "mxfp8", "mxfp4")


def random(seed: int, *shape: int) -> torch.Tensor:
    """bfloat16 values over many powers of two, so that blocks differ."""
    make = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-12, 4, shape, generator=make).float())
    return (torch.randn(shape, generator=make) * size).to(torch.bfloat16)


def state(e: int = E, f: int = F, d: int = D) -> State:
    found = rest(e, d)
    for i in range(e):
        for n, k in enumerate(("gate", "up", "down")):
            found[f"{EXPERTS}.{i}.{k}_proj.weight"] = random(3 * i + n, *((d, f) if k == "down" else (f, d)))
    found["model.layers.0.self_attn.o_proj.weight"] = random(99, d, 128)
    return found


def plain_config(e: int = E, f: int = F, d: int = D) -> dict[str, Any]:
    about = config({}, e, f, d)
    del about["quantization_config"]
    return about


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"), state(), plain_config())


# One tensor.


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_equals_transformers_quantizer(scale_fmt: str) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    about = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    values = random(1, 256, 384)
    values[128:, :128] = 0
    theirs = finegrained.Fp8Quantize(SimpleNamespace(quantization_config=about))._quantize_one(
        "x.weight", values
    )
    made = encode(values.float(), (128, 128), "e4m3", "F32" if scale_fmt == "float" else "F8_E8M0")
    assert torch.equal(made.codes, theirs["x.weight"].view(torch.uint8).reshape(-1))
    found, wanted = made.scales.float(), theirs["x.weight_scale_inv"].float()
    assert torch.equal(found[1, 0], torch.tensor(1.0))
    # Theirs is 1 / (448 / largest), ours largest / 448: a rounding less.
    assert bool(((found - wanted).abs() <= wanted * 2**-23).all())


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_code_is_the_nearest_value(element: str) -> None:
    """Searched among all 16, in float64; the block's largest value is the element's, so that the scale is 1."""
    values = torch.tensor(ELEMENTS[element].values, dtype=torch.float64)
    most = float(values.abs().max())
    make = torch.Generator().manual_seed(2)
    x = (torch.rand(64, 32, generator=make, dtype=torch.float64) * 2 - 1) * float(values.max())
    x = x.float().double()
    x[:, 0] = float(values.max())
    made = encode(x.float(), (1, 32), element, "F32")
    assert torch.equal(made.scales, torch.ones(64, 1))
    codes = nibbles(made.codes.view(64, 16)).long()
    if ELEMENTS[element].high:
        codes = codes.view(64, 16, 2).flip(2).reshape(64, 32)
    apart = (values[codes] - x).abs()
    nearest = (values - x[..., None]).abs().amin(-1)
    assert float((apart - nearest).max()) <= most * 2**-24  # a bound is a float32


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    block = torch.cat([torch.tensor([6.0]), ties, -ties, torch.zeros(17)])[None]
    made = encode(block, (1, 32), "e2m1", "U8")
    assert made.scales.tolist() == [[127]]
    found = E2M1[nibbles(made.codes.view(1, 16)).long()]
    assert found[0, 1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert found[0, 8:15].tolist() == [0, -1, -1, -2, -2, -4, -4]


@pytest.mark.parametrize(("element", "most"), [("e2m1", 6.0), ("e4m3", 448.0)])
def test_exponents_are_the_least_that_hold_a_block(element: str, most: float) -> None:
    sizes = torch.tensor([most, most * 1.0001, most * 2, most / 2, most * 2.0**-100, 1e-44, 3e38])
    blocks = torch.zeros(len(sizes), 32)
    blocks[:, 5] = sizes
    made = encode(blocks, (1, 32), element, "U8")
    powers = made.scales.reshape(-1).int() - 127
    assert powers[:5].tolist() == [0, 1, 1, -1, -100]
    scale = torch.exp2(powers.double())
    assert bool((sizes.double() <= most * scale).all())
    assert bool((powers[5:] >= -127).all())


def test_values_that_are_none_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        values = torch.ones(4, 64)
        values[2, 40] = bad
        with pytest.raises(errors.NonFiniteError) as caught:
            encode(values, (1, 32), "e2m1", "U8", name="x.weight")
        assert str(caught.value) == (
            "expected finite values to encode, found NaN or infinite ones\n"
            "  tensor    x.weight\n"
            "  try       a block with one has no scale: correct the source"
        )


# Whole folders.


def decoded_as(stored: State, name: str, quantize: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a weight of a converted folder means, by formulas of our own."""
    if quantize == "fp8":
        return stored[name].float() * expand(stored[f"{name}_scale_inv"], (128, 128), shape)
    if quantize == "mxfp8":
        power = torch.exp2(stored[f"{name}_scale_inv"].double() - 127)
        return (stored[name].double() * expand64(power)).float()
    power = torch.exp2(stored[f"{name}_scales"].double() - 127)
    return (E2M1[nibbles(stored[f"{name}_blocks"]).long()].double() * power[..., None]).reshape(shape).float()


def expand64(power: torch.Tensor) -> torch.Tensor:
    return power.repeat_interleave(32, -1)


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("to", ["split", "fused"])
def test_a_converted_folder_means_the_values(plain: Path, tmp_path: Path, quantize: str, to: str) -> None:
    report = restow.convert(plain, tmp_path / "q", to=to, quantize=quantize)
    opened = restow.open(tmp_path / "q")
    assert opened.problems == ()
    stored, before = load_file(tmp_path / "q" / "model.safetensors"), state()
    step = {"fp8": 2**-3, "mxfp8": 2**-3, "mxfp4": 2**-1}[quantize]  # between neighbours of an element
    if to == "fused":
        before[f"{EXPERTS}.gate_up_proj"] = torch.stack([
            torch.cat([before[f"{EXPERTS}.{i}.{k}_proj.weight"] for k in ("gate", "up")]) for i in range(E)
        ])  # fmt: skip
        before[f"{EXPERTS}.down_proj"] = torch.stack(
            [before[f"{EXPERTS}.{i}.down_proj.weight"] for i in range(E)]
        )
    names = [n for n in before if ".experts." in n and (n.endswith("_proj") == (to == "fused"))]
    for name in names:
        values = decoded_as(stored, name, quantize, tuple(before[name].shape))
        wide, high = (128, 128) if quantize == "fp8" else (1, 32)
        for r in range(0, before[name].shape[-2], wide):
            for c in range(0, before[name].shape[-1], high):
                one = before[name].float()[..., r : r + wide, c : c + high]
                off = (values[..., r : r + wide, c : c + high] - one).abs()
                room = one.abs().flatten(-2).amax(-1)[..., None, None] * step / 2
                assert bool((off <= room * 1.001).all()), name
    others = [n for n in before if ".experts." not in n]
    assert all(torch.equal(stored[n], before[n]) for n in others)
    assert {n for n in report.narrowed if "BF16 -> " in report.narrowed[n]} == set(report.narrowed)
    assert len(report.narrowed) == len(names)
    # Nothing is lost a second time: what the codes mean is encoded as it is.
    if quantize != "fp8":
        restow.convert(tmp_path / "q", tmp_path / "p", to="split")
        restow.convert(tmp_path / "p", tmp_path / "again", to=to, quantize=quantize)
        assert restow.verify(tmp_path / "q", tmp_path / "again").equal


def test_the_config_says_it_and_the_manifest_agrees(plain: Path, tmp_path: Path) -> None:
    restow.convert(plain, tmp_path / "q", to="hf", quantize="fp8", sha256=True, max_shard_bytes=100_000)
    about = json.loads((tmp_path / "q" / "config.json").read_text())
    assert about["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": [
            "lm_head",
            "model.embed_tokens",
            "model.layers.0.mlp.gate",
            "model.layers.0.self_attn.o_proj",
        ],
    }
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 3
    assert restow.verify(tmp_path / "q").equal
    scale = f"{EXPERTS}.1.up_proj.weight_scale_inv"
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    stored = load_file(tmp_path / "q" / index[scale])
    assert stored[scale].dtype == torch.float32
    assert tuple(stored[scale].shape) == (2, 2)


def test_experts_are_chosen_and_encoded(plain: Path, tmp_path: Path) -> None:
    restow.convert(plain, tmp_path / "two", to="split", experts=[2, 0], quantize="fp8")
    restow.convert(plain, tmp_path / "all", to="split", quantize="fp8")
    two, every = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "all"))
    for now, before in enumerate([2, 0]):
        for end in ("up_proj.weight", "down_proj.weight_scale_inv"):
            found, wanted = two[f"{EXPERTS}.{now}.{end}"], every[f"{EXPERTS}.{before}.{end}"]
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    assert restow.open(tmp_path / "two").problems == ()


def test_from_one_codec_into_another(plain: Path, tmp_path: Path) -> None:
    """Decoded in float32 in between, not in the config's dtype."""
    restow.convert(plain, tmp_path / "a", to="split", quantize="fp8")
    restow.convert(tmp_path / "a", tmp_path / "b", to="fused", quantize="mxfp4")
    stored, codes = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert "quant_method" in json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    for i in range(E):
        name = f"{EXPERTS}.{i}.down_proj.weight"
        made = encode(decoded_as(stored, name, "fp8", (D, F)), (1, 32), "e2m1", "U8")
        assert torch.equal(codes[f"{EXPERTS}.down_proj_blocks"][i].reshape(-1), made.codes)


def test_what_cannot_be_encoded_is_refused(plain: Path, tmp_path: Path) -> None:
    def refused(kind: type[errors.RestowError], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            restow.convert(plain, tmp_path / "x", **{"to": "split", "quantize": "fp8", **options})
        assert not (tmp_path / "x").exists()
        return str(caught.value)

    assert refused(errors.UsageError, quantize="int3") == (
        "expected quantize as one of fp8, mxfp4, mxfp8, nf4, found 'int3'"
    )
    assert refused(errors.QuantizationError, to="grouped") == (
        "expected rows in and out with the input axis last, as fp8 scales run along it, "
        "found in gate_and_up_projs e d (p f); out down_projs e f d\n"
        "  try       take a layout such as split or fused"
    )
    assert "keep_quantized=True alone" in refused(errors.UsageError, keep_quantized=True)
    assert 'to="source" alone' in refused(errors.UsageError, to="source")


def test_an_encoded_folder_does_not_come_back(plain: Path, tmp_path: Path) -> None:
    restow.convert(plain, tmp_path / "q", to="split", quantize="mxfp8")
    with pytest.raises(errors.UsageError, match="values were encoded in mxfp8"):
        restow.convert(tmp_path / "q", tmp_path / "s", to="source")


def test_codes_without_padding(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", state(2, 48, 64), plain_config(2, 48, 64))
    with pytest.raises(errors.QuantizationError, match="without padding"):
        restow.convert(folder, tmp_path / "q", to="split", quantize="mxfp4")
    assert not (tmp_path / "q").exists()


# Loaded by transformers.


def saved(folder: Path, kind: str) -> tuple[Path, Any]:
    """A tiny model of transformers whose sizes are multiples of 128, saved; and its class."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "intermediate_size": 128,
    }  # fmt: skip
    name, more = {
        "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 128, "num_experts": 3}),
        "mixtral": ("Mixtral", {"num_local_experts": 3}),
        "gpt_oss": ("GptOss", {"num_local_experts": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        "qwen3_5_moe": ("Qwen3_5Moe", {
            "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 3,
        }),
    }[kind]  # fmt: skip
    text = "Text" if kind == "qwen3_5_moe" else ""
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}{text}Config")(**common, **more)
    ).to(torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(random(number, *parameter.shape) / 16)
    model.save_pretrained(folder)
    return folder, type(model)


@pytest.mark.parametrize(("kind", "quantize"), [
    ("qwen3_moe", "fp8"),
    ("gpt_oss", "mxfp4"),
    pytest.param("qwen3_moe", "mxfp8", marks=pytest.mark.slow),
    pytest.param("mixtral", "fp8", marks=pytest.mark.slow),
    pytest.param("mixtral", "mxfp8", marks=pytest.mark.slow),
    pytest.param("qwen3_5_moe", "fp8", marks=pytest.mark.slow),
])  # fmt: skip
def test_transformers_loads_it(tmp_path: Path, kind: str, quantize: str) -> None:
    """Its model, whose experts it decodes on the CPU, holds to the bit what we decode; and that is near the source."""
    folder, model = saved(tmp_path / "a", kind)
    restow.convert(folder, tmp_path / "q", to="hf", quantize=quantize)
    theirs = model.from_pretrained(tmp_path / "q", dtype=torch.bfloat16).state_dict()
    ours = {name: torch.full_like(tensor, 7) for name, tensor in theirs.items()}
    restow.load(tmp_path / "q", ours)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    before = {name: torch.empty_like(tensor) for name, tensor in theirs.items()}
    restow.load(folder, before)
    changed = {name for name, tensor in theirs.items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in theirs if ".experts." in name and "bias" not in name}
    for name in changed:
        assert float((before[name] - theirs[name]).abs().max()) <= float(before[name].abs().max()) / 6


def test_resumed_or_not_it_is_the_same(plain: Path, tmp_path: Path) -> None:
    """Files that a killed run has finished are taken over, whether they hold the codes or the scales."""
    options: dict[str, Any] = {"to": "split", "quantize": "fp8", "max_shard_bytes": 60_000, "threads": 1}
    restow.convert(plain, tmp_path / "a", **options)
    calls = forked(lambda: traced(plain, tmp_path / "b", 0, options)).value
    for at in (len(calls) * 2 // 3, len(calls) * 3 // 4):  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        assert forked(lambda at=at: traced(plain, tmp_path / "b", at, options)).signal
        report = restow.convert(plain, tmp_path / "b", **options)
        assert [note for note in report.notes if "continued" in note]
        for file in (tmp_path / "a").glob("*.safetensors"):
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def traced(source: Path, target: Path, at: int, options: dict[str, Any]) -> object:
    """A conversion that dies before its file call number `at`, if that is not 0; its calls."""
    faults = Faults(at, "die before")
    restow.convert(source, target, **options)
    return faults.calls


def test_on_the_command_line(plain: Path, tmp_path: Path) -> None:
    def run(*words: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(app, [str(word) for word in words])
        return done.exit_code, done.stdout + done.stderr

    code, text = run("convert", plain, tmp_path / "q", "--to", "hf", "--quantize", "mxfp8")
    assert code == 0
    assert f"narrowed 9 tensors, such as {EXPERTS}.0.gate_proj.weight: BF16 -> mxfp8" in text
    restow.convert(plain, tmp_path / "same", to="hf", quantize="mxfp8")
    assert restow.verify(tmp_path / "q", tmp_path / "same").equal
    code, text = run("convert", plain, tmp_path / "x", "--to", "hf", "--quantize", "fp9")
    assert (code, "expected quantize as one of fp8, mxfp4, mxfp8, nf4, found 'fp9'" in text) == (2, True)


EVERY = list(tiny.EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("family_id", EVERY)
def test_every_family_is_encoded(family_id: str, tmp_path: Path) -> None:
    """As its vendor would ship it: found again without a finding, every experts module in codes, values near."""
    source = tiny.saved(family_id)
    restow.convert(source, tmp_path / "q", to="hf", quantize="fp8")
    opened = restow.open(tmp_path / "q")
    assert opened.problems == ()
    assert opened.modules
    assert {path for path, module in opened.modules.items() if module.codec is None} == set()
    assert restow.verify(tmp_path / "q").equal
    restow.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype=torch.float32)
    restow.convert(source, tmp_path / "plain", to="hf", dtype=torch.float32)
    back, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "plain"))
    assert back.keys() == plain.keys()
    experts = set(restow.open(tmp_path / "plain").expert_tensors)
    changed = {name for name in plain if not torch.equal(back[name], plain[name])}
    assert changed <= experts
    for name in changed:
        assert float((back[name] - plain[name]).abs().max()) <= float(plain[name].abs().max()) / 16
