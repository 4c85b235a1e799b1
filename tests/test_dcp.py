"""Distributed Checkpoint, the real one, over Hugging Face folders: native names in the state, hub files on the disk."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

import restow
import restow.dcp
import tiny
from moe import AT, Model, differing
from restow import errors, writing
from restow.dcp import Reader, Writer
from restow.files import SourceFile
from save_ranks import ranks, values
from test_load_ranks import blank, distributed, locals_of, module_of
from test_save import files, nothing_left, tensors
from test_save_ranks import written

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
EIGHT = Model(e=8, f=6, d=12, layers=2)
TEN, THREE = EIGHT.but(e=10), EIGHT.but(e=3)
Case = tuple[str, Model, str, Sequence[int], Sequence[Any]]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FOUR: list[Case] = [
    ("ep", EIGHT, "grouped", [4], [S0]),
    ("uneven", TEN, "grouped", [4], [S0]),
    ("fewer experts than ranks", THREE, "grouped", [4], [S0]),
    ("replicated", EIGHT, "grouped", [4], [R]),
    ("through gate and up", EIGHT, "fused", [4], [S1]),
    ("stacked", EIGHT, "stacked", [4], [S2]),
    ("ep and ep_shard", EIGHT, "grouped", [2, 2], [S0, S1]),
    ("hsdp", EIGHT, "grouped", [2, 2], [R, S0]),
    ("hsdp inner", TEN, "grouped", [2, 2], [S0, R]),
    ("fsdp over ep", EIGHT, "grouped", [2, 2], [_StridedShard(0, split_factor=2), S0]),
]


class Bytes:
    """Counts the bytes that this process reads from files of tensors."""

    def __init__(self) -> None:
        self.count = 0
        real = SourceFile.preadv

        def preadv(file: SourceFile, offset: int, buffers: Any) -> int:
            got = real(file, offset, buffers)
            self.count += got
            return got

        SourceFile.preadv = preadv  # type: ignore[method-assign]


# Reading.


def read_all(rank: int, folder: Path, cases: Sequence[Case]) -> list[tuple[str, list[str], int, int]]:
    out = []
    counter = Bytes()
    for name, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        wanted = distributed(model.spelled(layout), mesh, placements)
        state = blank(wanted, 0x5A)
        planned = restow.plan(folder / str(model.e), state).bytes
        counter.count = 0
        dcp.load(state, storage_reader=Reader(folder / str(model.e), layout=layout))
        out.append((name, differing(locals_of(state), locals_of(wanted)), counter.count, planned))
    return out


def test_plain_dcp_load_fills_dtensors_from_split_files(tmp_path: Path) -> None:
    for _, model, *_ in FOUR:
        written(model, tmp_path)
    found = values(ranks(4, tmp_path, read_all, tmp_path, FOUR))
    for reports in zip(*found, strict=True):
        name = reports[0][0]
        assert [wrong for _, wrong, *_ in reports] == [[]] * 4, name
        for _, _, count, planned in reports:
            assert count == planned, f"{name}: own bytes only"


def read_modules(rank: int, folder: Path) -> list[list[str]]:
    """FSDP2 alone and over EP, through the state dict that DCP's users pass."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    out = []
    for way in ("fsdp", "ep"):
        full = EIGHT.spelled("grouped")
        zeros = {n: torch.zeros_like(t) for n, t in full.items()}
        module = module_of(distributed(zeros, mesh["ep"], [S0]) if way == "ep" else zeros)
        fully_shard(module, mesh=mesh["fsdp"] if way == "ep" else None)
        state = get_model_state_dict(module)
        dcp.load(state, storage_reader=Reader(folder / "8"))
        other = {n: p for n, p in module.named_parameters() if isinstance(p, DTensor)}
        again = blank(other, 0)
        restow.load(folder / "8", again)
        out.append(differing(locals_of(other), locals_of(again)))
    return out


def apart(rank: int, folder: Path, model: Model) -> list[str]:
    """Rows that are not neighbours are read as they lie; on the way out DCP refuses what it takes for overlaps."""
    mesh = init_device_mesh("cpu", (2, 2))
    wanted = distributed(model.spelled("grouped"), mesh, [S0, _StridedShard(0, split_factor=2)])
    state = blank(wanted, 0x5A)
    dcp.load(state, storage_reader=Reader(folder / str(model.e)))
    wrong = differing(locals_of(state), locals_of(wanted))
    with pytest.raises(CheckpointException):
        dcp.save(state, storage_writer=Writer(folder / "out", like=folder / str(model.e)))
    return wrong


@pytest.mark.parametrize("model", [EIGHT, TEN], ids=["8", "10"])
def test_rows_that_are_no_neighbours(model: Model, tmp_path: Path) -> None:
    written(model, tmp_path)
    assert values(ranks(4, tmp_path, apart, tmp_path, model)) == [[]] * 4
    assert not (tmp_path / "out").exists()


def test_fully_sharded_modules(tmp_path: Path) -> None:
    """Against `restow.load`, whose values are tested against fully_shard's own elsewhere."""
    written(EIGHT, tmp_path)
    assert values(ranks(4, tmp_path, read_modules, tmp_path)) == [[[], []]] * 4


@pytest.mark.parametrize("layout", [None, "grouped", "fused", "stacked", "split"])
def test_one_process(layout: str | None, tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    wanted = EIGHT.spelled(layout or "grouped")
    state = blank(wanted, 0x5A)
    dcp.load(state, storage_reader=Reader(source, layout=layout))
    assert differing(state, wanted) == []


def test_a_part_of_the_state_and_other_dtypes(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    wanted = {n: t.float() for n, t in EIGHT.spelled("grouped").items() if "layers.1" in n}
    state = {n: torch.zeros_like(t) for n, t in wanted.items()}
    dcp.load(state, storage_reader=Reader(source))
    assert differing(state, wanted) == []


def test_renames(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    wanted = {n.replace("model.layers", "blocks"): t for n, t in EIGHT.spelled("grouped").items()}
    state = blank(wanted, 0)
    dcp.load(state, storage_reader=Reader(source, rename=[("model.layers", "blocks")]))
    assert differing(state, wanted) == []


def test_the_metadata_is_of_whole_native_tensors(tmp_path: Path) -> None:
    found = Reader(EIGHT.written(tmp_path / "8")).read_metadata().state_dict_metadata
    assert {name: tuple(one.size) for name, one in found.items()} == {  # type: ignore[union-attr]
        name: tuple(t.shape) for name, t in EIGHT.spelled("grouped").items()
    }
    assert {len(one.chunks) for one in found.values()} == {1}  # type: ignore[union-attr]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    state = blank(EIGHT.spelled("grouped"), 0)
    with pytest.raises((CheckpointException, RuntimeError), match=r"model\.more"):
        dcp.load({**state, "model.more": torch.zeros(2)}, storage_reader=Reader(source))
    with pytest.raises((CheckpointException, RuntimeError), match="step"):
        dcp.load({**state, "step": 3}, storage_reader=Reader(source))
    name = f"{AT.format(0)}.down_projs"
    with pytest.raises((CheckpointException, ValueError), match="down_projs"):
        dcp.load({**state, name: torch.zeros(8, 3, 3)}, storage_reader=Reader(source))
    with pytest.raises(CheckpointException, match="nowhere") as caught:
        dcp.load(state, storage_reader=Reader(tmp_path / "nowhere"))
    assert type(caught.value.failures[0][0]) is errors.MissingShardError, (
        "the error itself, whatever DCP swallows"
    )
    with pytest.raises(errors.MissingShardError):
        Reader(tmp_path / "nowhere").read_metadata().state_dict_metadata  # noqa: B018
    assert not Reader.validate_checkpoint_id(tmp_path / "nowhere")


def test_a_reader_is_used_again(tmp_path: Path) -> None:
    reader = Reader(EIGHT.written(tmp_path / "8"))
    for model in (EIGHT, TEN):
        state = blank(model.spelled("grouped"), 0)
        dcp.load(state, storage_reader=reader, checkpoint_id=written(model, tmp_path))
        assert differing(state, model.spelled("grouped")) == []


# Writing.


def write_all(rank: int, folder: Path, cases: Sequence[Case], how: str) -> None:
    for name, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        state = distributed(model.spelled(layout), mesh, placements)
        writer = Writer(folder / f"{how} {name}", like=folder / str(model.e))
        if how == "async":
            future = dcp.async_save(state, storage_writer=writer)
            for tensor in locals_of(state).values():
                tensor.zero_()  # training goes on
            future.result()  # type: ignore[union-attr]
        else:
            dcp.save(state, storage_writer=writer)


@pytest.mark.parametrize("how", ["save", "async"])
def test_dcp_saves_files_identical_to_likes(how: str, tmp_path: Path) -> None:
    cases = FOUR if how == "save" else FOUR[:2]
    for _, model, *_ in cases:
        written(model, tmp_path)
    values(ranks(4, tmp_path, write_all, tmp_path, cases, how))
    for name, model, *_ in cases:
        assert files(tmp_path / f"{how} {name}") == files(tmp_path / str(model.e)), name
    assert nothing_left(tmp_path)


def test_one_process_and_a_second_save_with_one_writer(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    writer = Writer(tmp_path / "a", like=source, replace=True)
    state = EIGHT.spelled("grouped")
    dcp.save(state, storage_writer=writer)
    assert files(tmp_path / "a") == files(source)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    dcp.save(state, storage_writer=writer)
    assert differing(tensors(tmp_path / "a"), tensors(source)) == ["model.norm.weight"]
    dcp.save(EIGHT.spelled("grouped"), storage_writer=writer, checkpoint_id=tmp_path / "b")
    assert files(tmp_path / "b") == files(source)


@pytest.mark.parametrize("family_id", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_without_like_transformers_reads_it(family_id: str, tmp_path: Path) -> None:
    model = tiny.build(family_id)
    dcp.save(model.state_dict(), storage_writer=Writer(tmp_path / "out", config=model.config))
    again, info = tiny.reload(tmp_path / "out", family_id)
    assert not any(info.values()), info
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_the_words_of_save(tmp_path: Path) -> None:
    renamed = {n.replace("model.layers", "blocks"): t for n, t in EIGHT.spelled("grouped").items()}
    words: dict[str, Any] = {"family": "qwen3_moe", "rename": [("model.layers", "blocks")]}
    dcp.save(renamed, storage_writer=Writer(tmp_path / "out", layout="fused", max_shard_bytes=999, **words))
    assert differing(tensors(tmp_path / "out"), EIGHT.spelled("fused")) == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    dcp.save(renamed, storage_writer=Writer(tmp_path / "wide", dtype=torch.float32, **words))
    assert {t.dtype for t in tensors(tmp_path / "wide").values()} == {torch.float32}


def refused(state: dict[str, Any], kind: str, text: str, writer: Writer) -> None:
    with pytest.raises((CheckpointException, errors.RestowError)) as caught:
        dcp.save(state, storage_writer=writer)
    assert kind in repr(caught.value) or kind in str(caught.value)
    assert text in str(caught.value)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = EIGHT.written(tmp_path / "8")
    state: dict[str, Any] = dict(EIGHT.spelled("grouped"))
    writer = Writer(tmp_path / "out", like=source)
    refused({**state, "step": 3}, "UsageError", "step, an object", writer)
    refused({**state, "model.more": torch.ones(2)}, "UnexpectedTensorError", "model.more", writer)
    less = {n: t for n, t in state.items() if n != "model.norm.weight"}
    refused(less, "MissingTensorError", "model.norm.weight", writer)
    refused(state, "UnsupportedFamilyError", "say family=", Writer(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(state, "DestinationExistsError", "out", writer)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["8", "out"]
    with pytest.raises(errors.UsageError, match="expected like= alone"):
        Writer(tmp_path / "out", like=source, layout="split")
    assert not Writer.validate_checkpoint_id(tmp_path / "no" / "where")


def test_a_writer_travels(tmp_path: Path) -> None:
    """As to the process of `async_save` that DCP may keep."""
    writer = pickle.loads(pickle.dumps(Writer(tmp_path / "out", family="qwen3_moe")))
    dcp.save(EIGHT.spelled("grouped"), storage_writer=writer)
    assert differing(tensors(tmp_path / "out"), EIGHT.spelled("split")) == []


# Failures.


def failing(rank: int, folder: Path, who: int, replace: bool) -> tuple[str, bool, str]:
    """A save that fails on one rank, then one that does not, to the same place, with a writer of its own."""
    mesh = init_device_mesh("cpu", (2,))
    state = distributed(EIGHT.spelled("grouped"), mesh, [S0])
    real, calls = writing.pwrite, [0]

    def pwrite(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(28, "planted")
        return real(*args)

    if rank == who:
        writing.pwrite = pwrite
    writer = Writer(folder / "out", like=folder / "8", replace=replace, threads=1)
    text = ""
    try:
        dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        text = str(error)
    writing.pwrite = real
    dist.barrier()
    gone = not any(p.name.endswith(".partial") for p in folder.iterdir())
    before = (folder / "out").exists()
    dist.barrier()
    second = Writer(folder / "out", like=folder / "8", replace=replace)
    dcp.save(state, storage_writer=second)
    return text, gone, str(before)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_a_failure_on_one_rank(who: int, replace: bool, tmp_path: Path) -> None:
    source = written(EIGHT, tmp_path)
    if replace:
        restow.save({n: t + 1 for n, t in EIGHT.spelled("grouped").items()}, tmp_path / "out", like=source)
    found = values(ranks(2, tmp_path, failing, tmp_path, who, replace))
    for text, gone, before in found:
        assert "NoSpaceError" in text or "ENOSPC" in text
        assert gone, "the staged files are gone, though the first writer lives"
        assert before == str(replace), "nothing was published"
    assert files(tmp_path / "out") == files(source)
    assert nothing_left(tmp_path)


def test_an_attempt_that_is_dropped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = EIGHT.written(tmp_path / "8")
    writer = Writer(tmp_path / "out", like=source)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_data", lambda *args: 1 / 0)
        with pytest.raises(CheckpointException):
            dcp.save(EIGHT.spelled("grouped"), storage_writer=writer)
    assert not nothing_left(tmp_path)
    del writer
    gc.collect()
    assert nothing_left(tmp_path)


# The other torch.

OLD = os.environ.get("RESTOW_TORCH_2_9", "")  # a python that has torch 2.9, for the job that tests it


@pytest.mark.slow
def test_against_torch_2_9(tmp_path: Path) -> None:
    if not OLD or not shutil.which(OLD):
        pytest.skip("RESTOW_TORCH_2_9 names no python with torch 2.9")
    source = EIGHT.written(tmp_path / "8")
    code = (
        "import sys, torch, torch.distributed.checkpoint as dcp, restow.dcp as r\n"
        "from safetensors.torch import load_file\n"
        "assert torch.__version__.startswith('2.9'), torch.__version__\n"
        "reader = r.Reader(sys.argv[1])\n"
        "state = {n: torch.zeros(m.size, dtype=m.properties.dtype)\n"
        "         for n, m in reader.read_metadata().state_dict_metadata.items()}\n"
        "dcp.load(state, storage_reader=reader, no_dist=True)\n"
        "assert any(t.any() for t in state.values())\n"
        "dcp.save(state, storage_writer=r.Writer(sys.argv[2], like=sys.argv[1]), no_dist=True)\n"
    )
    subprocess.run(
        [OLD, "-W", "ignore", "-c", code, str(source), str(tmp_path / "out")], check=True,
        env={**os.environ, "PYTHONPATH": str(Path(restow.__file__).parent.parent)},
    )  # fmt: skip
    assert files(tmp_path / "out") == files(source)
