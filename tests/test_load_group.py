"""Loads by all ranks of a group: the same bytes as alone, each replica read once, one parse a machine, errors on all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import restow
from moe import Model, Tensors, differing
from restow.errors import MissingTensorError, PeerFailedError, UsageError
from restow.folder import open_folder
from restow.handover import handed_over, taken_over
from restow.opening import open_checkpoint, read_as
from restow.torch import team as teams
from restow.torch import threads as counts
from restow.torch.replicas import Held, shared
from save_ranks import ranks, values
from test_load_ranks import Talked, silence

EIGHT = Model(e=8, f=6, d=12, layers=2)


def holding(model: Model, mesh: Sequence[int], placements: Sequence[Any], spare: bool) -> Tensors:
    """The grouped tensors with their experts placed, all else whole; strided where `spare`."""
    made = init_device_mesh("cpu", tuple(mesh))
    out: Tensors = {}
    for name, tensor in model.spelled("grouped").items():
        if "experts" in name:
            out[name] = distribute_tensor(tensor, made, list(placements), src_data_rank=None)
            out[name].to_local().fill_(-1)
        else:
            out[name] = (torch.full((*tensor.shape, 2), -1, dtype=tensor.dtype)[..., 0]
                         if spare else torch.full_like(tensor, -1))  # fmt: skip
    return out


def plain(state: Tensors) -> Tensors:
    return {n: (t.to_local() if isinstance(t, DTensor) else t).contiguous().clone() for n, t in state.items()}


def work(rank: int, folder: Path, cases: Sequence[Any]) -> list[Any]:
    found = []
    for mesh, placements, spare in cases:
        state = holding(EIGHT, mesh, placements, spare)
        alone = restow.load(folder, state)
        wanted = plain(state)
        state = holding(EIGHT, mesh, placements, spare)
        with mock.patch.object(teams, "open_folder", wraps=open_folder) as opens:
            report = restow.load(folder, state, group=dist.group.WORLD, threads=1)
        found.append((differing(plain(state), wanted), opens.call_count, figures(alone), figures(report)))
    return found


class Figures(NamedTuple):
    """Of a report, what can be sent to the test."""

    bytes_read: int
    bytes_written: int
    bytes_taken: int
    in_place: tuple[str, ...]


def figures(report: restow.LoadReport) -> Figures:
    return Figures(*(getattr(report, name) for name in Figures._fields))


def sharing(world: int, folder: Path, cases: Sequence[Any], copies: Sequence[int]) -> None:
    """`copies`: by case, how many ranks hold each expert; everything else is held by all."""
    EIGHT.written(folder / "source")
    source = restow.open(folder / "source")
    size = {n: e.pieces[0].end - e.pieces[0].begin for n, e in source.tensors.items()}
    experts = sum(size[n] for n in source.expert_tensors)
    others = sum(size.values()) - experts
    told = values(ranks(world, folder, work, folder / "source", cases))
    for i, times in enumerate(copies):
        reports = [one[i] for one in told]
        assert [opens for _, opens, _, _ in reports] == [1] + [0] * (world - 1), "one parse a machine"
        for wrong, _, alone, report in reports:
            assert wrong == []
            assert report.bytes_written == alone.bytes_written and report.in_place == alone.in_place
            assert report.bytes_read + report.bytes_taken == alone.bytes_read
        assert sum(alone.bytes_read for *_, alone, _ in reports) == times * experts + world * others
        read = [report.bytes_read for *_, report in reports]
        assert sum(read) == experts + others, "each byte is read by one rank"
        assert max(read) < 2 * sum(read) / world + max(size.values())


E = Shard(0)


def test_two_ranks_share_what_both_hold(tmp_path: Path) -> None:
    cases = [((2,), [E], False), ((2,), [Replicate()], True)]
    sharing(2, tmp_path, cases, [1, 2])


def test_replicas_of_a_mesh_are_read_once(tmp_path: Path) -> None:
    """HSDP: two replicas of two shards; replicas that are no neighbours; a shard of a shard."""
    cases = [
        ((2, 2), [Replicate(), E], False),
        ((2, 2), [E, Replicate()], True),
        ((2, 2), [E, E], False),
    ]
    sharing(4, tmp_path, cases, [2, 2, 1])


def bundles(rank: int, folder: Path) -> Any:
    teams.BUNDLE = 64
    return work(rank, folder, [((2, 2), [Replicate(), E], True)])


def test_bundles_are_bounded(tmp_path: Path) -> None:
    EIGHT.written(tmp_path / "source")
    for ((wrong, *_),) in values(ranks(4, tmp_path, bundles, tmp_path / "source")):
        assert wrong == []


def lacking(rank: int, folder: Path) -> Any:
    state = EIGHT.spelled("grouped")
    if rank == 1:
        state["model.unheard_of.weight"] = torch.zeros(3)
    return figures(restow.load(folder, state, group=dist.group.WORLD))


def unread(rank: int, folder: Path) -> Any:
    if rank == 1:
        import restow.torch.load as loading

        def fail(*args: object, **words: object) -> None:
            raise OSError("the disk is gone")

        loading.execute = fail  # type: ignore[assignment]
    return figures(restow.load(folder, EIGHT.spelled("grouped"), group=dist.group.WORLD))


def absent(rank: int, folder: Path) -> Any:
    return figures(restow.load(folder / "nowhere", EIGHT.spelled("grouped"), group=dist.group.WORLD))


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    EIGHT.written(tmp_path / "source")
    first, second = ranks(2, tmp_path, lacking, tmp_path / "source")
    assert type(second.error) is MissingTensorError
    assert str(first.error) == (
        "expected rank 1 to plan its part, found MissingTensorError there\n"
        "  rank 1    expected every tensor of the destination in the source, found 1 that it does not hold\n"
        "              missing   model.unheard_of.weight\n"
        "              looked in model-00001-of-00002.safetensors\n"
        "                        model-00002-of-00002.safetensors\n"
        f"              in        {tmp_path / 'source'}\n"
        "              try       rename= says how names differ; allow_missing= leaves a tensor as it is\n"
        "  rank      0\n"
        "  try       what was loaded on this rank is not complete: load again on all ranks"
    )
    assert type(first.error) is PeerFailedError
    first, second = ranks(2, tmp_path, unread, tmp_path / "source")
    assert type(second.error) is OSError
    assert str(first.error) == (
        "expected rank 1 to read its part, found OSError there\n"
        "  rank 1    the disk is gone\n"
        "  rank      0\n"
        "  try       what was loaded on this rank is not complete: load again on all ranks"
    )
    one, other = ranks(2, tmp_path, absent, tmp_path / "source")
    assert type(one.error) is type(other.error) and str(one.error) == str(other.error)


def quiet(rank: int, folder: Path) -> Any:
    with silence():
        report = restow.load(folder, EIGHT.spelled("grouped"))
        try:
            restow.load(folder, EIGHT.spelled("grouped"), group=dist.group.WORLD)
        except Talked:
            return report.bytes_taken
    return "spoke"


def outside(rank: int, folder: Path) -> Any:
    group = dist.new_group([0])
    if rank == 0:
        return restow.load(folder, EIGHT.spelled("grouped"), group=group).bytes_taken
    with pytest.raises(UsageError, match="a process outside it"):
        restow.load(folder, EIGHT.spelled("grouped"), group=group)
    return 0


def test_without_a_group_nobody_speaks_and_with_one_they_do(tmp_path: Path) -> None:
    EIGHT.written(tmp_path / "source")
    assert values(ranks(2, tmp_path, quiet, tmp_path / "source")) == [0, 0]
    assert values(ranks(2, tmp_path, outside, tmp_path / "source")) == [0, 0]


def test_readers_are_balanced_and_every_rank_computes_the_same() -> None:
    def held(*keys: int) -> Held:
        return Held(np.array(keys, np.int64), np.array([10 * k for k in keys], np.int64))

    found = shared([held(5, 1, 9), held(1, 5, 2), held(7, 5, 2)])
    assert [(one.holders, one.reader, one.keys) for one in found] == [
        ((0, 1), 1, (1,)),
        ((0, 1, 2), 0, (5,)),
        ((1, 2), 2, (2,)) if found[-1].reader == 2 else ((1, 2), 1, (2,)),
    ]
    assert shared([held(), held()]) == [] == shared([held(3), held(4)])


def test_threads_are_what_the_machine_has_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "cores", lambda: 16)
    assert counts.default_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert counts.default_threads() == 8, "left over from another job: nobody is here"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert counts.default_threads() == 4
    for said, threads in (("32", 1), ("0", 8), ("many", 8), ("", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert counts.default_threads() == threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert counts.default_readers() == 3, "of a device: some cores are the caller's and the driver's"


def test_a_folder_is_handed_over_whole(tmp_path: Path) -> None:
    folder = open_folder(EIGHT.written(tmp_path))
    again = taken_over(handed_over(folder))
    assert again.headers == folder.headers and dict(again.tensors) == dict(folder.tensors)
    assert (again.root, again.index, again.config, again.problems) == (
        folder.root, folder.index, folder.config, folder.problems,
    )  # fmt: skip
    one, other = read_as(again), open_checkpoint(tmp_path)
    assert one.modules == other.modules and one.stamps == other.stamps and one.problems == other.problems
