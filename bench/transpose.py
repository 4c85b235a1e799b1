"""Transposed copies as a fraction of a plain copy of the same bytes, for the shapes of MoE experts.

usage: python bench/transpose.py

A source tensor [rows, cols] goes into one half of a [cols, 2 * rows] destination ("down": into all of a
[cols, rows] one), over buffers larger than the caches, all prefaulted. The ways take turns, so that a noisy
neighbour hits them all. `tiles` is the library's: `tile_shape` tiles through a reused scratch, as a reader
would fill it, then `copy_transposed`; the fill counts. `shuffle` and `plain` force the kernel. `contiguous`
is `dst.copy_(src.t().contiguous())` and `naive` is `dst.copy_(src.t())`. Each Python thread moves one tensor.
"""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from restow.torch.transpose import copy_transposed, kernel_for, tile_shape

SOURCE = 240 << 20
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
SHAPES = (("gate 768x2048", 768, 2048, 2), ("gate 2048x7168", 2048, 7168, 2), ("down 2048x768", 2048, 768, 1))
SECONDS = 2.0  # per line of the table
local = threading.local()


def tiles(dst: torch.Tensor, src: torch.Tensor, kernel: str | None) -> None:
    tall, wide = tile_shape(src.element_size(), *src.shape)
    scratch = getattr(local, "scratch", None)
    if scratch is None:
        scratch = local.scratch = torch.empty(1 << 20, dtype=torch.uint8)
    for r in range(0, src.shape[0], tall):
        for c in range(0, src.shape[1], wide):
            part = src[r : r + tall, c : c + wide]
            tile = scratch[: part.numel() * src.element_size()].view(src.dtype).view(part.shape)
            tile.copy_(part)
            copy_transposed(dst[r : r + tall, c : c + wide], tile, kernel=kernel)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "memcpy": lambda dst, src: dst.t().as_strided(src.shape, src.stride()).copy_(src),
    "tiles": lambda dst, src: tiles(dst, src, None),
    "shuffle": lambda dst, src: tiles(dst, src, "shuffle"),
    "plain": lambda dst, src: tiles(dst, src, "plain"),
    "contiguous": lambda dst, src: dst.t().copy_(src.t().contiguous()),
    "naive": lambda dst, src: dst.copy_(src),
}


def line(
    pool: ThreadPoolExecutor, threads: int, srcs: list[torch.Tensor], dsts: list[torch.Tensor]
) -> list[float]:
    """Median GB/s of each way."""
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    turn, ends = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < ends or len(took["tiles"]) < 3:
        for way, move in WAYS.items():
            if way == "naive" and len(took[way]) >= 3:
                continue
            ids = [(turn + k) % len(srcs) for k in range(threads)]
            turn += threads
            start = time.perf_counter()
            for done in [pool.submit(move, dsts[i], srcs[i]) for i in ids]:
                done.result()
            took[way].append(time.perf_counter() - start)
    return [srcs[0].nbytes * threads / statistics.median(times) / 1e9 for times in took.values()]


def main() -> None:
    torch.set_num_threads(1)
    info = Path("/proc/cpuinfo")
    models = [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    names = " ".join(f"{w}B:{kernel_for(w).__name__}" for w in (1, 2, 4, 8))
    print(f"# {cpu}, {os.cpu_count()} cores, torch {torch.__version__}, kernels {names}")
    print(f"{'':38}{'GB/s':>7}  fraction of memcpy")
    print(f"{'dtype':16}{'tensor':16}{'thr':>4}" + "".join(f"{way:>11}" for way in WAYS))
    # random bytes, written once: every page is there before the first timing
    source = torch.randint(-(2**62), 2**62, (SOURCE // 8,)).view(torch.uint8)
    target = torch.ones(2 * SOURCE, dtype=torch.uint8)
    for dtype in DTYPES:
        for label, rows, cols, wide in SHAPES:
            size = rows * cols * dtype.itemsize
            srcs = [x.view(dtype).view(rows, cols) for x in source.split(size) if x.numel() == size]
            whole = [
                x.view(dtype).view(cols, wide * rows)
                for x in target.split(wide * size)
                if x.numel() == wide * size
            ]
            dsts = [x[:, :rows].t() for x in whole[: len(srcs)]]
            for threads in (1, 2):
                with ThreadPoolExecutor(threads) as pool:
                    memcpy, *rest = line(pool, threads, srcs, dsts)
                shown = "".join(f"{speed / memcpy:11.2f}" for speed in rest)
                print(f"{str(dtype)[6:]:16}{label:16}{threads:4}{memcpy:11.1f}{shown}", flush=True)


if __name__ == "__main__":
    main()
