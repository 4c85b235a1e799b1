"""What a staging folder knows about itself: which of its files are finished, for a run that continues a killed one.

A journal is a text file in the staging folder: a first line that says which work this is, then a line of JSON for each
file that was wholly written and synced. It is removed before the folder is published, so a folder that has one is
unfinished. A line counts only with the files it speaks of, which whoever continues judges by their bytes; a journal of
other work, or one that cannot be read, is none.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from restow import writing
from restow.manifest import plain_name

JOURNAL = "checkpoint.journal"
SIZE_LIMIT = 1 << 30

Notes = Mapping[str, Mapping[str, object]]


class Journal:
    """The journal of a staging folder that is being filled; `finished` is told of one file at a time."""

    def __init__(self, folder: Path, work: str, known: Notes) -> None:
        """Begin one, or go on with the one that holds `known`: it is written anew, since its end may be torn."""
        self.path = folder / JOURNAL
        if os.path.lexists(self.path):
            with writing.failures("remove", self.path):
                writing.unlink(self.path)
        with writing.failures("create", self.path):
            self._fd = writing.create(self.path)
        self._end = 0
        self._write({"work": work})
        for name, note in known.items():
            self.finished(name, note)

    def finished(self, name: str, note: Mapping[str, object]) -> None:
        """A file is on the disk; `note` is what its bytes can be recognised by."""
        self._write({"file": name, **note})

    def _write(self, line: Mapping[str, object]) -> None:
        data = (json.dumps(line, sort_keys=True) + "\n").encode("ascii")
        with writing.failures("write", self.path, len(data)):
            writing.pwrite_all(self._fd, memoryview(data), self._end)
        self._end += len(data)

    def close(self) -> None:
        """Close it; the file stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with writing.failures("close", self.path):
                writing.close(fd)

    def remove(self) -> None:
        """Close and remove it: the folder is whole."""
        self.close()
        with writing.failures("remove", self.path):
            writing.unlink(self.path)


def read(folder: Path, work: str) -> dict[str, dict[str, object]]:
    """The finished files of an unfinished run of the same work: name -> note; empty where there are none."""
    try:
        fd = os.open(folder / JOURNAL, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return {}
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > SIZE_LIMIT:
            return {}
        lines = file.read().split(b"\n")
    found: dict[str, dict[str, object]] = {}
    for number, line in enumerate(lines[:-1]):  # what follows the last line's end is torn
        try:
            body = json.loads(line)
        except (ValueError, RecursionError):
            return found
        if not isinstance(body, dict) or (number == 0 and body != {"work": work}):
            return {}
        name = body.pop("file", None)
        if number and isinstance(name, str) and plain_name(name):
            found[name] = body
    return found
