"""A conversion that was killed goes on: finished files stay as they are, and the result is that of one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import restow
from faults import Faults, Tree, forked, tree
from moe import Model
from restow import journal

MODEL = Model(e=8, f=16, d=24, layers=2)
SHARD = 6_000  # bytes: many files
STAGING = ".out.partial"


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory where there is one: an fsync costs nothing there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="restow-", dir=base))
    yield folder
    shutil.rmtree(folder)


def run(
    root: Path, at: int = 0, what: str = "", **more: object
) -> tuple[list[tuple[str, str]], tuple[str, ...], int]:
    """A conversion in a child: the calls it made, its notes and the bytes it wrote into weight files."""
    options = {"to": "grouped", "max_shard_bytes": SHARD, "threads": 1, **more}

    def work() -> tuple[list[tuple[str, str]], tuple[str, ...], int]:
        faults = Faults(at, what)
        report = restow.convert(root / "in", root / "out", **options)  # type: ignore[arg-type]
        return faults.calls, report.notes, report.bytes_read

    end = forked(work)
    if end.signal:
        assert end.signal == signal.SIGKILL
        return [], (), 0
    assert end.error is None, end.error
    return end.value  # type: ignore[return-value]


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """The finished files of a staging folder by its journal: inode and mtime."""
    path = root / STAGING / journal.JOURNAL
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    stats = {line["file"]: (root / STAGING / line["file"]).stat() for line in lines if "file" in line}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in stats.items()}


def undisturbed(root: Path) -> Tree:
    run(root)
    wanted = tree(root / "out")
    shutil.rmtree(root / "out")
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 3
    return wanted


@pytest.mark.parametrize("what", ["die before", "die after", "die half way"])
def test_killed_anywhere_it_goes_on(what: str, fast: Path) -> None:  # X03
    MODEL.written(fast / "in", "split")
    wanted = undisturbed(fast)
    calls, _, _ = run(fast)
    shutil.rmtree(fast / "out")
    count = len(calls)
    most = 0
    for at in range(2, count + 1, max(1, count // 12)):
        run(fast, at, what)
        if (fast / "out").exists():
            assert tree(fast / "out") == wanted
            shutil.rmtree(fast / "out")
        before = finished(fast)
        _, notes, _ = run(fast)
        assert tree(fast / "out") == wanted
        for name, (inode, mtime) in before.items():
            status = (fast / "out" / name).stat()
            assert (status.st_ino, status.st_mtime_ns) == (inode, mtime), name
        told = [note for note in notes if "continued" in note]
        assert told == (
            [f"continued a run that was killed: {len(before)} of its files were finished"] if before else []
        )
        assert sorted(path.name for path in fast.iterdir()) == ["in", "out"]
        most = max(most, len(before))
        shutil.rmtree(fast / "out")
    assert most > 3, "it was killed late enough to have something to go on with"


def killed_late(root: Path) -> dict[str, tuple[int, int]]:
    """Leave a run with some finished files and some that are not."""
    calls, _, _ = run(root)
    shutil.rmtree(root / "out")
    seals = [number for number, (name, _) in enumerate(calls, 1) if name == "fsync"]
    run(root, seals[3], "die before")
    found = finished(root)
    assert found
    return found


def test_threads_of_torch_stay_as_they_were(fast: Path) -> None:
    """Those of the caller, and those that begin later: a thread takes over what was set last, by whomever."""
    MODEL.written(fast / "in", "split")
    killed_late(fast)
    counts: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):  # one that goes on, and one from the beginning
            report = restow.convert(fast / "in", fast / "out", to="grouped", max_shard_bytes=SHARD, threads=1)
            counts.append(torch.get_num_threads())
            new = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            new.start()
            new.join()
            counts.append(len([note for note in report.notes if "continued" in note]))
            shutil.rmtree(fast / "out")
    finally:
        torch.set_num_threads(before)
    assert counts == [2, 2, 1, 2, 2, 0]


def test_what_was_read_is_not_read_again(fast: Path) -> None:
    MODEL.written(fast / "in", "split")
    whole = run(fast)[2]
    shutil.rmtree(fast / "out")
    killed_late(fast)
    assert run(fast)[2] < whole


@pytest.mark.parametrize("damage", ["bit", "short", "header", "gone", "link"])
def test_a_damaged_file_is_written_again(damage: str, fast: Path) -> None:
    MODEL.written(fast / "in", "split")
    wanted = undisturbed(fast)
    before = killed_late(fast)
    path = fast / STAGING / sorted(before)[0]
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[-3] ^= 1
    elif damage == "short":
        raw = raw[:-1]
    elif damage == "header":
        raw[20] ^= 1
    path.unlink()
    if damage == "link":
        (fast / "elsewhere").write_bytes(raw)
        path.symlink_to(fast / "elsewhere")
    elif damage != "gone":
        path.write_bytes(raw)
    run(fast)
    assert tree(fast / "out") == wanted
    status = (fast / "out" / path.name).stat()
    assert (status.st_ino, status.st_mtime_ns) != before[path.name]


@pytest.mark.parametrize("other", ["to", "experts", "source", "shards"])
def test_other_work_begins_anew(other: str, fast: Path) -> None:
    MODEL.written(fast / "in", "split")
    killed_late(fast)
    options: dict[str, object] = {}
    if other == "to":
        options = {"to": "fused"}
    elif other == "experts":
        options = {"experts": list(range(7, -1, -1))}
    elif other == "shards":
        options = {"max_shard_bytes": 2 * SHARD}
    else:
        path = next((fast / "in").glob("*.safetensors"))
        os.utime(path, ns=(1, 1))
    _, notes, _ = run(fast, **options)
    assert [note for note in notes if "removed .out.partial" in note]
    mine = tree(fast / "out")
    shutil.rmtree(fast / "out")
    run(fast, **options)
    assert tree(fast / "out") == mine


def test_odd_values_of_kept_files_are_still_told(fast: Path) -> None:
    """The warnings of a run that goes on are those of one that never stopped."""
    import torch

    weights = MODEL.spelled("split")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    weights[name][0, 0] = torch.tensor(float("nan"))
    from moe import write

    write(fast / "in", weights, MODEL.config, 2)
    killed_late(fast)
    report = restow.convert(fast / "in", fast / "out", to="grouped", max_shard_bytes=SHARD, threads=1)
    assert [note for note in report.notes if "continued" in note]
    assert [text for text in report.warnings if name in text]


@pytest.mark.parametrize("text", [b"", b"{}\n", b"[1]\n", b'{"work": "x"}\n{"file": "../a"}\n', b"\xff\xfe"])
def test_a_journal_that_is_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / journal.JOURNAL).write_bytes(text)
    assert journal.read(tmp_path, "x") == {}


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    (tmp_path / journal.JOURNAL).write_bytes(b'{"work": "x"}\n{"file": "a", "n": 1}\n{"file": "b"')
    assert journal.read(tmp_path, "x") == {"a": {"n": 1}}
    assert journal.read(tmp_path, "y") == {}
    assert journal.read(tmp_path / "nowhere", "x") == {}
