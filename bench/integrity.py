"""What digests cost: in a conversion, in `verify PATH` against the best cold read, and fingerprints against memcpy.

usage: python bench/integrity.py [--small] [--rounds N] [--layers N] [--save FILE] [--folder DIR]

The checkpoint is that of bench/convert.py (four layers in the shape of Qwen3-30B-A3B, 4.9 GB, or `--layers`).

    convert       with every digest of tensors and leaves, and without any: nothing else differs, values are looked at
                  in both. Both take turns in one process, after one conversion that is not counted: each gets the
                  memory that the one before has left. The cost is the median over the rounds of (with / without) - 1,
                  beside it the smallest and the largest. Source and target lie in memory (tmpfs) first, then on
                  the disk, the source in the page cache and free memory touched as in bench/convert.py. The bar is
                  judged in memory, where little but the digests differs from turn to turn, and on the disk only where
                  memory has no room: a disk's own seconds scatter by more than the bar. For information: how the
                  seconds of work on all cores (user and system) compare; and, in one round, a third conversion
                  without digests that does not look at values either
    verify        of a folder with a manifest, its files evicted from the page cache (posix_fadvise) before each run,
                  beside plain reads of the same evicted files by 1, 2 and 4 threads, the best of which counts; all
                  take turns, and the rates are medians
    fingerprint   of tensors in memory, beside copies of the same tensors; best of the rounds on each side

Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import convert as full
from _common import child, machine, table, verdicts

WAYS = ("fused", "grouped")
BARS = {"convert": 0.15, "verify": 0.8, "fingerprint": 0.3}
ARMS = ("all", "no digests", "neither")
MEMORY = Path("/dev/shm")  # a file system in memory, where there is one
BLOCK = 8 << 20

Runs = dict[str, list[dict[str, float]]]  # by arm


class Cost(NamedTuple):
    """Of conversions to one layout in one place: median seconds of each arm, and what digests cost in time and in work."""

    place: str
    to: str
    seconds: tuple[float, ...]
    cost: float
    least: float
    most: float
    work: float
    both: float  # the cost in time of digests and looks at the values


@contextlib.contextmanager
def without(arm: str) -> Iterator[None]:
    """Conversions in the block do what an arm of `ARMS` says."""
    from restow.torch import convert as converting
    from restow.torch.digesting import Digests
    from restow.torch.passing import Passing

    off: dict[tuple[object, str], object] = {}
    if arm != "all":
        off[Passing, "look"] = lambda self, part, begin, data: None
        off[Digests, "_digest"] = lambda self, block: None
        off[converting, "note_of"] = lambda file, digests: {}
    if arm == "neither":
        off[Digests, "_pass"] = lambda self, filled: None
    before = {(owner, name): getattr(owner, name) for owner, name in off}
    for (owner, name), call in off.items():
        setattr(owner, name, call)
    try:
        yield
    finally:
        for (owner, name), call in before.items():
            setattr(owner, name, call)


def converted(source: Path, target: Path, to: str, arm: str) -> dict[str, float]:
    """Seconds of one conversion in this process, and of its work on all cores; what it wrote is removed."""
    import restow

    with without(arm):
        started, before = time.perf_counter(), os.times()
        restow.convert(source, target, to=to)
        seconds, after = time.perf_counter() - started, os.times()
    shutil.rmtree(target)
    return {"seconds": seconds, "work": after.user + after.system - before.user - before.system}


def turns(source: Path, target: Path, to: str, rounds: int, on_disk: bool) -> Runs:
    """The conversions of one process."""
    runs: Runs = {arm: [] for arm in ARMS}
    if on_disk:
        full.settle(source)
    converted(source, target, to, "all")
    for i in range(rounds):
        for arm in ARMS if i == 0 else ARMS[:2][:: 1 - 2 * (i % 2)]:
            os.sync()
            runs[arm].append(converted(source, target, to, arm))
    return runs


def evict(folder: Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read(folder: Path, threads: int) -> float:
    """Seconds to read every weight file once, in blocks that are dealt out to threads."""
    jobs = [
        (path, at)
        for path in sorted(folder.glob("*.safetensors"))
        for at in range(0, path.stat().st_size, BLOCK)
    ]
    files = {path: os.open(path, os.O_RDONLY) for path, _ in jobs}

    def work(number: int) -> None:
        buffer = bytearray(BLOCK)
        for path, at in jobs[number::threads]:
            os.preadv(files[path], [buffer], at)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    took = time.perf_counter() - started
    for fd in files.values():
        os.close(fd)
    return took


def cost_of_digests(root: Path, place: str, rounds: int) -> list[Cost]:
    """Conversions of `root`'s source, each layout's in a process of its own."""
    found = []
    for to in WAYS:
        runs: Any = child(__file__, "--turns", root / "source", root / "out", to, rounds, place)

        def added(to_what: str, what: str, runs: Runs = runs) -> list[float]:
            return [a[what] / b[what] - 1 for a, b in zip(runs["all"], runs[to_what], strict=False)]

        middle = tuple(statistics.median(run["seconds"] for run in runs[arm]) for arm in ARMS)
        costs, work = added("no digests", "seconds"), statistics.median(added("no digests", "work"))
        both = statistics.median(added("neither", "seconds"))
        found.append(Cost(place, to, middle, statistics.median(costs), min(costs), max(costs), work, both))
    return found


def in_memory(size: dict[str, int]) -> bool:
    """Whether a file system in memory has room for a source and what is made of it, and memory for all of it."""
    need = 3 * sum(2 * prod(shape) for _, shape in full.tensors(size))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, free) >= need


def cold(folder: Path, rounds: int) -> tuple[dict[int, float], float]:
    """GB/s of plain reads by threads, and of `verify`, all from a cold cache: medians of rounds in which all take turns."""
    import restow

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    reads: dict[int, list[float]] = {1: [], 2: [], 4: []}
    verified = []
    for _ in range(rounds):
        for threads, rates in reads.items():
            evict(folder)
            rates.append(size / read(folder, threads))
        evict(folder)
        started = time.perf_counter()
        report = restow.verify(folder)
        verified.append(size / (time.perf_counter() - started))
        assert report.equal
        assert not report.warnings, report
    return {threads: statistics.median(rates) for threads, rates in reads.items()}, statistics.median(
        verified
    )


def prints(rounds: int, small: bool) -> list[tuple[str, float, float]]:
    """(layout, GB/s of a copy, GB/s of a fingerprint) of experts in memory."""
    import torch

    import restow

    e, f, d = (8, 192, 512) if small else (64, 768, 2048)
    at = "model.layers.0.mlp.experts"
    found = []
    for layout in ("split", "fused", "grouped"):
        form = restow.families["qwen3_moe"].form(layout)
        shapes = form.shapes({"e": e, "f": f, "d": d, "p": 2})
        state = {f"{at}.{n}": torch.randn(s, dtype=torch.bfloat16) for n, s in shapes.items()}
        other = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        size = sum(tensor.nbytes for tensor in state.values()) / 1e9
        copies, sums = 0.0, 0.0
        for _ in range(rounds + 2):
            started = time.perf_counter()
            for name, tensor in state.items():
                other[name].copy_(tensor)
            copies = max(copies, size / (time.perf_counter() - started))
            started = time.perf_counter()
            restow.fingerprint(state, family="qwen3_moe")
            sums = max(sums, size / (time.perf_counter() - started))
        found.append((layout, copies, sums))
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--small", action="store_true", help="a few MB: whether it runs, not how fast")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--layers", type=int, default=full.FULL["layers"])
    options.add_argument("--save", type=Path)
    options.add_argument("--folder", type=Path)
    options.add_argument("--turns", nargs=5, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.turns:
        source, target, to, count, place = asked.turns
        print(json.dumps(turns(Path(source), Path(target), to, int(count), place == "disk")))
        return 0
    import restow

    rounds = 1 if asked.small else asked.rounds
    size = full.SMALL if asked.small else {**full.FULL, "layers": asked.layers}
    costs: list[Cost] = []
    if in_memory(size):
        with tempfile.TemporaryDirectory(prefix="restow-integrity-", dir=MEMORY) as name:
            full.write(Path(name) / "source", size)
            costs += cost_of_digests(Path(name), "memory", rounds)
    with tempfile.TemporaryDirectory(prefix="restow-integrity-", dir=asked.folder) as name:
        root = Path(name)
        full.write(root / "source", size)
        costs += cost_of_digests(root, "disk", rounds)
        restow.convert(root / "source", root / "checked", to="fused")
        reads, verified = cold(root / "checked", rounds)
    sums = prints(rounds, asked.small)
    best = max(reads.values())
    judged = costs[0].place
    bars = [(f"digests added to a conversion to {one.to}, {judged}", one.cost, "<=", BARS["convert"])
            for one in costs if one.place == judged]  # fmt: skip
    told = (
        f"{one.to} {one.cost:+.1%} ({one.least:+.0%} to {one.most:+.0%})"
        for one in costs
        if one.place != judged
    )
    others = "; to the disk, whose seconds scatter without digests too: " * (
        len(costs) > len(WAYS)
    ) + ", ".join(told)
    bars.append(("verify, of the best cold read", verified / best, ">=", BARS["verify"]))
    bars += [(f"fingerprint of {name}, of memcpy", b / a, ">=", BARS["fingerprint"]) for name, a, b in sums]
    lines, good = verdicts(bars)
    parts = [
        f"# Integrity\n\n{machine()}{', --small' if asked.small else ''}; {rounds} rounds",
        table(["convert to", "s with digests", "s without", "s without looks either", "cost of digests", "from", "to",
               "of their work", "of both"],
              [(f"{one.to}, {one.place}", *(f"{s:.2f}" for s in one.seconds), *(f"{c:.1%}" for c in one[3:])) for one in costs]),
        f"Medians of pairs by turns. The bar is judged in {judged}{others}.",
        table(["cold", "GB/s"], [*((f"read, {n} threads", f"{rate:.2f}") for n, rate in reads.items()),
                                 ("verify PATH", f"{verified:.2f}")]),
        table(["in memory", "copy GB/s", "fingerprint GB/s"], [(n, f"{a:.2f}", f"{b:.2f}") for n, a, b in sums]),
        "\n".join(lines),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    print(text)
    if asked.save:
        asked.save.parent.mkdir(parents=True, exist_ok=True)
        asked.save.write_text(text)
    return 0 if good or asked.small else 1


if __name__ == "__main__":
    sys.exit(main())
