"""A share of another process's staging: files that it made are filled from here, by position.

The folder is opened once and files are found from there, so that a share of an attempt that was given up can never
reach the files of a later one, which take the same names. It rejects a folder that is not the one that was made.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from restow import writing
from restow.errors import DestinationError, MissingShardError, RestowError

WITNESS = ".witness"
PATIENCE = 10.0  # seconds in which a network file system shows what another node wrote


class Share:
    """Files below `folder`, made by another process, which left `token` in a witness file there.

    `watch` is called while the folder is waited for, and raises where that is in vain.
    """

    def __init__(
        self, folder: Path, token: str, rank: int | None = None, watch: Callable[[], object] = lambda: None
    ) -> None:
        self.counts: dict[str, int] = {}  # bytes written by this process, by file
        self._folder, self._rank = folder, rank
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._fd = _opened(folder, token, rank, watch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files, self._files = self._files, {}
        for fd in files.values():
            with suppress(OSError):
                writing.close(fd)
        os.close(self._fd)

    def write(self, name: str, offset: int, data: memoryview) -> int:
        """Write at `offset` of a file, from any thread; the bytes written."""
        path = self._folder / name
        with self._lock:
            if name not in self._files:
                with writing.failures("open", path):
                    self._files[name] = writing.reopen(Path(name), self._fd)
            fd = self._files[name]
            self.counts[name] = self.counts.get(name, 0) + len(data)
        with writing.failures("write", path, len(data)):
            writing.pwrite_all(fd, data, offset)
        writing.begin_sync(fd, offset, len(data))
        return len(data)

    def sync(self, between: Callable[[], object] = lambda: None) -> None:
        """Bring what was written to the disk, and close; `between` is called before each file."""
        for name in list(self._files):
            between()
            with writing.failures("sync", self._folder / name):
                writing.fsync(self._files[name])
            fd = self._files.pop(name)
            with writing.failures("close", self._folder / name):
                writing.close(fd)

    def published_as(self, path: Path) -> bool:
        """Whether the folder goes by `path` now: its maker gave it that name in the last step of all."""
        with suppress(OSError):
            mine, there = os.fstat(self._fd), path.stat()
            return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
        return False


def leave_witness(folder: Path, token: str) -> None:
    """Leave the token by which shares know the folder."""
    path = folder / WITNESS
    with writing.failures("create", path):
        fd = writing.create(path)
    try:
        with writing.failures("write", path):
            writing.pwrite_all(fd, memoryview(token.encode()), 0)
    finally:
        with writing.failures("close", path):
            writing.close(fd)


def remove_witness(folder: Path) -> None:
    """Take the token away: what is published holds checkpoint files only."""
    with writing.failures("remove", folder / WITNESS):
        writing.unlink(folder / WITNESS)


def vanished(error: RestowError) -> bool:
    """Whether what was there is gone: who made the folder takes it away when a rank has failed."""
    cause = error.__cause__
    return isinstance(error, MissingShardError) or (
        isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ESTALE)
    )


def _opened(folder: Path, token: str, rank: int | None, watch: Callable[[], object]) -> int:
    until = time.monotonic() + PATIENCE
    while True:
        fd = -1
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _text(fd) == token:
                return fd
        except OSError:
            pass
        if fd >= 0:
            os.close(fd)
        watch()
        if time.monotonic() > until:
            raise DestinationError(
                "the staging folder of rank 0 on every rank", "another disk, or none", path=folder, rank=rank,
                hint="save to a file system that all ranks share",
            )  # fmt: skip
        time.sleep(0.05)


def _text(folder: int) -> str:
    fd = os.open(WITNESS, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 256).decode("ascii", "replace")
    finally:
        os.close(fd)
