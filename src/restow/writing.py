"""Every call by which restow changes a file system, one thin function each, and what their failures mean.

Tests replace the functions in `CALLS` to record them or to make them fail, so nothing else in the package
creates, writes, renames, syncs, locks or removes a file. They raise plain OSErrors; `failures` is the one
place that turns those into errors of ours. Writing through a mapping is not offered: a full disk answers it
with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from restow.errors import (
    DestinationError,
    DestinationExistsError,
    DurabilityUncertainError,
    NoSpaceError,
    NotWritableError,
    RestowError,
    UsageError,
    show,
)

CALLS = (
    "create", "reopen", "open_lock", "lock", "unlock", "allocate", "pwrite", "fsync", "close", "sync_folder",
    "mkdir", "rename", "rename_new", "exchange", "unlink", "rmdir",
)  # fmt: skip
ROOM = "make room there, or name a folder on another disk"
LIMIT = "raise the limit (ulimit -f), or ask for smaller files"
HINTS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "look at the disk: the system's log says more",
}
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h


def create(path: Path) -> int:
    """A descriptor of a new file; its mode is what the umask leaves of 0666."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def reopen(path: Path, folder: int) -> int:
    """A descriptor, for writing, of a file that another process of ours has made; links are not followed.

    `path` counts from the open `folder`: what takes the folder's name later is never met.
    """
    return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, made if it is not there; links are not followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def lock(fd: int) -> None:
    """Take the lock now or raise BlockingIOError."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(fd: int) -> None:
    """Give the lock back, also where a forked child still holds a copy of the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows before the work; where impossible, set the length."""
    # Not posix_fallocate: where the file system cannot reserve, glibc's writes into every block instead.
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    code = errno.ENOSYS
    while call is not None:
        done = call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))
        code = ctypes.get_errno() if done else 0
        if code != errno.EINTR:
            break
    if code in UNSUPPORTED:
        os.ftruncate(fd, size)
    elif code:
        raise OSError(code, os.strerror(code))


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """One write; the count may be short."""
    return os.pwrite(fd, data, offset)


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, however short the single writes are."""
    while data:
        count = pwrite(fd, data, offset)
        if count <= 0:
            raise OSError(errno.EIO, "a write that wrote nothing")
        data, offset = data[count:], offset + count


def begin_sync(fd: int, offset: int, size: int) -> None:
    """Let the disk begin with bytes that were written, so that the sync at the end has less to wait for.

    A hint that promises nothing and reports nothing: failures are left for `fsync`, which alone may see them.
    """
    if size >= _WORTH and _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), 2)  # SYNC_FILE_RANGE_WRITE


_WORTH = 1 << 20  # bytes for which it is worth a call
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def fsync(fd: int) -> None:
    """Bring a file to the disk. Never call it twice after a failure: the second answer would be a lie."""
    os.fsync(fd)


def close(fd: int) -> None:
    """Close, after which the number is free again even if this raises."""
    os.close(fd)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # such file systems write names through, or offer nothing better
            raise
    finally:
        os.close(fd)


def mkdir(path: Path) -> None:
    """Make one folder; its mode is what the umask leaves of 0777."""
    path.mkdir()


def rename(old: Path, new: Path) -> None:
    """The plain rename, which replaces a file or an empty folder at `new`."""
    old.rename(new)


def rename_new(old: Path, new: Path) -> None:
    """Rename, or raise FileExistsError if `new` exists; a code of `UNSUPPORTED` where that is impossible."""
    _renameat2(old, new, _NOREPLACE)


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step; a code of `UNSUPPORTED` where that is impossible."""
    _renameat2(one, other, _EXCHANGE)


def unlink(path: Path) -> None:
    """Remove a file or a link."""
    path.unlink()


def rmdir(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


def _renameat2(old: Path, new: Path, flag: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flag)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(old), None, str(new))


def mount_of(path: Path) -> Path:
    """The topmost folder on the same file system as `path`, which must exist."""
    device = path.stat().st_dev
    while path != path.parent and path.parent.stat().st_dev == device:
        path = path.parent
    return path


@contextmanager
def failures(action: str, path: Path, size: int | None = None, *, published: bool = False) -> Iterator[None]:
    """Turn an OSError of the block into one of our errors: `action` on `path`, of `size` bytes."""
    try:
        yield
    except OSError as error:
        raise refusal(error, action, path, size, published=published) from error


def refusal(
    error: OSError, action: str, path: Path, size: int | None = None, *, published: bool = False
) -> RestowError:
    """The error of ours that an OSError stands for. `published`: the rename was done."""
    number = error.errno or 0
    code = errno.errorcode.get(number, f"errno {number}")
    expected = f"to {action} {show(path.name)}" + ("" if size is None else f" ({size} bytes)")
    if published:
        hint = "the new checkpoint is complete and in place, but a power cut may undo it; check the disk"
        return DurabilityUncertainError(expected, code, path=path, hint=hint)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        found, where = _shortage(number, path.parent)
        hint = LIMIT if number == errno.EFBIG else ROOM
        return NoSpaceError(expected, f"{code}: {found}", path=path, sections=where, hint=hint)
    if number == errno.EROFS:
        found = f"{code}: {show(mount_of(_existing(path)))} is mounted read-only"
        return NotWritableError(expected, found, path=path.parent, hint="name a folder elsewhere")
    if number in (errno.EACCES, errno.EPERM):
        hint = "name another folder, or have its rights changed"
        return NotWritableError(expected, f"{code}: user {os.geteuid()} may not", path=path.parent, hint=hint)
    if number == errno.ENAMETOOLONG:
        return UsageError(expected, f"{code}: the name is too long", path=path)
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        hint = "somebody else writes there: name another folder"
        return DestinationExistsError(expected, f"{code}: something is there", path=path, hint=hint)
    return DestinationError(expected, code, path=path, hint=HINTS.get(number, ""))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _shortage(number: int, folder: Path) -> tuple[str, list[tuple[str, list[str]]]]:
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            return f"a file may have {limit} bytes at most (RLIMIT_FSIZE)", []
        return "the file system does not take files of that size", []
    room = os.statvfs(_existing(folder))
    where = [f"{show(mount_of(_existing(folder)))}: {room.f_bavail * room.f_frsize} bytes free"]
    if room.f_files:
        where[0] += f", {room.f_favail} inodes free"
    if number == errno.EDQUOT:
        return "the quota is used up", [("mount", where)]
    found = "no inodes left" if room.f_files and not room.f_favail else "no space left"
    return found, [("mount", where)]
