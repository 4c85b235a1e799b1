"""Saving in codes: the files are those that a conversion of the saved values would have written, from any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import restow
from coded import write
from restow import errors
from restow.boxes import strides_of
from restow.boxing import coded_box
from restow.coding import Coding, Grid, Term
from save_ranks import ranks
from save_ranks import values as values_of
from test_encode import EXPERTS, E, plain_config, state

QUANTIZE = ("fp8", "mxfp8", "mxfp4")


def same(a: Path, b: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("held", ["split", "grouped", "stacked"])
def test_it_writes_what_a_conversion_writes(tmp_path: Path, quantize: str, held: str) -> None:
    """From every layout of the state; neither size is a multiple of 128."""
    f, d = 160, 192
    plain = write(tmp_path / "plain", state(E, f, d), plain_config(E, f, d))
    restow.convert(plain, tmp_path / "held", to=held)
    values = load_file(tmp_path / "held" / "model.safetensors")
    for to in ("split", "fused"):
        restow.convert(plain, tmp_path / f"want-{to}", to=to, quantize=quantize)
        about = plain_config(E, f, d)
        if (quantize, to, held) == ("fp8", "fused", "stacked"):  # gate and up share blocks, and come apart
            with pytest.raises(errors.QuantizationError) as caught:
                restow.save(values, tmp_path / to, layout=to, quantize=quantize, config=about)
            assert str(caught.value) == (
                f"expected parts of whole blocks of 128 along dim 1 of {EXPERTS}.gate_up_proj, which share a fp8 "
                "scale, found one from 0 to 160 of 320\n"
                f"  tensor    {EXPERTS}.gate_up_proj\n"
                "  try       save without quantize=, and encode the files: restow.convert(..., quantize=...)"
            )
            assert not (tmp_path / to).exists()
            continue
        if (quantize, to, held) == ("fp8", "fused", "split"):
            with pytest.raises(errors.QuantizationError):
                restow.save(values, tmp_path / to, layout=to, quantize=quantize, config=about)
            continue
        report = restow.save(values, tmp_path / to, layout=to, quantize=quantize, config=about)
        same(tmp_path / to, tmp_path / f"want-{to}")
        found, wanted = (json.loads((tmp_path / n / "config.json").read_text()) for n in (to, f"want-{to}"))
        assert found["quantization_config"] == wanted["quantization_config"]
        assert restow.open(tmp_path / to).problems == ()
        assert set(report.narrowed.values()) == {f"BF16 -> {quantize}"}


def test_hf_is_what_vendors_ship(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", state(E, 128, 128), plain_config(E, 128, 128))
    values = load_file(plain / "model.safetensors")
    restow.save(values, tmp_path / "a", quantize="fp8", config=plain_config(E, 128, 128))
    restow.convert(plain, tmp_path / "b", to="hf", quantize="fp8")
    same(tmp_path / "a", tmp_path / "b")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_by_distributed_checkpoint(tmp_path: Path, quantize: str) -> None:
    """Its writer, like a checkpoint in codes: the same files, what goes with the codes included."""
    plain = write(tmp_path / "plain", state(E, 192, 128), plain_config(E, 192, 128))
    restow.convert(plain, tmp_path / "grouped", to="grouped")
    restow.convert(plain, tmp_path / "want", to="split", quantize=quantize)
    values = load_file(tmp_path / "grouped" / "model.safetensors")
    dcp.save(values, storage_writer=restow.dcp.Writer(tmp_path / "out", like=tmp_path / "want"), no_dist=True)
    same(tmp_path / "out", tmp_path / "want")


def test_in_many_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restow.torch.write_coded.JOB", 1000)
    f, d = 320, 256
    plain = write(tmp_path / "plain", state(E, f, d), plain_config(E, f, d))
    values = load_file(plain / "model.safetensors")
    for quantize in QUANTIZE:
        restow.save(
            values, tmp_path / quantize, quantize=quantize, layout="split", config=plain_config(E, f, d)
        )
        restow.convert(plain, tmp_path / f"want-{quantize}", to="split", quantize=quantize)
        same(tmp_path / quantize, tmp_path / f"want-{quantize}")


def test_what_is_refused(tmp_path: Path) -> None:
    values = state(E, 128, 128)

    def refused(kind: type[errors.RestowError], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            restow.save(values, tmp_path / "x", quantize="fp8", **options)
        assert not (tmp_path / "x").exists()
        return str(caught.value)

    assert "found none" in refused(errors.ConfigError, family="qwen3_moe")
    assert "like= alone" in refused(errors.UsageError, like=tmp_path)
    assert "input axis last" in refused(
        errors.QuantizationError, layout="grouped", config=plain_config(E, 128, 128)
    )


def coding(shape: tuple[int, int], block: tuple[int, int], bits: int = 8) -> Coding:
    grid = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    terms = tuple(Term(i, 1, shape[i], block[i], i, 1) for i in range(2))
    return Coding(
        "fp8", "e4m3" if bits == 8 else "e2m1", bits, shape, (0, 0), (Grid("multiply", grid, terms),)
    )


@pytest.mark.parametrize(
    ("start", "size"), [((0, 0), (4, 6)), ((2, 3), (2, 3)), ((4, 6), (3, 2)), ((0, 3), (7, 5))]
)
def test_a_box_of_whole_blocks(start: tuple[int, int], size: tuple[int, int]) -> None:
    """Blocks of 2 x 3 in 7 x 8: the scales' places are those of the blocks, counted one by one."""
    at, steps = start[0] * 8 + start[1], (8, 1)
    box = coded_box(coding((7, 8), (2, 3)), "x", at, size, steps)
    counts = [-(-n // b) for n, b in zip(box.sizes, box.blocks, strict=True)]
    found = {
        box.scale_at + i * box.scale_steps[0] + j * box.scale_steps[1]
        for i in range(counts[0])
        for j in range(counts[1])
    }
    rows, columns = (range(s, s + n) for s, n in zip(start, size, strict=True))
    assert found == {r // 2 * 3 + c // 3 for r in rows for c in columns}
    assert box.steps == strides_of((7, 8))


@pytest.mark.parametrize(("at", "size", "steps"), [
    (8, (2, 3), (8, 1)),  # begins inside a block of rows
    (0, (3, 3), (8, 1)),  # ends inside one
    (1, (2, 3), (8, 1)),
    (0, (2, 4), (8, 1)),
    (0, (3,), (1,)),  # one row of two
    (0, (3, 3), (16, 1)),  # every second row
], ids=str)  # fmt: skip
def test_a_box_that_cuts_a_block(at: int, size: tuple[int, ...], steps: tuple[int, ...]) -> None:
    with pytest.raises(errors.QuantizationError, match="parts of whole blocks"):
        coded_box(coding((7, 8), (2, 3)), "x", at, size, steps)


def test_a_byte_of_two_codes_is_not_cut() -> None:
    four = coding((4, 8), (1, 8), 4)
    assert coded_box(four, "x", 8, (2, 8), (8, 1)).sizes == (2, 8)
    with pytest.raises(errors.QuantizationError):
        coded_box(coding((4, 8), (1, 1), 4), "x", 0, (4, 1), (8, 1))


def on_two_ranks(rank: int, folder: Path) -> tuple[int, str]:
    """EP on the experts, saved in codes; then with columns cut inside blocks; what this rank wrote, the refusal."""
    mesh = init_device_mesh("cpu", (2,))
    values = load_file(folder / "grouped" / "model.safetensors")

    def placed(dim: int) -> dict[str, torch.Tensor]:
        return {
            n: distribute_tensor(t, mesh, [Shard(dim) if ".experts." in n else Replicate()])
            for n, t in values.items()
        }

    about = plain_config(E, 192, 128)
    report = restow.save(placed(0), folder / "ep", quantize="fp8", config=about)
    try:
        restow.save(placed(1), folder / "cut", quantize="fp8", config=about)
    except errors.QuantizationError as error:
        return report.bytes_written, str(error).splitlines()[0]
    except errors.PeerFailedError as error:
        return report.bytes_written, str(error)
    return report.bytes_written, ""


def test_ranks_write_the_codes_of_their_own_experts(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", state(E, 192, 128), plain_config(E, 192, 128))
    restow.convert(plain, tmp_path / "grouped", to="grouped")
    restow.convert(plain, tmp_path / "want", to="hf", quantize="fp8")
    found = values_of(ranks(2, tmp_path, on_two_ranks, tmp_path))
    same(tmp_path / "ep", tmp_path / "want")
    stored = load_file(tmp_path / "want" / "model.safetensors")
    assert sum(own for own, _ in found) == sum(t.nbytes for t in stored.values())
    assert all(own for own, _ in found)
    assert all("parts of whole blocks of 128" in text for _, text in found)
    assert not (tmp_path / "cut").exists()
