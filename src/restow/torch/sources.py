"""A plan's source files, each opened once a call and watched: one that has changed since its header was read is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from restow.errors import IntegrityError, RestowError, TruncatedFileError
from restow.files import SourceFile, open_source
from restow.plans import Part

PROBES = 8  # bytes that tell whether a disk will have to be waited for


class Files:
    """Source files, each opened once a call, at its first read."""

    def __init__(self, stack: ExitStack, root: str | None, stamps: Mapping[str, tuple[int, ...]]) -> None:
        self._stack, self._root, self._stamps = stack, root, stamps
        self._open: dict[str, SourceFile] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> SourceFile:
        if name in self._open:
            return self._open[name]
        with self._lock:
            if name not in self._open:
                source = self._stack.enter_context(open_source(Path(self._root or "") / name))
                stamp = self._stamps.get(name, source.stamp)
                if stamp != source.stamp:
                    raise _changed(source, stamp[2], source.size)
                self._open[name] = source
            return self._open[name]

    def check(self) -> None:
        for source in self._open.values():
            if source.changed():
                raise _changed(source, source.size, os.fstat(source.fd).st_size)


def is_cold(parts: Sequence[Part], root: str) -> bool:
    """Whether a disk has to be waited for: of some bytes here and there most are not in memory."""
    there = total = 0
    for part in parts[:: max(1, len(parts) // PROBES)]:
        if part.file and part.end > part.begin:
            # What is wrong with a file is raised by whoever reads it.
            with suppress(RestowError), open_source(Path(root) / part.file) as source:
                total += 1
                there += source.at_hand(min(part.end, source.size) - 1)
    return 2 * there < total


def _changed(source: SourceFile, before: int, now: int) -> RestowError:
    if now < before:
        return TruncatedFileError(
            f"{before} bytes, as when its header was read",
            f"{now}",
            path=source.path,
            hint="fetch the file again",
        )
    return IntegrityError(
        "a source that stays as it was when its header was read",
        "another file, size or time of change",
        path=source.path,
        hint="run again once nobody writes to the checkpoint; what was loaded may be a mix",
    )
