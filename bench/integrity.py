"""What digests cost: in a conversion, in `verify PATH` against the best cold read, and fingerprints against memcpy.

usage: python bench/integrity.py [--small] [--rounds N] [--layers N] [--save FILE] [--folder DIR]

The checkpoint is that of bench/convert.py (four layers in the shape of Qwen3-30B-A3B, 4.9 GB, or `--layers`).

    convert       with every digest and look at the values, and with none; both take turns, each in a process of its
                  own, source in the page cache and free memory touched, as in bench/convert.py; the cost is the median
                  over the rounds of (with / without) - 1
    verify        of a folder with a manifest, its files evicted from the page cache (posix_fadvise) before each run,
                  beside plain reads of the same evicted files by 1, 2 and 4 threads, the best of which counts; the
                  rate is the best of the rounds on each side
    fingerprint   of tensors in memory, beside copies of the same tensors; best of the rounds on each side

Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import convert as full
from _common import child, machine, table, verdicts

WAYS = ("fused", "grouped")
BARS = {"convert": 0.15, "verify": 0.8, "fingerprint": 0.3}
BLOCK = 8 << 20


def converted(source: Path, target: Path, to: str, plain: bool) -> float:
    """Seconds of one conversion in this process, without any digest if `plain`."""
    import restow
    from restow.torch import convert as converting
    from restow.torch.digesting import Digests
    from restow.torch.passing import Passing

    if plain:
        Passing.look = lambda self, part, begin, data: None  # type: ignore[method-assign]
        Digests.beside = lambda self, filled: nullcontext()  # type: ignore[method-assign,assignment]
        converting.note_of = lambda file, digests: {}
    full.settle(source)
    started = time.perf_counter()
    restow.convert(source, target, to=to)
    return time.perf_counter() - started


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


def cost_of_digests(root: Path, rounds: int) -> list[tuple[str, float, float, float]]:
    found = []
    for to in WAYS:
        ratios, seconds = [], []
        for i in range(rounds):
            pair: dict[bool, float] = {}
            for plain in (False, True) if i % 2 else (True, False):
                done = child(__file__, "--one", root / "source", root / "out", to, int(plain))
                pair[plain] = float(str(done["seconds"]))
                shutil.rmtree(root / "out")
            ratios.append(pair[False] / pair[True] - 1)
            seconds.append(pair)
        best = [min(pair[plain] for pair in seconds) for plain in (True, False)]
        found.append((to, *best, statistics.median(ratios)))
    return found


def cold(folder: Path, rounds: int) -> tuple[dict[int, float], float]:
    """GB/s of plain reads by threads, and of `verify`, all from a cold cache."""
    import restow

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    reads = {1: 0.0, 2: 0.0, 4: 0.0}
    verified = 0.0
    for _ in range(rounds):
        for threads in reads:
            evict(folder)
            reads[threads] = max(reads[threads], size / read(folder, threads))
        evict(folder)
        started = time.perf_counter()
        report = restow.verify(folder)
        verified = max(verified, size / (time.perf_counter() - started))
        assert report.equal
        assert not report.warnings, report
    return reads, verified


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
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--layers", type=int, default=full.FULL["layers"])
    options.add_argument("--save", type=Path)
    options.add_argument("--folder", type=Path)
    options.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.one:
        source, target, to, plain = asked.one
        print(json.dumps({"seconds": converted(Path(source), Path(target), to, plain == "1")}))
        return 0
    import restow

    rounds = 1 if asked.small else asked.rounds
    root = Path(tempfile.mkdtemp(prefix="restow-integrity-", dir=asked.folder))
    try:
        full.write(root / "source", full.SMALL if asked.small else {**full.FULL, "layers": asked.layers})
        costs = cost_of_digests(root, rounds)
        restow.convert(root / "source", root / "checked", to="fused")
        reads, verified = cold(root / "checked", rounds)
    finally:
        shutil.rmtree(root)
    sums = prints(rounds, asked.small)
    best = max(reads.values())
    bars = [(f"digests added to a conversion to {to}", cost, "<=", BARS["convert"]) for to, *_, cost in costs]
    bars.append(("verify, of the best cold read", verified / best, ">=", BARS["verify"]))
    bars += [(f"fingerprint of {name}, of memcpy", b / a, ">=", BARS["fingerprint"]) for name, a, b in sums]
    lines, good = verdicts(bars)
    parts = [
        f"# Integrity\n\n{machine()}{', --small' if asked.small else ''}; {rounds} rounds",
        table(["convert to", "s without", "s with", "cost"], [(n, f"{a:.2f}", f"{b:.2f}", f"{c:.1%}") for n, a, b, c in costs]),
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
