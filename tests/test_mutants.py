"""Checkpoints with one or two things wrong that no list names: refused before the first byte, or read as what they say.

The oracle is a formula over the tensors that really lie in the files, by name, written out here for two vendors'
layouts. Sizes coincide on purpose: gate and up together are square.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import restow
from corpus_bytes import INDEX, Shards, Tensor, blob, index_of, table
from moe import Model, Tensors, differing
from restow.errors import RestowError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "F32": torch.float32}
PAINT = 7.5
ROLES = ("in", "out", "in.bias", "out.bias")
VENDORS = {
    "qwen3_moe": (Model(e=3, f=2, d=4), "split"),
    "gpt_oss": (Model(e=3, f=2, d=4, family="gpt_oss", roles=ROLES), "hf"),
}
Load = Callable[[Path, Tensors], object]


def read(path: Path, into: Tensors) -> object:
    return restow.load(path, into)


class Disk(NamedTuple):
    """A checkpoint as values, to be changed and written."""

    shards: Shards
    config: dict[str, Any]
    index: dict[str, Any]
    cut: dict[str, int]  # bytes that a file lacks at its end

    def write(self, root: Path) -> Path:
        root.mkdir()
        for file, shard in self.shards.items():
            raw = blob(*table(shard, {"format": "pt"}))
            (root / file).write_bytes(raw[: len(raw) - self.cut.get(file, 0)])
        (root / INDEX).write_text(json.dumps(self.index))
        (root / "config.json").write_text(json.dumps(self.config))
        return root


def good(vendor: str) -> Disk:
    model, layout = VENDORS[vendor]
    shards: Shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (name, tensor) in enumerate(model.spelled(layout).items()):
        data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        shards[list(shards)[i % 2]][name] = Tensor("BF16", tuple(tensor.shape), data)
    return Disk(shards, dict(model.config), index_of(shards), {})


def said(vendor: str, disk: Disk) -> Tensors | None:
    """The grouped tensors that the files hold, or None where they are no whole model of this vendor."""
    model, layout = VENDORS[vendor]
    held: Tensors = {}
    for shard in disk.shards.values():
        for name, tensor in shard.items():
            value = torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)
            if name in held and not torch.equal(held[name], value):
                return None
            held[name] = value
    whole = {name: tensor.shape for name, tensor in model.spelled(layout).items()}
    for name, shape in whole.items():
        if name not in held or held[name].shape != shape or not held[name].is_floating_point():
            return None
    out = {name: held[name] for name in model.others}
    for layer in range(model.layers):
        at = f"model.layers.{layer}.mlp.experts"
        if vendor == "gpt_oss":
            out[f"{at}.gate_and_up_projs"], out[f"{at}.down_projs"] = (
                held[f"{at}.{name}"] for name in ("gate_up_proj", "down_proj"))  # fmt: skip
            out |= {f"{at}.{n}": held[f"{at}.{n}"] for n in ("gate_up_proj_bias", "down_proj_bias")}
            continue
        gate, up, down = (
            [held[f"{at}.{e}.{p}_proj.weight"].to(torch.bfloat16).T for e in range(model.e)] for p in ("gate", "up", "down")
        )  # fmt: skip
        out[f"{at}.gate_and_up_projs"] = torch.stack(
            [torch.cat(pair, 1) for pair in zip(gate, up, strict=True)]
        )
        out[f"{at}.down_projs"] = torch.stack(down)
    return {name: tensor.to(torch.bfloat16) for name, tensor in out.items()}


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, Disk]:
    """A vendor's checkpoint after one or two changes."""
    vendor = draw(st.sampled_from(sorted(VENDORS)))
    disk = copy.deepcopy(good(vendor))
    for _ in range(draw(st.integers(1, 2))):
        draw(st.sampled_from(CHANGES))(draw, disk)
    return vendor, disk


def one(draw: st.DrawFn, disk: Disk) -> tuple[Shards, str, str]:
    """A tensor of the files: (shards, file, name)."""
    places = [(file, name) for file, shard in disk.shards.items() for name in shard]
    return (disk.shards, *draw(st.sampled_from(places)))


def put(disk: Disk, shard: str, old: str, new: str, tensor: Tensor) -> None:
    """A tensor under a new name, in its old place; the index says so."""
    disk.shards[shard] = {
        new if n == old else n: tensor if n == old else t for n, t in disk.shards[shard].items()
    }
    disk.index.update(index_of(disk.shards))


def exchanged(draw: st.DrawFn, disk: Disk) -> None:
    (shards, f, a), (_, g, b) = one(draw, disk), one(draw, disk)
    shards[f][a], shards[g][b] = shards[g][b], shards[f][a]


def renamed(draw: st.DrawFn, disk: Disk) -> None:
    shards, file, name = one(draw, disk)
    new = draw(st.sampled_from([f"{name}x", f"model.{name}", name.replace(".1.", ".01."), name.replace(".1.", ".9."),
                                name.replace(".2.", ".3."), name.removesuffix(".weight")]))  # fmt: skip
    put(disk, file, name, new, shards[file][name])


def dropped(draw: st.DrawFn, disk: Disk) -> None:
    shards, file, name = one(draw, disk)
    del shards[file][name]
    if draw(st.booleans()):
        disk.index.update(index_of(disk.shards))


def doubled(draw: st.DrawFn, disk: Disk) -> None:
    shards, file, name = one(draw, disk)
    tensor = shards[file][name]
    other = next(f for f in shards if f != file)
    shards[other][name] = tensor._replace(data=tensor.data[::-1])


def reshaped(draw: st.DrawFn, disk: Disk) -> None:
    shards, file, name = one(draw, disk)
    shape = shards[file][name].shape
    new = draw(st.sampled_from([shape[::-1], (1, *shape), (*shape, 1), (*shape[:-2], *shape[:-3:-1])]))
    shards[file][name] = shards[file][name]._replace(shape=tuple(new))


def retyped(draw: st.DrawFn, disk: Disk) -> None:
    shards, file, name = one(draw, disk)
    dtype = draw(st.sampled_from(["F16", "I16"]))
    shards[file][name] = shards[file][name]._replace(dtype=dtype)


def cut(draw: st.DrawFn, disk: Disk) -> None:
    disk.cut[draw(st.sampled_from(sorted(disk.shards)))] = draw(st.integers(1, 40))


def reworded(draw: st.DrawFn, disk: Disk) -> None:
    key = draw(st.sampled_from(sorted(disk.config)))
    values = [
        0,
        1,
        -1,
        2,
        3,
        4,
        5,
        10**12,
        None,
        "3",
        3.5,
        True,
        [],
        {},
        [[1]],
        "qwen3_moe",
        "gpt_oss",
        "bfloat16",
    ]
    disk.config[key] = draw(st.sampled_from(values))
    if draw(st.integers(0, 3)) == 0:
        del disk.config[key]


def reindexed(draw: st.DrawFn, disk: Disk) -> None:
    where: dict[str, Any] = disk.index["weight_map"]
    if where:
        name = draw(st.sampled_from(sorted(where)))
        where[name] = draw(
            st.sampled_from([*disk.shards, "model-00009-of-00009.safetensors", "../x", 1, None])
        )
    if draw(st.booleans()):
        disk.index["metadata"] = draw(st.sampled_from([None, {}, [], {"total_size": "x"}, {"total_size": 1}]))


CHANGES = (exchanged, renamed, dropped, doubled, reshaped, retyped, cut, reworded, reindexed)


@contextmanager
def folder() -> Iterator[Path]:
    """In memory where there is such a place: every conversion syncs its files."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="restow-mutants-", dir=place) as name:
        yield Path(name)


def check(vendor: str, disk: Disk, root: Path, load: Load = read) -> bool:
    """Whether it was loaded; asserts that a refusal wrote nothing and that whatever is delivered is what the files say."""
    path, wanted = disk.write(root / "a"), said(vendor, disk)
    state = {n: torch.full_like(t, PAINT) for n, t in VENDORS[vendor][0].spelled("grouped").items()}
    loaded = True
    try:
        load(path, state)
    except RestowError as error:
        loaded = False
        assert str(error).isascii()
        assert all(bool((tensor == PAINT).all()) for tensor in state.values()), error
    else:
        assert wanted is not None, "loaded, and no whole model"
        assert differing(state, wanted) == []
    try:
        restow.convert(path, root / "b", to="grouped")
    except RestowError:
        assert [p.name for p in root.iterdir()] == ["a"]
        return loaded
    if wanted is None:  # integers outside the experts go along as they are, and are no weights there either
        with pytest.raises(RestowError):
            restow.load(root / "b", state)
        return loaded
    state = {n: torch.full_like(t, PAINT) for n, t in state.items()}
    restow.load(root / "b", state)
    assert differing(state, wanted) == []
    assert restow.verify(root / "b").equal
    assert restow.verify(path, root / "b").equal
    return loaded


def tried(examples: int, load: Load = read) -> None:
    """Check so many mutants; some must be loaded and some refused, else this would prove nothing."""
    found: dict[bool, int] = {True: 0, False: 0}
    phases = (
        (Phase.generate, Phase.shrink) if load is read else (Phase.generate,)
    )  # one that fails need not be small

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases, report_multiple_bugs=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutants())
    def each(mutant: tuple[str, Disk]) -> None:
        with folder() as root:
            found[check(*mutant, root, load)] += 1

    each()
    assert min(found.values()) > examples // 20, found


def test_the_good_ones_pass() -> None:
    for vendor in VENDORS:
        with folder() as root:
            assert check(vendor, good(vendor), root)


def test_mutants() -> None:
    tried(120)


@pytest.mark.slow
def test_many_mutants() -> None:
    tried(4000)


def lenient(path: Path, into: Tensors) -> None:
    """A reader that takes what it can get, and says nothing of the rest."""
    with suppress(RestowError):
        restow.load(path, into)


def exchanging(path: Path, into: Tensors) -> None:
    """A reader that takes two experts for each other."""
    restow.load(path, into)
    name = "model.layers.1.mlp.experts.down_projs"
    into[name].copy_(into[name][[0, 2, 1]])


def early(path: Path, into: Tensors) -> None:
    """A reader that writes before it judges."""
    into["model.norm.weight"].zero_()
    restow.load(path, into)


@pytest.mark.parametrize("reader", [lenient, exchanging, early])
def test_a_wrong_reader_is_seen(reader: Load) -> None:
    with pytest.raises(AssertionError):
        tried(60, reader)
