"""No page of a shared file is written by two nodes: on network file systems a client may write back whole pages.

Each process writes the whole pages of its ranges itself and keeps their edges. Which nodes touch an edge's page is told
to all; one owner a page writes what all of them have for it. On a local file system (`page` 0) nothing is kept back. It
rejects nothing: what cannot be written is the writer's to say.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from restow import writing

STRIPE = 1 << 20  # bytes: no common network file system caches or locks in larger units by default
NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb3",
    "ceph",
    "9p",
    "afs",
    "wekafs",
    "panfs",
    "fuse",
)

Write = Callable[[str, int, memoryview], int]
Exchange = Callable[[str, str], Sequence[str]]  # key, mine -> everybody's, in the order of ranks


def page_of(folder: Path) -> int:
    """The unit in which ranks of several nodes must not share this folder's files: 0 on a local file system."""
    kind = file_system(folder)
    return STRIPE if kind.split(".")[0] in NETWORK else 0


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, as the mount table spells it."""
    mount = str(writing.mount_of(folder))
    kind = ""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        words = line.split()
        if len(words) > 2 and words[1] == mount:
            kind = words[2]
    return kind


class PagedWrites:
    """Writes of one process. `write` may be called from any thread; `settle` once, by all processes, at the end."""

    def __init__(self, write: Write, page: int) -> None:
        self._write, self._page = write, page
        self._edges: dict[tuple[str, int], list[tuple[int, bytes]]] = {}
        self._lock = threading.Lock()

    def write(self, file: str, offset: int, data: memoryview) -> int:
        """Write what fills pages; keep the rest. Gives the bytes that were taken."""
        page = self._page
        if not page:
            return self._write(file, offset, data)
        end = offset + len(data)
        first, last = -(-offset // page) * page, end // page * page
        if first < last:
            self._keep(file, offset, data[: first - offset])
            self._write(file, first, data[first - offset : last - offset])
            self._keep(file, last, data[last - offset :])
        else:
            cut = max(0, min(first, end) - offset)  # at most one boundary lies inside
            self._keep(file, offset, data[:cut])
            self._keep(file, offset + cut, data[cut:])
        return len(data)

    def _keep(self, file: str, offset: int, data: memoryview) -> None:
        if len(data):
            with self._lock:
                self._edges.setdefault((file, offset // self._page), []).append((offset, bytes(data)))

    def settle(self, rank: int, node: str, exchange: Exchange) -> int:
        """Bring every edge to its page's owner and write them; the bytes that this process wrote.

        `exchange(key, mine)` gives every rank's text. Pages that one node touches are written by who has them.
        """
        if not self._page:
            return 0
        touched = [[file, number] for file, number in sorted(self._edges)]
        told = [json.loads(text) for text in exchange("edges", json.dumps([node, touched]))]
        ranks: dict[tuple[str, int], list[int]] = {}
        for other, (_, pages) in enumerate(told):
            for file, number in pages:
                ranks.setdefault((file, number), []).append(other)
        shared = {page for page, who in ranks.items() if len({told[r][0] for r in who}) > 1}
        mine = {
            page: parts for page, parts in self._edges.items() if page in shared and ranks[page][0] != rank
        }
        sent = [
            [file, at, base64.b85encode(data).decode()]
            for (file, _), parts in mine.items()
            for at, data in parts
        ]
        got = exchange("bytes of edges", json.dumps(sent))
        written = 0
        for page, parts in self._edges.items():
            if page not in mine:
                written += self._put(page[0], parts)
        for other, text in enumerate(got):
            if other == rank:
                continue
            for file, at, data in json.loads(text):
                if ranks[file, at // self._page][0] == rank:
                    written += self._put(file, [(at, base64.b85decode(data))])
        self._edges = {}
        return written

    def _put(self, file: str, parts: Sequence[tuple[int, bytes]]) -> int:
        return sum(self._write(file, at, memoryview(data)) for at, data in parts)
