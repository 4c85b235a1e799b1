"""How far memory grows while a checkpoint is loaded, over its destination: 1 GB and 5 GB of experts alike.

usage: python bench/memory.py [--small] [--save]

bfloat16, one tensor per expert and projection, qwen3_moe; layers of 128 experts, 2048 x 640. The files are
holes, which reading turns into zeros; destinations are filled with ones first, so that all of their memory is
there and every byte that was not written shows. A process per way opens the checkpoint, touches its
destination and resets the kernel's record of its peak (VmHWM); extra is what the peak then rises above that,
exactly, page cache not being part of a process. 8 threads, the most that a load takes by itself. Exits 1 if a
bar is missed or memory is short. `--save` writes bench/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

import restow
from _common import Tensor, child, machine, sparse_checkpoint, status, table, verdicts

MIB = 2**20
EXPERTS, D, F = 128, 2048, 640
THREADS = 8
BAR = 64
SIZES = {"full": (1, 5), "small": (1,)}
WAYS = ("grouped", "fused", "grouped, file order")


def write(folder: Path, layers: int, experts: int) -> None:
    """A checkpoint of `layers` layers: true headers over files without data."""
    tensors: list[Tensor] = [("model.embed_tokens.weight", "BF16", (1024, D))]
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        tensors.append((f"{mlp}.gate.weight", "BF16", (experts, D)))
        for e in range(experts):
            tensors.append((f"{mlp}.experts.{e}.gate_proj.weight", "BF16", (F, D)))
            tensors.append((f"{mlp}.experts.{e}.up_proj.weight", "BF16", (F, D)))
            tensors.append((f"{mlp}.experts.{e}.down_proj.weight", "BF16", (D, F)))
    tensors += [("model.norm.weight", "BF16", (D,)), ("lm_head.weight", "BF16", (1024, D))]
    config = {"model_type": "qwen3_moe", "num_experts": experts, "hidden_size": D, "moe_intermediate_size": F}
    sparse_checkpoint(folder, tensors, 2 * layers, {**config, "num_hidden_layers": layers})


def one(folder: str, way: str) -> dict[str, float]:
    """One load in this process: bytes of the destination, bytes beyond it."""
    layout = way.partition(",")[0]
    opened = restow.open(folder)
    targets = restow.plan(opened, layout=layout).targets
    into = {target.name: torch.empty(target.shape, dtype=torch.bfloat16) for target in targets}
    if way.endswith("file order"):
        into |= restow.empty_like_disk(opened, layout=layout)
    for tensor in into.values():
        tensor.fill_(1)
    size = sum(tensor.nbytes for tensor in into.values())
    before = status("VmRSS")
    assert before > size, "the destination is there"
    Path("/proc/self/clear_refs").write_text("5")
    report = restow.load(opened, into, threads=THREADS)
    extra = status("VmHWM") - before
    assert report.bytes_read == report.bytes_written == size
    assert not any(int(tensor.count_nonzero()) for tensor in into.values()), "every byte was written"
    return {"size": size, "extra": extra}


def check_can_fail() -> float:
    """What is measured of a second copy of 100 MiB that is made and dropped, in MiB."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    torch.ones(100 * MIB, dtype=torch.uint8)
    return (status("VmHWM") - before) / MIB


def available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024


def main(small: bool, save: bool) -> int:
    seen = check_can_fail()
    assert 95 < seen < 110, f"a copy of 100 MiB was measured as {seen:.0f} MiB"
    rows, bars = [], []
    experts = 16 if small else EXPERTS
    for layers in SIZES["small" if small else "full"]:
        with tempfile.TemporaryDirectory(prefix="restow-bench-") as folder:
            write(Path(folder), layers, experts)
            weights = layers * experts * 3 * D * F * 2
            for way in WAYS:
                if available() < 1.3 * weights:
                    print(f"{weights / 1e9:.1f} GB of experts need {1.3 * weights / 1e9:.1f} GB of memory")
                    return 1
                found = child(__file__, "--one", folder, way)
                size, extra = (float(str(found[key])) for key in ("size", "extra"))
                what = f"{way}, {weights / 1e9:.1f} GB of experts"
                rows.append([what, f"{size / MIB:,.0f}", f"{extra / MIB:.1f}"])
                bars.append((f"extra MiB, {what}", extra / MIB, "<=", BAR))
    lines, good = verdicts(bars)
    head = ["into", "destination MiB", "extra MiB"]
    text = "\n".join([machine(), "", table(head, rows), "", *lines])
    print(text)
    if save:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "memory.md").write_text(f"# Memory of a load\n\n{text}\n")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", nargs=2)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        sys.exit(0)
    sys.exit(main(given.small, given.save))
