"""The demo runs, and what it keeps is right: recomputed here from names and places, in plain integers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import restow
from restow.torch import demo_model as m

MASK = 0xFFFFFFFF


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "kept"
    command = [sys.executable, "-m", "restow", "demo", "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def value(name: str, at: int) -> int:
    """The 16 bits of element `at` of tensor `name`."""
    x = (at * 0x9E3779B1 + zlib.crc32(name.encode())) & MASK
    x ^= x >> 15
    x = x * 0x85EBCA6B & MASK
    x ^= x >> 13
    return (x & 1) << 15 | (112 + (x >> 1 & 31)) << 7 | (x >> 6 & 127)


def origin(name: str, place: tuple[int, ...], first: int) -> tuple[str, int]:
    """Where an element of a loaded tensor comes from: a tensor of the checkpoint and a flat index."""
    path, _, word = name.rpartition(".")
    if word == "gate_and_up_projs":
        e, i, column = place
        half, j = ("gate", "up")[column // m.INNER], column % m.INNER
        return f"{path}.{first + e}.{half}_proj.weight", j * m.WIDTH + i
    if word == "down_projs":
        e, j, i = place
        return f"{path}.{first + e}.down_proj.weight", i * m.INNER + j
    shape = m.shapes()[name]
    return name, int(np.ravel_multi_index(place, shape))


def test_the_story(kept: tuple[Path, str]) -> None:
    folder, text = kept
    lines = text.splitlines()
    assert len(lines) <= 40
    assert text.isascii()
    assert sum("all right" in line for line in lines) == 3
    assert "208,891,904 bytes in 4 reads" in text
    assert "  rank 1     experts 8-15: 114,520,064 bytes in " in text
    assert "restow.errors.MissingTensorError: expected " in text
    assert m.LOST in text
    assert lines[-1] == (
        f"  kept       checkpoint, single.safetensors, rank-0.safetensors, rank-1.safetensors in {folder}"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint", "rank-0.safetensors", "rank-1.safetensors", "single.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(("file", "first", "count"), [("single", 0, 16), ("rank-0", 0, 8), ("rank-1", 8, 8)])
def test_what_was_kept_is_right(kept: tuple[Path, str], file: str, first: int, count: int) -> None:
    chance = random.Random(file)
    with safe_open(kept[0] / f"{file}.safetensors", "pt") as held:
        wanted = dict(m.loaded_shapes())
        for name in wanted:
            if ".experts." in name:
                wanted[name] = (count, *wanted[name][1:])
        assert set(held.keys()) == set(wanted)
        for name, shape in wanted.items():
            tensor = held.get_tensor(name)
            assert tuple(tensor.shape) == shape
            bits = tensor.view(torch.uint16).numpy()
            for _ in range(200):
                place = tuple(chance.randrange(n) for n in shape)
                assert int(bits[place]) == value(*origin(name, place, first)), (name, place)


def test_the_checkpoint_is_one(kept: tuple[Path, str]) -> None:
    opened = restow.open(kept[0] / "checkpoint")
    assert not [problem for problem in opened.problems if problem.fatal]
    assert {name: entry.shape for name, entry in opened.tensors.items()} == m.shapes()
    assert sum(e.pieces[0].end - e.pieces[0].begin for e in opened.tensors.values()) == 208_891_904


def test_no_value_is_zero_nan_or_infinite() -> None:
    values = torch.from_numpy(m.bits("a name", m.flat(1 << 20))).view(torch.bfloat16).float()
    assert torch.isfinite(values).all()
    assert values.abs().min() >= 2**-15
    assert len(values.unique()) == 1 << 13


def test_the_demos_own_check_can_fail() -> None:
    name = "model.layers.3.mlp.experts.down_projs"
    right = torch.empty(2, m.INNER, m.WIDTH, dtype=torch.bfloat16)
    for part, bits in m.wanted(name, tuple(right.shape), 4):
        right[part] = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
    assert m.compared({name: right}, 4) == (right.numel(), [])
    assert m.compared({name: right}, 3) == (right.numel(), [name])
    assert m.compared({name: right.flip(0)}, 4)[1] == [name]
    wrong = right.clone()
    wrong[1, 7, 11] = 0
    assert m.compared({name: wrong}, 4)[1] == [name]


def test_a_second_demo_does_not_write_over_the_first(kept: tuple[Path, str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in kept[0].rglob("*"))
    command = [sys.executable, "-m", "restow", "demo", "--keep", str(kept[0]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["class"] == "restow.errors.DestinationExistsError"
    assert done.stderr.startswith(
        "restow.errors.DestinationExistsError: expected none of the demo's files there, found"
    )
    assert sorted((path, path.stat().st_mtime_ns) for path in kept[0].rglob("*")) == before
