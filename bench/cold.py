"""Loading one MoE layer from files that are in no page cache, as a fraction of the fastest plain read of these files.

usage: python bench/cold.py [--small] [--rounds N] [--save] [--folder DIR]

The checkpoint of bench/load.py (1.2 GB). Before each run the files are written back and evicted
(posix_fadvise DONTNEED), and mincore must say that none of their pages is left. The floor of a round is the best of 1, 2
and 4 threads that read all files with pread, each a part in one piece, in order, 8 MiB at a time into one touched buffer.
All ways take turns; a ratio is the median over the rounds of (seconds of the floor) / (seconds of the load). Destinations
are touched before, filled with -1, and compared whole after the last round. What the disk's own side caches it caches for
all alike: the first round is not counted. Loads run with as many threads as they take by themselves.

Exits 1 if a bar is missed. `--save` writes bench/results/cold.md.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from _common import machine, table, verdicts
from load import EXPERTS, FULL, FUSED, GROUPED, SMALL, Case, Pair, Room, check, others, shards, write

PIECE = 8 << 20
READERS = (1, 2, 4)
KINDS = {"grouped": GROUPED, "fused": FUSED, "file order": GROUPED}
BAR = 0.9


def resident(path: Path) -> int:
    """How many of a file's pages are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as whole:
        pages = ctypes.create_string_buffer(-(-len(whole) // mmap.PAGESIZE))
        first = ctypes.c_char.from_buffer(whole)
        failed = libc.mincore(ctypes.addressof(first), len(whole), pages)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in pages.raw)


def evict(paths: Sequence[Path]) -> None:
    """Take the files out of the page cache, and make sure of it."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = sum(map(resident, paths))
    if left:
        raise SystemExit(f"{left} pages are still in the page cache")


def read_plainly(paths: Sequence[Path], threads: int) -> float:
    """Seconds in which `threads` threads read all files, each its part of all bytes in order."""
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    buffers = [bytearray(b"\1") * PIECE for _ in range(threads)]

    def part(number: int) -> None:
        begin, end, at = total * number // threads, total * (number + 1) // threads, 0
        for file, size in zip(files, sizes, strict=True):
            place, last = max(begin - at, 0), min(end - at, size)
            while place < last:
                place += os.preadv(file, [memoryview(buffers[number])[: min(PIECE, last - place)]], place)
            at += size

    start = time.perf_counter()
    pool = [threading.Thread(target=part, args=(number,)) for number in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    took = time.perf_counter() - start
    for file in files:
        os.close(file)
    return took


def load(case: Case, names: tuple[str, str], pair: Pair) -> float:
    """Seconds of a load."""
    import restow

    into = {f"{EXPERTS}.{name}": tensor for name, tensor in zip(names, pair, strict=True)}
    into |= {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in others(case).items()}
    start = time.perf_counter()
    restow.load(case.path, into)
    return time.perf_counter() - start


def main(small: bool, rounds: int, save: bool, folder: str | None) -> int:
    with tempfile.TemporaryDirectory(prefix="restow-bench-", dir=folder) as name:
        case = write(Path(name), SMALL if small else FULL)
        paths = shards(case)
        size = sum(path.stat().st_size for path in paths)
        room = Room(3 * case.e * case.d * case.f * 2)
        took: dict[str, list[float]] = {}
        for turn in range(-1, rounds):
            for threads in READERS:
                evict(paths)
                took.setdefault(f"pread, {threads}", []).append(read_plainly(paths, threads))
            for kind, names in KINDS.items():
                pair = room.tensors(kind, case)
                evict(paths)
                took.setdefault(kind, []).append(load(case, names, pair))
                if turn in (-1, rounds - 1):
                    check(case, kind, kind, pair)
    took = {way: seconds[1:] for way, seconds in took.items()}
    floors = [min(found) for found in zip(*(took[f"pread, {n}"] for n in READERS), strict=True)]
    rows, bars = [], []
    for way, seconds in took.items():
        ratio = statistics.median(floor / one for floor, one in zip(floors, seconds, strict=True))
        middle = statistics.median(seconds)
        spread = f"{size / max(seconds) / 1e9:.2f} to {size / min(seconds) / 1e9:.2f}"
        shown = f"{way} threads" if way.startswith("pread") else f"restow {way}"
        rows.append((shown, f"{size / middle / 1e9:.2f}", spread, f"{ratio:.2f}"))
        if way in KINDS:
            bars.append((f"restow {way}, of the best pread", ratio, ">=", 0.0 if small else BAR))
    lines, good = verdicts(bars)
    head = ("", "GB/s", "from, to", "of the best pread")
    what = f"{size / 1e9:.2f} GB, evicted before each run; {rounds} rounds, medians"
    text = "\n".join([f"# {machine()}", "", what, "", table(head, rows), "", *lines])
    print(text)
    if save:
        (Path(__file__).parent / "results" / "cold.md").write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--folder", help="where to make the checkpoint: a local disk")
    given = parser.parse_args()
    sys.exit(main(given.small, given.rounds, given.save, given.folder))
