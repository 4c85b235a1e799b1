"""Leaves whose digest comes from the bytes that were read: the same numbers, and proof that they were written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import restow
from restow.plans import Part
from restow.torch import passing, read
from test_integrity import SMALL, data, leaves, manifest, xxh3


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each leaf that was asked for had passed by in order."""
    real, found = passing.Passing.digest, []

    def digest(self: passing.Passing, *what: Any) -> str | None:
        found.append(real(self, *what) is not None)
        return real(self, *what)

    monkeypatch.setattr(passing.Passing, "digest", digest)
    return found


@pytest.mark.parametrize("told", [1 << 19, 500])
@pytest.mark.parametrize("layout", ["split", "fused", "stacked"])
def test_leaves_pass_by_in_order(
    layout: str, told: int, tmp_path: Path, given: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`told`: bytes after which whoever watches is told, all of a matrix or a part of a row."""
    monkeypatch.setattr(read, "TOLD", told)
    SMALL.written(tmp_path / "a", layout)
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped")
    assert given == [True] * (SMALL.layers * SMALL.e * 3)
    assert manifest(tmp_path / "b")["leaves"] == leaves(SMALL)


def test_views_are_made_of_one_tensor_of_a_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are known by their names: a reader that makes views of each holds up every other thread."""
    real, made = passing.leaf_views, []

    def leaf_views(owner: Any, *what: Any) -> Any:
        made.append(owner[:2])
        return real(owner, *what)

    monkeypatch.setattr(passing, "leaf_views", leaf_views)
    SMALL.written(tmp_path / "a", "split")
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped", threads=1)
    assert manifest(tmp_path / "b")["leaves"] == leaves(SMALL)
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(SMALL.layers)]
    assert sorted(made) == sorted((path, role) for path in paths for role in ("in", "out"))


def test_chosen_experts(tmp_path: Path, given: list[bool]) -> None:
    SMALL.written(tmp_path / "a", "split")
    experts = [7, 0, 11]
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped", experts=experts)
    assert given == [True] * (SMALL.layers * 3 * 3)
    every = leaves(SMALL)
    at = "model.layers.{}.experts.{}.{}"
    assert manifest(tmp_path / "b")["leaves"] == {
        at.format(layer, i, word): every[at.format(layer, e, word)]
        for layer in range(SMALL.layers)
        for i, e in enumerate(experts)
        for word in ("gate", "up", "down")
    }


def test_a_cast_is_hashed_as_it_is_written(tmp_path: Path, given: list[bool]) -> None:
    SMALL.written(tmp_path / "a", "split")
    restow.convert(tmp_path / "a", tmp_path / "b", to="grouped", dtype=torch.float32)
    assert given
    assert not any(given)
    down = SMALL.weight("out", 1)[5].t().float()
    assert manifest(tmp_path / "b")["leaves"]["model.layers.1.experts.5.down"] == xxh3(data(down))


def test_what_was_moved_wrongly_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each slice one leaf is hashed out of what is to be written."""
    SMALL.written(tmp_path / "a", "split")
    real = read.move

    def move(into: torch.Tensor, tile: torch.Tensor) -> None:
        real(into, tile)
        into[..., 0, 0].view(torch.int16).bitwise_xor_(1)

    monkeypatch.setattr(read, "move", move)
    with pytest.raises(restow.errors.IntegrityError) as caught:
        restow.convert(tmp_path / "a", tmp_path / "b", to="grouped")
    assert str(caught.value) == (
        "expected the values that were read for model.layers.0.experts.0.up in "
        "model.layers.0.mlp.experts.gate_and_up_projs, found others\n"
        "  tensor    model.layers.0.mlp.experts.gate_and_up_projs\n"
        "  try       nothing was published; memory has failed, or this is a defect of restow: please report it"
    )
    assert not (tmp_path / "b").exists()


TILES = {
    "in order": ([(0, 960), (960, 1920)], True),
    "one piece": ([(0, 1920)], True),
    "more than the leaf": ([(0, 1920), (0, 1920)], True),
    "again from the start": ([(0, 960), (0, 960), (960, 1920)], True),
    "the end first": ([(960, 1920), (0, 960)], False),
    "a gap": ([(0, 900), (960, 1920)], False),
    "twice the same": ([(0, 960), (0, 960)], False),
}


@pytest.mark.parametrize(("tiles", "whole"), TILES.values(), ids=TILES)
def test_tiles(
    tiles: Sequence[tuple[int, int]], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leaf has a digest only if its bytes came from the first to the last."""
    from restow.landing import Wish, layout_of
    from restow.prepare import prepare
    from restow.wanted import default_targets

    opened = restow.open(SMALL.written(tmp_path / "a", "split"))
    layout = layout_of("grouped", opened.family)
    assert layout is not None
    wish = Wish(layout=layout, family=opened.family)
    targets = list(default_targets(opened, layout, wish, keep_quantized=False))
    found = passing.Passing(prepare(opened, targets, wish))
    path = "model.layers.1.mlp.experts"
    raw = data(SMALL.weight("in", 1)[3, 1])
    assert len(raw) == 1920
    part = Part(f"{path}.3.up_proj.weight", "BF16", "", 0, len(raw))
    for begin, end in tiles:
        found.look(part, begin, memoryview(raw)[begin:end])
    target = next(t for t in targets if t.name == f"{path}.gate_and_up_projs")
    assert found.digest(target, ("in", 3, 1)) == (xxhash.xxh3_128_hexdigest(raw) if whole else None)
    assert found.digest(target, ("in", 3, 0)) is None
    assert found.digest(target._replace(dtype="F32"), ("in", 3, 1)) is None
