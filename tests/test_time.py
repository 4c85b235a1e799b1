"""What happens meanwhile: sources that change under a reader, signals, stopped clocks, little memory, other locales."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import restow
from faults import tree
from moe import Model, Tensors, same
from restow.errors import DestinationError, RestowError, TruncatedFileError

MODEL = Model(e=8, f=16, d=24, layers=2)
CODE = "import sys; from restow.cli import main; sys.argv[1:] = {!r}; main()"


def state() -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in MODEL.spelled("grouped").items()}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def meanwhile(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """`change` comes after the headers were read and before the data is."""
    from restow.torch import load as module

    real = module.execute

    def execute(*arguments: Any, **more: Any) -> Any:
        change()
        return real(*arguments, **more)

    monkeypatch.setattr(module, "execute", execute)


def test_a_source_that_is_rewritten_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # X05
    folder = MODEL.written(tmp_path / "a", "split")

    def rewrite() -> None:
        path = shards(folder)[1]
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    meanwhile(monkeypatch, rewrite)
    with pytest.raises(RestowError) as caught:
        restow.load(folder, state())
    assert "changed" in str(caught.value) or "another" in str(caught.value) or "same" in str(caught.value)


def test_a_source_that_is_cut_short_is_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # X06
    folder = MODEL.written(tmp_path / "a", "split")
    meanwhile(monkeypatch, lambda: os.truncate(shards(folder)[1], 3000))
    with pytest.raises(RestowError) as caught:
        restow.load(folder, state())
    assert isinstance(caught.value, TruncatedFileError) or "changed" in str(caught.value)
    assert shards(folder)[1].name in str(caught.value)


def test_a_link_that_is_turned_elsewhere_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # X07
    folder, other = MODEL.written(tmp_path / "a", "split"), MODEL.written(tmp_path / "b", "split")
    path = shards(folder)[0]
    path.rename(tmp_path / "first")
    path.symlink_to(tmp_path / "first")

    def turn() -> None:
        path.unlink()
        path.symlink_to(shards(other)[0])

    restow.load(folder, state())
    meanwhile(monkeypatch, turn)
    with pytest.raises(RestowError) as caught:
        restow.load(folder, state())
    assert path.name in str(caught.value)


def test_a_reader_beside_a_replacement_never_sees_a_mix(tmp_path: Path) -> None:  # X02
    """A checkpoint is replaced again and again while it is loaded: all old, all new, or told that it changed."""
    first, second = MODEL.spelled("grouped"), MODEL.spelled("grouped")
    second = {name: tensor.flip(0) for name, tensor in second.items()}
    sources: dict[str, Tensors] = {"old": first, "new": second}
    folders = {}
    for name, tensors in sources.items():
        from moe import write

        folders[name] = write(tmp_path / name, tensors, MODEL.config, 2)
        restow.convert(folders[name], tmp_path / f"{name}-", to="split", max_shard_bytes=9_000)
    target = tmp_path / "here"
    restow.convert(folders["old"], target, to="split", max_shard_bytes=9_000)
    stop, turns = threading.Event(), [0]

    def replace() -> None:
        while not stop.is_set():
            for name in ("new", "old"):
                restow.convert(
                    folders[name], target, to="split", max_shard_bytes=9_000, replace=True, threads=1
                )
                turns[0] += 1

    writer = threading.Thread(target=replace)
    writer.start()
    seen: dict[str, int] = {}
    try:
        end, least = time.monotonic() + 5, time.monotonic() + 120
        while (now := time.monotonic()) < end or (
            now < least and (turns[0] < 3 or not seen.keys() & {"old", "new"})
        ):
            into = state()
            try:
                restow.load(target, into, threads=2)
            except RestowError:
                seen["told"] = seen.get("told", 0) + 1
                continue
            which = [name for name, want in sources.items() if all(same(into[n], want[n]) for n in want)]
            assert len(which) == 1, "a mix"
            seen[which[0]] = seen.get(which[0], 0) + 1
    finally:
        stop.set()
        writer.join()
    assert turns[0] > 2
    assert seen.get("old", 0) + seen.get("new", 0) > 0


# The command line, stopped from outside.


def slow_convert(root: Path, *, replace: bool = False) -> subprocess.Popen[str]:
    """A conversion that waits in its first write until it is told to go on, in a process of its own."""
    arguments = [
        "convert",
        str(root / "in"),
        str(root / "out"),
        "--to",
        "grouped",
        *(["--replace"] if replace else []),
    ]
    code = f"""
import sys, time, pathlib
from restow import writing
real = writing.pwrite
def pwrite(fd, data, offset):
    if len(data) > 500 and not pathlib.Path({str(root / "go")!r}).exists():
        pathlib.Path({str(root / "there")!r}).touch()
        for _ in range(6000):
            if pathlib.Path({str(root / "go")!r}).exists():
                break
            time.sleep(0.05)
    return real(fd, data, offset)
writing.pwrite = pwrite
sys.argv[1:] = {arguments!r}
from restow.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(6000):
        if (root / "there").exists():
            return process
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("it did not begin to write")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_cleans_up_and_is_the_exit_code(number: int, code: int, tmp_path: Path) -> None:  # X09, X08
    MODEL.written(tmp_path / "in", "split")
    process = slow_convert(tmp_path)
    assert (tmp_path / ".out.partial").is_dir()
    process.send_signal(number)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "in", "there"]
    assert "Traceback" not in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_while_torch_is_imported_is_not_lost(number: int, code: int, tmp_path: Path) -> None:
    """What is raised while torch imports numpy never comes out of that import: signals wait for its end."""
    MODEL.written(tmp_path / "in", "split")
    begin = f"""
import os, sys
class Finder:
    def find_spec(self, name, *more):
        if name == "numpy.linalg":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder())
"""
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "grouped"]
    done = subprocess.run(
        [sys.executable, "-c", begin + CODE.format(arguments)], capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_stopped_process_goes_on(tmp_path: Path) -> None:  # X10
    """Stopped for a while, and with a lock file whose age would look like years: nothing goes by the clock."""
    MODEL.written(tmp_path / "in", "split")
    process = slow_convert(tmp_path)
    process.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / ".out.lock", (1, 1))
    with pytest.raises(DestinationError):  # it is still held
        restow.convert(tmp_path / "in", tmp_path / "out", to="split")
    assert (tmp_path / ".out.partial").is_dir()
    process.send_signal(signal.SIGCONT)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert restow.verify(tmp_path / "in", tmp_path / "out").equal


def test_little_memory_is_said_in_one_line(tmp_path: Path) -> None:  # X12
    Model(e=8, f=512, d=2048, layers=4).written(tmp_path / "in", "split")
    code = f"""
import resource, sys
import torch
from restow.cli import main
size = int([line for line in open("/proc/self/status") if line.startswith("VmSize")][0].split()[1]) * 1024
import restow.torch.convert
resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20), resource.RLIM_INFINITY))
sys.argv[1:] = ["convert", {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, "--to", "grouped", "--threads", "1"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 3, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "MemoryError" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_too_many_open_files_are_the_machines(tmp_path: Path) -> None:  # X11
    MODEL.written(tmp_path / "in", "split")
    restow.convert(tmp_path / "in", tmp_path / "many", to="split", max_shard_bytes=600)
    assert len(shards(tmp_path / "many")) > 40
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)); " + CODE.format(
        ["convert", str(tmp_path / "many"), str(tmp_path / "out"), "--to", "grouped"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "DestinationError: expected to open a file more, found EMFILE\n" in done.stderr
    assert "raise the limit of open files (ulimit -n)" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "many"]


def test_another_locale_gives_the_same_bytes(tmp_path: Path) -> None:  # X14
    MODEL.written(tmp_path / "in", "split")
    (tmp_path / "in" / "tokenizer.json").write_text('{"a": "\u00e9\u4e2d"}', encoding="utf-8")
    settings: list[Mapping[str, str]] = [
        {}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ]  # fmt: skip
    results = []
    for i, more in enumerate(settings):
        arguments = [
            "convert",
            str(tmp_path / "in"),
            str(tmp_path / f"out{i}"),
            "--to",
            "grouped",
            "--sha256",
        ]
        code = CODE.format(arguments)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={**os.environ, **more},
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(tree(tmp_path / f"out{i}"))
    assert results[0] == results[1]


# What cannot happen by construction.


def test_nothing_is_written_through_a_mapping() -> None:  # D18
    root = Path(restow.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"ACCESS_WRITE|PROT_WRITE|np\.memmap|torch\.from_file", text), path.name


def test_staging_lies_beside_its_destination(tmp_path: Path) -> None:  # D15
    """There is no choosing another file system for it: publishing is a rename, and a rename cannot cross."""
    from restow.destination import locate

    place = locate(tmp_path / "x")
    assert place.staging.parent == place.old.parent == place.lock.parent == place.path.parent
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(["convert", "a", "b", "--to", "split", "--staging", "c"])],
        capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2
