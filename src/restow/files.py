"""Every read of a file: one door, so that reads can be counted and faults injected.

A `SourceFile` is a regular file, open for reading and read by position, never through a mapping: a file that
is cut short while we read is a `TruncatedFileError`, not a signal. It rejects folders, pipes, sockets and
devices after the open and without waiting (O_NONBLOCK, then fstat), so nothing can be swapped in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from restow.errors import (
    DestinationError,
    MissingShardError,
    NotSafetensorsError,
    RestowError,
    TruncatedFileError,
    UnsafePathError,
)

IOV_MAX = 1024  # buffers that one preadv takes
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
ABSENT = "no file"  # found where a path leads nowhere
_LOOK = "look at what lies under this name, and put the file there"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


class SourceFile:
    """An open regular file; `stamp` (device, inode, size, mtime in ns) tells if it is still the same one."""

    __slots__ = ("fd", "name", "path", "size", "stamp")

    def __init__(self, fd: int, path: str, status: os.stat_result) -> None:
        self.fd = fd
        self.path = path
        self.name = os.path.basename(path)  # noqa: PTH119 - a Path per file costs more than the open
        self.size = status.st_size
        self.stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        now = os.fstat(self.fd)
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != self.stamp

    def announce(self, offset: int, count: int) -> None:
        """Tell the system that these bytes will be read, where it listens."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_WILLNEED)

    def at_hand(self, offset: int) -> bool:
        """Whether the byte there comes without waiting for a disk; True where the system does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        try:
            os.preadv(self.fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def pread(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset`."""
        parts: list[bytes] = []
        done = 0
        while done < count:
            try:
                part = os.pread(self.fd, count - done, offset + done)
            except OSError as error:
                _refuse_os(error, self.path)
            if not part:
                self._cut(offset, count, done)
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def preadv(self, offset: int, buffers: Sequence[memoryview | bytearray]) -> int:
        """Fill all `buffers`, in order, with the bytes from `offset` on; the count of bytes read."""
        views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if len(view)]
        wanted = sum(map(len, views))
        done = first = 0
        while first < len(views):
            try:
                count = os.preadv(self.fd, views[first : first + IOV_MAX], offset + done)
            except OSError as error:
                _refuse_os(error, self.path)
            if not count:
                self._cut(offset, wanted, done)
            done += count
            if done == wanted:
                break
            while first < len(views) and count >= len(views[first]):
                count -= len(views[first])
                first += 1
            if count:
                views[first] = views[first][count:]
        return done

    def _cut(self, offset: int, wanted: int, done: int) -> NoReturn:
        raise TruncatedFileError(
            f"{wanted} bytes at offset {offset}",
            f"{done}: {wanted - done} bytes are missing",
            path=self.path,
            hint="the file became shorter while it was read; fetch it again",
        )


def open_source(
    path: str | os.PathLike[str],
    *,
    what: str = "a safetensors file",
    refuse: type[RestowError] = NotSafetensorsError,
) -> SourceFile:
    """Open `path` for reading; `what` is expected there, and anything but a regular file raises `refuse`."""
    name = os.fspath(path)
    try:
        fd = os.open(name, _FLAGS)
    except ValueError:  # a NUL inside the name
        raise UnsafePathError(what, "a path that holds a NUL character", path=name, hint=_LOOK) from None
    except OSError as error:
        _refuse_open(error, name, what, refuse)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = next((text for test, text in _KINDS if test(status.st_mode)), "something else")
            raise refuse(f"{what} (a regular file)", kind, path=name, hint=_LOOK)
        return SourceFile(fd, name, status)
    except BaseException:
        os.close(fd)
        raise


def read_all(path: str | os.PathLike[str], limit: int, *, what: str, refuse: type[RestowError]) -> bytes:
    """The whole of a small file of at most `limit` bytes."""
    with open_source(path, what=what, refuse=refuse) as source:
        if source.size > limit:
            raise refuse(f"{what} of at most {limit} bytes", f"{source.size} bytes", path=source.path)
        return source.pread(0, source.size)


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted; hidden ones are left out, since no checkpoint's file is hidden."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        _refuse_os(error, os.fspath(folder))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder; a link loop or an absent path is not one."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    return False


def _refuse_open(error: OSError, path: str, what: str, refuse: type[RestowError]) -> NoReturn:
    if error.errno == errno.ELOOP:
        raise UnsafePathError(what, "a link that leads back to itself", path=path, hint=_LOOK) from None
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        dangling = error.errno == errno.ENOENT and Path(path).is_symlink()
        raise MissingShardError(
            what,
            "a link that leads nowhere" if dangling else ABSENT,
            path=path,
            hint="download it again: the cache it links to was pruned"
            if dangling
            else "download it again, or check the path",
        ) from None
    if error.errno == errno.ENXIO:  # what the system says for sockets and for devices without a driver
        raise refuse(f"{what} (a regular file)", "a socket or a device", path=path, hint=_LOOK) from None
    _refuse_os(error, path)


def _refuse_os(error: OSError, path: str) -> NoReturn:
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    if error.errno in (errno.EMFILE, errno.ENFILE):  # nothing is wrong with the file
        raise DestinationError(
            "to open a file more", code, path=path, hint="raise the limit of open files (ulimit -n)"
        ) from error
    hint = "look at its rights, and at the disk it lies on"
    raise MissingShardError(
        "a file that can be read", f"{code} from the system", path=path, hint=hint
    ) from error
