"""The manifest's digests: fixed ones, a second implementation, the same leaves in every layout, and what they find."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from typer.testing import CliRunner

import restow
from moe import Model, write
from restow.cli import app
from restow.publish import Staging
from restow.torch import convert as converting
from restow.torch import digesting, read

MASK = 2**64 - 1
SMALL = Model(e=12, f=24, d=40, layers=2)
LAYOUTS = ["split", "fused", "grouped", "stacked"]

# A second implementation of XXH3-128 for inputs of more than 240 bytes, by the specification in xxHash's repository.
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a"
    "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f"
    "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
P1, P2, P3, P4, P5 = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5,
)  # fmt: skip
Q1, Q2, Q3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D


def word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def xxh3(data: bytes) -> str:
    assert len(data) > 240
    acc = [Q3, P1, P2, P3, P4, Q2, P5, Q1]

    def stripe(at: int, secret: int) -> None:
        for i in range(8):
            value = word(data, at + 8 * i)
            key = value ^ word(SECRET, secret + 8 * i)
            acc[i ^ 1] = (acc[i ^ 1] + value) & MASK
            acc[i] = (acc[i] + (key & 0xFFFFFFFF) * (key >> 32)) & MASK

    blocks = (len(data) - 1) // 1024
    for block in range(blocks):
        for n in range(16):
            stripe(1024 * block + 64 * n, 8 * n)
        for i in range(8):
            acc[i] = ((acc[i] ^ (acc[i] >> 47) ^ word(SECRET, 128 + 8 * i)) * Q1) & MASK
    for n in range((len(data) - 1 - 1024 * blocks) // 64):
        stripe(1024 * blocks + 64 * n, 8 * n)
    stripe(len(data) - 64, 121)

    def merged(secret: int, start: int) -> int:
        total = start
        for i in range(4):
            wide = (acc[2 * i] ^ word(SECRET, secret + 16 * i)) * (
                acc[2 * i + 1] ^ word(SECRET, secret + 16 * i + 8)
            )
            total += (wide & MASK) ^ (wide >> 64)
        total &= MASK
        total = ((total ^ (total >> 37)) * 0x165667919E3779F9) & MASK
        return total ^ (total >> 32)

    low = merged(11, (len(data) * P1) & MASK)
    high = merged(192 - 64 - 11, ~(len(data) * P2) & MASK)
    return f"{high:016x}{low:016x}"


def counted(size: int) -> bytes:
    return bytes(i % 251 for i in range(size))


# Published test vectors: bytes 0, 1, 2 ... modulo 251, by their number.
VECTORS = {
    0: "99aa06d3014798d86001c324468d497f",
    256: "96c36c85d00e5bc544f5d90dacde463a",
    1000: "18bf41bc8229e27733ef703fb2b20ed1",
    4096: "e12cd72144990fe57135ffa504f1bc71",
}


@pytest.mark.parametrize("size", VECTORS)
def test_vectors(size: int) -> None:
    data = counted(size)
    assert xxhash.xxh3_128(data).hexdigest() == VECTORS[size]
    if size > 240:
        assert xxh3(data) == VECTORS[size]


@pytest.mark.parametrize("size", [241, 1023, 1024, 1025, 1088, 2048, 5003])
def test_second_implementation(size: int) -> None:
    data = counted(size)
    assert xxh3(data) == xxhash.xxh3_128(data).hexdigest()


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "checkpoint.manifest.json").read_text())  # type: ignore[no-any-return]


def data(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def leaves(model: Model) -> dict[str, str]:
    """The digest of every leaf of the model, from its weights alone."""
    found = {}
    for layer in range(model.layers):
        pairs, downs = model.weight("in", layer), model.weight("out", layer)
        for e in range(model.e):
            at = f"model.layers.{layer}.experts.{e}"
            found |= {f"{at}.{p}": xxh3(data(pairs[e, i])) for i, p in enumerate(("gate", "up"))}
            found[f"{at}.down"] = xxh3(data(downs[e].t()))
    return found


@pytest.mark.parametrize(("chunk", "block"), [(1 << 27, 1000), (20_000, 1 << 20), (20_000, 1000)])
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", ["split", "grouped"])
def test_leaves_have_one_digest_in_every_layout(
    layout: str, to: str, chunk: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chunk`: stacks of experts are written in many slices, a leaf in one or (rows in order) in several; `block`:
    slices are hashed in many pieces, which end anywhere in a leaf."""
    monkeypatch.setattr(converting, "CHUNK", chunk)
    monkeypatch.setattr(digesting, "BLOCK", block)
    monkeypatch.setattr(read, "TOLD", block)
    SMALL.written(tmp_path / "a", layout)
    restow.convert(tmp_path / "a", tmp_path / "b", to=to)
    found = manifest(tmp_path / "b")
    assert found["leaves"] == leaves(SMALL)
    stored = {n: t for file in (tmp_path / "b").glob("*.safetensors") for n, t in load_file(file).items()}
    long = {n: t for n, t in stored.items() if t.nbytes > 240}
    assert {n: found["tensors"][n] for n in long} == {n: xxh3(data(t)) for n, t in long.items()}
    assert found["tensors"].keys() == stored.keys()


def test_a_leaf_that_is_cut_against_its_order_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        converting, "CHUNK", 2 * 40 * 48
    )  # less than an expert's pair, in the grouped layout turned
    SMALL.written(tmp_path / "a", "split")
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped")
    restow.convert(tmp_path / "a", tmp_path / "c", to="split")
    cut, whole = manifest(tmp_path / "b"), manifest(tmp_path / "c")
    assert not any(key.endswith("gate") for key in cut["leaves"])
    assert whole["leaves"] == leaves(SMALL)
    assert restow.verify(tmp_path / "b").equal


@pytest.mark.parametrize("to", ["split", "fused", "grouped"])
def test_what_was_written_wrongly_is_found(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is of the bytes that were handed to the file, so a byte that changes after that does not have it."""
    SMALL.written(tmp_path / "a", "split")
    real, wrong = Staging.write, []

    def written(self: Staging, name: str, offset: int, buffer: Any) -> int:
        out = bytearray(buffer)
        if len(out) == 1920 * (1 if to == "split" else 2 * SMALL.e) and not wrong:
            out[-1] ^= 1
            wrong.append(name)
        return real(self, name, offset, out)

    monkeypatch.setattr(Staging, "write", written)
    restow.convert(tmp_path / "a", tmp_path / "b", to=to)
    assert wrong
    report = restow.verify(tmp_path / "b")
    assert {d.kind for d in report.differences} == {"digest"}
    assert len({d.name for d in report.differences}) == 1


def test_values_are_told_alike_however_small_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SMALL.spelled("split")
    for layer, e, value in ((0, 3, float("nan")), (1, 5, float("-inf"))):
        state[f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"][::7, ::5] = value
    write(tmp_path / "a", state, SMALL.config)
    whole = restow.convert(tmp_path / "a", tmp_path / "b", to="fused").warnings
    monkeypatch.setattr(digesting, "BLOCK", 1000)
    pieces = restow.convert(tmp_path / "a", tmp_path / "c", to="fused").warnings
    assert pieces == whole
    assert "layers.1.mlp.experts.5.down_proj.weight" in whole[0]


@pytest.mark.parametrize("chunk", [1 << 27, 2000])
@pytest.mark.parametrize("to", LAYOUTS)
def test_an_expert_of_zeros_of_either_sign_is_told(
    to: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose last value alone is none of them is not."""
    monkeypatch.setattr(converting, "CHUNK", chunk)
    at = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    state = SMALL.spelled("split")
    for e, word in ((2, "up"), (4, "down"), (6, "down"), (8, "gate")):
        tensor = state[at.format(e, word)]
        tensor.copy_(torch.where(torch.arange(tensor.numel()).view(tensor.shape) % 3 == 0, -0.0, 0.0))
    state[at.format(6, "down")][-1, -1] = 1e-30
    state[at.format(8, "gate")][:] = -0.0
    write(tmp_path / "a", state, SMALL.config)
    (warning,) = restow.convert(tmp_path / "a", tmp_path / "b", to=to).warnings
    assert [at.format(e, word) in warning for e, word in ((2, "up"), (4, "down"), (8, "gate"))] == [True] * 3
    assert at.format(6, "down") not in warning
    assert "found 3 tensors without" in warning


def test_sha256_of_every_file(tmp_path: Path) -> None:
    SMALL.written(tmp_path / "a", "split")
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped", sha256=True, max_shard_bytes=40_000)
    files = manifest(tmp_path / "b")["files"]
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        entry = files[path.name]
        assert entry == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    assert restow.verify(tmp_path / "b").equal
    raw = bytearray(shards[1].read_bytes())
    raw[raw.index(b'"pt"') + 1] ^= 1  # in the header's metadata: no tensor's digest shows it
    shards[1].write_bytes(raw)
    report = restow.verify(tmp_path / "b")
    assert [(d.kind, d.name) for d in report.differences] == [("digest", shards[1].name)]
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "split", "--sha256"]
    )
    assert done.exit_code == 0
    entries = manifest(tmp_path / "c")["files"].items()
    assert all("sha256" in entry for name, entry in entries if name.endswith(".safetensors"))
    restow.convert(tmp_path / "a", tmp_path / "d", to="split")
    entries = manifest(tmp_path / "d")["files"].items()
    assert not any("sha256" in entry for name, entry in entries if name.endswith(".safetensors"))


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_damaged_leaf_of_a_stack_is_named(to: str, tmp_path: Path) -> None:
    SMALL.written(tmp_path / "a", "split")
    restow.convert(tmp_path / "a", tmp_path / "b", to=to)
    (path,) = (tmp_path / "b").glob("*.safetensors")
    pair = SMALL.weight("in", 1)
    pair[[3, 10]] = pair[[10, 3]]
    stored = load_file(path)
    layout = restow.families["qwen3_moe"].form(to)
    from moe import AT, AXES, spell

    stored |= {f"{AT.format(1)}.{n}": t for n, t in spell(layout.row("in"), AXES["in"], pair).items()}
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    out = bytearray(raw)
    for name, tensor in stored.items():
        begin, end = header[name]["data_offsets"]
        out[8 + size + begin : 8 + size + end] = data(tensor)
    path.write_bytes(out)
    report = restow.verify(tmp_path / "b")
    assert not report.equal
    found = {(d.leaf[1], d.leaf[2]): d.why for d in report.differences if d.leaf is not None}
    assert found.keys() == {(e, p) for e in (3, 10) for p in (0, 1)}
    assert all(f"expert {e} here is expert {13 - e} there" in why for (e, _), why in found.items())
    assert all(path.name in why for why in found.values())
