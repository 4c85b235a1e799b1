"""The commit protocol: a save that fails or dies anywhere leaves the old one or the new one whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import restow
from faults import ERRORS, INTERRUPTS, KILLS, Child, End, Faults, Tree, fork, forked, outcome, tree
from restow import locking, manifest, writing
from restow.destination import locate, unfinished
from restow.errors import (
    BusyError,
    CoverageError,
    DestinationError,
    DestinationExistsError,
    DurabilityUncertainError,
    IndexFileError,
    MissingShardError,
    NoSpaceError,
    NotWritableError,
    SamePathError,
    UsageError,
)
from restow.publish import Staging

MIB = 2**20
ROUNDABOUT = {"exchange": errno.EINVAL, "rename_new": errno.EINVAL}  # a file system without renameat2's flags
RENAMES = ("rename", "rename_new", "exchange")
MODES = {"new": (False, {}), "replace": (True, {}), "new without flags": (False, ROUNDABOUT),
         "replace without flags": (True, ROUNDABOUT)}  # fmt: skip


def publish(
    path: Path, fill: int, *, replace: bool = False, wait: Callable[[], object] = bool
) -> tuple[str, ...]:
    """Three files, one in a folder, and an index."""
    size = 5000 + fill
    with Staging(path, size=size + 1004, count=4, replace=replace) as staging:
        staging.create("a.safetensors", size)
        staging.create("sub/b.safetensors", 1000)
        staging.write("a.safetensors", 4000, bytes([fill]) * (size - 4000))
        wait()
        staging.write("sub/b.safetensors", 0, bytearray([fill]) * 1000)
        staging.write("a.safetensors", 0, memoryview(bytes([fill]) * 4000))
        staging.seal("a.safetensors")
        staging.add("empty", b"")
        staging.add("model.safetensors.index.json", b"{  }")
        staging.finish({"source": {"fill": fill}}, digests={"empty": {"sha256": "00"}})
    return staging.notes


def naive(path: Path, fill: int, *, replace: bool = False) -> None:
    """What the field does: the old files go, the new ones are written at their names."""
    if not replace:
        writing.mkdir(path)
    for name in ("a.safetensors", "sub/b.safetensors", "model.safetensors.index.json"):
        if replace:
            writing.unlink(path / name)
        (path / name).parent.mkdir(exist_ok=True)
        fd = writing.create(path / name)
        writing.pwrite_all(fd, memoryview(bytes([fill]) * 100), 0)
        writing.close(fd)


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory where there is one: an fsync costs nothing there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="restow-", dir=base))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts of their own: `tmpfs("size=1m")`."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine does not let us mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


class Bench:
    """One kind of publication, its two known results, and a folder to break it in."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.replace, self.deny = MODES[mode]
        self.path, self.template = folder / "run" / "x", folder / "old"
        publish(self.template, 1)
        publish(folder / "new", 2)
        self.known: dict[str, Tree] = {"old": tree(self.template), "new": tree(folder / "new")}
        assert self.known["old"] != self.known["new"]

    def reset(self) -> None:
        """An old checkpoint, if it is to be replaced, and neighbours that nobody may touch."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        (self.folder / "run" / "neighbour").mkdir(parents=True)
        (self.folder / "run" / "neighbour" / "notes.txt").write_text("mine")
        (self.folder / "run" / ".x.txt").write_text("mine too")
        if self.replace:
            shutil.copytree(self.template, self.path)
        self.before = self.inodes()

    def inodes(self) -> dict[str, tuple[int, int, int]]:
        paths = [path for path in (self.folder / "run").rglob("*") if ".x.lock" not in str(path)]
        stats = [(str(path.relative_to(self.folder / "run")), path.lstat()) for path in paths]
        return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in stats}

    def run(self, at: int = 0, what: str = "", second: int = 0) -> tuple[End, list[tuple[str, str]]]:
        """One publication in a child; its calls are returned if it lived to report them."""
        self.reset()
        report = self.folder / "calls.json"
        report.unlink(missing_ok=True)

        def work() -> tuple[str, ...]:
            faults = Faults(at, what, self.deny, self.folder / "run")
            faults.second = second
            try:
                return publish(self.path, 2, replace=self.replace)
            finally:
                assert faults.outside == [], "a change that went around the one module"
                report.write_text(json.dumps(faults.calls))

        end = forked(work)
        return end, [
            (name, where) for name, where in json.loads(report.read_text())
        ] if report.exists() else []

    def left(self) -> set[str]:
        return {path.name for path in (self.folder / "run").iterdir()} - {"x", "neighbour", ".x.txt"}

    def check(self, case: str) -> str:
        """What the destination holds: one whole checkpoint; the neighbours and old inodes are untouched."""
        found = outcome(self.path, self.known)
        if (
            found == "absent" and self.replace
        ):  # only between two renames, and then a name holds all of the old one
            assert outcome(self.folder / "run" / ".x.old", self.known) == "old", case
            found = "set aside"
        assert found in (("old", "new", "set aside") if self.replace else ("absent", "new")), case
        assert self.left() <= {".x.lock", ".x.partial", ".x.old"}, case
        kept = {name: facts for name, facts in self.inodes().items() if name in self.before}
        if found == "old":
            assert kept == self.before, case
        for name in ("neighbour", "neighbour/notes.txt", ".x.txt"):
            assert kept[name] == self.before[name], case
        return "old" if found == "absent" else found

    def again(self, case: str) -> None:
        """A plain run after it succeeds, says what it swept, and leaves nothing else."""
        left = self.left() - {".x.lock"}
        notes = publish(self.path, 2, replace=True)
        assert outcome(self.path, self.known) == "new", case
        assert self.left() == set(), case
        assert bool(left) == any("removed" in note or "gave x back" in note for note in notes), (
            case,
            left,
            notes,
        )


@pytest.mark.parametrize("mode", MODES)
def test_killed_anywhere_leaves_old_or_new(fast: Path, mode: str) -> None:
    bench = Bench(fast, mode)
    end, calls = bench.run()
    assert (end.signal, end.error, bench.check("undisturbed"), bench.left()) == (0, None, "new", set())
    assert end.value == (("names cannot be exchanged here: x was replaced by two renames",)
                         if mode == "replace without flags" else ())  # fmt: skip
    assert len(calls) >= 35
    for what in KILLS:
        seen = []
        for at, call in enumerate(calls, 1):
            if what == "die half way" and call[0] != "pwrite":
                continue
            if what != "die before" and call[0] in bench.deny:
                continue  # it fails, so there is no after
            case = f"{mode}: {what} {at} {call}"
            assert bench.run(at, what)[0].signal == signal.SIGKILL, case
            seen.append(bench.check(case))
            bench.again(case)
        # One commit point: old up to there, new from there on.
        order = ["old", "set aside", "new"]
        assert [order.index(one) for one in seen] == sorted(order.index(one) for one in seen)
        if what != "die half way":
            expected = {"old", "set aside", "new"} if mode == "replace without flags" else {"old", "new"}
            assert set(seen) == expected
    # SQLite's rule: beyond the last call nothing can happen.
    assert bench.run(len(calls) + 1, "die before")[0].signal == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_error_anywhere_is_typed_and_leaves_nothing_behind(fast: Path, mode: str) -> None:  # D04, D19, D20
    bench = Bench(fast, mode)
    _, calls = bench.run()
    published = max(at for at, (name, _) in enumerate(calls, 1) if name in RENAMES)
    held = next(at for at, (name, _) in enumerate(calls, 1) if name == "lock")
    uncertain = 0
    for at, (name, where) in enumerate(calls, 1):
        if name in bench.deny:
            continue
        for what, number in ERRORS.items():
            case = f"{mode}: {what} at {at} {name} {where}"
            end, _ = bench.run(at, what)
            found, error, text = bench.check(case), end.error, str(end.error)
            if at <= published:
                wanted = NoSpaceError if number != errno.EIO else DestinationError
                assert type(error) is wanted, case
                assert what in text and found == "old", case
                assert where in text or name in RENAMES, case
                assert ("quota" in text) == (what == "EDQUOT"), case
                assert bench.left() == ({".x.lock"} if at == held else set()), case
            elif name == "sync_folder":
                uncertain += 1
                assert type(error) is DurabilityUncertainError and found == "new", case
                assert bench.left() == (
                    {".x.partial", ".x.old"} & bench.left() if bench.replace else set()
                ), case
                assert bool(bench.left()) == bench.replace, (
                    case
                )  # the old one is kept while the new one may go
            else:
                assert error is None and found == "new", (
                    case
                )  # it is published and durable: a warning, no error
                notes = end.value
                assert isinstance(notes, tuple) and any(what in note for note in notes), case
            bench.again(case)
    assert uncertain == len(ERRORS)


def test_the_order_of_the_calls(fast: Path) -> None:
    """No kill shows a sync that is missing, only a power cut does: so the order itself is what is pinned."""
    calls = Bench(fast, "replace").run()[1]
    made = ("a.safetensors", "b.safetensors", "empty", "model.safetensors.index.json", manifest.MANIFEST)
    at = {call: calls.index(call) for call in calls}
    for name in made:
        steps = [
            at[step, name]
            for step in ("create", "allocate", "pwrite", "fsync", "close")
            if (step, name) in at
        ]
        assert steps == sorted(steps) and len(steps) == (3 if name == "empty" else 5)
        last_write = max(i for i, call in enumerate(calls) if call in (("pwrite", name), ("create", name)))
        assert last_write < at["fsync", name] < at["sync_folder", ".x.partial"]
    assert at["create", manifest.MANIFEST] > max(at["close", name] for name in made[:-1])  # the last file
    tail = [
        ("sync_folder", "sub"), ("sync_folder", ".x.partial"),  # the names in the staging folder
        ("exchange", ".x.partial"), ("sync_folder", "run"),  # published, and on the disk
        ("unlink", "a.safetensors"), ("unlink", "empty"), ("unlink", "model.safetensors.index.json"),
        ("unlink", "b.safetensors"),
        ("rmdir", "sub"), ("unlink", manifest.MANIFEST), ("rmdir", ".x.partial"),  # only now the old one goes
        ("unlink", ".x.lock"), ("unlock", ".x.lock (deleted)"),
    ]  # fmt: skip
    assert calls[-len(tail) :] == tail


def test_what_was_replaced_goes_only_when_its_successor_is_safe(fast: Path) -> None:
    """Killed between the exchange and the sync of the parent: the next run syncs before it sweeps."""
    bench = Bench(fast, "replace")
    calls = bench.run()[1]
    bench.run([name for name, _ in calls].index("exchange") + 1, "die after")
    assert (
        bench.check("killed") == "new" and outcome(bench.folder / "run" / ".x.partial", bench.known) == "old"
    )
    report = fast / "later"

    def work() -> None:
        faults = Faults()
        publish(bench.path, 2, replace=True)
        report.write_text(json.dumps(faults.calls))

    assert forked(work).error is None
    later = [tuple(call) for call in json.loads(report.read_text())]
    assert later.index(("sync_folder", "run")) < next(
        i for i, (name, _) in enumerate(later) if name == "unlink"
    )


@pytest.mark.parametrize("mode", ["new", "replace"])
def test_short_writes_are_continued(fast: Path, mode: str) -> None:
    bench = Bench(fast, mode)
    _, calls = bench.run()
    writes = [at for at, (name, _) in enumerate(calls, 1) if name == "pwrite"]
    for at in writes:
        end, after = bench.run(at, "short")
        assert end.error is None and bench.check(str(at)) == "new" and bench.left() == set()
        assert len(after) == len(calls) + 1
    assert len(writes) == 6


@pytest.mark.parametrize("mode", ["new", "replace", "replace without flags"])
def test_interrupted_anywhere(fast: Path, mode: str) -> None:
    bench = Bench(fast, mode)
    _, calls = bench.run()
    seen = set()
    for at, (name, where) in enumerate(calls, 1):
        for what in INTERRUPTS:
            case = f"{mode}: {what} {at} {name} {where}"
            if name in bench.deny and what == "interrupt after":
                continue
            end, _ = bench.run(at, what)
            assert end.signal == 0 and type(end.error) is KeyboardInterrupt, case
            seen.add(bench.check(case))
            # Only an interrupt while the lock is taken or given back may leave its file, held by nobody.
            assert bench.left() <= ({".x.lock"} if where == ".x.lock" or at >= len(calls) - 1 else set()), (
                case
            )
            bench.again(case)
    assert seen == {"old", "new"}


def test_interrupted_again_while_cleaning(fast: Path) -> None:
    bench = Bench(fast, "replace")
    _, calls = bench.run()
    at = next(at for at, (name, where) in enumerate(calls, 1) if (name, where) == ("fsync", "empty"))
    for more in range(1, 8):
        end, _ = bench.run(at, "interrupt before", second=at + more)
        assert type(end.error) is KeyboardInterrupt and bench.check(str(more)) == "old"
        bench.again(str(more))


@pytest.mark.parametrize("replace", [False, True])
def test_on_this_disk_too(tmp_path: Path, replace: bool) -> None:
    bench = Bench(tmp_path, "replace" if replace else "new")
    _, calls = bench.run()
    for at in range(1, len(calls) + 1, 3):
        bench.run(at, "die before")
        bench.check(str(at))
        bench.again(str(at))


def test_the_checker_catches_a_writer_that_is_not_atomic(fast: Path) -> None:
    for name, fill in (("old", 1), ("new", 2)):
        naive(fast / name, fill)
    known = {name: tree(fast / name) for name in ("old", "new")}
    seen = []
    for at in range(1, 100):
        shutil.rmtree(fast / "x", ignore_errors=True)
        shutil.copytree(fast / "old", fast / "x")
        end = forked(lambda at=at: (Faults(at, "die before"), naive(fast / "x", 2, replace=True))[1])
        seen.append(outcome(fast / "x", known))
        if end.signal == 0:
            break
    assert seen == ["old", *["mixed"] * 10, "new", "new"]


def test_two_writers_cannot_both_win(fast: Path) -> None:  # X01
    ready, go = os.pipe(), os.pipe()

    def work(fill: int) -> int:
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        publish(fast / "x", fill, wait=lambda: time.sleep(0.3))
        return os.getpid()

    first = fork(lambda: work(1))
    second = fork(lambda: work(2), beside=[first])
    assert len(os.read(ready[0], 1)) + len(os.read(ready[0], 1)) == 2
    os.write(go[1], b"gg")
    ends = {1: first.end(), 2: second.end()}
    for fd in (*ready, *go):
        os.close(fd)
    (winner,) = [fill for fill, end in ends.items() if end.error is None]
    loser = ends[3 - winner].error
    assert type(loser) is BusyError
    assert f"process {ends[winner].value} on {os.uname().nodename[:64]}, at work since 20" in str(loser)
    publish(fast / "alone", winner)
    assert tree(fast / "x") == tree(fast / "alone")
    assert {path.name for path in fast.iterdir()} == {"x", "alone"}


def test_the_lock_changes_hands_without_a_gap(fast: Path) -> None:
    """Its file is removed by every holder: nobody may then hold a lock on a file that is gone."""

    def work() -> int:
        wins, end = 0, time.monotonic() + 20
        while wins < 200 and time.monotonic() < end:
            try:
                lock = locking.acquire(fast / ".x.lock")
            except BusyError:
                os.sched_yield()
                continue
            os.close(os.open(fast / "inside", os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            (fast / "inside").unlink()
            locking.release(lock)
            wins += 1
        return wins

    children: list[Child] = []
    for _ in range(4):
        children.append(fork(work, beside=children))
    ends = [child.end() for child in children]
    assert [end.error for end in ends] == [None] * 4
    assert [end.value for end in ends] == [200] * 4
    assert list(fast.iterdir()) == []


def test_file_systems_without_locks(fast: Path) -> None:
    def work() -> tuple[str, ...]:
        Faults(deny={"lock": errno.ENOSYS})
        return publish(fast / "x", 1)

    assert forked(work).error is None
    shutil.rmtree(fast / "x")
    (fast / ".x.partial").mkdir()
    end = forked(work)
    assert type(end.error) is BusyError and "no locks" in str(end.error)
    assert (fast / ".x.partial").is_dir() and not (fast / "x").exists()


def test_a_disk_that_is_too_small(tmpfs: Callable[[str], Path]) -> None:  # D01
    folder = tmpfs("size=1m")
    with pytest.raises(NoSpaceError) as caught, Staging(folder / "x", size=4 * MIB, count=1):
        pass
    needed = 4 * MIB + 41944
    assert str(caught.value).startswith(f"expected room for {needed} bytes ({4 * MIB} and 1 %), found ")
    assert f"bytes free on {folder}\n" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up(tmpfs: Callable[[str], Path]) -> None:  # D02
    folder = tmpfs("size=6m")
    publish(folder / "x", 1)
    before = tree(folder / "x")
    with (
        pytest.raises(NoSpaceError) as caught,
        Staging(folder / "x", size=4 * MIB, count=2, replace=True) as staging,
    ):
        staging.add("a", bytes(2 * MIB))
        (folder / "other").write_bytes(bytes(3 * MIB))
        staging.add("b", bytes(2 * MIB))
    assert f"to reserve b ({2 * MIB} bytes), found ENOSPC: no space left" in str(caught.value)
    assert f"mount     {folder}: " in str(caught.value)
    assert tree(folder / "x") == before
    assert {path.name for path in folder.iterdir()} == {"x", "other"}


@pytest.mark.parametrize("default", [False, True])
def test_a_limit_on_the_size_of_files(fast: Path, default: bool) -> None:  # D03
    publish(fast / "x", 1)
    before = tree(fast / "x")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if default else signal.SIG_IGN)
        publish(fast / "x", 2, replace=True)

    end = forked(work)
    assert tree(fast / "x") == before
    if default:
        assert end.signal == signal.SIGXFSZ
    else:
        assert type(end.error) is NoSpaceError
        assert str(end.error) == (
            "expected to reserve a.safetensors (5002 bytes), "
            "found EFBIG: a file may have 3000 bytes at most (RLIMIT_FSIZE)\n"
            f"  in        {fast}/.x.partial/a.safetensors\n"
            "  try       raise the limit (ulimit -f), or ask for smaller files"
        )
        assert [path.name for path in fast.iterdir()] == ["x"]


def test_a_disk_without_inodes(tmpfs: Callable[[str], Path]) -> None:  # D05
    folder = tmpfs("size=8m,nr_inodes=6")
    with pytest.raises(NoSpaceError, match=r"room for 7 inodes, found \d inodes free"):
        publish(folder / "x", 1)
    assert list(folder.iterdir()) == []
    with (
        pytest.raises(NoSpaceError, match="ENOSPC: no inodes left"),
        Staging(folder / "x", size=9, count=1) as staging,
    ):
        for name in "abcdef":
            staging.add(name, b"")
    assert list(folder.iterdir()) == []


def test_a_read_only_mount(tmpfs: Callable[[str], Path]) -> None:  # D06
    folder = tmpfs("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(NotWritableError) as caught:
        publish(folder / "x", 1)
    assert f"EROFS: {folder} is mounted read-only" in str(caught.value)


def test_no_right_to_write(fast: Path) -> None:  # D07
    if os.geteuid():
        pytest.skip("only root can become another user")
    fast.chmod(0o555)

    def work() -> None:
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        publish(fast / "x", 1)

    end = forked(work)
    assert type(end.error) is NotWritableError
    assert str(end.error) == (
        "expected a folder to write x in, found that user 65534 may not write there\n"
        f"  in        {fast}\n"
        "  try       name another folder, or have its rights changed"
    )
    assert list(fast.iterdir()) == []


def test_source_and_destination_are_one(fast: Path, tmpfs: Callable[[str], Path]) -> None:  # D08
    source = fast / "parent" / "a"
    (source / "child").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"1234")
    (fast / "link").symlink_to(source)
    before = tree(fast)
    cases = {
        source: "that they are one",
        source / ".": "that they are one",
        fast / "link": "that they are one",
        fast / "parent" / ".." / "parent" / "a": "that they are one",
        source / "child": "the destination inside the source",
        fast / "link" / "fresh": "the destination inside the source",
        source.parent: "the source inside the destination",
    }
    bound = tmpfs("size=64k") / "bound"
    bound.mkdir()
    if not subprocess.run(["mount", "--bind", str(source), str(bound)], capture_output=True).returncode:
        cases |= {bound: "that they are one", bound / "fresh": "the destination inside the source"}
    try:
        for path, found in cases.items():
            for sources in ([source], [fast / "elsewhere", source]):
                with (
                    pytest.raises(SamePathError) as caught,
                    Staging(path, size=1, count=1, sources=sources, replace=True),
                ):
                    pass
                assert caught.value.found == found, path
    finally:
        subprocess.run(["umount", str(bound)], capture_output=True)
    assert tree(fast) == before
    with pytest.raises(SamePathError, match="the source inside"):
        Staging(source, size=1, count=1, sources=[source / "model.safetensors"]).__enter__()
    with Staging(fast / "b", size=1, count=1, sources=[source]) as staging:
        staging.finish()


def test_what_is_there_is_kept(fast: Path) -> None:  # D09, D10
    publish(fast / "x", 1)
    before, times = tree(fast), [path.stat().st_mtime_ns for path in (fast, fast / "x")]
    with pytest.raises(DestinationExistsError, match=r"say replace=True \(--replace\)"):
        publish(fast / "x", 2)
    assert tree(fast) == before and [path.stat().st_mtime_ns for path in (fast, fast / "x")] == times

    for strange in ("notes.txt", "sub/notes.txt", "deep/notes.txt"):
        path = fast / "x" / strange
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = tree(fast)
        with pytest.raises(DestinationExistsError, match="files that restow did not write") as caught:
            publish(fast / "x", 2, replace=True)
        assert strange.split("/n")[0] in str(caught.value) and tree(fast) == before
        path.unlink()
    (fast / "x" / "deep").rmdir()
    (fast / "x" / "empty").unlink()
    (fast / "x" / "empty").symlink_to("a.safetensors")  # a listed name, and not what we wrote
    with pytest.raises(DestinationExistsError, match="not ours  empty"):
        publish(fast / "x", 2, replace=True)
    (fast / "x" / "empty").unlink()
    publish(fast / "x", 2, replace=True)  # a listed file may be missing


def test_replace_needs_our_manifest(fast: Path) -> None:
    (fast / "x").mkdir()
    with pytest.raises(DestinationExistsError, match="an empty folder"):
        publish(fast / "x", 1)
    (fast / "x" / "model.safetensors").write_bytes(b"a year of work")
    before = tree(fast)
    for text in (None, b"{", b"[]", b'{"format": 1, "files": {"model.safetensors": {}}, "format": 1}'):
        if text is not None:
            (fast / "x" / manifest.MANIFEST).write_bytes(text)
            before = tree(fast)
        with pytest.raises(DestinationExistsError, match=r"model\.safetensors"):
            publish(fast / "x", 1, replace=True)
        assert tree(fast) == before
    shutil.rmtree(fast / "x")
    (fast / "x").mkdir()
    publish(fast / "x", 1, replace=True)  # there is nothing to lose in an empty folder


def test_what_appears_while_we_work_is_kept(fast: Path) -> None:
    for replace in (False, True):
        with pytest.raises(DestinationExistsError):
            publish(
                fast / "x",
                1,
                replace=replace,
                wait=lambda: (fast / "x").mkdir() or (fast / "x/n").write_text(""),
            )
        assert sorted(tree(fast)) == ["x", "x/n"]
        shutil.rmtree(fast / "x")


def test_what_appears_at_the_last_moment_is_kept(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing.rename_new
    monkeypatch.setattr(writing, "rename_new", lambda old, new: (new.mkdir(), real(old, new)))
    with pytest.raises(DestinationExistsError, match="EEXIST"):
        publish(fast / "x", 1)
    assert [path.name for path in fast.iterdir()] == ["x"] and list((fast / "x").iterdir()) == []


def test_no_link_or_special_file_is_replaced(fast: Path) -> None:  # D11
    (fast / "folder").mkdir()
    (fast / "file").write_text("mine")
    os.mkfifo(fast / "fifo")
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("link", "folder")):
        (fast / name).symlink_to(target)
    before = tree(fast)
    kinds = {"file": "a file", "fifo": "a FIFO", "dangling": "a link", "loop": "a link", "link": "a link"}
    for name, kind in kinds.items():
        with pytest.raises(DestinationExistsError, match=kind):
            publish(fast / name, 1, replace=True)
    assert tree(fast) == before
    with pytest.raises(DestinationError, match=r"loop|ELOOP"):
        publish(fast / "loop" / "x", 1)


def test_names_that_cannot_be(fast: Path) -> None:  # D12, D13
    with pytest.raises(DestinationError, match=r"found nothing\n.*\n.*mkdir -p") as caught:
        publish(fast / "x" / "y" / "z", 1)
    assert caught.value.path == str(fast / "x" / "y")
    (fast / "file").write_text("")
    with pytest.raises(DestinationError, match="no folder"):
        publish(fast / "file" / "z", 1)
    for name in ("n" * 256, "n" * 247, "a\0b", "x.partial", ".x.lock", ".x.old", "\ud800", "n" * 300 + "/x"):
        with pytest.raises(UsageError):
            publish(fast / name, 1)
    with pytest.raises(UsageError):
        publish(Path("/"), 1)
    (fast / "file").unlink()
    assert list(fast.iterdir()) == []
    for name in ("n" * 246, os.fsdecode(b"\xff"), "a b", "-x", "\u00fc"):
        publish(fast / name, 1)
        publish(fast / name, 2, replace=True)
    assert locate(fast / "a b" / ".").path == fast / "a b"
    assert locate(f"{fast}/a b/../-x/").path == fast / "-x"


def test_a_dead_run_is_swept_and_a_live_one_is_not(fast: Path) -> None:  # D14
    with Staging(fast / "x", size=1, count=1) as staging:
        with pytest.raises(BusyError, match=f"process {os.getpid()} on "):
            publish(fast / "x", 2)
        staging.add("a", b"1")
        staging.finish()
    assert sorted(tree(fast)) == ["x", "x/a", f"x/{manifest.MANIFEST}"]
    (fast / ".y.partial").mkdir()
    (fast / ".y.partial" / "model.safetensors").write_bytes(b"half")
    (fast / ".y.lock").write_text("of a dead run")
    assert publish(fast / "y", 1) == ("removed .y.partial, left by an earlier run (1 files)",)
    assert {path.name for path in fast.iterdir()} == {"x", "y"}


def test_hidden_names_that_are_not_ours(fast: Path) -> None:
    (fast / ".x.old").mkdir()
    (fast / ".x.old" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationExistsError, match=r"notes\.txt"):
        publish(fast / "x", 1)
    (fast / ".y.partial").symlink_to(fast / ".x.old")
    with pytest.raises(DestinationExistsError, match="something else"):
        publish(fast / "y", 1)
    os.mkfifo(fast / ".z.lock")
    with pytest.raises(DestinationError, match="no regular file"):
        publish(fast / "z", 1)
    assert sorted(tree(fast)) == [".x.old", ".x.old/notes.txt", ".y.partial", ".z.lock"]


def test_an_interrupted_replacement_is_given_back(fast: Path) -> None:  # D17
    publish(fast / "x", 1)
    before = tree(fast / "x")
    (fast / "x").rename(fast / ".x.old")
    publish(fast / ".staged", 2)
    (fast / ".staged").rename(fast / ".x.partial")
    with pytest.raises(DestinationExistsError):
        publish(fast / "x", 3)
    assert tree(fast / "x") == before
    assert [path.name for path in fast.iterdir()] == ["x"]


def test_modes_follow_the_umask(fast: Path) -> None:  # D16
    forked(lambda: (os.umask(0o027), publish(fast / "x", 1)))
    modes = {path.name: f"{path.stat().st_mode & 0o777:o}" for path in (fast / "x").rglob("*")}
    assert f"{(fast / 'x').stat().st_mode & 0o777:o}" == modes["sub"] == "750"
    assert {mode for name, mode in modes.items() if name != "sub"} == {"640"}


def test_a_failed_sync_is_never_asked_again(fast: Path) -> None:  # D19
    bench = Bench(fast, "new")
    _, calls = bench.run()
    at = next(at for at, call in enumerate(calls, 1) if call == ("fsync", "a.safetensors"))
    _, after = bench.run(at, "EIO")
    assert after.count(("fsync", "a.safetensors")) == 1
    assert ("close", "a.safetensors") in after[at:]


def test_what_is_kept_until_the_next_run_is_said(fast: Path) -> None:  # D19
    """The parent's sync fails after the exchange: the new one is in place, and the old one stays beside it."""
    bench = Bench(fast, "replace")
    calls = bench.run()[1]
    end, _ = bench.run(
        calls.index(("sync_folder", "run"), calls.index(("exchange", ".x.partial"))) + 1, "EIO"
    )
    assert str(end.error) == (
        "expected to sync run, found EIO\n"
        f"  in        {fast}/run\n"
        "  try       the new checkpoint is complete and in place, but a power cut may undo it; check the disk"
    )
    assert end.notes == ("the replaced checkpoint is kept as .x.partial until the next run",)


@pytest.mark.parametrize("what", ERRORS)
def test_a_file_that_cannot_be_closed(fast: Path, what: str) -> None:  # D20
    """NFS and quotas tell only then that bytes were lost: it counts as a write that failed."""
    bench = Bench(fast, "new")
    calls = bench.run()[1]
    end, _ = bench.run(calls.index(("close", "a.safetensors")) + 1, what)
    code = {"ENOSPC": "ENOSPC: no space left", "EDQUOT": "EDQUOT: the quota is used up", "EIO": "EIO"}[what]
    first, *rest = str(end.error).splitlines()
    assert first == f"expected to close a.safetensors (5002 bytes), found {code}"
    assert f"  in        {bench.path.parent}/.x.partial/a.safetensors" in rest
    hint = "look at the disk: the system's log says more" if what == "EIO" else writing.ROOM
    assert rest[-1] == f"  try       {hint}"
    assert type(end.error) is (DestinationError if what == "EIO" else NoSpaceError)
    assert bench.check(what) == "old" and bench.left() == set()


def test_a_lock_that_cannot_be_closed_is_told_and_no_error(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # D20
    """By then the checkpoint is published and on the disk."""
    real = os.close

    def close(fd: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        real(fd)
        if ".x.lock" in name:
            raise OSError(errno.EIO, "denied")

    monkeypatch.setattr(locking.os, "close", close)
    assert publish(fast / "x", 1) == (
        "while tidying up: expected to close .x.lock, found EIO\n"
        f"  in        {fast}/.x.lock\n"
        "  try       look at the disk: the system's log says more",
    )
    assert {path.name for path in fast.iterdir()} == {"x"}


def test_what_was_set_aside_is_named_to_who_looks_for_it(fast: Path) -> None:  # D17
    publish(fast / "x", 1)
    (fast / "x").rename(fast / ".x.old")
    with pytest.raises(MissingShardError) as caught:
        restow.open(fast / "x")
    assert str(caught.value) == (
        "expected a folder or a safetensors file, found no file\n"
        f"  in        {fast}/x\n"
        "  try       an interrupted replacement set it aside as .x.old; the next run that writes there gives it back"
    )


def test_what_was_swept_is_said_with_an_error_too(fast: Path) -> None:  # D14, D17
    publish(fast / "x", 1)
    (fast / "x").rename(fast / ".x.old")
    (fast / ".x.partial").mkdir()
    with pytest.raises(DestinationExistsError) as caught:
        publish(fast / "x", 2)
    assert caught.value.__notes__ == [
        "gave x back what an interrupted replacement had set aside",
        "removed .x.partial, left by an earlier run (0 files)",
    ]


def test_file_systems_that_cannot_reserve(fast: Path) -> None:
    """A C library without fallocate and renameat2: the length is set, the names go by plain renames."""

    def work() -> None:
        writing.ctypes.CDLL = lambda *_, **__: object()  # type: ignore[attr-defined,misc,assignment]
        publish(fast / "y", 1)
        publish(fast / "y", 2, replace=True)

    assert forked(work).error is None
    publish(fast / "x", 2)
    assert tree(fast / "y") == tree(fast / "x")


def test_few_descriptors_are_enough(fast: Path) -> None:  # X11
    def work() -> None:
        with Staging(fast / "x", size=64, count=64) as staging:
            resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
            for number in range(64):
                staging.add(f"{number}", b"1")
            staging.finish()

    assert forked(work).error is None
    assert len(tree(fast / "x")) == 65

    def greedy() -> None:
        with Staging(fast / "y", size=64, count=64) as staging:
            resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
            for number in range(64):
                staging.create(f"{number}", 1)

    assert "EMFILE" in str(forked(greedy).error)
    assert [path.name for path in fast.iterdir()] == ["x"]


def test_threads_write_into_one_file(fast: Path) -> None:
    parts = [bytes([number]) * 10_000 for number in range(16)]
    with Staging(fast / "x", size=160_000, count=1) as staging:
        staging.create("a", 160_000)
        threads = [
            threading.Thread(target=staging.write, args=("a", i * 10_000, part))
            for i, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        staging.finish()
    assert (fast / "x" / "a").read_bytes() == b"".join(parts)


def test_a_file_is_not_closed_below_a_running_write(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number could by then belong to another file, which the write would then damage."""
    real, running, order = writing.pwrite, threading.Event(), []

    def slow(fd: int, data: memoryview, offset: int) -> int:
        if len(data) == 7:
            running.set()
            time.sleep(0.2)
            order.append("written")
        return real(fd, data, offset)

    monkeypatch.setattr(writing, "pwrite", slow)
    close = writing.close
    monkeypatch.setattr(writing, "close", lambda fd: (order.append("closed"), close(fd)))
    with pytest.raises(ZeroDivisionError), Staging(fast / "x", size=7, count=1) as staging:
        staging.create("a", 7)
        thread = threading.Thread(target=staging.write, args=("a", 0, b"1234567"))
        thread.start()
        running.wait()
        raise ZeroDivisionError
    thread.join()
    assert order == ["written", "closed"] and list(fast.iterdir()) == []


def test_a_file_written_in_part_is_not_published(fast: Path) -> None:
    with (
        pytest.raises(CoverageError, match="10 bytes in a, found 9 written"),
        Staging(fast / "x", size=10, count=1) as s,
    ):
        s.create("a", 10)
        s.write("a", 0, b"123456789")
        s.finish()
    for offset, data in ((8, b"123"), (-1, b"1"), (11, b"")):
        with pytest.raises(CoverageError), Staging(fast / "x", size=10, count=1) as staging:
            staging.create("a", 10)
            staging.write("a", offset, data)
    with pytest.raises(UsageError, match="sealed"), Staging(fast / "x", size=10, count=1) as staging:
        staging.add("a", b"1")
        staging.write("a", 0, b"1")
    with pytest.raises(UsageError, match="call finish"), Staging(fast / "x", size=10, count=1):
        pass
    with pytest.raises(ZeroDivisionError), Staging(fast / "x", size=10, count=1) as staging:
        staging.create("a", 10)
        raise ZeroDivisionError
    assert list(fast.iterdir()) == []


def test_names_inside(fast: Path) -> None:
    for name in ("../a", "/a", "a//b", "", ".", "a/..", "a\0", manifest.MANIFEST, "A", "sub/U\u0308"):
        with pytest.raises(UsageError), Staging(fast / "x", size=10, count=1) as staging:
            staging.add("a", b"")
            staging.add("sub/\u00fc", b"")
            staging.add(name, b"")
    assert list(fast.iterdir()) == []


def test_a_forked_child_does_not_clean_up_for_its_parent(fast: Path) -> None:
    with Staging(fast / "x", size=1, count=1) as staging:
        staging.create("a", 1)
        assert forked(lambda: staging.__exit__(None, None, None)).error is None
        with pytest.raises(BusyError):
            publish(fast / "x", 2)
        staging.write("a", 0, b"1")
        staging.finish()
    assert len(tree(fast / "x")) == 2


def test_who_lists_checkpoints_passes_over_unfinished_ones(fast: Path) -> None:  # X04
    names = [
        "step_10",
        "step_20.partial",
        ".step_30.partial",
        ".step_30.lock",
        ".step_5.old",
        "step.old",
        "a.lock",
    ]
    assert [name for name in names if not unfinished(name)] == ["step_10", "step.old", "a.lock"]
    with Staging(fast / "step_40", size=1, count=1) as staging:
        assert all(unfinished(path.name) for path in fast.iterdir())
        staging.finish()


def test_the_manifest(fast: Path) -> None:
    publish(fast / "x", 1)
    text = (fast / "x" / manifest.MANIFEST).read_text("ascii")
    tool = json.loads(text)["tool"]
    assert text == (
        '{\n"files": {\n"a.safetensors": {"size": 5001},\n"empty": {"sha256": "00", "size": 0},\n'
        '"model.safetensors.index.json": {"size": 4},\n"sub/b.safetensors": {"size": 1000}\n},\n'
        f'"format": 1,\n"source": {{\n"fill": 1\n}},\n"tool": "{tool}"\n}}\n'
    )
    record = manifest.read(fast / "x")
    assert record == json.loads(text) and manifest.read(fast) is None
    assert manifest.foreign(fast / "x") == [] and manifest.foreign(fast) == ["x"]
    bad = (b"", b"nan", b"[" * 100_000, b'{"format": 2, "files": {}}', b'{"format": 1}', b"\xff",
           b'{"format": 1, "format": 1}',
           b'{"format": 1, "files": {"../x": {}}}', b'{"format": 1, "files": []}')  # fmt: skip
    for data in bad:
        with pytest.raises(IndexFileError, match="in        where"):
            manifest.parse(data, "where")
    with pytest.raises(UsageError), Staging(fast / "y", size=1, count=1) as staging:
        staging.finish(digests={"never": {}})
    with pytest.raises(UsageError), Staging(fast / "y", size=1, count=1) as staging:
        staging.finish({"format": 3})


def test_every_call_is_listed() -> None:
    """A new primitive that is not in CALLS would escape the tests above."""
    helpers = {"pwrite_all", "mount_of", "failures", "refusal", "begin_sync"}
    own = {
        name for name, value in vars(writing).items() if getattr(value, "__module__", "") == writing.__name__
    }
    assert {name for name in own if not name.startswith("_") and callable(getattr(writing, name))} == {
        *writing.CALLS,
        *helpers,
    }
