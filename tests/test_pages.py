"""The page rule: on network file systems no page is written by two nodes, shown with a model of client caches.

In the model a node reads a page when it first touches it, changes its own copy, and writes back whole pages when it
closes; nodes close in any order. Two nodes that touch one page lose what the first one wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restow import pages, writing
from restow.pages import PagedWrites, Range, all_spills, file_system, page_of, shared_pages


@dataclass
class Server:
    """What lies on the disk: zeros at first."""

    files: dict[str, bytearray]


@dataclass
class Client:
    """One node's cache of a server, page by page."""

    server: Server
    page: int
    cached: dict[tuple[str, int], bytearray] = field(default_factory=dict)

    def write(self, file: str, offset: int, data: memoryview) -> int:
        for i, byte in enumerate(data):
            number, at = divmod(offset + i, self.page)
            start = number * self.page
            if (file, number) not in self.cached:
                self.cached[file, number] = bytearray(self.server.files[file][start : start + self.page])
            self.cached[file, number][at] = byte
        return len(data)

    def close(self) -> None:
        for (file, number), data in self.cached.items():
            start = number * self.page
            self.server.files[file][start : start + len(data)] = data
        self.cached.clear()


@dataclass(frozen=True)
class World:
    """Who writes what: ranks on nodes, each with its pieces (file, offset, length); a page; the order of closing."""

    sizes: Mapping[str, int]
    nodes: Sequence[str]
    pieces: Sequence[Sequence[Range]]
    page: int
    seed: int


def content(file: str, begin: int, end: int) -> bytes:
    return bytes(1 + (i * 37 + len(file)) % 255 for i in range(begin, end))


def final(world: World, folder: Path, *, rule: bool) -> tuple[dict[str, bytes], list[int]]:
    """The files when all nodes have closed, and the bytes that each rank wrote."""
    server = Server({file: bytearray(size) for file, size in world.sizes.items()})
    clients = {node: Client(server, world.page) for node in world.nodes}
    random, counts = Random(world.seed), [0] * len(world.nodes)

    def writer(rank: int) -> pages.Write:
        def write(file: str, offset: int, data: memoryview) -> int:
            counts[rank] += len(data)
            return clients[world.nodes[rank]].write(file, offset, data)

        return write

    paged = [
        PagedWrites(writer(rank), world.page if rule else 0, folder, rank, node)
        for rank, node in enumerate(world.nodes)
    ]
    if rule:
        told = shared_pages([one.told(pieces) for one, pieces in zip(paged, world.pieces, strict=True)])
        for one in paged:
            one.learn(told)
    todo = [(rank, piece) for rank, pieces in enumerate(world.pieces) for piece in pieces]
    random.shuffle(todo)
    for rank, piece in todo:
        data = content(*piece)
        assert paged[rank].write(piece.file, piece.begin, memoryview(data)) == len(data)
    if rule:
        spilled = all_spills([one.spilled() for one in paged])
        for one in paged:
            one.collect(spilled)
    order = list(clients)
    random.shuffle(order)
    for node in order:
        clients[node].close()
    return {file: bytes(data) for file, data in server.files.items()}, counts


def wanted(world: World) -> dict[str, bytes]:
    return {file: content(file, 0, size) for file, size in world.sizes.items()}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Files cut at random places, each piece given to a random rank of up to 6 on up to 3 nodes."""
    count = draw(st.integers(1, 6))
    nodes = [f"node {draw(st.integers(0, 2))}" for _ in range(count)]
    sizes = {f"f{i}": draw(st.integers(0, 200)) for i in range(draw(st.integers(1, 3)))}
    held: list[list[Range]] = [[] for _ in nodes]
    for file, size in sizes.items():
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=12))})
        for begin, end in pairwise(cuts):
            held[draw(st.integers(0, count - 1))].append(Range(file, begin, end))
    return World(sizes, nodes, held, draw(st.sampled_from([1, 2, 7, 16, 64, 4096])), draw(st.integers(0, 99)))


@given(worlds())
def test_nothing_is_lost_with_the_rule(world: World) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        found, counts = final(world, Path(name), rule=True)
        assert found == wanted(world)
        assert sum(counts) == sum(world.sizes.values()), "every byte once"
        assert list(Path(name).iterdir()) == [], "no file of edges is left"


HALVES = World({"f": 20}, ["a", "b"], [[Range("f", 0, 10)], [Range("f", 10, 20)]], 16, 3)


def test_without_the_rule_data_is_lost(tmp_path: Path) -> None:
    """The model fails where two nodes share a page, and only there."""
    assert final(HALVES, tmp_path, rule=False)[0] != wanted(HALVES)
    assert final(HALVES, tmp_path, rule=True)[0] == wanted(HALVES)
    one_node = World(HALVES.sizes, ["a", "a"], HALVES.pieces, 16, 3)
    assert final(one_node, tmp_path, rule=False)[0] == wanted(HALVES)
    aligned = World({"f": 20}, ["a", "b"], [[Range("f", 0, 16)], [Range("f", 16, 20)]], 16, 3)
    assert final(aligned, tmp_path, rule=False)[0] == wanted(HALVES)


def test_random_worlds_lose_data_without_the_rule(tmp_path: Path) -> None:
    random, lost = Random(5), 0
    for seed in range(40):
        cuts = sorted(random.sample(range(1, 300), 9))
        parts = [Range("f", a, b) for a, b in zip([0, *cuts], [*cuts, 300], strict=True)]
        world = World({"f": 300}, ["a", "b", "a"], [parts[i::3] for i in range(3)], 32, seed)
        lost += final(world, tmp_path, rule=False)[0] != wanted(world)
        assert final(world, tmp_path, rule=True)[0] == wanted(world)
    assert lost > 20


def test_pages_of_one_node_are_written_at_once(tmp_path: Path) -> None:
    """Nothing is kept back, and nothing goes another way, where all ranks are of one node or pages do not meet."""
    for nodes in (["a", "a"], ["a", "b"]):
        seen: list[tuple[str, int, int]] = []
        half = 16 if nodes[1] == "b" else 10
        paged = PagedWrites(lambda f, o, d: seen.append((f, o, len(d))) or len(d), 16, tmp_path, 0, "a")  # noqa: B023
        other = PagedWrites(lambda f, o, d: len(d), 16, tmp_path, 1, nodes[1])
        paged.learn(shared_pages([paged.told([Range("f", 0, half)]), other.told([Range("f", half, 32)])]))
        paged.write("f", 0, memoryview(bytes(half)))
        assert seen == [("f", 0, half)]
        assert paged.spilled() == "[]"


def test_large_ranges_cost_no_page_each() -> None:
    """What is told grows with the ranges, not with their pages."""
    paged = PagedWrites(lambda f, o, d: len(d), 1 << 20, Path(), 0, "a")
    text = paged.told([Range("f", i << 30, (i + 1) << 30) for i in range(1000)])
    assert text == '["a", {"f": [[0, 1024000]]}]'


def test_edges_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BUFFER", 10)
    world = World(
        {"f": 900}, ["a", "b"], [[Range("f", i, i + 3) for i in range(k, 900, 6)] for k in (0, 3)], 100, 1
    )
    assert final(world, tmp_path, rule=True)[0] == wanted(world)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from restow.errors import NoSpaceError

    def full(*args: object) -> int:
        raise OSError(28, "planted")

    monkeypatch.setattr(writing, "pwrite", full)
    with pytest.raises(NoSpaceError, match=r"\.edges-"):
        final(HALVES, tmp_path, rule=True)


# Which file systems.

TABLE = """\
/dev/vda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/vdb /home/local xfs rw 0 0
mds@tcp:/scratch /scratch\\040big lustre rw 0 0
sshfs /mnt/far fuse.sshfs rw 0 0
tmpfs /run tmpfs rw 0 0
a /twice ext4 rw 0 0
b:/ /twice nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind", "shared"),
    [
        ("/var/tmp", "ext4", False),
        ("/home/me/out", "nfs4", True),
        ("/homestead", "ext4", False),
        ("/home/local/out", "xfs", False),
        ("/scratch big/out", "lustre", True),
        ("/mnt/far", "fuse.sshfs", True),
        ("/run/x", "tmpfs", False),
        ("/twice/x", "nfs", True),
    ],
)
def test_detection_by_file_system_type(
    folder: str, kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert file_system(Path(folder), TABLE) == kind
    monkeypatch.setattr(Path, "read_text", lambda self: TABLE)
    assert page_of(Path(folder)) == (pages.STRIPE if shared else 0)


def test_here(tmp_path: Path) -> None:
    assert file_system(tmp_path, Path("/proc/self/mounts").read_text())
    assert page_of(tmp_path) in (0, pages.STRIPE)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    if "full_disk" not in str(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == []
