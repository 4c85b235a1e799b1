"""Where a checkpoint goes, and every reason not to begin: judged before the first byte is written.

A `Place` is a destination and the hidden names beside it. Rejected are names that cannot be, a missing
parent, a source and a destination of which one holds the other, what is already there (unless it is to be
replaced and all of it is ours), folders without the right to write, and disks without room.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from restow import manifest
from restow.errors import (
    DestinationError,
    DestinationExistsError,
    NoSpaceError,
    NotWritableError,
    RestowError,
    SamePathError,
    UsageError,
    show,
)
from restow.writing import ROOM, failures, mount_of, refusal

StrPath = str | os.PathLike[str]
PARTIAL = ".partial"
HIDDEN = (PARTIAL, ".old", ".lock")  # of .NAME.partial, .NAME.old, .NAME.lock
KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link, and links are not followed there"),
)  # fmt: skip


class Place(NamedTuple):
    """A destination: an existing folder without links in its path, and a name in it."""

    parent: Path
    name: str

    @property
    def path(self) -> Path:
        """The destination itself."""
        return self.parent / self.name

    @property
    def staging(self) -> Path:
        """Where the new one is made; after an exchange, where the replaced one waits for its removal."""
        return self.parent / f".{self.name}{PARTIAL}"

    @property
    def old(self) -> Path:
        """Where the replaced one waits on file systems that cannot exchange names."""
        return self.parent / f".{self.name}.old"

    @property
    def lock(self) -> Path:
        """The file that keeps a second writer away."""
        return self.parent / f".{self.name}.lock"


def unfinished(name: str) -> bool:
    """Whether those who list checkpoints must pass over this name: staging, or its hidden neighbours."""
    return name.endswith(PARTIAL) or (name.startswith(".") and name.endswith(HIDDEN))


def locate(path: StrPath) -> Place:
    """The place of a destination, or the reason why there is none."""
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError("a destination", "a NUL character in its name", path=show(text))
    try:
        given = Path(text).absolute()
        given = given.resolve() if given.name in ("", "..") else given
        parent = given.parent.resolve(strict=True)
        length, limit = len(os.fsencode(given.name)), os.pathconf(parent, "PC_NAME_MAX")
    except UnicodeEncodeError as error:
        raise UsageError(
            "a destination that this system can name", "lone surrogates", path=show(text)
        ) from error
    except RuntimeError as error:  # what pathlib makes of ELOOP
        hint = "name the folder itself, not the link"
        raise DestinationError(
            "a folder above the destination", "a loop of links", path=text, hint=hint
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_parent(Path(text), error) from error
    except OSError as error:
        raise refusal(error, "reach", Path(text)) from error
    if not given.name or unfinished(given.name):
        hint = "choose another name"
        raise UsageError(
            "a name for a checkpoint", "one that is kept for unfinished work", path=given, hint=hint
        )
    spare = limit - len(HIDDEN[0]) - 1  # the staging folder's name is longer
    if length > spare:
        raise UsageError(f"a name of at most {spare} bytes", f"{length}", path=given)
    if not parent.is_dir():
        raise _no_parent(given, None)
    return Place(parent, given.name)


def check_apart(place: Place, sources: Iterable[StrPath]) -> None:
    """Refuse a destination that is a source, lies in one, or holds one: by device and inode, not by text."""
    ours = _identities(place.path)
    for source in sources:
        theirs = _identities(Path(source))
        if ours[0] is not None and ours[0] == theirs[0]:
            found = "that they are one"
        elif theirs[0] is not None and theirs[0] in ours:
            found = "the destination inside the source"
        elif ours[0] is not None and ours[0] in theirs:
            found = "the source inside the destination"
        else:
            continue
        where = [("source", [show(source)])]
        hint = "name another folder: a source is never written to"
        raise SamePathError(
            "a destination apart from its source", found, path=place.path, sections=where, hint=hint
        )


def check_writable(place: Place) -> None:
    """Refuse a read-only mount and folders without the right to write."""
    if os.statvfs(place.parent).f_flag & os.ST_RDONLY:
        raise refusal(OSError(errno.EROFS, ""), "write", place.path)
    for folder in (place.parent, place.path):
        effective = os.access in os.supports_effective_ids
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
            found = f"that user {os.geteuid()} may not write there"
            hint = "name another folder, or have its rights changed"
            raise NotWritableError(f"a folder to write {show(place.name)} in", found, path=folder, hint=hint)


def check_vacant(place: Place, *, replace: bool) -> bool:
    """Whether there is a checkpoint to replace; refuse what is there and may not be replaced."""
    try:
        mode = place.path.lstat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise refusal(error, "look at", place.path) from error
    kind = next((text for test, text in KINDS if test(mode)), "a device")
    if kind != "a folder":
        raise DestinationExistsError(
            "nothing at the destination", kind, path=place.path, hint="remove it yourself"
        )
    with failures("look into", place.path):
        strangers = manifest.foreign(place.path)
        empty = not any(place.path.iterdir())
    if not strangers and replace:
        return True
    hint = "say replace=True (--replace) to replace it"
    found = "an empty folder" if empty else "a checkpoint that restow wrote"
    if strangers:
        found = "a folder with files that restow did not write"
        hint = "choose another name: replace=True (--replace) is for folders that hold nothing else than ours"
    lines = [("not ours", [show(name) for name in strangers])]
    raise DestinationExistsError(
        "nothing at the destination", found, path=place.path, sections=lines, hint=hint
    )


def check_room(place: Place, size: int, count: int) -> None:
    """Refuse a disk without room for `size` bytes and 1 % more, in `count` files and three more."""
    room = os.statvfs(place.parent)
    free, needed, inodes = room.f_bavail * room.f_frsize, size + -(-size // 100), count + 3
    mount = show(mount_of(place.parent))
    if room.f_blocks and needed > free:  # a file system that does not count its blocks says 0
        found = f"{free} bytes free on {mount}"
        raise NoSpaceError(f"room for {needed} bytes ({size} and 1 %)", found, path=place.path, hint=ROOM)
    if room.f_files and inodes > room.f_favail:
        found = f"{room.f_favail} inodes free on {mount}"
        raise NoSpaceError(f"room for {inodes} inodes", found, path=place.path, hint=ROOM)


def _no_parent(path: Path, error: OSError | None) -> RestowError:
    found = "nothing" if isinstance(error, FileNotFoundError) else "something that is no folder"
    hint = f"make it first: mkdir -p {show(path.parent)}" if found == "nothing" else ""
    return DestinationError("a folder above the destination", found, path=path.parent, hint=hint)


def _identities(path: Path) -> list[tuple[int, int] | None]:
    """(device, inode) of what a path leads to and of every folder above; None if it leads to nothing."""
    try:
        whole = path.resolve(strict=True)
    except (OSError, RuntimeError):
        above = path.absolute().parent.resolve()
        return [None, *(_identity(folder) for folder in (above, *above.parents))]
    return [_identity(folder) for folder in (whole, *whole.parents)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
