"""The mixin on meshes of gloo processes: ranges, views, scratch, namespaces, for even and uneven experts."""

from __future__ import annotations

from pathlib import Path

import pytest

import mixin_ranks

MESHES = [
    {"ep": 4},
    {"ep": 3},
    {"ep_shard": 2, "ep": 2},
    {"ep_replicate": 2, "ep_shard": 1, "ep": 2},
    {"ep_shard": 2, "ep": 1},
]


def called(sizes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes.items())


@pytest.mark.parametrize("sizes", MESHES, ids=called)
def test_both_directions_on_a_mesh(sizes: dict[str, int], tmp_path: Path) -> None:
    mixin_ranks.run("rows", tmp_path, **sizes)


@pytest.mark.parametrize("sizes", MESHES[:2], ids=called)
def test_members_on_a_mesh(sizes: dict[str, int], tmp_path: Path) -> None:
    mixin_ranks.run("members", tmp_path, **sizes)


def test_experts_over_two_mesh_dims(tmp_path: Path) -> None:
    mixin_ranks.run("two_shards", tmp_path, ep=4)
