"""One CUDA device: codes decoded there. FP8 in blocks and MXFP4 from the page cache into packed grouped bfloat16.

    python bench/gpu_codes.py [--layers 4] [--repeats 5] [--save FILE]

FP8: Qwen3-30B-A3B's layers, e4m3 with 128 x 128 blocks. MXFP4: gpt-oss-20b's, blocks of 32, e8m0 scales, gate and up interleaved.
Rates are of the files' bytes. Beside restow: safetensors' own loader, which brings the same bytes to the device and leaves
them codes; restow into memory of the host, where threads decode. Every value on the device is compared to the bit with
what the threads decode, which the tests compare with transformers; one changed bit is seen to be found. Exits 1 where extra
memory on the device is more than 256 MiB, or where restow, decoding included, is slower than safetensors without.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import restow
from _common import machine, table, verdicts
from gpu import host_limits, timed

MIB = 2**20


def bits(shape: tuple[int, ...], low: int, high: int, seed: int) -> torch.Tensor:
    """Bytes that follow from a seed and their own numbers."""
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fp8(folder: Path, layers: int) -> None:
    experts, f, d = 128, 768, 2048
    index: dict[str, str] = {}
    for layer in range(layers):
        state = {}
        for number in range(3 * experts):
            e, kind = divmod(number, 3)
            shape = (f, d) if kind < 2 else (d, f)
            name = f"model.layers.{layer}.mlp.experts.{e}.{('gate', 'up', 'down')[kind]}_proj.weight"
            state[name] = bits(shape, 0, 127, layer * 1000 + number).view(torch.float8_e4m3fn)
            grid = (shape[0] // 128, shape[1] // 128)
            state[f"{name}_scale_inv"] = torch.rand(
                grid, generator=torch.Generator().manual_seed(number)
            ).add_(0.5)
        file = f"model-{layer}.safetensors"
        save_file(state, folder / file, {"format": "pt"})
        index |= dict.fromkeys(state, file)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    finish(folder, index, {
        "model_type": "qwen3_moe", "num_experts": experts, "moe_intermediate_size": f, "hidden_size": d,
        "num_hidden_layers": layers, "torch_dtype": "bfloat16", "quantization_config": quantization,
    })  # fmt: skip


def mxfp4(folder: Path, layers: int) -> None:
    experts, f, d = 32, 2880, 2880
    index: dict[str, str] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        state = {
            f"{at}.gate_up_proj_blocks": bits((experts, 2 * f, d // 32, 16), 0, 256, layer),
            f"{at}.gate_up_proj_scales": bits((experts, 2 * f, d // 32), 118, 130, layer + 100),
            f"{at}.gate_up_proj_bias": bits((experts, 2 * f * 2), 0, 64, layer).view(torch.bfloat16),
            f"{at}.down_proj_blocks": bits((experts, d, f // 32, 16), 0, 256, layer + 200),
            f"{at}.down_proj_scales": bits((experts, d, f // 32), 118, 130, layer + 300),
            f"{at}.down_proj_bias": bits((experts, d * 2), 0, 64, layer + 1).view(torch.bfloat16),
        }
        file = f"model-{layer}.safetensors"
        save_file(state, folder / file, {"format": "pt"})
        index |= dict.fromkeys(state, file)
    finish(folder, index, {
        "model_type": "gpt_oss", "num_local_experts": experts, "intermediate_size": f, "hidden_size": d,
        "num_hidden_layers": layers, "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"},
    })  # fmt: skip


def finish(folder: Path, index: dict[str, str], config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(t.view(torch.int16), other[n].to(t.device).view(torch.int16)) for n, t in one.items()
    )


def measured(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of restow on the device, of the threads, of safetensors; bytes of the files, and what was extra."""
    targets = restow.plan(folder, layout="grouped", part=True).targets
    shapes = {t.name: t.shape for t in targets}
    into = {n: torch.full(s, -1, dtype=torch.bfloat16, device="cuda") for n, s in shapes.items()}
    host = {n: torch.full(s, -1, dtype=torch.bfloat16) for n, s in shapes.items()}
    opened = restow.open(folder)
    restow.load(opened, into, part=True)
    for tensor in into.values():
        tensor.fill_(-1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = restow.load(opened, into, part=True)
    extra = (torch.cuda.max_memory_allocated() - before) / MIB
    restow.load(opened, host, part=True)
    if not same(host, into):
        sys.exit("the device decodes other values than the threads")
    next(iter(host.values())).view(torch.int16)[-1, -1] ^= 1
    if same(host, into):
        sys.exit("the comparison sees nothing")
    files = sorted(folder.glob("*.safetensors"))
    return {
        "bytes": report.bytes_read,
        "extra": extra,
        "restow.load, decoded on the device": timed(lambda: restow.load(opened, into, part=True), repeats),
        "safetensors load_file(device='cuda'), codes": timed(
            lambda: [load_file(file, device="cuda") for file in files], 3
        ),
        "restow.load, decoded by threads, host memory": timed(
            lambda: restow.load(opened, host, part=True), 1
        ),
    }


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--save", type=Path)
    words = options.parse_args()
    rows, bars = [], []
    for name, make in (("FP8", fp8), ("MXFP4", mxfp4)):
        with tempfile.TemporaryDirectory(prefix="restow-bench-") as place:
            make(Path(place), words.layers)
            os.sync()
            found = measured(Path(place), words.repeats)
        size, extra, *_ = found.values()
        ours, theirs, _ = list(found.values())[2:]
        for what, seconds in list(found.items())[2:]:
            rows.append((f"{name}: {what}", f"{1000 * seconds:.0f}", f"{size / seconds / 1e9:.1f}",
                         f"{seconds / ours:.2f}"))  # fmt: skip
        bars.append((f"{name}: extra MiB on the device", extra, "<=", 256.0))
        bars.append((f"{name}: times safetensors, which leaves codes", theirs / ours, ">=", 1.0))
    pinned = host_limits(1)["pinned memory to the device"]
    rows.append(("pinned memory to the device", "", f"{pinned:.1f}", ""))
    lines, good = verdicts(bars)
    head = ("into packed grouped bfloat16", "ms", "GB/s of the files", "times restow's seconds")
    text = "\n".join(
        [f"# {torch.cuda.get_device_name()}, {machine()}", "", f"{words.layers} layers, page cache warm, medians", "",
         table(head, rows), "", *lines]
    )  # fmt: skip
    print(text)
    if words.save:
        words.save.write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
