"""Saving from several ranks: identical files whatever the mesh, nothing written twice, no fear when a rank fails."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import restow
import tiny
from moe import AT, Model, differing
from moe_model import Config, MoEModel, parallelize
from restow import errors, sharing, writing
from restow.torch import peers as peers_module
from restow.torch import together
from restow.torch.save import SaveHandle
from save_ranks import Ended, ranks, start, values
from test_load_ranks import blank, distributed, locals_of, module_of, silence
from test_save import files, nothing_left, save, tensors

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
EIGHT = Model(e=8, f=6, d=12, layers=2)
TEN, THREE = EIGHT.but(e=10), EIGHT.but(e=3)

# What is saved, where it is held, in how many files.

Case = tuple[
    str, Model, str, Sequence[int], Sequence[Any]
]  # id, model, layout of the state, mesh, placements
FOUR: list[Case] = [
    ("ep", EIGHT, "grouped", [4], [S0]),
    ("uneven", TEN, "grouped", [4], [S0]),
    ("fewer experts than ranks", THREE, "grouped", [4], [S0]),
    ("replicated", EIGHT, "grouped", [4], [R]),
    ("rows", EIGHT, "grouped", [4], [S1]),
    ("columns", EIGHT, "fused", [4], [S2]),
    ("through gate and up", EIGHT, "fused", [4], [S1]),
    ("split", TEN, "split", [4], [S1]),
    ("ep and ep_shard", EIGHT, "grouped", [2, 2], [S0, S1]),
    ("hsdp", EIGHT, "grouped", [2, 2], [R, S0]),
    ("hsdp inner", EIGHT, "fused", [2, 2], [S0, R]),
    ("twice", TEN, "grouped", [2, 2], [S0, S0]),
    ("strided", EIGHT, "grouped", [2, 2], [S0, _StridedShard(0, split_factor=2)]),
    ("strided first", EIGHT, "grouped", [2, 2], [_StridedShard(0, split_factor=2), S0]),
    ("strided rows", EIGHT, "grouped", [2, 2], [_StridedShard(1, split_factor=2), S1]),
]
TWO: list[Case] = [
    ("ep", TEN, "grouped", [2], [S0]),
    ("rows", EIGHT, "grouped", [2], [S1]),
    ("replicated", TEN, "stacked", [2], [R]),
]


def written(model: Model, folder: Path) -> Path:
    return (
        model.written(folder / f"{model.e}")
        if not (folder / f"{model.e}").exists()
        else folder / f"{model.e}"
    )


def every_case(rank: int, folder: Path, cases: Sequence[Case]) -> list[tuple[str, int, int]]:
    """Load, save in silence: bytes that this rank wrote, and all."""
    out = []
    for name, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        state = blank(distributed(model.spelled(layout), mesh, placements), 0x5A)
        restow.load(folder / str(model.e), state)
        with silence():
            report = save(state, folder / f"saved {name}", like=folder / str(model.e))
        out.append((name, report.bytes_written, report.bytes_total))
    return out


@pytest.mark.parametrize(("world", "cases"), [(4, FOUR), (2, TWO)], ids=["4 ranks", "2 ranks"])
def test_files_are_identical_to_likes(world: int, cases: list[Case], tmp_path: Path) -> None:
    for _, model, *_ in cases:
        written(model, tmp_path)
    found = values(ranks(world, tmp_path, every_case, tmp_path, cases))
    for case, *reports in zip(cases, *found, strict=True):
        name, model, *_ = case
        source = tmp_path / str(model.e)
        assert files(tmp_path / f"saved {name}") == files(source), name
        assert {total for _, _, total in reports} == {sum(t.nbytes for t in tensors(source).values())}
        assert sum(own for _, own, _ in reports) == reports[0][2], f"{name}: data written twice, or never"
        if name != "fewer experts than ranks":
            assert all(own for _, own, _ in reports), f"{name}: the work is shared"
    assert nothing_left(tmp_path)


def greedy(rank: int, folder: Path) -> None:
    """Every rank writes all that it holds: as if nobody had chosen owners."""
    together.owners = lambda everybody, prepared: [[held.name for held in one.held] for one in everybody]
    every_case(rank, folder, [("greedy", EIGHT, "grouped", [2], [S0])])


def test_data_written_twice_is_noticed(tmp_path: Path) -> None:
    written(EIGHT, tmp_path)
    ended = ranks(2, tmp_path, greedy, tmp_path)
    assert type(ended[0].error) is errors.CoverageError
    assert not (tmp_path / "saved greedy").exists()


def test_one_rank_of_a_group(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    assert (
        len(values(ranks(1, tmp_path, every_case, tmp_path, [("one", EIGHT, "grouped", [1], [S0])]))[0]) == 1
    )
    assert files(tmp_path / "saved one") == files(source)


# fully_shard.


def wrapped(rank: int, folder: Path, cases: Sequence[tuple[Model, str]]) -> None:
    """`fully_shard` alone (FSDP2), and over experts that EP sharded before: chunks of a chunk."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    for model, way in cases:
        full = {n: torch.zeros_like(t) for n, t in model.spelled("grouped").items()}
        if way == "ep":
            module = module_of(distributed(full, mesh["ep"], [S0]))
            for layer in module.model.layers.children():
                fully_shard(layer.mlp.experts, mesh=mesh["fsdp"])
            fully_shard(module, mesh=mesh["fsdp"])
        else:
            module = module_of(full)
            fully_shard(
                module, mesh=mesh if way == "hsdp" else mesh._flatten("all") if way == "fsdp" else None
            )
        restow.load(folder / str(model.e), module)
        with silence():
            save(module, folder / f"{way} {model.e}", like=folder / str(model.e))


FSDP = [(EIGHT, "fsdp"), (TEN, "ep"), (THREE, "ep"), (TEN, "hsdp")]
MORE_FSDP = [(m, way) for m in (EIGHT, TEN, THREE) for way in ("fsdp", "ep", "hsdp") if (m, way) not in FSDP]


@pytest.mark.parametrize(
    "cases", [FSDP, pytest.param(MORE_FSDP, marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_fully_shard(cases: Sequence[tuple[Model, str]], tmp_path: Path) -> None:
    for model in (EIGHT, TEN, THREE):
        written(model, tmp_path)
    values(ranks(4, tmp_path, wrapped, tmp_path, cases))
    for model, way in cases:
        assert files(tmp_path / f"{way} {model.e}") == files(tmp_path / str(model.e)), (way, model)


# Parts of other kinds.


def pipeline(rank: int, folder: Path) -> None:
    """Rank r holds layer r; the first the embedding, the last the head: plain tensors, other names on each rank."""
    state = {
        name: tensor
        for name, tensor in EIGHT.spelled("grouped").items()
        if f"layers.{rank}." in name
        or name.startswith("model.embed" if rank == 0 else ("lm_head", "model.norm"))
    }
    with silence():
        save(state, folder / "like", group=dist.group.WORLD, like=folder / "8")
        save(state, folder / "new", group=dist.group.WORLD, family="qwen3_moe")


def test_pipeline_parts(tmp_path: Path) -> None:
    source = written(EIGHT, tmp_path)
    values(ranks(2, tmp_path, pipeline, tmp_path))
    for how in ("like", "new"):
        assert differing(tensors(tmp_path / how), EIGHT.spelled("split")) == []
    assert files(tmp_path / "like") == files(source)


def own_experts(rank: int, folder: Path, models: Sequence[Model]) -> list[int]:
    """Every rank holds tensors of its own experts, by their global numbers, and a copy of all else."""
    out = []
    for model in models:
        per = -(-model.e // 4)
        mine = {str(e) for e in range(rank * per, min(model.e, (rank + 1) * per))}
        state = {}
        for name, tensor in model.spelled("split").items():
            number = re.search(r"experts\.(\d+)\.", name)
            if number is None or number[1] in mine:
                state[name] = tensor
        like, group = folder / str(model.e), dist.group.WORLD
        out.append(save(state, folder / f"out {model.e}", like=like, group=group).bytes_written)
    return out


def test_experts_under_names_of_their_own(tmp_path: Path) -> None:
    models = EIGHT, TEN, THREE
    for model in models:
        written(model, tmp_path)
    counts = values(ranks(4, tmp_path, own_experts, tmp_path, models))
    for model, *parts in zip(models, *counts, strict=True):
        source = tmp_path / str(model.e)
        assert files(tmp_path / f"out {model.e}") == files(source), model
        assert sum(parts) == sum(t.nbytes for t in tensors(source).values()), model


PARTS = [
    (model, axis, of, layout, how)
    for model, axis, of, layout in [
        (EIGHT, "e", 4, "grouped"), (TEN, "e", 4, "grouped"), (THREE, "e", 4, "grouped"), (EIGHT, "e", 2, "fused"),
        (EIGHT, "f", 2, "grouped"), (EIGHT, "f", 4, "fused"),
    ]
    for how in ("like", "new")
]  # fmt: skip


def plain_parts(rank: int, folder: Path) -> list[int]:
    """Plain tensors that hold a part; with more ranks than parts, replicas."""
    out = []
    for case, (model, axis, of, layout, how) in enumerate(PARTS):
        shard = restow.Shard(axis, rank % of, of)
        plan = restow.plan(folder / str(model.e), layout=layout, shard=shard)
        shapes = {t.name: t.local_shape for t in plan.targets}
        state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        restow.load(folder / str(model.e), state, shard=shard, layout=layout)
        words: dict[str, Any] = {"like": folder / str(model.e)}
        if how == "new":
            words = {"config": model.config, "layout": "split"}
        with silence():
            out.append(save(state, folder / f"out {case}", shard=shard, **words).bytes_written)
    return out


def test_plain_parts(tmp_path: Path) -> None:
    for model in (EIGHT, TEN, THREE):
        written(model, tmp_path)
    counts = values(ranks(4, tmp_path, plain_parts, tmp_path))
    for case, ((model, *words), *parts) in enumerate(zip(PARTS, *counts, strict=True)):
        source, out = tmp_path / str(model.e), tmp_path / f"out {case}"
        assert differing(tensors(out), model.spelled("split")) == [], (model, words)
        assert sum(parts) == sum(t.nbytes for t in tensors(source).values()), (model, words)
        if words[-1] == "like":
            assert files(out) == files(source), (model, words)


# Saved on one mesh, loaded on another.


def save_on_four(rank: int, folder: Path, model: Model) -> None:
    mesh = init_device_mesh("cpu", (4,))
    state = distributed(model.spelled("grouped"), mesh, [S0])
    save(state, folder / "saved", family=model.family, config=model.config)


def load_on(
    rank: int, folder: Path, model: Model, meshes: Sequence[tuple[Sequence[int], Sequence[Any]]]
) -> list[str]:
    wrong = []
    for shape, placements in meshes:
        mesh = init_device_mesh("cpu", tuple(shape))
        wanted = distributed(model.spelled("grouped"), mesh, placements)
        into = blank(wanted, 0x5A)
        restow.load(folder / "saved", into)
        wrong += [f"{placements} {name}" for name in differing(locals_of(into), locals_of(wanted))]
    return wrong


@pytest.mark.parametrize("model", [EIGHT, TEN], ids=["8", "10"])
def test_saved_on_one_mesh_loaded_on_others(model: Model, tmp_path: Path) -> None:
    values(ranks(4, tmp_path, save_on_four, tmp_path, model))
    meshes = [
        ([4], [S0]),
        ([2, 2], [S0, S1]),
        ([2, 2], [R, S0]),
        ([2, 2], [_StridedShard(0, split_factor=2), S0]),
    ]
    assert values(ranks(4, tmp_path, load_on, tmp_path, model, meshes)) == [[]] * 4
    assert values(ranks(2, tmp_path, load_on, tmp_path, model, [([2], [S0])])) == [[]] * 2
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            assert load_on(rank, tmp_path, model, [([8], [S0]), ([2, 4], [R, S0])]) == []
        finally:
            dist.destroy_process_group()


# Training: loaded, changed in place, saved, read by transformers.


def update(state: Mapping[str, torch.Tensor], step: int = 1) -> None:
    """The same change of every element whatever the mesh: it follows from the value alone."""
    with torch.no_grad():
        for tensor in state.values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_floating_point():
                local.copy_(torch.sin(local.double() * (3 + step)).to(local.dtype) * 0.5 + local * 0.75)


def meshed(rank: int, folder: Path, source: Path) -> None:
    """A model's tensors, experts grouped, under EP 2 x FSDP 2, changed in place and saved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    plan = restow.plan(source)
    experts = {f"{path}." for path, _, _ in plan.layouts}
    whole = {t.name: torch.full(t.shape, torch.nan, dtype=dtypes[t.dtype]) for t in plan.targets}
    held = {
        name: distribute_tensor(t, mesh["ep"], [S0], src_data_rank=None)
        if any(map(name.startswith, experts))
        else t
        for name, t in whole.items()
    }
    module = module_of(held)
    fully_shard(module, mesh=mesh["fsdp"])
    restow.load(source, module)
    update(dict(module.named_parameters()))
    save(module, folder / source.name, like=source)


def all_meshed(rank: int, folder: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        meshed(rank, folder, source)


def test_a_change_under_ep_and_fsdp_is_the_change_in_one_process(tmp_path: Path) -> None:
    sources = {
        family_id: tiny.saved(family_id)
        for family_id in ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "llama4")
    }
    assert len({source.name for source in sources.values()}) == len(sources)
    values(ranks(4, tmp_path, all_meshed, tmp_path, list(sources.values())))
    for family_id, source in sources.items():
        model, _ = tiny.reload(source, family_id)
        before = tiny.logits(model)
        update(model.state_dict())
        wanted = tiny.logits(model)
        assert (wanted - before).abs().max() > 1e-2, "the change is one"
        again, info = tiny.reload(tmp_path / source.name, family_id)
        assert not any(info.values()), (family_id, info)
        assert torch.equal(tiny.logits(again), wanted), family_id


def train(rank: int, folder: Path, source: Path, world: int, fsdp: bool) -> None:
    """Two steps of plain gradient descent on four sequences, by all ranks together."""
    import json

    model = MoEModel(Config.read(json.loads((source / "config.json").read_text())))
    if world > 1:
        parallelize(model, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "ep")), fsdp=fsdp)
    restow.load(source, model)
    for step in range(2):
        for part in range(4 // world):
            row = torch.arange(8) * (2 * (rank + part * world) + 3) + rank + part * world + step
            loss = model(row[None] % 56).square().mean() / 4
            loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                factor = (world // 2 if ".experts." in name else world) if fsdp else 1  # FSDP averages
                parameter -= 0.1 * factor * parameter.grad
                parameter.grad = None
    save(model, folder / f"trained {world}", like=source)


def test_two_training_steps(tmp_path: Path) -> None:
    source = tiny.saved("qwen3_moe")
    values(ranks(1, tmp_path, train, tmp_path, source, 1, False))
    values(ranks(4, tmp_path, train, tmp_path, source, 4, True))
    one, info = tiny.reload(tmp_path / "trained 1", "qwen3_moe")
    assert not any(info.values()), info
    many, info = tiny.reload(tmp_path / "trained 4", "qwen3_moe")
    assert not any(info.values()), info
    before, _ = tiny.reload(source, "qwen3_moe")
    assert (tiny.logits(one) - tiny.logits(before)).abs().max() > 1e-3, "training changes something"
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(tiny.logits(many), tiny.logits(one), rtol=1e-4, atol=1e-4)


# In the background.


def in_background(rank: int, folder: Path) -> bool:
    mesh = init_device_mesh("cpu", (2,))
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    handle = restow.save(state, folder / "out", like=folder / "8", wait=False)
    assert isinstance(handle, SaveHandle)
    for tensor in locals_of(state).values():
        tensor.zero_()
    dist.barrier()  # training goes on, collectives and all
    first = handle.result(60)
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    again = restow.save(state, folder / "again", like=folder / "8", wait=False, reuse=handle)
    assert isinstance(again, SaveHandle)
    return again.result(60).bytes_written == first.bytes_written


def test_in_the_background(tmp_path: Path) -> None:
    source = written(EIGHT, tmp_path)
    assert values(ranks(2, tmp_path, in_background, tmp_path)) == [True, True]
    assert files(tmp_path / "out") == files(source) == files(tmp_path / "again")


# Refusals: on all ranks, before any byte.


def odd_state(rank: int, folder: Path, what: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    words: dict[str, Any] = {"like": folder / "8"}
    name = f"{AT.format(1)}.down_projs"
    path = folder / "out"
    if rank == 1:
        if what == "dtype":
            state["model.norm.weight"] = state["model.norm.weight"].float()
        elif what == "shape":
            state["lm_head.weight"] = state["lm_head.weight"][1:]
        elif what == "more":
            state["model.more"] = torch.ones(2)
        elif what == "partial":
            local = state[name].to_local()  # type: ignore[attr-defined]
            state[name] = DTensor.from_local(local, mesh, [Partial()], run_check=False)
        elif what == "meta":
            state["model.norm.weight"] = torch.empty(EIGHT.d, device="meta")
        elif what == "rename":
            words["rename"] = [("a", "b")]
        elif what == "path":
            path = folder / "elsewhere"
        elif what == "place":
            state[name] = distribute_tensor(EIGHT.spelled("grouped")[name], mesh, [R], src_data_rank=None)
        elif what == "words":
            words["dtype"] = torch.bfloat16
    restow.save(state, path, **words)


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("dtype", errors.IntegrityError, "model.norm.weight as BF16 [12], which rank 0 holds, found F32 [12] on rank 1"),
        ("shape", errors.IntegrityError, "lm_head.weight as BF16 [13, 12], which rank 0 holds, found BF16 [12, 12]"),
        ("more", errors.UnexpectedTensorError, "  no place  model.more\n"),
        ("partial", errors.UsageError, "a partial tensor holds a pending sum"),
        ("meta", errors.UsageError, "expected memory behind model.norm.weight, found a meta tensor"),
        ("rename", errors.IntegrityError, "expected rename () on every rank, found [('a', 'b')] on rank 1"),
        ("path", errors.IntegrityError, "elsewhere on rank 1"),
        ("place", errors.CoverageError, "every element of model.layers.1.mlp.experts.down_projs on some rank, once"),
        ("words", errors.UsageError, "expected like= alone"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_what_ranks_disagree_on(what: str, kind: type, text: str, tmp_path: Path) -> None:
    written(EIGHT, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    ended = ranks(2, tmp_path, odd_state, tmp_path, what)
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "no byte was written"
    first, second = sorted((one.error for one in ended), key=lambda e: isinstance(e, errors.PeerFailedError))
    assert type(first) is kind, first
    assert text in str(first)
    assert type(second) is errors.PeerFailedError
    assert text in str(second), "the other rank says why"


# Failures in the middle.


def guarded(rank: int, folder: Path, plan: str) -> Any:
    """A save over an old checkpoint; `plan` says what befalls whom."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    for tensor in locals_of(state).values():
        tensor.add_(1)
    what, who = plan.split()
    if rank == int(who):
        befall(what, folder)
    restow.save(state, folder / "out", like=folder / "8", replace=True, threads=1)


def befall(what: str, folder: Path) -> None:
    """Plant a fault in this process."""

    def after(count: int, act: Callable[[], object], name: str) -> None:
        real, seen = getattr(writing, name), []

        def call(*args: Any) -> Any:
            seen.append(1)
            if len(seen) == count:
                act()
            return real(*args)

        setattr(writing, name, call)

    def full() -> None:
        raise OSError(28, "planted")

    def die() -> None:
        (folder / "when").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def stop() -> None:
        (folder / "when").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)

    if what == "full":
        after(4, full, "pwrite")
    elif what == "killed":
        after(4, die, "pwrite")
    elif what == "killed-at-sync":
        after(1, die, "fsync")
    elif what == "stopped":
        after(4, stop, "pwrite")
    elif what == "killed-before-rename":
        after(1, die, "exchange")
    elif what == "killed-after-rename":
        real = writing.exchange

        def exchange(*args: Any) -> None:
            real(*args)
            die()

        writing.exchange = exchange
    elif what == "killed-after-report":
        said = peers_module.Peers.say

        def say(self: Any, key: str, text: str) -> None:
            said(self, key, text)
            if key == "written":
                die()

        peers_module.Peers.say = say  # type: ignore[method-assign]


def since(folder: Path, one: Ended) -> float:
    """Seconds from the blow to a rank's end."""
    return one.at - float((folder / "when").read_text())


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """An old checkpoint that restow wrote, at "out"."""
    source = written(EIGHT, tmp_path)
    save(EIGHT.spelled("grouped"), tmp_path / "out", like=source)
    return files(tmp_path / "out")


def again(tmp_path: Path) -> None:
    """A following save succeeds, and leaves nothing of the one before."""
    values(ranks(2, tmp_path, guarded, tmp_path, "nothing 0"))
    state = EIGHT.spelled("grouped")
    for tensor in state.values():
        tensor.add_(1)
    save(state, tmp_path / "alone", like=tmp_path / "8")
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_full_disk_on_one_rank(world: int, tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(world, tmp_path, guarded, tmp_path, "full 1")
    assert type(ended[1].error) is errors.NoSpaceError
    for rank in set(range(world)) - {1}:
        error = ended[rank].error
        assert type(error) is errors.PeerFailedError, error
        assert str(error).startswith("expected rank 1 to reach '")
        assert "found NoSpaceError there" in str(error)
        assert "ENOSPC" in str(error)
    assert files(tmp_path / "out") == old
    assert nothing_left(tmp_path)
    again(tmp_path)


def full_while_others_sleep(rank: int, folder: Path, full: int, sleeps: str) -> None:
    """A rank's disk is full; the others come to their files, or to the folder, when rank 0 has taken all away."""

    def wait_first(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any) -> Any:
            while any(path.name.startswith(".out.partial") for path in folder.iterdir()):
                time.sleep(0.01)
            return real(*args)

        setattr(module, name, call)

    if rank not in (full, 0):
        together._watched = lambda *_: lambda count: None  # it does not look for the others while it writes
        wait_first(*((writing, "reopen") if sleeps == "files" else (sharing, "_opened")))
    guarded(rank, folder, f"full {full}")


@pytest.mark.parametrize("sleeps", ["files", "folder"])
@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_whose_files_are_gone_says_why(
    full: int, sleeps: str, tmp_path: Path, old: dict[str, bytes]
) -> None:
    """Whose files were taken away is told of the rank that failed, whenever it looks."""
    ended = ranks(3, tmp_path, full_while_others_sleep, tmp_path, full, sleeps)
    assert type(ended[full].error) is errors.NoSpaceError
    for rank in {0, 1, 2} - {full}:
        error = ended[rank].error
        assert type(error) is errors.PeerFailedError, error
        assert f"expected rank {full} to reach '" in str(error)
        assert "found NoSpaceError there" in str(error)
    assert files(tmp_path / "out") == old
    assert nothing_left(tmp_path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "world"),
    [
        ("killed", 4), ("killed-at-sync", 2),
        pytest.param("killed", 2, marks=SLOW), pytest.param("killed-at-sync", 4, marks=SLOW),
    ],
)  # fmt: skip
def test_a_rank_killed_in_the_middle(what: str, world: int, tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(world, tmp_path, guarded, tmp_path, f"{what} 1")
    assert ended[1].signal == signal.SIGKILL
    for rank in set(range(world)) - {1}:
        error = ended[rank].error
        assert type(error) is errors.PeerFailedError, error
        assert "rank 1" in str(error)
        assert "its process gone" in str(error)
        assert since(tmp_path, ended[rank]) < 10
    assert files(tmp_path / "out") == old
    assert nothing_left(tmp_path)
    again(tmp_path)


def test_a_rank_killed_while_the_others_write(tmp_path: Path, old: dict[str, bytes]) -> None:
    """The others need not come to their end to notice."""
    ended = ranks(2, tmp_path, slow_and_killed, tmp_path)
    assert ended[1].signal == signal.SIGKILL
    assert "its process gone" in str(ended[0].error)
    assert since(tmp_path, ended[0]) < 10
    assert files(tmp_path / "out") == old


def slow_and_killed(rank: int, folder: Path) -> None:
    real = writing.pwrite

    def slow(*args: Any) -> int:
        time.sleep(0.2)  # a write of minutes: 30 pieces and more
        return real(*args)

    if rank == 0:
        writing.pwrite = slow
    guarded(rank, folder, "killed 1")


@pytest.mark.parametrize("what", ["killed", "killed-before-rename", "killed-after-rename"])
def test_rank_0_killed(what: str, tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(2, tmp_path, guarded, tmp_path, f"{what} 0")
    assert ended[0].signal == signal.SIGKILL
    assert since(tmp_path, ended[1]) < 10
    if what == "killed-after-rename":
        assert type(ended[1].error) is errors.DurabilityUncertainError
        assert files(tmp_path / "out") != old
        assert len(tensors(tmp_path / "out")) == len(tensors(tmp_path / "8"))
    else:
        assert type(ended[1].error) is errors.PeerFailedError
        assert "rank 0" in str(ended[1].error)
        assert files(tmp_path / "out") == old
    again(tmp_path)


def test_a_rank_killed_after_its_report_is_not_missed(tmp_path: Path, old: dict[str, bytes]) -> None:
    """Its bytes are on the disk and counted; what is published is whole."""
    ended = ranks(2, tmp_path, guarded, tmp_path, "killed-after-report 1")
    assert ended[1].signal == signal.SIGKILL
    if ended[0].error is None:
        assert files(tmp_path / "out") != old
    else:
        assert type(ended[0].error) is errors.PeerFailedError
        assert files(tmp_path / "out") == old


def test_a_rank_that_stops(tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(4, tmp_path, guarded, tmp_path, "stopped 1", stopped=[1])
    for rank in (0, 2, 3):
        error = ended[rank].error
        assert type(error) is errors.PeerTimeoutError, error
        assert "rank 1" in str(error)
        assert since(tmp_path, ended[rank]) < 10
    assert files(tmp_path / "out") == old
    assert nothing_left(tmp_path)


IMPATIENT = 1.5  # seconds, in the one rank that waits for the sleeper: who sleeps finds nobody gone


def wakes(rank: int, folder: Path) -> None:
    """Rank 1 stops, is given up, and wakes when the next save has begun under the same names."""
    if rank == 1:
        real = writing.reopen

        def reopen(*args: Any) -> int:
            (folder / "asleep").touch()
            while not (folder / "awake").exists():  # as a stopped process: without a beat
                time.sleep(0.01)
            return real(*args)

        writing.reopen = reopen
        peers_module.Peers._beat = lambda self, stop: None  # type: ignore[method-assign]
    else:
        peers_module.SILENCE = IMPATIENT
    guarded(rank, folder, "nothing 0")


def test_a_rank_that_wakes_finds_nothing_to_write_to(tmp_path: Path, old: dict[str, bytes]) -> None:
    from restow.publish import Staging

    run = start(2, tmp_path, wakes_and_says, tmp_path)
    while not (tmp_path / "given up").exists():
        time.sleep(0.01)

    file = next(n for n in old if n.endswith(".safetensors"))
    with Staging(tmp_path / "out", size=10, count=2, replace=True) as staging:
        staging.create(file, 4)
        (tmp_path / "awake").touch()
        ended = run.ended()
        assert (staging.place.staging / file).read_bytes() == b"\0" * 4
        staging.write(file, 0, b"mine")
        staging.finish()
    assert type(ended[0].error) is errors.PeerTimeoutError
    assert isinstance(ended[1].error, errors.PeerFailedError | errors.PeerTimeoutError), ended[1].error
    assert (tmp_path / "out" / file).read_bytes() == b"mine"


def wakes_and_says(rank: int, folder: Path) -> None:
    try:
        wakes(rank, folder)
    finally:
        if rank == 0:
            (folder / "given up").touch()


def sleeps_through_the_end(rank: int, folder: Path) -> None:
    """Rank 0 stops while it syncs, is given up, and wakes."""
    if rank == 0:
        real = writing.sync_folder

        def sync_folder(*args: Any) -> None:
            while not (folder / "awake").exists():
                time.sleep(0.01)
            real(*args)

        writing.sync_folder = sync_folder
        peers_module.Peers._beat = lambda self, stop: None  # type: ignore[method-assign]
    else:
        peers_module.SILENCE = IMPATIENT
    try:
        guarded(rank, folder, "nothing 0")
    finally:
        (folder / "awake").touch()


def test_a_first_rank_that_wakes_publishes_nothing(tmp_path: Path, old: dict[str, bytes]) -> None:
    """The others have said that the old checkpoint is as it was: so it is."""
    ended = ranks(2, tmp_path, sleeps_through_the_end, tmp_path)
    assert type(ended[1].error) is errors.PeerTimeoutError
    assert "rank 0" in str(ended[1].error)
    assert type(ended[0].error) is errors.PeerTimeoutError
    assert "it given up by the others" in str(ended[0].error)
    assert files(tmp_path / "out") == old
    assert nothing_left(tmp_path)


def late(rank: int, folder: Path, seconds: float) -> None:
    if rank == 1:
        time.sleep(seconds)
    guarded(rank, folder, "nothing 0")


@pytest.mark.slow
def test_a_rank_that_comes_late(tmp_path: Path, old: dict[str, bytes]) -> None:
    """Later than a silent rank would be given up: the save is whole, and the new one."""
    values(ranks(2, tmp_path, late, tmp_path, peers_module.SILENCE + 2))
    assert files(tmp_path / "out").keys() == old.keys() and files(tmp_path / "out") != old
    assert restow.verify(tmp_path / "out").equal
    assert nothing_left(tmp_path)


def test_what_counts_as_late_and_what_as_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock that it is given: a rank that has not come has longer than one that came and beats no more."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        store = dist.FileStore(str(tmp_path / "store"), 2)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        peers = peers_module.Peers(None, alone=False)
        peers._look(1, "holds", 0.0)
        peers._look(1, "holds", peers_module.LATE - 1)
        with pytest.raises(
            errors.PeerTimeoutError, match="expected rank 1 to come, found it has not in 300 s"
        ):
            peers._look(1, "holds", peers_module.LATE + 1)
        assert peers._store is not None
        for now in (400.0, 400.0 + peers_module.SILENCE - 1, 400.0 + 2 * peers_module.SILENCE - 2):
            peers._store.add("beat/1", 1)
            peers._look(1, "holds", now)
        peers._look(1, "holds", now + peers_module.SILENCE - 0.1)
        with pytest.raises(
            errors.PeerTimeoutError, match="a sign of rank 1 before 'holds', found none for 6 s"
        ):
            peers._look(1, "holds", now + peers_module.SILENCE + 0.1)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_never_comes_is_named(tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(2, tmp_path, never_alone, tmp_path)
    assert type(ended[0].error) is errors.PeerTimeoutError
    assert "expected rank 1 to come, found it has not in 0.5 s" in str(ended[0].error)
    assert files(tmp_path / "out") == old


def never_alone(rank: int, folder: Path) -> None:
    peers_module.LATE, peers_module.LINGER = 0.5, 0.1  # nobody else is there to hear
    mesh = init_device_mesh("cpu", (2,))
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    try:
        if rank == 0:
            restow.save(state, folder / "out", like=folder / "8", replace=True)
    finally:
        (folder / f"ended {rank}").touch()
    while not (folder / "ended 0").exists():
        time.sleep(0.01)


def other_disk(rank: int, folder: Path) -> None:
    """Rank 1 sees a folder of the same name without what rank 0 wrote: as if it were its own disk."""
    sharing.PATIENCE = 0.5
    if rank == 1:
        real = os.open

        def mine(path: Any, *args: Any, **words: Any) -> int:
            if str(path).endswith(".partial") or "partial" in Path(str(path)).name:
                (folder / "private").mkdir(exist_ok=True)
                (folder / "private" / sharing.WITNESS).write_text("another attempt")
                path = folder / "private"
            return real(path, *args, **words)

        sharing.os.open = mine  # type: ignore[attr-defined]
    guarded(rank, folder, "nothing 0")


def test_ranks_with_other_disks(tmp_path: Path, old: dict[str, bytes]) -> None:
    ended = ranks(2, tmp_path, other_disk, tmp_path)
    assert type(ended[1].error) is errors.DestinationError
    assert "expected the staging folder of rank 0 on every rank, found another disk" in str(ended[1].error)
    assert type(ended[0].error) is errors.PeerFailedError
    assert files(tmp_path / "out") == old
    again(tmp_path)


# Nodes.


NODES = [
    (model, placements, page)
    for model in (EIGHT, TEN)
    for placements in ([S0], [S1], [R, S0], [S0, S1])
    for page in (256, 4096)
]
SOME = [case for number, case in enumerate(NODES) if number % 3 == 0]
MORE = [case for number, case in enumerate(NODES) if number % 3]


def on_nodes(rank: int, folder: Path, cases: Sequence[tuple[Model, list[Any], int]]) -> list[tuple[int, int]]:
    """Two nodes of two ranks; counts the spilled bytes too."""
    together.machine = lambda: f"node {rank // 2}"
    spilled: list[int] = []
    real = together.PagedWrites._spill
    together.PagedWrites._spill = lambda self, owner, file, offset, data: (  # type: ignore[method-assign]
        spilled.append(len(data)), real(self, owner, file, offset, data),
    )  # fmt: skip
    out = []
    for case, (model, placements, page) in enumerate(cases):
        mesh = init_device_mesh("cpu", (2, 2) if len(placements) == 2 else (4,))
        state = distributed(model.spelled("grouped"), mesh, placements)
        spilled.clear()
        report = save(state, folder / f"out {case}", like=folder / str(model.e), page_bytes=page)
        out.append((report.bytes_written, sum(spilled)))
    return out


@pytest.mark.parametrize("cases", [SOME, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_several_nodes_on_a_network_file_system(
    cases: Sequence[tuple[Model, list[Any], int]], tmp_path: Path
) -> None:
    for model in (EIGHT, TEN):
        written(model, tmp_path)
    found = values(ranks(4, tmp_path, on_nodes, tmp_path, cases))
    for case, ((model, *words), *parts) in enumerate(zip(cases, *found, strict=True)):
        source = tmp_path / str(model.e)
        assert files(tmp_path / f"out {case}") == files(source), words
        assert sum(own for own, _ in parts) == sum(t.nbytes for t in tensors(source).values()), words
        assert any(spilled for _, spilled in parts), f"{words}: pages were shared"
    assert nothing_left(tmp_path)
