"""Merging into a base of several files: what a killed merge finished is kept, and the result is that of one run."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_adapters as adapters
import restow
import restow.lora
import tiny
from faults import Faults, forked, tree
from restow.errors import AdapterError
from test_resume import finished

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path
STAGING = ".out.partial"


def prepared(root: Path, family: str = "qwen3_moe") -> None:
    """A base of many small files in bfloat16, so that rounding is measured too, and an adapter."""
    base = tiny.saved(family, True, "plain", torch.bfloat16)
    restow.convert(base, root / "in", to="hf", max_shard_bytes=24_000)
    adapters.make(root / "adapter", family)


def run(
    root: Path, at: int = 0, what: str = "", **more: object
) -> tuple[list[tuple[str, str]], dict[str, object]]:
    """A merge in a child: the calls it made, and its report without time; nothing if it was killed."""

    def work() -> tuple[list[tuple[str, str]], dict[str, object]]:
        faults = Faults(at, what)
        report = restow.lora.merge(root / "in", root / "adapter", root / "out", **more)  # type: ignore[arg-type]
        body = dataclasses.asdict(report)
        del body["seconds"]
        return faults.calls, body

    end = forked(work)
    if end.signal:
        return [], {}
    assert end.error is None, end.error
    return end.value  # type: ignore[return-value]


@pytest.mark.parametrize("what", ["die before", "die half way"])
def test_killed_anywhere_it_goes_on(what: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    calls, whole = run(tmp_path)
    wanted = tree(tmp_path / "out")
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 5
    shutil.rmtree(tmp_path / "out")
    most = 0
    for at in range(2, len(calls) + 1, max(1, len(calls) // 5)):
        run(tmp_path, at, what)
        before = finished(tmp_path)
        if not (tmp_path / "out").exists():
            _, report = run(tmp_path)
            notes = report.pop("notes")
            assert report == {k: v for k, v in whole.items() if k != "notes"}
            assert bool(before) == any("continued" in note for note in notes)  # type: ignore[attr-defined]
        assert tree(tmp_path / "out") == wanted
        for name, (inode, mtime) in before.items():
            status = (tmp_path / "out" / name).stat()
            assert (status.st_ino, status.st_mtime_ns) == (inode, mtime), "a finished file was written again"
        most = max(most, len(before))
        shutil.rmtree(tmp_path / "out")
    assert most > 3


def killed_late(root: Path) -> dict[str, tuple[int, int]]:
    calls, _ = run(root)
    shutil.rmtree(root / "out")
    run(root, len(calls) * 3 // 4, "die before")
    found = finished(root)
    assert len(found) > 2
    return found


@pytest.mark.parametrize("damage", ["bit", "note"])
def test_a_damaged_file_is_written_again(damage: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    run(tmp_path)
    wanted = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    before = killed_late(tmp_path)
    path = tmp_path / STAGING / sorted(before)[0]
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[-3] ^= 1
        path.write_bytes(raw)
    else:
        journal = tmp_path / STAGING / "checkpoint.journal"
        journal.write_text(journal.read_text().replace('"roles"', '"rules"'))
    run(tmp_path)
    assert tree(tmp_path / "out") == wanted
    status = (tmp_path / "out" / path.name).stat()
    assert (status.st_ino, status.st_mtime_ns) != before[path.name]


@pytest.mark.parametrize("other", ["adapter", "alpha", "base"])
def test_other_work_begins_anew(other: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    killed_late(tmp_path)
    if other == "base":
        os.utime(next((tmp_path / "in").glob("*.safetensors")), ns=(1, 1))
    else:
        state = {
            n: t * 2 if other == "adapter" else t for n, t in adapters.tensors(tmp_path / "adapter").items()
        }
        config = {**adapters.config(tmp_path / "adapter"), "lora_alpha": 3 if other == "alpha" else 6}
        adapters.write(tmp_path / "adapter", state, **config)
    _, report = run(tmp_path)
    assert [note for note in report["notes"] if "removed .out.partial" in note]  # type: ignore[attr-defined]
    mine = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run(tmp_path)
    assert tree(tmp_path / "out") == mine


def test_a_delta_that_is_not_applied_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count can fail: one expert's delta is skipped, and nothing is published."""
    from restow.torch import adapter_delta

    prepared(tmp_path)
    plain = adapter_delta.Book.apply

    def skip(self: adapter_delta.Book, role: str, key: tuple[str, ...], *more: torch.Tensor) -> None:
        if key[1:] != ("in", "7", "1"):
            plain(self, role, key, *more)

    monkeypatch.setattr(adapter_delta.Book, "apply", skip)
    with pytest.raises(AdapterError, match="each of 75 deltas applied, found 73"):
        restow.lora.merge(tmp_path / "in", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / STAGING).exists()


def test_what_is_merged_verifies_by_its_manifest(tmp_path: Path) -> None:
    prepared(tmp_path)
    restow.lora.merge(tmp_path / "in", tmp_path / "adapter", tmp_path / "out")
    assert restow.verify(tmp_path / "out").equal
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    report = restow.verify(tmp_path / "out")
    assert [d for d in report.differences if d.name in load_file(path)]


@pytest.mark.parametrize("to", ["grouped", "fused", "stacked"])
def test_the_base_s_layout_stays(tmp_path: Path, to: str) -> None:
    """A base in another layout is merged in that layout, and holds what a merge of the hub's form holds."""
    base = adapters.base("qwen3_moe")
    adapters.make(tmp_path / "adapter", "qwen3_moe")
    restow.convert(base, tmp_path / "in", to=to)
    restow.lora.merge(tmp_path / "in", tmp_path / "adapter", tmp_path / "out")
    restow.lora.merge(base, tmp_path / "adapter", tmp_path / "hub")
    assert restow.open(tmp_path / "out").layouts == restow.open(tmp_path / "in").layouts
    assert restow.verify(tmp_path / "out", tmp_path / "hub").equal
    assert not restow.verify(tmp_path / "out", base).equal
