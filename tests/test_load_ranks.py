"""Ranks: DTensors of any placement, filled by every rank for itself, against what DTensor would hold."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import restow
from moe import AT, Model, Tensors, differing, raw
from restow.errors import UsageError
from restow.torch.storage import runs_at, slot_of
from strategies import part_of

EIGHT = Model(e=8, f=6, d=12, layers=1)
TEN = EIGHT.but(e=10)
Case = tuple[str, Model, str, Sequence[int], Sequence[Any]]  # id, model, layout, mesh, placements

TALKS = [
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier",
    "scatter",
    "broadcast_object_list", "gather", "gather_object", "scatter_object_list", "reduce_scatter", "reduce",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv",
    "monitored_barrier", "new_group", "batch_isend_irecv",
]  # fmt: skip


class Talked(Exception):
    """A rank spoke to another."""


@contextmanager
def silence() -> Iterator[None]:
    """Every way in which ranks talk raises."""
    from torch.distributed import _functional_collectives as functional

    def refuse(*args: object, **kwargs: object) -> None:
        raise Talked

    places: list[tuple[object, str]] = [(dist, name) for name in TALKS]
    places += [(dist.distributed_c10d, name) for name in TALKS]
    places += [(functional, name) for name in TALKS if hasattr(functional, name)]
    places += [(functional, name) for name in ("all_gather_tensor", "reduce_scatter_tensor", "wait_tensor")]
    places += [(DTensor, "redistribute"), (DTensor, "full_tensor")]
    before = [(place, name, getattr(place, name)) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, refuse)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """`work(rank, *arguments)` in `world` forked processes of a gloo group: what each returned."""
    pipes = []
    for rank in range(world):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            outcome: tuple[bool, Any]
            try:
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world
                )
                outcome = True, work(rank, *arguments)
                dist.destroy_process_group()
            except BaseException:
                outcome = False, traceback.format_exc()
            with os.fdopen(theirs, "wb") as out:
                pickle.dump(outcome, out)
            sys.stderr.flush()
            os._exit(0)
        os.close(theirs)
        pipes.append((child, ours))
    found = []
    for child, pipe in pipes:
        with os.fdopen(pipe, "rb") as data:
            found.append(pickle.load(data))
        os.waitpid(child, 0)
    (folder / "group").unlink(missing_ok=True)
    failed = [text for good, text in found if not good]
    assert not failed, failed[0]
    return [value for _, value in found]


def distributed(full: Tensors, mesh: Any, placements: Sequence[Any], only: str = ".experts.") -> Tensors:
    """What DTensor itself makes of whole tensors, without a word between the ranks."""
    return {
        name: distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)
        if only in name
        else tensor
        for name, tensor in full.items()
    }


def blank(tensors: Tensors, byte: int) -> Tensors:
    """The same DTensors and tensors with other bytes."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        paint = torch.empty(local.shape, dtype=local.dtype)
        raw(paint).fill_(byte)
        if isinstance(tensor, DTensor):
            out[name] = DTensor.from_local(
                paint, tensor.device_mesh, tensor.placements, run_check=False,
                shape=tensor.shape, stride=tensor.stride(),
            )  # fmt: skip
        else:
            out[name] = paint
    return out


def locals_of(tensors: Tensors) -> Tensors:
    return {n: (t.to_local() if isinstance(t, DTensor) else t).contiguous() for n, t in tensors.items()}


def fill(rank: int, folders: dict[str, Path], cases: Sequence[Case]) -> list[tuple[str, list[str], int, int]]:
    """Every case on this rank: the names that differ, the plan's bytes, the bytes read."""
    out = []
    for name, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        wanted = distributed(model.spelled(layout), mesh, placements)
        into = blank(wanted, 0x5A)
        with silence():
            plan = restow.plan(folders[str(model.e)], into)
            report = restow.load(folders[str(model.e)], into)
        out.append((name, differing(locals_of(into), locals_of(wanted)), plan.bytes, report.bytes_read))
    return out


S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()

FOUR: list[Case] = [
    ("ep", EIGHT, "grouped", [4], [S0]),
    ("fused", EIGHT, "fused", [4], [S0]),
    ("uneven", TEN, "grouped", [4], [S0]),
    ("empty", EIGHT.but(e=3), "grouped", [4], [S0]),
    ("replicated", EIGHT, "grouped", [4], [R]),
    ("rows", EIGHT, "grouped", [4], [S1]),
    ("columns", EIGHT, "grouped", [4], [S2]),
    ("through gate and up", EIGHT, "fused", [4], [S1]),
    ("split rows", EIGHT, "split", [4], [S0]),
    ("split columns", TEN, "split", [4], [S1]),
    ("ep and ep_shard", EIGHT, "grouped", [2, 2], [S0, S1]),
    ("ep_shard first", EIGHT, "grouped", [2, 2], [S1, S0]),
    ("columns of experts", TEN, "stacked", [2, 2], [S0, S2]),
    ("hsdp", EIGHT, "grouped", [2, 2], [R, S0]),
    ("hsdp inner", EIGHT, "fused", [2, 2], [S0, R]),
    ("twice", EIGHT, "grouped", [2, 2], [S0, S0]),
    ("twice, uneven", TEN, "grouped", [2, 2], [S0, S0]),
    ("strided", EIGHT, "grouped", [2, 2], [S0, _StridedShard(0, split_factor=2)]),
    ("strided first", EIGHT, "grouped", [2, 2], [_StridedShard(0, split_factor=2), S0]),
    ("strided rows", EIGHT, "grouped", [2, 2], [_StridedShard(1, split_factor=2), S1]),
    ("strided fused", EIGHT, "fused", [2, 2], [_StridedShard(1, split_factor=2), S0]),
]
THREE: list[Case] = [
    ("4 on 3", EIGHT.but(e=4), "grouped", [3], [S0]),
    ("10 on 3", TEN, "epfd", [3], [S0]),
    ("rows of 12 on 3", EIGHT, "fused", [3], [S2]),
]


@pytest.mark.parametrize(("world", "cases"), [(4, FOUR), (3, THREE)], ids=["4 ranks", "3 ranks"])
def test_every_rank_fills_its_own_part_in_silence(world: int, cases: list[Case], tmp_path: Path) -> None:
    models = {str(model.e): model for _, model, *_ in cases}
    folders = {e: model.written(tmp_path / e) for e, model in models.items()}
    ranks = on_ranks(world, tmp_path, fill, folders, cases)
    for found in zip(*ranks, strict=True):
        name = found[0][0]
        assert [wrong for _, wrong, *_ in found] == [[]] * world, name
        assert all(planned == read for *_, planned, read in found), name


def talk(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.ones(4), mesh, [S0], src_data_rank=None)
    calls: list[Callable[[], object]] = [
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: dist.barrier(),
        lambda: tensor.full_tensor(),
        lambda: tensor.redistribute(mesh, [R]),
    ]
    out = []
    with silence():
        for call in calls:
            try:
                call()
            except Talked:
                out.append("talked")
    dist.barrier()
    return out


def test_the_ban_on_talking_can_fail(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, talk) == [["talked"] * 4] * 2


def shift(rank: int, folder: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    wanted = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    into = blank(wanted, 0)
    restow.load(folder, into)
    for name in into:
        if ".experts." in name:
            local = into[name].to_local()
            local.copy_(local.roll(1, 0))
    return differing(locals_of(into), locals_of(wanted))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, shift, EIGHT.written(tmp_path / "m"))
    assert ranks == [[f"{AT.format(0)}.down_projs", f"{AT.format(0)}.gate_and_up_projs"]] * 2


# FSDP.


def module_of(tensors: Tensors) -> nn.Module:
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for word in path:
            if word not in at._modules:
                at.add_module(word, nn.Module())
            at = at._modules[word]
        at.register_parameter(leaf, nn.Parameter(tensor))
    return root


def whole_modules(rank: int, cases: Sequence[tuple[Path, Model, str]]) -> list[list[str]]:
    """`fully_shard` over modules of plain tensors; values compared whole, after the load."""
    out = []
    for folder, model, layout in cases:
        full = model.spelled(layout)
        module = module_of({n: torch.zeros_like(t) for n, t in full.items()})
        for layer in module.model.layers.children():
            fully_shard(layer)
        fully_shard(module)
        assert all(isinstance(p, DTensor) for p in module.parameters())
        with silence():
            report = restow.load(folder, module)
        assert sorted(report.in_place) == sorted(full)
        out.append(differing({name: p.full_tensor().detach() for name, p in module.named_parameters()}, full))
    return out


def test_fully_shard(tmp_path: Path) -> None:
    folders = {model.e: model.written(tmp_path / str(model.e)) for model in (EIGHT, TEN)}
    cases = [(folders[m.e], m, layout) for m in (EIGHT, TEN) for layout in ("grouped", "fused", "split")]
    assert on_ranks(2, tmp_path, whole_modules, cases) == [[[]] * len(cases)] * 2


def expert_modules(rank: int, cases: Sequence[tuple[Path, Model, bool]]) -> list[list[str]]:
    """`fully_shard` over experts that EP sharded before: against a chunk of a chunk, not against DTensor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    outer, inner = mesh.get_coordinate()
    out = []
    for folder, model, nested in cases:
        full = model.spelled("grouped")
        module = module_of(distributed({n: torch.zeros_like(t) for n, t in full.items()}, mesh["ep"], [S0]))
        if nested:
            for layer in module.model.layers.children():
                fully_shard(layer.mlp.experts, mesh=mesh["fsdp"])
        fully_shard(module, mesh=mesh["fsdp"])
        with silence():
            restow.load(folder, module)
        found = {n: p.to_local().detach().contiguous() for n, p in module.named_parameters()}
        wanted = {
            n: cut(cut(t, 2, inner) if ".experts." in n else t, 2, outer).contiguous()
            for n, t in full.items()
        }
        out.append([n for n in differing(found, wanted) if found[n].numel() or wanted[n].numel()])
    return out


def cut(tensor: torch.Tensor, of: int, rank: int) -> torch.Tensor:
    chunks = tensor.chunk(of, 0)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def test_fully_shard_over_expert_parallel_holds_a_chunk_of_a_chunk(tmp_path: Path) -> None:
    models = [EIGHT, TEN, EIGHT.but(e=3), EIGHT.but(e=1)]
    folders = {model.e: model.written(tmp_path / str(model.e)) for model in models}
    cases = [(folders[m.e], m, nested) for m in models for nested in (False, True)]
    assert on_ranks(4, tmp_path, expert_modules, cases) == [[[]] * len(cases)] * 4


# Placements without processes.

MESHES = [(8,), (2, 4), (4, 2), (2, 2, 2)]
STRIDED = _StridedShard(0, split_factor=2)


def combinations(mesh: tuple[int, ...], strided: bool) -> list[tuple[Any, ...]]:
    found = list(product([R, S0, S1], repeat=len(mesh)))
    if strided and len(mesh) == 2:
        found += [(S0, STRIDED), (R, STRIDED), (STRIDED, R), (S1, STRIDED), (STRIDED, S1)]
    return found


@pytest.mark.parametrize("rank", range(8))
def test_runs_are_what_dtensor_holds(rank: int) -> None:
    """8 ranks of up to three mesh dims; even, uneven and too short tensors."""
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        for shape, mesh_shape in product([(8, 16), (5, 7), (3, 2), (1, 12)], MESHES):
            mesh = init_device_mesh("cpu", mesh_shape)
            full = torch.arange(shape[0] * shape[1]).reshape(shape)
            for placements in combinations(mesh_shape, strided=shape[0] % 8 == 0):
                tensor = distribute_tensor(full, mesh, list(placements), src_data_rank=None)
                target = slot_of("x", tensor).target
                local = tensor.to_local().numpy()
                assert (local.size == 0) == (np.prod(target.local_shape) == 0), placements
                if local.size:
                    np.testing.assert_array_equal(
                        part_of(full.numpy(), target.runs), local, err_msg=str(placements)
                    )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "mesh", "at", "runs"),
    [
        ([S0], [4], [1], (((2, 2),), ((0, 6),))),
        ([S0, STRIDED], [1, 2], [0, 0], (((0, 2), (4, 2)), ((0, 6),))),
        ([S0, STRIDED], [2, 2], [0, 0], (((0, 1), (2, 1)), ((0, 6),))),
        ([R, S1], [2, 3], [1, 2], (((0, 8),), ((4, 2),))),
        ([Shard(-1)], [4], [0], (((0, 8),), ((0, 2),))),
        ([S1], [4], [3], (((0, 8),), ())),
        ([], [], [], (((0, 8),), ((0, 6),))),
    ],
    ids=["ep", "strided", "rows 0 and 2", "hsdp", "negative", "empty", "no mesh"],
)
def test_runs_at(placements: list[Any], mesh: list[int], at: list[int], runs: object) -> None:
    assert runs_at("x", placements, mesh, at, (8, 6)) == runs


def test_a_pending_sum_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        runs_at("model.w", [Partial()], [2], [0], (8, 6))
    assert str(caught.value) == (
        "expected Shard or Replicate placements for model.w, found P(sum)\n"
        "  tensor    model.w\n"
        "  try       a partial tensor holds a pending sum, no weights: reduce it first"
    )
