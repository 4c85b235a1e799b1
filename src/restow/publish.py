"""The commit protocol of every save and conversion: staged, synced, published by one rename.

A checkpoint is made in a hidden folder beside its destination, on the same file system, and takes its name in
one step when all of it is on the disk. Whatever fails or kills the process before leaves the destination as
it was; what a kill leaves behind is hidden, and the next run for the same destination removes it and says so.
Rejects what `destination` rejects, a second writer, files written in part, and leaving the block without
`finish`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from restow import destination, journal, locking, manifest, placing, writing
from restow.destination import StrPath
from restow.errors import (
    BusyError,
    DestinationExistsError,
    DurabilityUncertainError,
    RestowError,
    UsageError,
    show,
)
from restow.journal import Journal
from restow.staged import StagedFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Staging:
    """A checkpoint in the making: `with Staging(path, size=..., count=...) as staging: ... staging.finish()`.

    `size` and `count` are the bytes and files that will be written, manifest not counted; `sources` are the
    paths that are read and must lie apart from the destination. `work` names what is done: where an earlier
    run of the same was killed, its finished files are in `left`, for `keep` or `drop`, and the others are gone.
    `notes` holds what the user should be told, a line each.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        size: int,
        count: int,
        sources: Iterable[StrPath] = (),
        replace: bool = False,
        work: str = "",
    ) -> None:
        self.place = destination.locate(path)
        self.notes: tuple[str, ...] = ()
        self._room = (size, count)
        self._sources = tuple(sources)
        self._replace = replace
        self._pid = os.getpid()
        self._lock: locking.Lock | None = None
        self.left: Mapping[str, Mapping[str, object]] = {}
        self._work = work
        self._journal: Journal | None = None
        self._files: dict[str, StagedFile] = {}
        self._folders: dict[str, Path] = {}
        self._known: set[str] = set()
        self._begun = False  # something of ours may lie at the staging name
        self._done = False

    def __enter__(self) -> Self:
        place = self.place
        destination.check_apart(place, self._sources)
        destination.check_writable(place)
        if not os.path.lexists(place.old):  # else a killed replacement is put right first, under the lock
            destination.check_vacant(place, replace=self._replace)
        self._lock = locking.acquire(place.lock)
        try:
            self._take_over(held=self._lock.held)
            destination.check_vacant(place, replace=self._replace)
            destination.check_room(place, self._room[0] - self._kept_bytes(), self._room[1] - len(self.left))
            self._begin()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def create(self, name: str, size: int) -> None:
        """Make a file of `size` bytes; `name` may hold folders, `a/b`."""
        folded = unicodedata.normalize("NFC", name).casefold()
        if not manifest.plain_name(name) or name == manifest.MANIFEST or folded in self._known:
            found = f"{show(name)}, taken, reserved, or no plain name"
            raise UsageError("new file names that differ in more than case", found, path=self.place.path)
        self._known.add(folded)
        self._make(name, size)

    def keep(self, name: str, size: int) -> None:
        """Take over a file of `left`, as it is."""
        self._known.add(unicodedata.normalize("NFC", name).casefold())
        self._files[name] = StagedFile.kept(self.place.staging / name, size)

    def drop(self, name: str) -> None:
        """Remove a file of `left`, to make it anew."""
        with writing.failures("remove", self.place.staging / name):
            writing.unlink(self.place.staging / name)

    def finished(self, name: str, note: Mapping[str, object]) -> None:
        """Seal a file and note by what a later run can recognise it, should this one be killed."""
        self.seal(name)
        if self._journal is not None:
            self._journal.finished(name, note)

    def write(self, name: str, offset: int, buffer: ReadableBuffer) -> int:
        """Write a contiguous buffer into a file and return the count; any thread may, for any file."""
        return self._files[name].write(offset, buffer)

    def seal(self, name: str) -> None:
        """Sync and close a file that is wholly written, early, so that thousands need not be open at once."""
        self._files[name].seal()

    def book(self, name: str, count: int) -> None:
        """Count bytes of a file that another process wrote at its path below `place.staging` and synced."""
        self._files[name].book(count)

    def add(self, name: str, data: ReadableBuffer) -> None:
        """A small file in one call."""
        self.create(name, memoryview(data).nbytes)
        self.write(name, 0, data)
        self.seal(name)

    def finish(
        self,
        extra: Mapping[str, object] | None = None,
        *,
        digests: Mapping[str, Mapping[str, object]] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Seal all, write the manifest, publish, and remove what was replaced: on return it is on the disk.

        `extra` are sections of the manifest (`source`, `tensors`, others); `digests` (name -> {"sha256":
        ...}) are put beside the sizes of the files. `before` is called last before the rename, and may raise.
        """
        records = {name: {"size": file.size} for name, file in self._files.items()}
        if unknown := sorted((digests or {}).keys() - records.keys()):
            raise UsageError("digests of files that were written", show(unknown[0]), path=self.place.path)
        files = {name: {**(digests or {}).get(name, {}), **record} for name, record in records.items()}
        if taken := {"files", "format", "tool"} & (extra or {}).keys():
            raise UsageError("sections that the manifest leaves free", min(taken), path=self.place.path)
        text = manifest.render({**(extra or {}), "files": files})
        for file in self._files.values():
            file.seal()
        self._make(manifest.MANIFEST, len(text))
        self.write(manifest.MANIFEST, 0, text)
        self.seal(manifest.MANIFEST)
        if self._journal is not None:
            self._journal.remove()
        for folder in (*reversed(self._folders.values()), self.place.staging):
            with writing.failures("sync", folder):
                writing.sync_folder(folder)
        if before is not None:
            before()
        # Judged again: the destination may have changed hands while we worked, and only ours is replaced.
        replacing = destination.check_vacant(self.place, replace=self._replace)
        self._tell((placing.swap if replacing else placing.move)(self.place))
        with writing.failures("sync", self.place.parent, published=True):
            writing.sync_folder(self.place.parent)
        self._done = True
        try:
            placing.sweep(self.place)  # what was replaced
        except RestowError as failure:
            self._tell(f"the next run removes what could not be removed now: {failure}")
        self._begun = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked child leaves the block: the work is its parent's
        self._leave(error)
        if error is None and not self._done:
            hint = "call finish() at the end of the block; nothing was published"
            raise UsageError("a finished checkpoint", "none", path=self.place.path, hint=hint)

    def _make(self, name: str, size: int) -> None:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = self.place.staging.joinpath(*parts[:depth])
            if "/".join(parts[:depth]) not in self._folders:
                with writing.failures("make", folder):
                    writing.mkdir(folder)
                self._folders["/".join(parts[:depth])] = folder
        self._files[name] = StagedFile(self.place.staging / name, size)

    def _tell(self, note: str) -> None:
        self.notes += (note,) if note else ()

    def _take_over(self, *, held: bool) -> None:
        left = placing.leftovers(self.place)
        if left and not held:
            hint = "this file system has no locks: if no process writes there, remove that folder yourself"
            raise BusyError("no other writer", f"{show(left[0].name)}", path=left[0], hint=hint)
        if self._work and held and not os.path.lexists(self.place.old):
            self.left = journal.read(self.place.staging, self._work) if self._is_ours() else {}
        if not self.left:
            self.notes += placing.settle(self.place)
            return
        with writing.failures("look into", self.place.staging):
            there = sorted(self.place.staging.iterdir())
        names = {path.name for path in there if path.is_file() and not path.is_symlink()}
        self.left = {name: note for name, note in self.left.items() if name in names}
        for path in there:
            if path.name not in self.left and path.name != journal.JOURNAL:
                placing.remove(path)
        self.notes += (f"continued a run that was killed: {len(self.left)} of its files were finished",)

    def _is_ours(self) -> bool:
        return self.place.staging.is_dir() and not self.place.staging.is_symlink()

    def _kept_bytes(self) -> int:
        return sum((self.place.staging / name).stat().st_size for name in self.left)

    def _begin(self) -> None:
        try:
            with writing.failures("make", self.place.staging):
                self._begun = True  # before the call: an interrupt may come between it and the next line
                if not self.left:
                    writing.mkdir(self.place.staging)
        except DestinationExistsError as error:
            self._begun = False
            found = f"{show(self.place.staging.name)}, made just now"
            raise BusyError("no other writer", found, path=self.place.staging) from error
        if self._work:
            self._journal = Journal(self.place.staging, self._work, self.left)

    def _leave(self, error: BaseException | None) -> None:
        failed: list[RestowError] = []
        try:
            for file in self._files.values():
                _try(file.discard, failed)
            if self._journal is not None:
                _try(self._journal.close, failed)
            # While a power cut may undo the rename, the replaced one stays: the next run removes it.
            if self._begun and not isinstance(error, DurabilityUncertainError):
                _try(lambda: placing.settle(self.place), failed)
            elif self._begun and (kept := placing.leftovers(self.place)):
                self._tell(f"the replaced checkpoint is kept as {show(kept[0].name)} until the next run")
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                _try(lambda: locking.release(lock), failed)
        for failure in failed:
            self._tell(f"while tidying up: {failure}")
        if error is not None:
            for note in self.notes:  # no report will say them
                error.add_note(note)


def _try(call: Callable[[], object], failed: list[RestowError]) -> None:
    # A failure of the cleaning must not hide the one that it cleans up after.
    try:
        call()
    except RestowError as failure:
        failed.append(failure)
