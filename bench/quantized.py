"""FP8 in blocks into a grouped bfloat16 destination on the CPU: restow against torch's own quantised reader.

usage: python bench/quantized.py [--small] [--save]

A layer of Qwen3-30B-A3B: 128 experts of 768 x 2048, e4m3 with 128 x 128 blocks, one file, in the page cache. torch's
`QuantizedHuggingFaceStorageReader` decodes each expert's weight into a tensor of its own, which a user then stacks and
transposes; that part is not counted. It runs with one thread and with as many as restow takes, and the better counts.
A process per way: destinations are filled with ones first, the kernel's record of its peak (VmHWM) is reset, and extra is
what the peak of the first load rises above that; times are the best of all loads. Every value of both is compared, and the
comparison is seen to fail. Exits 1 if a bar is missed. `--save` writes bench/results/quantized.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

import restow
from _common import child, machine, status, table, verdicts
from restow.torch.threads import default_threads

MIB = 2**20
LAYER = "model.layers.0.mlp.experts"
SIZES = {"full": (128, 768, 2048), "small": (4, 256, 512)}
ROUNDS = {"full": 4, "small": 1}
BAR, MEMORY = 3.0, 64
MOST = 8  # threads, the most that a load takes by itself: for what memory it then needs


def make(folder: Path, experts: int, f: int, d: int) -> int:
    """A layer of experts in FP8 with 128 x 128 blocks; the bytes of the file."""
    state = {}
    for e in range(experts):
        for key in ("gate", "up", "down"):
            shape = (d, f) if key == "down" else (f, d)
            codes = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
            state[f"{LAYER}.{e}.{key}_proj.weight"] = codes
            state[f"{LAYER}.{e}.{key}_proj.weight_scale_inv"] = torch.rand(
                -(-shape[0] // 128), -(-shape[1] // 128)
            )
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    names = {"metadata": {}, "weight_map": dict.fromkeys(state, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    about = {
        "model_type": "qwen3_moe", "num_experts": experts, "moe_intermediate_size": f, "hidden_size": d,
        "num_hidden_layers": 1, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    return sum(tensor.nbytes for tensor in state.values())


def grouped(experts: int, f: int, d: int) -> dict[str, torch.Tensor]:
    return {
        f"{LAYER}.gate_and_up_projs": torch.ones(experts, d, 2 * f, dtype=torch.bfloat16),
        f"{LAYER}.down_projs": torch.ones(experts, f, d, dtype=torch.bfloat16),
    }


def split(experts: int, f: int, d: int) -> dict[str, torch.Tensor]:
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    return {
        f"{LAYER}.{e}.{key}_proj.weight": torch.ones(shape, dtype=torch.bfloat16)
        for e in range(experts)
        for key, shape in shapes.items()
    }


def one(folder: str, way: str, rounds: int, *sizes: int) -> dict[str, float]:
    """Loads in this process: the seconds of the best, and bytes beyond the destination in the first."""
    ours, threads = way.startswith("restow"), int(way.removeprefix("restow"))
    into = grouped(*sizes) if ours else split(*sizes)
    if ours:
        restow.plan(folder, into, part=True)  # what is imported late is there
    times, extra = [], 0
    for number in range(rounds):
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        if ours:
            restow.load(folder, into, part=True, threads=threads)
        else:
            reader = QuantizedHuggingFaceStorageReader(
                path=folder, thread_count=threads, target_dtype=torch.bfloat16, block_size=128
            )
            dcp.load(into, storage_reader=reader, no_dist=True)
        times.append(time.perf_counter() - started)
        extra = status("VmHWM") - before if not number else extra
    differ = -1 if ours else differing(folder, into, sizes)
    return {"seconds": min(times), "extra": extra, "differ": differ}


def differing(folder: str, theirs: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> int:
    """How many of the peer's tensors are not what restow put into the grouped ones."""
    ours = grouped(*sizes)
    restow.load(folder, ours, part=True)

    def same(name: str) -> bool:
        number, key, _ = name.removeprefix(f"{LAYER}.").split(".")
        both, down = ours[f"{LAYER}.gate_and_up_projs"][int(number)], ours[f"{LAYER}.down_projs"][int(number)]
        own = {"gate_proj": both[:, : sizes[1]], "up_proj": both[:, sizes[1] :], "down_proj": down}[key]
        return torch.equal(own.T, theirs[name])

    found = sum(not same(name) for name in theirs)
    name, tensor = next(iter(theirs.items()))
    tensor[-1, -1] += 1e4
    assert not same(name), "a changed value is found"
    return found


def main(size: str, save: bool) -> int:
    sizes = SIZES[size]
    threads = default_threads()
    rows = []
    with tempfile.TemporaryDirectory(prefix="restow-bench-") as place:
        bytes_ = make(Path(place), *sizes)
        ways = [f"restow{threads}", f"restow{MOST}", *map(str, sorted({1, threads}))]
        found = {way: child(__file__, "--one", place, way, ROUNDS[size], *sizes) for way in ways}
    seconds = {way: float(str(one["seconds"])) for way, one in found.items()}
    extra = {way: float(str(one["extra"])) / MIB for way, one in found.items()}
    for way in ways:
        number = way.removeprefix("restow")
        name = f"torch, split, {way} threads" if number == way else f"restow, grouped, {number} threads"
        rate = f"{bytes_ / seconds[way] / 1e9:.2f}"
        rows.append([name, f"{seconds[way]:.3f}", rate, f"{extra[way]:.1f}"])
    best = min(seconds[way] for way in ways[2:])
    lines, good = verdicts(
        [
            ("times as fast as torch's reader", best / seconds[ways[0]], ">=", BAR),
            (f"extra MiB, {threads} threads", extra[ways[0]], "<=", MEMORY),
            (f"extra MiB, {MOST} threads", extra[ways[1]], "<=", MEMORY),
            ("tensors that differ", sum(int(str(found[way]["differ"])) for way in ways[2:]), "<=", 0),
        ]
    )
    experts, f, d = sizes
    about = (
        f"{experts} experts of {f} x {d}: {bytes_ / 1e6:.0f} MB of codes and scales, "
        f"{3 * experts * f * d * 2 / MIB:,.0f} MiB of bfloat16; best of {ROUNDS[size]}"
    )
    head = ["into bfloat16", "s", "GB/s of file", "extra MiB"]
    text = "\n".join([machine(), about, "", table(head, rows), "", *lines])
    print(text)
    if save:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "quantized.md").write_text(f"# FP8 decoded\n\n{text}\n")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--small", action="store_true", help="a few MB: shows that it works, measures nothing"
    )
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", nargs=6)
    given = parser.parse_args()
    if given.one:
        folder, way, *numbers = given.one
        print(json.dumps(one(folder, way, *map(int, numbers))))
        sys.exit(0)
    sys.exit(main("small" if given.small else "full", given.save))
