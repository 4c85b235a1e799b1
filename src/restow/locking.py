"""One writer at a time: a lock file beside the destination, held by flock.

The kernel gives the lock back when its holder dies, so neither the file's age nor its text decides anything;
the text (process, host, start) is only what `BusyError` says. Rejects a lock that is held, and a lock path
that is no file.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from restow import writing
from restow.errors import BusyError, DestinationError, show

TEXT_BYTES = 256  # always written in full, so that no rest of a longer text of an earlier holder stays
LOOKS = 40  # at the text of a lock that is held, before it is reported as it is


class Lock(NamedTuple):
    """A lock of this process. `held` is False on file systems without locks: nothing is swept there."""

    path: Path
    fd: int
    held: bool


def acquire(path: Path) -> Lock:
    """Take the lock at `path` or raise BusyError."""
    while True:
        with writing.failures("open", path):
            fd = writing.open_lock(path)
        try:
            lock = Lock(path, fd, _try(fd, path))
            current = _still_there(fd, path)
        except BaseException:
            os.close(fd)
            raise
        if current:
            break
        os.close(fd)  # the holder before us removed the file between our open and our lock: it guards nothing
    try:
        with writing.failures("write", path, TEXT_BYTES):
            writing.pwrite_all(fd, memoryview(_text()), 0)
    except BaseException:
        release(lock)
        raise
    return lock


def release(lock: Lock) -> None:
    """Remove the lock file, then give the lock back: the other order could remove the next holder's."""
    try:
        with writing.failures("remove", lock.path):
            writing.unlink(lock.path)
    finally:
        try:
            with writing.failures("unlock", lock.path):
                if lock.held:
                    writing.unlock(lock.fd)
        finally:
            with writing.failures("close", lock.path):
                os.close(lock.fd)


def _try(fd: int, path: Path) -> bool:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DestinationError("a lock file", "no regular file", path=path, hint="remove it")
    try:
        writing.lock(fd)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise _busy(fd, path) from None
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise writing.refusal(error, "lock", path) from error
    return True


def _still_there(fd: int, path: Path) -> bool:
    mine = os.fstat(fd)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _text() -> bytes:
    start = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"pid": os.getpid(), "host": socket.gethostname()[:64], "start": start}
    return json.dumps(facts).encode("ascii").ljust(TEXT_BYTES - 1)[: TEXT_BYTES - 1] + b"\n"


def _busy(fd: int, path: Path) -> BusyError:
    holder = "a process that has not yet written its name"
    for _ in range(LOOKS):
        try:
            facts = json.loads(os.pread(fd, TEXT_BYTES, 0))
            holder = f"process {facts['pid']} on {facts['host']}, at work since {facts['start']}"
            if facts["host"] != socket.gethostname()[:64] or Path(f"/proc/{int(facts['pid'])}").exists():
                break
        except (ValueError, KeyError, TypeError):
            pass
        time.sleep(0.005)  # the holder has the lock and is about to write, maybe over the text of a dead one
    return BusyError("no other writer", show(holder), path=path, hint="wait for it, or end it")
