"""Loading into codes: a destination with codes and scales, filled from values, is what a conversion would have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import restow
from coded import State, write
from restow import errors
from restow.boxes import held, whole
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.targets import Target
from restow.torch.packed import fill_packed, packed_side, put
from restow.torch.storage import Slot
from test_encode import EXPERTS, E, F, plain_config, state

D = 192  # with F of 160, neither is a multiple of 128
QUANTIZE = ("fp8", "mxfp8", "mxfp4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"), state(E, F, D), plain_config(E, F, D))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def poured(stored: State) -> State:
    """Tensors like these, filled with something else."""
    return {n: torch.full(t.shape, 1, dtype=torch.uint8).to(t.dtype) for n, t in stored.items()}


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("to", ["split", "fused", "stacked"])
def test_it_holds_what_a_conversion_writes(plain: Path, tmp_path: Path, quantize: str, to: str) -> None:
    restow.convert(plain, tmp_path / "q", to=to, quantize=quantize)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    into = poured(stored)
    made = restow.plan(plain, into)
    report = restow.load(plain, into)
    for name, tensor in stored.items():
        assert torch.equal(bytes_of(into[name]), bytes_of(tensor)), name
    assert (made.missing, made.unused) == ((), ())
    assert report.bytes_read == made.bytes == sum(t.nbytes for t in state(E, F, D).values())
    assert report.bytes_written == sum(t.nbytes for t in stored.values())
    coded = {name for name in stored if ".experts." in name}
    assert set(report.staged) == coded
    assert set(report.staged.values()) == {f"encoded in {quantize}"}
    assert set(report.in_place) == stored.keys() - coded
    assert set(report.narrowed.values()) == {f"BF16 -> {quantize}"}
    again = poured(stored)
    restow.load(load_file(plain / "model.safetensors"), again, family="qwen3_moe")  # from memory
    assert all(torch.equal(bytes_of(again[n]), bytes_of(t)) for n, t in stored.items())


def test_weights_outside_the_experts_and_scales_of_powers(plain: Path) -> None:
    """A destination as DeepSeek's own: attention in codes too, scales in float8_e8m0fnu under `.scale`."""
    name = "model.layers.0.self_attn.o_proj"
    stored = state(E, F, D)
    into: State = {}
    for n, t in stored.items():
        into[n] = torch.empty_like(t)
        if ".experts." in n or n == f"{name}.weight":
            into[n] = torch.zeros(t.shape, dtype=torch.float8_e4m3fn)
            grid = [-(-k // 128) for k in t.shape]
            into[n.replace(".weight", ".scale")] = torch.zeros(grid, dtype=torch.uint8).view(
                torch.float8_e8m0fnu
            )
    report = restow.load(plain, into)
    assert f"{name}.weight" in report.staged
    value = stored[f"{name}.weight"].float()
    scale = into[f"{name}.scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    decoded = into[f"{name}.weight"].float() * scale[: value.shape[0], : value.shape[1]]
    assert float((decoded - value).abs().max()) <= float(value.abs().max()) / 16


def test_codes_of_the_same_codec_are_carried(plain: Path, tmp_path: Path) -> None:
    """Not decoded and encoded again: a source's own codes, which encoding would not make."""
    restow.convert(plain, tmp_path / "q", to="split", quantize="fp8")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    into = poured(stored)
    report = restow.load(tmp_path / "q", into)
    assert report.staged == {}
    assert all(torch.equal(bytes_of(into[n]), bytes_of(t)) for n, t in stored.items())


def test_from_one_codec_into_another(plain: Path, tmp_path: Path) -> None:
    restow.convert(plain, tmp_path / "a", to="split", quantize="fp8")
    restow.convert(tmp_path / "a", tmp_path / "b", to="split", quantize="mxfp8")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    into = poured(stored)
    report = restow.load(tmp_path / "a", into)
    assert all(torch.equal(bytes_of(into[n]), bytes_of(t)) for n, t in stored.items())
    assert set(report.narrowed.values()) == {"fp8 -> mxfp8"}


Runs = tuple[tuple[tuple[int, int], ...], ...]


@pytest.mark.parametrize(("codes", "scales"), [
    ((((1, 2),), ((0, 320),), ((0, 192),)), (((1, 2),), ((0, 3),), ((0, 2),))),
    ((((0, 1), (2, 1)), ((100, 60), (200, 120)), ((0, 192),)), (((0, 1), (2, 1)), ((0, 1), (2, 1)), ((0, 2),))),
    ((((0, 3),), ((0, 320),), ((64, 65),)), (((0, 3),), ((0, 3),), ((1, 1),))),
    ((((0, 3),), ((0, 0),), ((0, 192),)), (((2, 1),), ((2, 1),), ((1, 1),))),
], ids=["experts", "rows of two runs", "columns", "a scale without its codes"])  # fmt: skip
def test_any_placement(plain: Path, tmp_path: Path, codes: Runs, scales: Runs) -> None:
    """Parts as DTensors give them, which cut blocks: codes and scales are those of the whole."""
    restow.convert(plain, tmp_path / "q", to="fused", quantize="fp8")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    name = f"{EXPERTS}.gate_up_proj"
    slots = {}
    for n, t in stored.items():
        runs = {name: codes, f"{name}_scale_inv": scales}.get(n, whole(t.shape))
        target = Target(
            n,
            tuple(t.shape),
            {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}.get(t.dtype, "BF16"),
            runs,
        )
        slots[n] = Slot(target, torch.zeros(held(runs), dtype=t.dtype), False)
    opened = open_checkpoint(plain)
    side = packed_side(opened, slots, Wish())
    assert side is not None
    fill_packed(side, dict(side.prepared.targets), slots, memory=None, threads=2)
    for n in (name, f"{name}_scale_inv", f"{EXPERTS}.down_proj"):
        picked = stored[n].view(torch.uint8) if n == name else stored[n]
        for dim, runs in enumerate(slots[n].target.runs):
            picked = picked.index_select(dim, torch.cat([torch.arange(a, a + k) for a, k in runs]))
        assert torch.equal(bytes_of(slots[n].local), bytes_of(picked)), n


def test_large_weights_come_in_bands(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restow.convert(plain, tmp_path / "q", to="fused", quantize="fp8")
    monkeypatch.setattr("restow.torch.encode.BAND", 128 * 50)
    monkeypatch.setattr("restow.torch.encoded.CHUNK", 128 * 192)
    monkeypatch.setattr("restow.torch.packed.CHUNK", 128 * 192)
    restow.convert(plain, tmp_path / "b", to="fused", quantize="fp8")
    stored, bands = (load_file(tmp_path / n / "model.safetensors") for n in "qb")
    into = poured(stored)
    restow.load(plain, into)
    for n, t in stored.items():
        assert torch.equal(bytes_of(bands[n]), bytes_of(t)), n
        assert torch.equal(bytes_of(into[n]), bytes_of(t)), n


def test_what_is_refused(plain: Path, tmp_path: Path) -> None:
    restow.convert(plain, tmp_path / "q", to="stacked", quantize="fp8")
    stored = load_file(tmp_path / "q" / "model.safetensors")

    def refused(kind: type[errors.RestowError], into: State, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            restow.load(plain, into, **options)
        return str(caught.value)

    assert refused(errors.UsageError, poured(stored), check=True) == (
        "expected check=True with a destination of values, found one in codes"
    )
    half = {n: t.to(torch.bfloat16) if n.endswith("_scale_inv") else t for n, t in poured(stored).items()}
    assert refused(errors.QuantizationError, half) == (
        f"expected scales in F32, F8_E8M0, U8 to encode with, found BF16 of {EXPERTS}.w1_scale_inv\n"
        f"  tensor    {EXPERTS}.w1\n"
        "  try       encode with the tool that reads this format, or into one of fp8, mxfp4, mxfp8, nf4"
    )
    lost = {n: t for n, t in poured(stored).items() if n != f"{EXPERTS}.w2_scale_inv"}
    refused(errors.RestowError, lost)


def test_put_writes_what_both_have() -> None:
    target = Target("x", (6, 4), "F32", (((1, 2), (5, 1)), ((0, 4),)))
    slot = Slot(target, torch.zeros(3, 4), False)
    values = torch.arange(16.0).view(4, 4)  # rows 2 to 5
    assert put(slot, (((2, 4),), ((0, 4),)), values) == 32
    assert slot.local.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [12, 13, 14, 15]]
