"""What a load really reads and writes: counted at the one door to files, and by counters as destinations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.testing._internal.distributed.fake_pg import FakeStore

import restow
from moe import AT, Model, Tensors, differing, painted, write
from restow.errors import MissingTensorError, UnexpectedTensorError
from restow.files import SourceFile, open_source
from restow.plans import Plan
from restow.reads import merged
from restow.torch import read, rows
from restow.torch.jobs import LEAST, PIECE, Job, Queue, Streams
from restow.torch.sources import Files
from restow.torch.transpose import entry_for

SMALL = Model()
FORMS = [
    "split",
    "fused",
    "grouped",
    "stacked",
    "torchtitan",
    "epfd",
    "megatron",
    "megatron_sequential",
    "mlx",
]
Reads = list[tuple[str, int, int]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Every read of data, as (file, begin, end)."""
    found: Reads = []
    before = SourceFile.preadv

    def counted(source: SourceFile, offset: int, buffers: Sequence[memoryview]) -> int:
        count = before(source, offset, buffers)
        found.append((Path(source.path).name, offset, offset + count))
        return count

    monkeypatch.setattr(SourceFile, "preadv", counted)
    return found


# Own bytes only.


@pytest.mark.parametrize("src", ["split", "fused", "grouped"])
@pytest.mark.parametrize("dst", FORMS)
def test_what_is_read_is_what_was_planned(src: str, dst: str, tmp_path: Path, seen: Reads) -> None:
    source = SMALL.written(tmp_path, src)
    for shard in (None, restow.Shard("e", 1, 3), restow.Shard("f", 1, 2), restow.Shard("d", 0, 3)):
        plan = restow.plan(source, layout=dst, shard=shard)
        into = {t.name: torch.empty(t.local_shape, dtype=torch.bfloat16) for t in plan.targets}
        seen.clear()
        report = restow.load(source, into, shard=shard)
        assert merged(sorted(seen)) == plan.reads
        assert sum(end - begin for _, begin, end in seen) == plan.bytes == report.bytes_read


@pytest.mark.parametrize("src", ["split", "fused"])
@pytest.mark.parametrize("of", [1, 3, 8, 11])
def test_ranks_read_each_byte_of_each_expert_once(src: str, of: int, tmp_path: Path, seen: Reads) -> None:
    source = restow.open(SMALL.written(tmp_path, src))
    experts = source.expert_tensors
    for rank in range(of):
        shard = restow.Shard("e", rank, of)
        targets = restow.plan(source, shard=shard).targets
        restow.load(source, {t.name: torch.empty(t.local_shape) for t in targets}, shard=shard)
    times: dict[str, torch.Tensor] = {}
    for file, begin, end in seen:
        counts = times.setdefault(file, torch.zeros((tmp_path / file).stat().st_size, dtype=torch.int32))
        counts[begin:end] += 1
    for name, entry in source.tensors.items():
        piece = entry.pieces[0]
        assert (times[piece.file][piece.begin : piece.end] == (1 if name in experts else of)).all(), name


# Counters.


@pytest.fixture
def adding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Destinations add up what is written to them: an element that is written twice holds twice its value."""
    straight: list[int] = []
    before, due = SourceFile.preadv, read._Worker._read_due

    def into_counters(source: SourceFile, offset: int, buffers: Sequence[memoryview]) -> int:
        if not straight:
            return before(source, offset, buffers)
        fresh = [bytearray(len(buffer)) for buffer in buffers]
        count = before(source, offset, fresh)
        for buffer, data in zip(buffers, fresh, strict=True):
            torch.frombuffer(buffer, dtype=torch.uint8).add_(torch.frombuffer(data, dtype=torch.uint8))
        return count

    def marked(worker: Any) -> int:
        straight.append(1)
        try:
            return due(worker)
        finally:
            straight.clear()

    monkeypatch.setattr(SourceFile, "preadv", into_counters)
    monkeypatch.setattr(read._Worker, "_read_due", marked)
    monkeypatch.setattr(read, "move", lambda to, tile: to.view(torch.int16).add_(tile.view(torch.int16)))
    monkeypatch.setattr(read._Worker, "_whole_rows", lambda worker, job: 0)  # those are moved one by one


ONCE = 0x0101  # a count of one in each byte of an element


def counters(tensors: Tensors, count: int) -> Tensors:
    return {n: torch.full(t.shape, count, dtype=torch.int16).view(torch.bfloat16) for n, t in tensors.items()}


@pytest.mark.parametrize("src", ["split", "fused", "grouped"])
@pytest.mark.parametrize("dst", FORMS)
def test_every_counter_is_one(src: str, dst: str, tmp_path: Path, adding: None) -> None:
    """A source of ones over zeros: ones everywhere in the end, for every layout and part."""
    source = write(tmp_path, counters(SMALL.spelled(src), ONCE), SMALL.config, files=2)
    for shard in (None, restow.Shard("e", 1, 3), restow.Shard("f", 1, 4), restow.Shard("d", 1, 3)):
        targets = restow.plan(source, layout=dst, shard=shard).targets
        like = {t.name: torch.empty(t.local_shape) for t in targets}
        into = counters(like, 0)
        restow.load(source, into, threads=1, shard=shard)
        assert differing(into, counters(like, ONCE)) == []


def test_the_counters_can_fail(tmp_path: Path, adding: None) -> None:
    source = write(tmp_path, counters(SMALL.spelled("split"), ONCE), SMALL.config)
    for layout in ("fused", "grouped"):
        into = counters(SMALL.spelled(layout), 0)
        for _ in range(2):
            restow.load(source, into, threads=1)
        assert differing(into, counters(into, 2 * ONCE)) == []


# One expert missing.


@pytest.mark.parametrize("part", ["shard", "experts"])
def test_the_rank_that_needs_a_missing_expert_raises_and_others_load(
    part: str, tmp_path: Path, seen: Reads
) -> None:
    tensors = SMALL.spelled("split", others=False)
    lost = f"{AT.format(1)}.5.up_proj.weight"
    del tensors[lost]
    source = write(tmp_path, tensors, SMALL.config)
    for rank in range(4):
        mine = [2 * rank, 2 * rank + 1]
        options: dict[str, Any] = (
            {"shard": restow.Shard("e", rank, 4)} if part == "shard" else {"experts": mine}
        )
        wanted = SMALL.spelled("grouped", others=False, take=mine)
        into = painted(wanted)
        seen.clear()
        if rank != 2:
            report = restow.load(source, into, **options)
            assert sorted(report.in_place) == sorted(wanted)
            assert differing(into, wanted) == []
            continue
        with pytest.raises(MissingTensorError) as caught:
            restow.load(source, into, **options)
        assert f"\n  missing   {lost}\n" in str(caught.value)
        assert seen == []
        assert differing(into, painted(wanted)) == []


# Ranks without processes: DTensors of a mesh of which only one rank is there.


@pytest.fixture
def mesh_of() -> Iterator[Any]:
    yield rank_of
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank_of(rank: int, world: int) -> Any:
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    return init_device_mesh("cpu", (world,), mesh_dim_names=(f"ep{rank}",))


@pytest.mark.parametrize(("experts", "world"), [(160, 24), (10, 24), (10, 4)])
def test_uneven_experts_on_many_ranks(
    experts: int, world: int, tmp_path: Path, mesh_of: Any, seen: Reads
) -> None:
    """Each against `distribute_tensor` of the whole; together every expert once."""
    model = SMALL.but(e=experts, f=2, d=4, layers=1)
    source = model.written(tmp_path)
    whole = model.spelled("grouped", others=False)
    held = []
    for rank in range(world):
        mesh = mesh_of(rank, world)
        into: dict[str, torch.Tensor] = {name: torch.empty_like(t) for name, t in model.others.items()}
        wanted = {name: distribute_tensor(t, mesh, [Cut(0)], src_data_rank=None) for name, t in whole.items()}
        into |= {name: torch.zeros_like(t) for name, t in wanted.items()}
        report = restow.load(source, into)
        assert differing(local(into), {**local(wanted), **model.others}) == []
        names = [name for name in whole if wanted[name].to_local().numel()]
        assert set(report.in_place) == {*names, *model.others}
        held.append(len(into[f"{AT.format(0)}.down_projs"].to_local()))  # type: ignore[attr-defined]
    each = -(-experts // world)
    assert held == [min(each, max(0, experts - each * rank)) for rank in range(world)]
    assert sum(held) == experts
    expert_bytes = sum(t.nbytes for t in whole.values())
    other_bytes = sum(t.nbytes for t in model.others.values())
    assert sum(end - begin for _, begin, end in seen) == expert_bytes + world * other_bytes


def local(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}


# Layers past the last one: multi-token prediction.


def mtp(tmp_path: Path, *, held: bool) -> tuple[Path, Model]:
    """deepseek_v3 of two layers by its config; with `held` the files have a third, the prediction block."""
    model = SMALL.but(family="deepseek_v3", layers=3)
    tensors = model.spelled("split") if held else model.but(layers=2).spelled("split")
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3)} if held else {}
    return write(tmp_path, {**tensors, **extra}, model.but(layers=2).config), model


def test_a_prediction_block_needs_no_place(tmp_path: Path, seen: Reads) -> None:
    source, model = mtp(tmp_path, held=True)
    wanted = model.but(layers=2).spelled("grouped")
    into = painted(wanted)
    report = restow.load(source, into)
    assert differing(into, wanted) == []
    assert report.unused == ()
    assert report.bytes_read == sum(t.nbytes for t in wanted.values()), "and costs nothing"
    assert all(".layers.2." in name for name in restow.plan(source, into).passed)


def test_a_prediction_block_that_is_wanted_is_filled(tmp_path: Path) -> None:
    source, model = mtp(tmp_path, held=True)
    wanted = {**model.spelled("grouped"), "model.layers.2.eh_proj.weight": torch.ones(3)}
    into = painted(wanted)
    restow.load(source, into)
    assert differing(into, wanted) == []


def test_a_prediction_block_that_is_not_there_is_missing_by_name(tmp_path: Path) -> None:
    source, model = mtp(tmp_path, held=False)
    into = painted(model.spelled("grouped"))
    with pytest.raises(MissingTensorError) as caught:
        restow.load(source, into)
    missing = sorted(name for name in into if ".layers.2." in name)
    assert missing
    assert all(name in str(caught.value) for name in missing)
    report = restow.load(source, into, allow_missing=["model.layers.2.*"])
    assert sorted(report.missing) == missing


# Names.


def test_rename_on_load(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path)
    wanted = {
        name.replace("model.", "net.", 1)
        .replace(".mlp.gate.", ".moe.router.")
        .replace(".mlp.", ".moe."): tensor
        for name, tensor in SMALL.spelled("grouped").items()
    }
    into = painted(wanted)
    table = {
        "model.layers.{}.mlp.gate.weight": "net.layers.{}.moe.router.weight",
        "model.layers.{}.mlp.experts.{}.gate_proj.weight": "net.layers.{}.moe.experts.gate_and_up_projs",
        "model.layers.{}.mlp.experts.{}.up_proj.weight": "net.layers.{}.moe.experts.gate_and_up_projs",
        "model.layers.{}.mlp.experts.{}.down_proj.weight": "net.layers.{}.moe.experts.down_projs",
        "model.embed_tokens.weight": "net.embed_tokens.weight",
        "model.norm.weight": "net.norm.weight",
    }  # fmt: skip
    report = restow.load(source, into, rename=table)
    assert sorted(report.in_place) == sorted(wanted)
    assert differing(into, wanted) == []
    runs = {
        name.replace(".moe.router.", ".mlp.gate.").replace(".moe.", ".mlp."): t for name, t in into.items()
    }
    restow.load(source, runs, rename=[("model", "net")])
    with pytest.raises((MissingTensorError, UnexpectedTensorError)):
        restow.load(source, runs)


# Network file systems.


@pytest.mark.parametrize("dst", ["grouped", "fused"])
def test_on_a_network_what_a_thread_takes_is_asked_for_in_one_piece(
    dst: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SMALL.written(tmp_path, files=1)
    plan = restow.plan(source, layout=dst)
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        SourceFile,
        "announce",
        lambda file, begin, count: asked.append((Path(file.path).name, begin, begin + count)),
    )

    def load(network: bool | None) -> Tensors:
        asked.clear()
        into = {t.name: torch.full(t.local_shape, -1, dtype=torch.bfloat16) for t in plan.targets}
        assert restow.load(source, into, threads=1, network=network).bytes_read == plan.bytes
        return into

    local = load(None)
    assert asked == []
    assert differing(load(True), local) == [] and tuple(asked) == plan.reads and len(asked) == 1
    monkeypatch.setattr("restow.torch.load.on_network", lambda folder: folder == source)
    assert differing(load(None), local) == [] and len(asked) == 1
    load(False)
    assert asked == []


@pytest.mark.parametrize("cold", [False, True])
def test_from_a_disk_more_threads_read_longer_runs_through_descriptors_of_their_own(
    cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SMALL.written(tmp_path)
    plan = restow.plan(source)
    into = {t.name: torch.full(t.local_shape, -1, dtype=torch.bfloat16) for t in plan.targets}
    made: list[tuple[Any, ...]] = []
    before = read._takes

    def noted(plan: Plan, workers: int, cold: bool, large: bool) -> Any:
        made.append((workers, cold))
        return before(plan, workers, cold, large)

    files: list[object] = []
    monkeypatch.setattr(read, "_takes", noted)
    monkeypatch.setattr(read, "default_threads", lambda: 3)
    monkeypatch.setattr(read, "Files", lambda *a: files.append(Files(*a)) or files[-1])
    monkeypatch.setattr(SourceFile, "at_hand", lambda file, offset: not cold)
    assert restow.load(source, into).bytes_read == plan.bytes
    assert made == [(read.READERS, True) if cold else (3, False)]
    assert len(files) == (read.READERS if cold else 1)
    assert restow.load(source, into, threads=2).bytes_read == plan.bytes
    assert made[1][0] == 2, "who says how many threads gets as many"


@pytest.mark.parametrize(("error", "there"), [(None, True), (BlockingIOError, False), (OSError, True)])
def test_what_is_at_hand(
    error: type[OSError] | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    read_now = os.preadv

    def preadv(*arguments: Any) -> int:
        if error is not None:
            raise error
        return read_now(*arguments[:3])

    with open_source(tmp_path / "file") as source:
        monkeypatch.setattr("restow.files.os.preadv", preadv)
        assert source.at_hand(2) is there


def test_large_tiles_stay_within_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    before = read._Worker.__init__

    def noted(worker: Any, *arguments: Any) -> None:
        limits.append(arguments[4])
        before(worker, *arguments)

    monkeypatch.setattr(read._Worker, "__init__", noted)
    source = SMALL.written(tmp_path)
    into = {t.name: torch.empty(t.local_shape) for t in restow.plan(source).targets}
    for threads in (1, 2, 6, 30):
        limits.clear()
        restow.load(source, into, threads=threads, network=True)
        assert len(set(limits)) == 1 and limits[0] >= read.TILE
        assert limits[0] * len(limits) <= read.WINDOW or limits[0] == read.TILE
    restow.load(source, into, threads=1, network=True)
    assert limits[-1] == read.JOB


def test_threads_take_less_towards_the_end() -> None:
    sizes = [3 << 20] * 60 + [100] * 1000
    queue = Queue((Job(i, (), 0, 1, n) for i, n in enumerate(sizes)), sum(sizes), 2)
    taken = list(iter(queue.take, []))
    assert [job.number for jobs in taken for job in jobs] == list(range(len(sizes)))  # each once, in order
    room = [sum(job.size for job in jobs) for jobs in taken]
    assert room[0] == 15 << 20  # five whole ones in 16 MiB
    assert all(size <= max(LEAST, 3 << 20, sum(room[i:]) // 4) for i, size in enumerate(room))
    assert len(taken[-1]) > 100, "what is small is taken together"


def test_from_a_disk_each_thread_reads_a_run_of_its_own_and_helps_when_it_is_done() -> None:
    sizes = [3 << 20] * 60 + [0, 20 << 20, 5] + [100] * 1000
    streams = Streams([Job(i, (), 0, 1, n) for i, n in enumerate(sizes)], 4)
    first = [streams.take(worker) for worker in range(4)]
    begins = [sum(sizes[: jobs[0].number]) * 4 / sum(sizes) for jobs in first]
    assert [round(begin) for begin in begins] == [0, 1, 2, 3], "a quarter apart"
    assert all(sum(job.size for job in jobs) <= PIECE for jobs in first)
    rest = list(iter(lambda: streams.take(2), []))
    own = [jobs[0].number for jobs in rest if first[2][0].number < jobs[0].number < first[3][0].number]
    assert own == sorted(own) and own == [jobs[0].number for jobs in rest][: len(own)], (
        "its own first, in order"
    )
    assert sorted(job.number for jobs in [*first, *rest] for job in jobs) == list(range(len(sizes)))
    assert [streams.take(worker) for worker in range(4)] == [[]] * 4
    assert Streams([], 3).take(1) == []
    few = Streams([Job(0, (), 0, 1, 5)], 3)
    assert sorted(len(few.take(worker)) for worker in (1, 2, 0)) == [0, 0, 1]


# Whole rows.


@pytest.mark.parametrize("order", [("gate", "up", "down"), ("down", "up", "gate"), ("gate", "down", "up")])
@pytest.mark.parametrize("room", [read.WINDOW, 1])
def test_matrices_that_share_rows_are_written_together(
    order: Sequence[str], room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are neighbours in their file, in either order, and memory holds them; else one by one, all alike."""
    if entry_for(2) is None:
        pytest.skip("this build of torch has no such function")
    e, f, d = 3, 40, 72
    names = [f"{AT.format(0)}.{n}.{p}_proj.weight" for n in range(e) for p in order]
    ramp = torch.arange(f * d, dtype=torch.int16)
    tensors = {
        n: (ramp + 100 * i).view(torch.bfloat16).view((d, f) if "down" in n else (f, d))
        for i, n in enumerate(names)
    }
    index = {
        names[i]: f"m-{i}.safetensors" for i in range(len(names))
    }  # files by name: their order is this one
    for name, file in index.items():
        save_file({name: tensors[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    opened = restow.open(tmp_path, layout="split", family="qwen3_moe")
    into = {f"{AT.format(0)}.gate_and_up_projs": torch.full((e, d, 2 * f), -1, dtype=torch.bfloat16)}
    into |= {f"{AT.format(0)}.down_projs": torch.full((e, f, d), -1, dtype=torch.bfloat16)}
    taken: list[int] = []
    before = read._Worker._whole_rows

    def counted(worker: Any, job: Any) -> int:
        done = before(worker, job)
        taken.append(1 + len(job.beside) if done else 0)
        return done

    monkeypatch.setattr(read._Worker, "_whole_rows", counted)
    monkeypatch.setattr(read, "WINDOW", room)
    report = restow.load(opened, into, threads=1, layout="grouped")
    assert report.bytes_read == 3 * e * f * d * 2
    both, down = into.values()
    for n in range(e):
        at = f"{AT.format(0)}.{n}"
        assert torch.equal(both[n, :, :f], tensors[f"{at}.gate_proj.weight"].t())
        assert torch.equal(both[n, :, f:], tensors[f"{at}.up_proj.weight"].t())
        assert torch.equal(down[n], tensors[f"{at}.down_proj.weight"].t())
    pairs = order[1] != "down" and room > 1
    assert sorted(taken) == (
        [0] * (e if order[1] == "down" else 2 * e) if room == 1 else [1] * e + [2] * e * pairs
    )


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_rows_are_filled_in_blocks(parts: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_for(width)
    if entry is None:
        pytest.skip("this build of torch has no such function")
    monkeypatch.setattr(rows, "ROOM", 1)  # blocks of 64 rows, and a last one of 6
    source = np.random.default_rng(5).integers(0, 99, (parts, 33, 134)).astype(f"u{width}")
    out = np.full((136, parts * 33), 255, f"u{width}")
    room = np.zeros(rows.block(parts * 33 * width), np.uint8)
    tile = source.ctypes.data
    rows.fill_rows(entry, out[1:].ctypes.data, tile, (parts * 33, 134), width, room.ctypes.data)
    assert np.array_equal(out[1:-1], np.concatenate([one.T for one in source], axis=1))
    assert (out[[0, -1]] == 255).all(), "nothing around it"
