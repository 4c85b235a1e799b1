"""One file of a staging folder: made with its size, written at offsets by many threads, sealed once.

Rejects writes past its end, writes after it is sealed, and sealing before every byte was booked. The booking
counts what the system says was written; which bytes they were is the executor's ledger.
"""

from __future__ import annotations

from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING

from restow import writing
from restow.errors import CoverageError, UsageError, show

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class StagedFile:
    """A file that is being written. `size` is its length from the start."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._booked = 0
        self._busy = 0
        self._turn = Condition()
        with writing.failures("create", path):
            self._fd = writing.create(path)
        try:
            with writing.failures("reserve", path, size):
                if size:  # 0 is an error to fallocate
                    writing.allocate(self._fd, size)
        except BaseException:
            self.discard()
            raise

    @classmethod
    def kept(cls, path: Path, size: int) -> StagedFile:
        """A file that an earlier run has finished."""
        file = cls.__new__(cls)
        file.path, file.size, file._booked, file._busy, file._fd = path, size, size, 0, -1
        file._turn = Condition()
        return file

    def write(self, offset: int, buffer: ReadableBuffer) -> int:
        """Write the bytes of a contiguous buffer at `offset`; the count is booked and returned."""
        whole = memoryview(buffer)
        data = whole.cast("B") if whole.nbytes else memoryview(b"")
        if offset < 0 or offset + len(data) > self.size:
            span = f"bytes {offset} to {offset + len(data)}"
            raise CoverageError(f"{self.size} bytes in {show(self.path.name)}", span, path=self.path)
        with self._turn:
            if self._fd < 0:
                raise UsageError(f"{show(self.path.name)} to be open", "it sealed", path=self.path)
            self._busy += 1
        booked = 0
        try:
            with writing.failures("write", self.path, len(data)):
                writing.pwrite_all(self._fd, data, offset)
            writing.begin_sync(self._fd, offset, len(data))
            booked = len(data)
        finally:
            with self._turn:
                self._busy -= 1
                self._booked += booked
                self._turn.notify_all()
        return booked

    def book(self, count: int) -> None:
        """Count bytes that another process wrote and brought to the disk itself."""
        with self._turn:
            self._booked += count

    def seal(self) -> None:
        """Bring a wholly written file to the disk and close it; nothing to do for a sealed one."""
        if self._fd < 0:
            return
        with self._turn:
            self._turn.wait_for(lambda: not self._busy)
        if self._booked != self.size:
            found = f"{self._booked} written"
            raise CoverageError(f"{self.size} bytes in {show(self.path.name)}", found, path=self.path)
        with writing.failures("sync", self.path, self.size):
            writing.fsync(self._fd)
        self._close()

    def discard(self) -> None:
        """Close without a promise. A write that failed at close is only known to matter to `seal`."""
        if self._fd >= 0:
            self._close()

    def _close(self) -> None:
        with self._turn:
            # Let running writes end: a number closed below one may by then belong to another file.
            self._turn.wait_for(lambda: not self._busy)
            fd, self._fd = self._fd, -1
        with writing.failures("close", self.path, self.size):
            writing.close(fd)
