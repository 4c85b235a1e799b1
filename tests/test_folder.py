"""Every case of the corpus, through `open_folder`: the class, the fields, the words."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

import restow
from corpus import CASES, Case, rank_file, says, write_rank
from corpus_bytes import CONFIG, E7, INDEX, S1, S2, S3, blob, edit, fill, good, reindex, table, write
from restow import errors
from restow.entries import Entry, Piece
from restow.errors import RestowError
from restow.folder import Folder, open_folder

IDS = {
    **{f"F{i:02}": i not in (12, 13, 34) for i in range(1, 40)},  # 12, 13 need digests, 34 needs the data
    **{f"I{i:02}": True for i in range(1, 23)},
    **{f"R{i:02}": True for i in range(1, 8)},
    **{f"G{i:02}": True for i in range(8)},
    "P01": True,
}


def reaction(case: Case, folder: Path) -> tuple[RestowError | None, Folder | None]:
    """What opening the case gives: the fatal error, else the only finding, else nothing."""
    path = case.build(folder) or folder
    try:
        opened = open_folder(path, **case.options)
    except RestowError as error:
        return error, None
    found = [problem for problem in opened.problems if not problem.fatal]
    assert len(found) == len(opened.problems) <= 1, found
    return (found[0].error if found else None), opened


def judge(case: Case, error: RestowError | None, opened: Folder | None) -> None:
    if case.error is None:
        assert error is None, str(error)
        return
    assert type(error) is case.error, repr(error)
    assert (opened is None) == case.fatal
    text = str(error)
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    for part in case.holds:
        assert says(text, part), (part, text)
    if case.tensor is not None:
        assert error is not None and error.tensor == case.tensor
    if case.file is not None:
        assert error is not None and error.path is not None and error.path.endswith(case.file), error.path


def test_the_table_is_whole() -> None:
    kept = {name.split("_")[0] for name in CASES}
    assert {name for name, wanted in IDS.items() if wanted} <= kept


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_corpus(case: Case, tmp_path: Path) -> None:
    if case.id[0] not in "FIPRG":
        pytest.skip("a level that open_folder does not judge")
    start = time.monotonic()
    judge(case, *reaction(case, tmp_path / case.id))
    assert time.monotonic() - start < 5, "a pipe or a bomb was waited for"
    assert not (tmp_path / case.id / "canary").exists()


@pytest.mark.parametrize("name", ["F24_size_mismatch", "I10_tensor_unlisted", "R03_overlap"])
def test_the_oracle_can_fail(name: str, tmp_path: Path) -> None:
    """The same judge, over a builder that builds something good, something else, or wants other words."""
    case = CASES[name]
    good_case = dataclasses.replace(case, build=CASES["G00_good"].build)
    with pytest.raises(AssertionError):
        judge(good_case, *reaction(good_case, tmp_path / "good"))
    other = dataclasses.replace(case, build=CASES["F01_empty_file"].build)
    with pytest.raises(AssertionError):
        judge(other, *reaction(other, tmp_path / "other"))
    for change in ({"holds": ("not there",)}, {"tensor": "x"}, {"file": "x"}, {"fatal": False}):
        with pytest.raises(AssertionError):
            wrong = dataclasses.replace(case, **change)  # type: ignore[arg-type]
            judge(wrong, *reaction(wrong, tmp_path / next(iter(change))))
    control = dataclasses.replace(CASES["G00_good"], build=case.build)
    with pytest.raises(AssertionError):
        judge(control, *reaction(control, tmp_path / "control"))


def test_entries_lead_to_the_bytes(tmp_path: Path) -> None:
    write(tmp_path, good())
    folder = open_folder(tmp_path)
    wanted = {name: tensor for shard in good().values() for name, tensor in shard.items()}
    assert list(folder.tensors) == list(wanted)
    for name, tensor in wanted.items():
        entry = folder.tensors[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
        (piece,) = entry.pieces
        assert piece.box == tuple((0, size) for size in tensor.shape)
        assert Path(folder.path(piece.file)).read_bytes()[piece.begin : piece.end] == tensor.data
    assert "nothing" not in folder.tensors
    with pytest.raises(KeyError):
        folder.tensors["nothing"]
    assert folder.config == CONFIG
    assert folder.index == INDEX
    assert folder.metadata[S3] == {"format": "pt"}
    assert dict(folder.index_metadata) == {"total_size": sum(len(t.data) for t in wanted.values())}


def test_ranks_make_one_entry(tmp_path: Path) -> None:
    CASES["G07_dcp_shards"].build(tmp_path)
    entry = open_folder(tmp_path).tensors["w"]
    assert entry == Entry("F32", (32, 4), entry.pieces)
    assert [piece.box for piece in entry.pieces] == [((8 * r, 8), (0, 4)) for r in range(4)]
    assert [piece.file for piece in entry.pieces] == [rank_file(r) for r in range(4)]
    for rank, piece in enumerate(entry.pieces):
        assert isinstance(piece, Piece)
        data = (tmp_path / piece.file).read_bytes()[piece.begin : piece.end]
        assert data == fill("F32", (8, 4), rank + 1).data


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_the_real_writer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(3.0), "c": torch.arange(5)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    folder = open_folder(tmp_path)
    assert {name: entry.shape for name, entry in folder.tensors.items()} == {"a": (3, 4), "b": (), "c": (5,)}
    assert "DCP_SHARDING_INFO" in folder.headers[0].metadata


def test_a_grid_of_parts_and_a_part_out_of_bounds(tmp_path: Path) -> None:
    for i, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        info = json.dumps({"w": {"saved_offsets": [row, column]}})
        part = table({"w": fill("F32", (2, 2), i)}, {"DCP_SHARDING_INFO": info})
        (tmp_path / rank_file(i)).write_bytes(blob(*part))
    assert len(open_folder(tmp_path).tensors["w"].pieces) == 4
    with pytest.raises(errors.CoverageError, match="out of bounds"):
        open_folder(tmp_path, shapes={"w": (4, 3)})
    (tmp_path / rank_file(3)).unlink()
    with pytest.raises(errors.CoverageError, match="12 of 16 elements"):
        open_folder(tmp_path)


def test_a_part_without_its_place_is_not_guessed(tmp_path: Path) -> None:
    CASES["G07_dcp_shards"].build(tmp_path)
    (tmp_path / rank_file(1)).write_bytes(blob(*table({"w": fill("F32", (8, 4), 2)})))
    with pytest.raises(errors.AmbiguousTensorError):
        open_folder(tmp_path)
    write_rank(tmp_path, 1, 8, 8, '{"other": {"saved_offsets": [8, 0]}}')
    with pytest.raises(errors.HeaderError, match="DCP_SHARDING_INFO"):
        open_folder(tmp_path)


def test_every_fatal_finding_is_told(tmp_path: Path) -> None:
    write(tmp_path, good())
    edit(tmp_path, lambda header: header[E7].update(dtype="F17"))
    (tmp_path / S1).write_bytes((tmp_path / S1).read_bytes()[:-100])
    (tmp_path / S3).unlink()
    with pytest.raises(errors.MissingShardError) as caught:
        open_folder(tmp_path)
    text = str(caught.value)
    assert S3 in text
    also = dict(caught.value.sections)["also"]
    assert [line.split(":")[0] for line in also] == ["TruncatedFileError", "HeaderError"]
    assert S1 in also[0] and S2 in also[1] and E7 in also[1]


# Which files are the checkpoint.


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, good())
    folder = open_folder(tmp_path / S2)
    assert [header.file for header in folder.headers] == [S2]
    assert len(folder.tensors) == 45
    assert folder.config == CONFIG


def test_a_folder_of_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, good())
    (tmp_path / INDEX).unlink()
    assert len(open_folder(tmp_path).tensors) == 93
    (tmp_path / S3).unlink()
    with pytest.raises(errors.MissingShardError, match="found 2 of them"):
        open_folder(tmp_path)


def test_two_sets_of_shards_without_an_index(tmp_path: Path) -> None:
    CASES["I12_stale_shards"].build(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(errors.AmbiguousSourceError):
        open_folder(tmp_path)


def test_other_index_names(tmp_path: Path) -> None:
    write(tmp_path, good())
    (tmp_path / INDEX).rename(tmp_path / "model.bf16.safetensors.index.json")
    assert open_folder(tmp_path).index == "model.bf16.safetensors.index.json"
    (tmp_path / "other.safetensors.index.json").write_bytes(b"{}")
    with pytest.raises(errors.AmbiguousSourceError):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", [".step_20.partial", "step_20.partial", "link", "journal"])
def test_a_folder_in_the_making_is_no_checkpoint(name: str, tmp_path: Path) -> None:  # X04
    """A killed save's files have their size and their headers, and zeros where the rest would have come."""
    folder = tmp_path / (".step_20.partial" if name == "link" else name)
    write(folder, good())
    why = "its name ends in .partial"
    hint = "run what wrote it again; if you know that it is whole, give it another name"
    if name == "link":
        (tmp_path / name).symlink_to(folder)
    if name == "journal":
        (folder / "checkpoint.journal").write_text('{"work": "1"}\n')
        why = "checkpoint.journal lies in it"
        hint += " and remove that file"
    for path in (tmp_path / name, tmp_path / name / S1):
        with pytest.raises(errors.CoverageError) as caught:
            open_folder(path)
        assert str(caught.value) == (
            f"expected a finished checkpoint, found one in the making: {why}\n"
            f"  in        {tmp_path / name}\n  try       {hint}"
        )


def test_a_folder_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # X02
    """Once: all of it is the new one's. Again and again: told."""
    from restow import folder as module

    write(tmp_path / "a", good())
    write(tmp_path / "b", good())
    edit(tmp_path / "b", lambda header: header.update(__metadata__={"which": "b"}))
    turns = [0, 1]

    def meddling(source: object, limits: object) -> object:
        header = module_read(source, limits)  # type: ignore[arg-type]
        if header.file == S2 and turns[0] < turns[1]:
            turns[0] += 1
            (tmp_path / "a").rename(tmp_path / "c")
            (tmp_path / "b").rename(tmp_path / "a")
            (tmp_path / "c").rename(tmp_path / "b")
        return header

    module_read = module.read_header
    monkeypatch.setattr(module, "read_header", meddling)
    assert open_folder(tmp_path / "a").metadata[S2]["which"] == "b"
    turns[:] = [0, 2]
    with pytest.raises(errors.IntegrityError) as caught:
        open_folder(tmp_path / "a")
    assert str(caught.value) == (
        "expected a folder that keeps its name while its headers are read, found another one there, twice\n"
        f"  in        {tmp_path / 'a'}\n"
        "  try       run again once nobody replaces the checkpoint"
    )


def test_what_was_wrong_with_a_folder_that_is_gone_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # X02
    from restow import folder as module

    write(tmp_path / "a", good())
    write(tmp_path / "b", good())
    (tmp_path / "a" / S2).unlink()

    def meddling(path: str, limits: object) -> object:
        try:
            return real(path, limits)  # type: ignore[arg-type]
        finally:
            if (tmp_path / "b").exists():
                (tmp_path / "a").rename(tmp_path / "c")
                (tmp_path / "b").rename(tmp_path / "a")

    real = module.select
    monkeypatch.setattr(module, "select", meddling)
    assert [header.file for header in open_folder(tmp_path / "a").headers] == [S1, S2, S3]


def test_adapters(tmp_path: Path) -> None:
    pair = {"base_model.model.x.lora_A.weight": fill("F32", (2, 4), 1)}
    (tmp_path / "adapter_model.safetensors").write_bytes(blob(*table(pair)))
    assert list(open_folder(tmp_path).tensors) == list(pair)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "optimizer.safetensors").write_bytes(blob({}))
    folder = open_folder(tmp_path)
    assert list(folder.tensors) == list(pair)
    assert [type(problem.error) for problem in folder.problems] == [errors.StrayShardError]


@pytest.mark.parametrize("verb", ["plan", "convert"])
def test_an_adapter_is_no_checkpoint(verb: str, tmp_path: Path) -> None:
    pair = {"base_model.model.x.lora_A.weight": fill("F32", (2, 4), 1)}
    (tmp_path / "adapter_model.safetensors").write_bytes(blob(*table(pair)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(errors.ConfigError) as caught:
        restow.plan(tmp_path) if verb == "plan" else restow.convert(tmp_path, tmp_path / "out", to="grouped")
    assert str(caught.value) == (
        "expected a checkpoint with a config.json, found an adapter\n"
        f"  in        {tmp_path}\n"
        "  try       restow lora writes it in another format, restow merge adds it to its base (in Python, restow.lora)"
    )


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(errors.UnsafePickleError, match="save_file"):
            open_folder(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_in_dcps_own_format(tmp_path: Path) -> None:
    """As torch itself writes one: its metadata is a pickle, which nobody reads here."""
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(errors.UnsafePickleError) as caught:
        open_folder(tmp_path)
    assert str(caught.value) == (
        "expected safetensors files, found a Distributed Checkpoint in its own format, whose metadata is a pickle\n"
        "  files     __0_0.distcp\n"
        f"  in        {tmp_path}\n"
        "  try       load it with torch.distributed.checkpoint where its origin is trusted, and save it with "
        "restow.dcp.Writer"
    )


def test_a_repository_of_the_hubs_cache(tmp_path: Path) -> None:
    """Its files are links into blobs, below a snapshot; those work, and the folder above says where they are."""
    root, snapshot = (
        tmp_path / "models--org--my model",
        tmp_path / "models--org--my model" / "snapshots" / "abc",
    )
    write(root / "blobs", good())
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((root / "blobs").iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
        file.rename(file.with_name(f"{i:064x}"))
    opened = open_folder(snapshot)
    assert len(opened.tensors) == 93 and opened.config == CONFIG and not opened.problems
    with pytest.raises(errors.MissingShardError) as caught:
        open_folder(root)
    assert str(caught.value) == (
        "expected safetensors files, found none in this folder\n"
        f"  in        {root}\n"
        "  try       this is a repository in the hub's cache: open the folder below its snapshots"
    )


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingShardError, match="none in this folder"):
        open_folder(tmp_path)
    with pytest.raises(errors.MissingShardError, match="no file"):
        open_folder(tmp_path / "absent")
    with pytest.raises(errors.UnsafePathError):
        open_folder(str(tmp_path) + "/a\0b")


def test_an_index_that_is_a_pipe(tmp_path: Path) -> None:
    write(tmp_path, good())
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(errors.IndexFileError, match="regular file"):
        open_folder(tmp_path)


def test_empty_tensors_may_be_unlisted(tmp_path: Path) -> None:
    shards = good()
    shards[S2]["empty"] = fill("F32", (0, 4), 1)
    write(tmp_path, shards)
    reindex(tmp_path, lambda value: value["weight_map"].pop("empty"))
    (problem,) = open_folder(tmp_path).problems
    assert type(problem.error) is errors.IndexMismatchError and not problem.fatal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "qwen3_moe", "num_exp', "stops"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "depth"),
        ("[1]", "object"),
        ('{"a": {"b": [1, 18446744073709551616]}}', "a.b"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("", "stops"),
    ],
)
def test_a_config_is_refused_when_it_is_asked_for(text: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, good())
    (tmp_path / "config.json").write_text(text)
    folder = open_folder(tmp_path)
    with pytest.raises(errors.ConfigError, match=words) as caught:
        _ = folder.config
    assert caught.value.path == str(tmp_path / "config.json")


def test_a_config_may_be_absent_or_hold_infinity(tmp_path: Path) -> None:
    write(tmp_path, good(), config={"limit": [0.0, float("inf")], "pad": -1, "scale": -0.0})
    assert open_folder(tmp_path).config == {"limit": [0.0, float("inf")], "pad": -1, "scale": 0.0}
    (tmp_path / "config.json").unlink()
    assert open_folder(tmp_path).config is None


# The whole text of the messages.

GOLDEN = {
    "F01_empty_file": """\
expected a safetensors file of at least 8 bytes, found 0 bytes
  in        ROOT/model-00002-of-00003.safetensors
  try       download or write it again""",
    "F03_lfs_pointer": """\
expected a safetensors file, found a git LFS pointer
  in        ROOT/model-00002-of-00003.safetensors
  try       git lfs pull""",
    "F05_header_2_63": """\
expected a header of at most 100000000 bytes, found 9223372036854775808 bytes
  in        ROOT/model-00002-of-00003.safetensors
  try       the file is damaged, or no safetensors file; Limits(header=...) raises the limit""",
    "F09_cut_in_data": """\
expected 11232 bytes of tensors, found 11132: 100 bytes are missing
  cut off   model.layers.1.mlp.experts.11.down_proj.weight
  in        ROOT/model-00002-of-00003.safetensors
  try       the disk was full or the copy broke off; fetch or write the file again""",
    "F15_overlap": """\
expected tensors that share no byte, found bytes 7392 to 7648, which begin inside \
model.layers.1.mlp.experts.7.gate_proj.weight
  tensor    model.layers.1.mlp.experts.8.gate_proj.weight
  also      LayoutError: expected tensors that lie end to end, found 256 bytes before this one that no \
tensor claims (model.layers.1.mlp.experts.8.up_proj.weight, ROOT/model-00002-of-00003.safetensors)
  in        ROOT/model-00002-of-00003.safetensors
  try       fetch the file again; if it comes the same, it was written wrong""",
    "F24_size_mismatch": """\
expected as many bytes between the offsets as dtype and shape need, found 256 bytes where F32 of [8, 16] \
needs 512
  tensor    model.layers.1.mlp.experts.7.gate_proj.weight
  in        ROOT/model-00002-of-00003.safetensors
  try       fetch the file again; if it comes the same, it was written wrong""",
    "I07_shard_missing": """\
expected 3 shards, as model.safetensors.index.json says, found 2 of them
  missing   model-00002-of-00003.safetensors
  in        ROOT/model-00002-of-00003.safetensors
  try       download these shards""",
    "I09_tensor_not_in_shard": """\
expected every tensor in the file that model.safetensors.index.json gives, found not in \
model-00001-of-00003.safetensors but in model-00002-of-00003.safetensors
  tensor    model.layers.1.mlp.experts.7.gate_proj.weight
  in        ROOT/model.safetensors.index.json
  try       download the index again, with its shards""",
    "I20_case_differs": """\
expected 3 shards, as model.safetensors.index.json says, found 2 of them
  missing   Model-00002-of-00003.safetensors (only the case differs: model-00002-of-00003.safetensors)
  in        ROOT/Model-00002-of-00003.safetensors
  try       rename them as the index has them""",
    "P01_pickle_only": """\
expected safetensors files, found only pickles, which run code when they are read
  pickles   pytorch_model.bin
  in        ROOT
  try       convert it where its origin is trusted: torch.load(file, weights_only=True), then \
safetensors.torch.save_file; restow never unpickles weights""",
    "R01_middle_rank_missing": """\
expected parts that fill w [32, 4], each element once, found no part for 16:24 of dim 0
  tensor    w
  looked in shard-00001-model-00001-of-00001.safetensors
            shard-00002-model-00001-of-00001.safetensors
            shard-00004-model-00001-of-00001.safetensors
  in        ROOT
  try       the files are not all of one save: fetch all of it, into an empty folder""",
    "I12_stale_shards": """\
expected only the files of the checkpoint, found 4 beside it
  not read  model-00001-of-00004.safetensors
            model-00002-of-00004.safetensors
            model-00003-of-00004.safetensors
            model-00004-of-00004.safetensors
  in        ROOT
  try       remove them if they are left from an earlier save""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_full_text(name: str, tmp_path: Path) -> None:
    error, _ = reaction(CASES[name], tmp_path / "ROOT")
    assert str(error).replace(str(tmp_path) + "/", "") == GOLDEN[name]
