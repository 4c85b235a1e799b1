"""Load time per byte as a checkpoint grows: 1, 2, 4 and 8 GB of experts, warm page cache, touched destinations.

usage: python bench/growth.py [--small] [--rounds N] [--save] [--folder DIR] [--device cuda]

On a CUDA device 16 GB is a size, too, and its table is printed only: redirect it.

bfloat16, one tensor per expert and projection, qwen3_moe; layers of 128 experts, 2048 x 640, a GB each. The smaller
checkpoints are the first layers of the largest (the same files under a second name), so that all sizes take turns over
one page cache and one piece of memory. Each load opens, plans and reads with the threads that it takes by itself; the time
per byte is the median over the rounds, and a bar compares the slowest size with the fastest. Every destination is filled
with -1 before each load; after the last one each expert of it is compared with what safetensors reads.

Exits 1 if a bar is missed. `--save` writes bench/results/growth.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import restow
from _common import machine, table, verdicts

EXPERTS, D, F = 128, 2048, 640
FULL, SMALL, MORE = (1, 2, 4, 8), (1, 2), 16
WAYS = ("file order", "packed")
BAR = 1.1
Tensors = dict[str, torch.Tensor]


def write(folder: Path, sizes: Sequence[int], experts: int, d: int, f: int) -> dict[int, Path]:
    """A checkpoint for each number of layers, two files a layer, which all of them share; random bits, all finite."""
    noise = (
        torch.randint(-(2**15), 2**15, (d * f + 4099,), dtype=torch.int32).to(torch.int16) & -0x4001
    ).view(torch.bfloat16)
    written = 0

    def tensor(*shape: int) -> torch.Tensor:
        nonlocal written
        written += 1
        return noise[written % 4099 :][: prod(shape)].view(shape).clone()

    made: dict[int, Path] = {}
    index: dict[str, str] = {}
    for layer in range(max(sizes)):
        at = f"model.layers.{layer}.mlp"
        for half in (0, 1):
            numbers = range(half * experts // 2, (half + 1) * experts // 2)
            tensors = {
                f"{at}.experts.{e}.{p}_proj.weight": tensor(f, d) for e in numbers for p in ("gate", "up")
            }
            tensors |= {f"{at}.experts.{e}.down_proj.weight": tensor(d, f) for e in numbers}
            index |= dict.fromkeys(tensors, f"layer-{layer:03}-{half}.safetensors")
            save_file(tensors, folder / f"layer-{layer:03}-{half}.safetensors", metadata={"format": "pt"})
        if layer + 1 in sizes:
            made[layer + 1] = first_layers(folder, index, layer + 1, experts, d, f)
    return made


def first_layers(folder: Path, index: Mapping[str, str], layers: int, experts: int, d: int, f: int) -> Path:
    """The layers that are there as a checkpoint of their own."""
    made = folder / str(layers)
    made.mkdir()
    for file in set(index.values()):
        os.link(folder / file, made / file)
    rest = {f"model.layers.{i}.mlp.gate.weight": torch.ones(experts, d) for i in range(layers)}
    rest |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.ones(64, d))
    rest = {name: tensor.to(torch.bfloat16) for name, tensor in rest.items()}
    rest["model.norm.weight"] = torch.ones(d, dtype=torch.bfloat16)
    save_file(rest, made / "rest.safetensors", metadata={"format": "pt"})
    listing = {**index, **dict.fromkeys(rest, "rest.safetensors")}
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    config = {"model_type": "qwen3_moe", "num_experts": experts, "hidden_size": d, "moe_intermediate_size": f}
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return made


def places(folder: Path, memory: torch.Tensor, way: str) -> Tensors:
    """The destination of a checkpoint, in one piece of memory."""
    into: Tensors = {}
    at = 0
    for target in restow.plan(folder, layout="grouped").targets:
        shape, count = target.shape, prod(target.shape)
        flat = memory[at : at + count]
        files = way == "file order" and len(shape) == 3
        into[target.name] = (
            flat.view(shape[0], shape[2], shape[1]).transpose(1, 2) if files else flat.view(shape)
        )
        at += count
    return into


def compare(folder: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Every expert against the files, as safetensors reads them."""
    seen = 0
    for path in sorted(folder.glob("layer-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                module, _, rest = name.partition(".experts.")
                number, word = rest.split(".")[:2]
                both, down = (into[f"{module}.experts.{n}"] for n in ("gate_and_up_projs", "down_projs"))
                half = both.shape[2] // 2
                found = down[int(number)] if word == "down_proj" else both[int(number)]
                if word != "down_proj":
                    found = found[:, :half] if word == "gate_proj" else found[:, half:]
                if not torch.equal(found.t().contiguous().cpu(), file.get_tensor(name)):
                    raise SystemExit(f"{name} differs from the file")
                seen += 1
    assert seen
    assert seen == sum(3 * t.shape[0] for n, t in into.items() if n.endswith("down_projs"))


def main(small: bool, rounds: int, save: bool, folder: str | None, device: str) -> int:
    sizes, shape = (SMALL, (8, 256, 128)) if small else (FULL, (EXPERTS, D, F))
    sizes += (MORE,) if device == "cuda" and not small else ()
    took: dict[tuple[str, int], list[float]] = {}
    read: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="restow-bench-", dir=folder) as name:
        folders = write(Path(name), sizes, *shape)
        count = sum(
            prod(target.shape) for target in restow.plan(folders[sizes[-1]], layout="grouped").targets
        )
        memory = torch.full((count,), -1, dtype=torch.bfloat16, device=device)
        os.sync()  # what is still being written to the disk takes its share of the memory's rate
        for turn in range(-1, rounds):
            for way in WAYS:
                for n in sizes:
                    into = places(folders[n], memory, way)
                    memory.fill_(-1)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    report = restow.load(folders[n], into)
                    seconds = time.perf_counter() - start
                    read[n] = report.bytes_read
                    if turn >= 0:
                        took.setdefault((way, n), []).append(seconds)
                    if turn == rounds - 1:
                        compare(folders[n], into)
    rows, bars = [], []
    for way in WAYS:
        each = {n: statistics.median(took[way, n]) / read[n] * 1e9 for n in sizes}  # seconds a GB
        rows += [(f"{way}, {n}", f"{read[n] / 1e9:.2f}", f"{took_ * 1e3:.1f}") for n, took_ in each.items()]
        slowest = max(each.values()) / min(each.values())
        bars.append((f"{way}, slowest of fastest", slowest, "<=", 99.0 if small else BAR))
    lines, good = verdicts(bars)
    head = ("", "GB", "ms a GB")
    where = f"{torch.cuda.get_device_name()}, {machine()}" if device == "cuda" else machine()
    text = "\n".join([f"# {where}", "", f"{rounds} rounds, medians", "", table(head, rows), "", *lines])
    print(text)
    if save:
        (Path(__file__).parent / "results" / "growth.md").write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--folder", help="where to make the checkpoint: a local disk")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    sys.exit(main(given.small, given.rounds, given.save, given.folder, given.device))
