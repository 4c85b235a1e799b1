"""Converting a checkpoint of four layers in the shape of Qwen3-30B-A3B (4.9 GB, 8 files) as a fraction of cp and sync.

usage: python bench/convert.py [--small] [--rounds N] [--save] [--folder DIR]

128 experts of 2048 x 768 in bfloat16, one tensor per expert and projection. `cp` followed by a sync of the same bytes
is the floor: it reads and writes every byte once. All ways take turns, each beside a cp of its own source, by turns
before and after it, and a ratio is the median over the rounds of (seconds of cp + sync) / (seconds of the conversion,
its own syncs and renames included). Before each run its source is in the page cache, free memory has been touched and
nothing waits to be written. A conversion runs in a process of its own, whose peak memory (VmHWM) is that of Python and
torch too; its time is that of the call, imports not counted.

    grouped   one tensor per expert to [E, d, 2f] and [E, f, d]: every matrix is transposed on the way
    undone    grouped to "source": every file must be identical to the one it came from
    fused     to [E, 2f, d] and [E, d, f]: no transpose
    back      fused to "source", compared as well

Exits 1 if a bar is missed or a file differs. `--save` writes bench/results/convert.md.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _common import child, machine, status, table, verdicts

GB, MIB = 1e9, 2**20
FULL = {"e": 128, "d": 2048, "f": 768, "layers": 4, "h": 4096, "kv": 512, "files": 8}
SMALL = {"e": 16, "d": 512, "f": 192, "layers": 2, "h": 512, "kv": 64, "files": 3}
WAYS = {  # what is converted, to what, and the bar
    "grouped": ("source", "grouped", 0.3),
    "undone": ("grouped", "source", 0.3),
    "fused": ("source", "fused", 0.7),
    "back": ("fused", "source", 0.7),
}
PEAK = 1024  # MiB
ROOM = 20  # GB that must be free: the source and at most two copies, with some to spare

Specs = list[tuple[str, tuple[int, ...]]]


class Run(NamedTuple):
    """One conversion: seconds, the floor's seconds beside it, peak bytes, and whether what came back is identical."""

    seconds: float
    floor: float
    peak: int
    same: bool


def tensors(size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order in which transformers writes them."""
    e, d, f, h, kv = (size[axis] for axis in ("e", "d", "f", "h", "kv"))
    yield "model.embed_tokens.weight", (1024, d)
    for layer in range(size["layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, d)
        yield f"{at}.self_attn.o_proj.weight", (d, h)
        for name in ("q", "k"):
            yield f"{at}.self_attn.{name}_norm.weight", (128,)
        yield f"{at}.mlp.gate.weight", (e, d)
        for expert in range(e):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (f, d)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", (f, d)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (d, f)
        for name in ("input", "post_attention"):
            yield f"{at}.{name}_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (1024, d)


def write(folder: Path, size: dict[str, int]) -> int:
    """Write the checkpoint: no two tensors alike, all values finite; the bytes of its tensors."""
    folder.mkdir()
    specs = list(tensors(size))
    total = sum(2 * prod(shape) for _, shape in specs)
    files: list[Specs] = [[]]
    held = 0
    for name, shape in specs:
        if held > total / size["files"] and len(files) < size["files"]:
            files.append([])
            held = 0
        files[-1].append((name, shape))
        held += 2 * prod(shape)
    noise = np.random.default_rng(7).integers(
        0, 2**15, max(prod(s) for _, s in specs) + 4099, dtype=np.uint16
    )
    noise &= np.uint16(0xBFFF)  # never the exponent of infinities and NaN
    index: dict[str, str] = {}
    for number, part in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in part:
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in part:
                first = len(index) % 4099
                out.write((noise[first : first + prod(shape)] ^ np.uint16(len(index))).tobytes())
                index[name] = file
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": size["e"],
        "moe_intermediate_size": size["f"], "hidden_size": size["d"], "num_hidden_layers": size["layers"],
        "vocab_size": 1024, "num_attention_heads": size["h"] // 128, "num_key_value_heads": max(1, size["kv"] // 128),
        "head_dim": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "dtype": "bfloat16", "intermediate_size": 6144,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def settle(folder: Path) -> None:
    """The same start for all: a folder in the page cache, all free memory touched, nothing waiting to be written.

    A virtual machine gives memory that lies free for seconds back to its host, and gets it again at a tenth of the
    speed: here a bare pwrite of 2.5 GB took 0.5 s into memory that was touched before and 5 s into other.
    """
    os.sync()
    for path in folder.parent.rglob("*"):  # what another way has read or written is no part of this one
        if path.is_file() and path.parent != folder:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(16 * MIB):
                pass
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))
    size = max(MIB, free - 768 * MIB)
    touch = f"import mmap\nm = mmap.mmap(-1, {size})\nfor i in range(0, len(m), 4096): m[i] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def floor(source: Path, target: Path) -> float:
    """Seconds of cp and sync."""
    settle(source)

    def copy() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        subprocess.run(["sync", *sorted(target.iterdir()), target], check=True)

    seconds = timed(copy)
    shutil.rmtree(target)
    return seconds


def convert(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Seconds of a conversion in a process of its own, and that process's peak memory."""
    found = child(__file__, "--one", source, target, to)
    return float(str(found["seconds"])), int(str(found["peak"]))


def one(source: str, target: str, to: str) -> None:
    """The process of one conversion."""
    import restow
    import restow.torch.convert

    settle(Path(source))
    report = restow.convert(source, target, to=to)
    print(json.dumps({"seconds": report.seconds, "peak": status("VmHWM")}))


def identical(a: Path, b: Path) -> bool:
    """Whether `b` holds the files of `a`, byte for byte, and besides them only its manifest."""
    wanted = sorted(path.name for path in a.iterdir())
    found = sorted(path.name for path in b.iterdir() if path.name != "checkpoint.manifest.json")
    return wanted == found and all(filecmp.cmp(a / name, b / name, shallow=False) for name in wanted)


def measure(folder: Path, rounds: int) -> dict[str, list[Run]]:
    """Every way in every round, each beside a floor of its own."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way, (source, to, _) in WAYS.items():
            target = folder / ("back" if to == "source" else to)
            # By turns first and second: a disk takes what comes after a pause faster.
            copied = floor(folder / source, folder / "copy") if number % 2 else 0.0
            seconds, peak = convert(folder / source, target, to)
            copied = copied or floor(folder / source, folder / "copy")
            same = to != "source" or identical(folder / "source", target)
            if to == "source":
                shutil.rmtree(target)
                shutil.rmtree(folder / source)
            runs[way].append(Run(seconds, copied, peak, same))
            last = runs[way][-1]
            print(
                f"round {number + 1}  {way:<8}{last.seconds:7.2f} s  cp + sync {last.floor:6.2f} s  "
                f"{last.peak / MIB:6.0f} MiB  {'identical' if last.same else 'DIFFERENT'}",
                flush=True,
            )
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--small", action="store_true", help="a few MB: shows that it works, measures nothing"
    )
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write bench/results/convert.md")
    parser.add_argument("--folder", help="where to make the checkpoint: a local disk")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return 0
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if not options.small and free < ROOM * GB:
        print(f"expected {ROOM} GB free, found {free / GB:.1f}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="restow-bench-", dir=options.folder) as name:
        total = write(Path(name) / "source", SMALL if options.small else FULL)
        runs = measure(Path(name), options.rounds or (1 if options.small else 3))
    rows, bars = [], []
    for way, (source, to, bar) in WAYS.items():
        ratio = statistics.median(run.floor / run.seconds for run in runs[way])
        seconds = statistics.median(run.seconds for run in runs[way])
        peak = max(run.peak for run in runs[way]) / MIB
        rows.append(
            (
                f"{source} to {to}",
                f"{seconds:.2f}",
                f"{total / seconds / GB:.2f}",
                f"{ratio:.2f}",
                f"{peak:.0f}",
            )
        )
        bars.append((f"{way}, of cp + sync", ratio, ">=", 0.0 if options.small else bar))
        bars.append((f"{way}, peak MiB", peak, "<=", float(PEAK)))
        if to == "source":
            bars.append(
                (f"{way}, runs with a file that differs", sum(not r.same for r in runs[way]), "<=", 0.0)
            )
    floors = [run.floor for way in runs for run in runs[way]]
    best = statistics.median(floors)
    rows.append(("cp + sync", f"{best:.2f}", f"{total / best / GB:.2f}", "1.00", ""))
    lines, good = verdicts(bars)
    text = table(("", "s", "GB/s", "of cp + sync", "peak MiB"), rows)
    spread = (
        f"cp + sync took {min(floors):.2f} to {max(floors):.2f} s, load average {os.getloadavg()[1]:.1f}."
    )
    rounds = f"{total:,} bytes, median of {len(floors) // len(WAYS)} rounds. {spread}"
    shown = "\n".join([machine(), rounds, "", text])
    print(f"\n{shown}\n\n" + "\n".join(lines))
    if options.save:
        results = Path(__file__).parent / "results" / "convert.md"
        results.parent.mkdir(exist_ok=True)
        command = "python bench/convert.py" + (" --small" if options.small else "")
        results.write_text(
            f"# Converting on disk\n\n`{command}`\n\n{shown}\n\n"
            + "\n".join(f"- {line}" for line in lines)
            + "\n"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
