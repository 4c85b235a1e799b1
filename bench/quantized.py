"""FP8 in blocks into a grouped bfloat16 destination on the CPU: restow against torch's own quantised reader.

Both read the same file. torch's `QuantizedHuggingFaceStorageReader` decodes each expert's weight into a tensor of its
own, which a user then stacks and transposes; that part is timed apart and not counted. `python bench/quantized.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

import restow

PATH = "model.layers.0.mlp.experts"


def make(folder: Path, experts: int, f: int, d: int) -> int:
    """A layer of experts in FP8 with 128 x 128 blocks; the bytes of the file."""
    state = {}
    for e in range(experts):
        for key in ("gate", "up", "down"):
            shape = (d, f) if key == "down" else (f, d)
            codes = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
            state[f"{PATH}.{e}.{key}_proj.weight"] = codes
            state[f"{PATH}.{e}.{key}_proj.weight_scale_inv"] = torch.rand(
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


def ours(
    folder: Path, experts: int, f: int, d: int, threads: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    into = {
        f"{PATH}.gate_and_up_projs": torch.zeros(experts, d, 2 * f, dtype=torch.bfloat16),
        f"{PATH}.down_projs": torch.zeros(experts, f, d, dtype=torch.bfloat16),
    }
    started = time.perf_counter()
    restow.load(folder, into, part=True, threads=threads)
    return time.perf_counter() - started, into


def theirs(folder: Path, experts: int, f: int, d: int) -> tuple[float, dict[str, torch.Tensor]]:
    into = {
        f"{PATH}.{e}.{key}_proj.weight": torch.zeros(
            (d, f) if key == "down" else (f, d), dtype=torch.bfloat16
        )
        for e in range(experts)
        for key in ("gate", "up", "down")
    }
    reader = QuantizedHuggingFaceStorageReader(path=str(folder), target_dtype=torch.bfloat16, block_size=128)
    started = time.perf_counter()
    dcp.load(into, storage_reader=reader, no_dist=True)
    return time.perf_counter() - started, into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="a few MB: shows that it works, measures nothing"
    )
    args = parser.parse_args()
    if args.small:
        args.experts, args.inner, args.width, args.rounds = 4, 256, 512, 1
    sizes = args.experts, args.inner, args.width
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = make(folder, *sizes)
        us = [ours(folder, *sizes, args.threads) for _ in range(args.rounds)]
        them = [theirs(folder, *sizes) for _ in range(args.rounds)]
        name = f"{PATH}.{args.experts - 1}.up_proj.weight"
        same = torch.equal(us[0][1][f"{PATH}.gate_and_up_projs"][-1][:, args.inner :].T, them[0][1][name])
    a, b = min(t for t, _ in us), min(t for t, _ in them)
    print(
        f"{args.experts} experts of {args.inner} x {args.width}, {size / 1e6:.0f} MB of codes and scales, warm cache"
    )
    print(f"  restow, into grouped bfloat16          {a:.3f} s  {size / a / 1e9:.2f} GB/s of file")
    print(f"  torch's reader, into split bfloat16    {b:.3f} s  {size / b / 1e9:.2f} GB/s of file")
    print(f"  {b / a:.1f} times as fast; values {'equal' if same else 'differ'}")


if __name__ == "__main__":
    main()
