"""No page of a shared file is written by two nodes: on network file systems a client may write back whole pages.

Before the first byte every process says which pages it will touch. A page that processes of several nodes touch has
one owner among them; what other nodes have for it goes through a file of its own, one a pair of processes, which the
owner reads and writes at the end. On a local file system (`page` 0) all is written at once. It rejects nothing: what
cannot be written is the writer's to say.
"""

from __future__ import annotations

import json
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from restow import writing
from restow.errors import IntegrityError
from restow.files import open_source

STRIPE = 1 << 20  # bytes: no common network file system caches or locks in larger units by default
NETWORK = (
    "nfs", "nfs4", "lustre", "gpfs", "mmfs", "beegfs", "cifs", "smb3", "ceph", "9p", "afs", "wekafs", "panfs", "fuse",
    "virtiofs", "gfs2", "ocfs2", "orangefs", "pvfs2", "glusterfs",
)  # fmt: skip
BUFFER = 1 << 20  # bytes of records gathered for one write
RECORD = struct.Struct("<IQI")  # number of the file, offset, length; then the bytes

Write = Callable[[str, int, memoryview], int]


class Range(NamedTuple):
    """Bytes `file[begin:end]` that a process will write."""

    file: str
    begin: int
    end: int


class Stretch(NamedTuple):
    """Pages `first` to `end` of a file, touched by these ranks of several nodes."""

    first: int
    end: int
    ranks: tuple[int, ...]

    def owner(self, page: int) -> int:
        """The rank that writes a page: all of them in turn."""
        return self.ranks[page % len(self.ranks)]


def page_of(folder: Path) -> int:
    """The unit in which ranks of several nodes must not share this folder's files: 0 on a local file system."""
    return STRIPE if on_network(folder) else 0


def on_network(folder: Path) -> bool:
    """Whether a folder lies on a network file system, by its type."""
    try:
        table = Path("/proc/self/mounts").read_text()
    except OSError:
        return False
    return file_system(folder, table).split(".")[0] in NETWORK


def file_system(folder: Path, table: str) -> str:
    """The type of the file system that holds a folder, as a mount table spells it."""
    path, kind, depth = f"{folder.resolve()}/", "", -1
    for line in table.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        mount = words[1].encode("latin-1", "replace").decode("unicode_escape").rstrip("/") + "/"
        if path.startswith(mount) and len(mount) >= depth:  # of two at one place, the later is seen
            kind, depth = words[2], len(mount)
    return kind


def shared_pages(texts: Sequence[str]) -> str:
    """From what all ranks told: the nodes, the files, and the stretches of pages that several nodes touch."""
    nodes: list[str] = []
    ends: dict[str, list[tuple[int, int, int]]] = {}  # file -> (page, +1 or -1, rank)
    for rank, text in enumerate(texts):
        node, pages = json.loads(text)
        nodes.append(node)
        for file, runs in pages.items():
            ends.setdefault(file, []).extend(end for a, b in runs for end in ((a, 1, rank), (b, -1, rank)))
    found: dict[str, list[Stretch]] = {}
    for file, events in sorted(ends.items()):
        found[file] = list(_stretches(sorted(events), nodes))
    return json.dumps([nodes, found])


def _stretches(events: Sequence[tuple[int, int, int]], nodes: Sequence[str]) -> Iterator[Stretch]:
    there: set[int] = set()
    for (page, sign, rank), (after, _, _) in zip(events, [*events[1:], (0, 0, 0)], strict=True):
        (there.add if sign > 0 else there.discard)(rank)
        if after > page and len({nodes[one] for one in there}) > 1:
            yield Stretch(page, after, tuple(sorted(there)))


def all_spills(texts: Sequence[str]) -> str:
    """From what all ranks told: (from, to, bytes) of every file of edges."""
    return json.dumps([[rank, to, size] for rank, text in enumerate(texts) for to, size in json.loads(text)])


class PagedWrites:
    """Writes of the process `rank` on `node`, into files below `folder`; `write` may be called from any thread.

    `learn` comes first, what rank 0 made of `told`; then the writes; then `collect`, of what it made of `spilled`.
    """

    def __init__(self, write: Write, page: int, folder: Path, rank: int, node: str) -> None:
        self._write, self._page, self._folder, self._rank, self._node = write, page, folder, rank, node
        self._nodes: list[str] = []
        self._stretches: dict[str, list[Stretch]] = {}
        self._files: list[str] = []
        self._spills: dict[int, _Spill] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spills, self._spills = self._spills, {}
        for spill in spills.values():
            spill.discard()

    def told(self, ranges: Iterable[Range]) -> str:
        """The pages that these ranges touch, as a text for rank 0."""
        pages: dict[str, list[list[int]]] = {}
        for file, begin, end in sorted(ranges):
            runs = pages.setdefault(file, [])
            if begin == end:
                continue
            first, last = begin // self._page, -(-end // self._page)
            if runs and first <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], last)
            else:
                runs.append([first, last])
        return json.dumps([self._node, pages])

    def learn(self, text: str) -> None:
        """Take over what rank 0 made of all that was told."""
        self._nodes, found = json.loads(text)
        self._files = list(found)
        self._stretches = {
            file: [Stretch(a, b, tuple(ranks)) for a, b, ranks in runs] for file, runs in found.items()
        }

    def write(self, file: str, offset: int, data: memoryview) -> int:
        """Write what lies in pages of this node, keep the rest for their owners; the bytes that were taken."""
        stretches = self._stretches.get(file)
        if not stretches:
            return self._write(file, offset, data)
        for owner, begin, end in self._cuts(stretches, offset, offset + len(data)):
            piece = data[begin - offset : end - offset]
            if owner < 0:
                self._write(file, begin, piece)
            else:
                self._spill(owner, file, begin, piece)
        return len(data)

    def _cuts(self, stretches: Sequence[Stretch], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """A range as (owner on another node or -1, begin, end), neighbours of one owner joined."""
        at, number = begin, max(0, bisect_right(stretches, (begin // self._page, 1 << 62)) - 1)
        open_owner, open_at = -1, begin
        while at < end:
            page = at // self._page
            while number < len(stretches) and stretches[number].end <= page:
                number += 1
            if number == len(stretches) or stretches[number].first > page:
                owner = -1
                until = stretches[number].first * self._page if number < len(stretches) else end
            else:
                owner = stretches[number].owner(page)
                owner = -1 if self._nodes[owner] == self._node else owner
                until = (page + 1) * self._page
            if owner != open_owner:
                if at > open_at:
                    yield open_owner, open_at, at
                open_owner, open_at = owner, at
            at = min(until, end)
        if at > open_at:
            yield open_owner, open_at, at

    def _spill(self, owner: int, file: str, offset: int, data: memoryview) -> None:
        with self._lock:
            if owner not in self._spills:
                self._spills[owner] = _Spill(_spill_path(self._folder, self._rank, owner))
            self._spills[owner].add(RECORD.pack(self._files.index(file), offset, len(data)), data)

    def spilled(self) -> str:
        """Close the files of edges; as a text for rank 0, how long each is."""
        spills, self._spills = self._spills, {}
        return json.dumps([[owner, spill.close()] for owner, spill in sorted(spills.items())])

    def collect(self, text: str) -> int:
        """Write what other nodes had for this process's pages; the bytes of it."""
        written = 0
        for sender, owner, size in json.loads(text):
            if owner != self._rank:
                continue
            path = _spill_path(self._folder, sender, owner)
            with open_source(path, what="a file of edges", refuse=IntegrityError) as source:
                at = 0
                while at < size:
                    number, offset, length = RECORD.unpack(source.pread(at, RECORD.size))
                    data = source.pread(at + RECORD.size, length)
                    written += self._write(self._files[number], offset, memoryview(data))
                    at += RECORD.size + length
            with writing.failures("remove", path):
                writing.unlink(path)
        return written


class _Spill:
    """Records for one owner, appended to a file that nobody else writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._kept = path, 0, bytearray()
        with writing.failures("create", path):
            self._fd = writing.create(path)

    def add(self, head: bytes, data: memoryview) -> None:
        self._kept += head
        self._kept += data
        if len(self._kept) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        with writing.failures("write", self._path, len(self._kept)):
            writing.pwrite_all(self._fd, memoryview(bytes(self._kept)), self._size)
        self._size += len(self._kept)
        self._kept = bytearray()

    def discard(self) -> None:
        with suppress(OSError):
            writing.close(self._fd)

    def close(self) -> int:
        self._flush()
        with writing.failures("sync", self._path):
            writing.fsync(self._fd)
        with writing.failures("close", self._path):
            writing.close(self._fd)
        return self._size


def _spill_path(folder: Path, sender: int, owner: int) -> Path:
    return folder / f".edges-{sender}-{owner}"
