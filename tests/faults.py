"""Faults at every call that changes a file system: record the calls of a run, then break the i-th one.

`forked` runs a function in a child, so that it can be killed (`fork` does not wait for it); `Faults` stands in for the functions of
`restow.writing`; `tree` and `outcome` say what a folder holds, byte for byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from restow import writing

Tree = dict[str, str]
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
KILLS = ("die before", "die after", "die half way")
INTERRUPTS = ("interrupt before", "interrupt after")


class End(NamedTuple):
    """How a child ended: `signal` if killed, else `error` (None where it succeeded) and what it returned."""

    signal: int
    error: BaseException | None
    value: object
    notes: tuple[str, ...] = ()


class Faults:
    """Replaces the calls of `restow.writing` in this process, for good: only for use in a child.

    `at` is the number of the call, from 1, that `what` happens to; `deny` makes calls of those names always
    fail, with an errno. `calls` lists what was called; `outside` what else changed files
    below `root`.
    """

    def __init__(
        self, at: int = 0, what: str = "", deny: Mapping[str, int] | None = None, root: Path | None = None
    ):
        self.at, self.what, self.deny, self.root = at, what, dict(deny or {}), root
        self.second = 0  # a later call that is interrupted as well
        self.calls: list[tuple[str, str]] = []
        self.outside: list[str] = []
        self._inside = False
        for name in writing.CALLS:
            setattr(writing, name, self._wrap(name, getattr(writing, name)))
        if root is not None:
            sys.addaudithook(self._audit)

    def _wrap(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def stand_in(*args: object) -> object:
            first = args[0] if args else ""
            where = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(str(first))
            self.calls.append((name, where.name))
            number = len(self.calls)
            what = self.what if number == self.at else "interrupt before" if number == self.second else ""
            return self._do(what, name, self._denied(name) if name in self.deny else call, args)

        return stand_in

    def _denied(self, name: str) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise OSError(self.deny[name], "denied")

        return fail

    def _do(self, what: str, name: str, call: Callable[..., object], args: tuple[object, ...]) -> object:
        if what in ERRORS:
            raise OSError(ERRORS[what], what)
        if what == "die before":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupt before":
            os.kill(os.getpid(), signal.SIGINT)
        if name == "pwrite" and what in ("short", "die half way"):
            fd, data, offset = args
            args = (fd, data[: (len(data) + 1) // 2], offset)  # type: ignore[index,arg-type]
        self._inside = True
        try:
            answer = call(*args)
        finally:
            self._inside = False
        if what in ("die after", "die half way"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupt after":
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    def _audit(self, event: str, args: tuple[object, ...]) -> None:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event == "open" and not (isinstance(args[2], int) and args[2] & writes):
            return
        changes = (
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "os.truncate",
            "os.link",
            "os.symlink",
            "os.chmod",
        )
        if (
            (event == "open" or event in changes)
            and not self._inside
            and str(args[0]).startswith(str(self.root))
        ):
            self.outside.append(f"{event} {args[0]}")


class Child(NamedTuple):
    """A process that runs some work: its number, and the end of the pipe that its words come out of."""

    number: int
    reader: int

    def end(self) -> End:
        """Wait for it; what it raised or returned."""
        with os.fdopen(self.reader, "rb") as pipe:
            data = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        assert status <= 0, f"the child itself failed: {status}"
        return End(-status, None, None) if status else pickle.loads(data)


def fork(work: Callable[[], object], beside: Sequence[Child] = ()) -> Child:
    """Run `work` in a child; what it raises or returns must pickle. From the main thread alone: one that forks while
    another does can leave its child a lock that nobody will ever give back.

    `beside` are children that still run: their pipes are no business of this one's.
    """
    assert threading.current_thread() is threading.main_thread()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking beside threads; the test runner's are idle
        child = os.fork()
    if not child:
        code = 0
        try:
            for fd in (reader, *(other.reader for other in beside)):
                os.close(fd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                end = End(0, None, work())
            except BaseException as error:
                notes = tuple(getattr(error, "__notes__", ()))
                end = End(0, error.with_traceback(None), None, notes)
                error.__cause__ = error.__context__ = None
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(end))
        except BaseException:
            traceback.print_exc()
            code = 97
        os._exit(code)
    os.close(writer)
    return Child(child, reader)


def forked(work: Callable[[], object]) -> End:
    """Run `work` in a child and wait for its end."""
    return fork(work).end()


def tree(folder: Path) -> Tree:
    """Every path below a folder: what it is, its mode, and the digest of its bytes."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name, mode = str(path.relative_to(folder)), f"{path.lstat().st_mode:o}"
        if path.is_symlink():
            found[name] = f"{mode} -> {path.readlink()}"
        elif path.is_file():
            found[name] = f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            found[name] = mode
    return found


def outcome(folder: Path, known: Mapping[str, Tree]) -> str:
    """Which of the known trees a folder holds wholly: "absent", a key of `known`, or "mixed"."""
    if not os.path.lexists(folder):
        return "absent"
    found = tree(folder)
    return next((name for name, whole in known.items() if found == whole), "mixed")
