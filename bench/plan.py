"""Opening and planning a checkpoint of DeepSeek-V3's shape, and of Kimi-K2's: seconds and memory on one core, no data.

usage: python bench/plan.py [--small] [--save]

The checkpoint is made here: true headers, index and config over sparse files. One rank of 64 (expert parallel) is
planned, then all 64, then 1,024 ranks (256 parts of the experts x 4 of `d`, all else in 1,024 parts along dim 0), whose
volumes must add up to the checkpoint's. Each line runs in a process of its own and counts its CPU seconds, which other
programs do not stretch, on a warm page cache; `import torch` is not part of it.
Exits 1 if a bar is missed. `--save` writes bench/results/plan.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import restow
from _common import Tensor, child, machine, sparse_checkpoint, status, table, verdicts
from restow.landing import Wish
from restow.planning import make_plan, plan_of
from restow.prepare import prepare
from restow.targets import Shard, Target
from restow.wanted import default_targets

MIB = 2**20
SHARDS = 163
WIDTH, HIDDEN = 7168, 2048
RANKS, PARTS = 64, (256, 4)


def shape(layers: int, dense: int, experts: int) -> list[Tensor]:
    """Names, dtypes and shapes as DeepSeek-V3 has them, in bfloat16."""

    def mlp(prefix: str, hidden: int) -> list[Tensor]:
        sizes = {"gate": (hidden, WIDTH), "up": (hidden, WIDTH), "down": (WIDTH, hidden)}
        return [(f"{prefix}.{name}_proj.weight", "BF16", size) for name, size in sizes.items()]

    attention = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_a_proj": (1536, WIDTH),
        "self_attn.q_a_layernorm": (1536,),
        "self_attn.q_b_proj": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, WIDTH),
        "self_attn.kv_a_layernorm": (512,),
        "self_attn.kv_b_proj": (32768, 512),
        "self_attn.o_proj": (WIDTH, 16384),
    }
    found: list[Tensor] = [("model.embed_tokens.weight", "BF16", (129280, WIDTH))]
    for layer in range(dense + layers):
        path = f"model.layers.{layer}"
        found += [(f"{path}.{name}.weight", "BF16", size) for name, size in attention.items()]
        if layer < dense:
            found += mlp(f"{path}.mlp", 18432)
            continue
        found.append((f"{path}.mlp.gate.weight", "BF16", (experts, WIDTH)))
        found.append((f"{path}.mlp.gate.e_score_correction_bias", "F32", (experts,)))
        found += mlp(f"{path}.mlp.shared_experts", HIDDEN)
        for expert in range(experts):
            found += mlp(f"{path}.mlp.experts.{expert}", HIDDEN)
    return [*found, ("model.norm.weight", "BF16", (WIDTH,)), ("lm_head.weight", "BF16", (129280, WIDTH))]


def write(folder: Path, kind: str, layers: int, dense: int, experts: int, shards: int) -> int:
    """Write one checkpoint; its number of tensors."""
    tensors = shape(layers, dense, experts)
    sizes = {"n_routed_experts": experts, "moe_intermediate_size": HIDDEN, "hidden_size": WIDTH}
    sparse_checkpoint(
        folder, tensors, shards, {"model_type": kind, **sizes, "num_hidden_layers": layers + dense}
    )
    return len(tensors)


def rank_plan(source: restow.Checkpoint, rank: int) -> restow.Plan:
    """What `restow.plan(source, shard=Shard("e", rank, of=64))` makes, which would import torch."""
    wish = Wish(shard=Shard("e", rank, RANKS))
    targets = default_targets(source, None, wish)
    return make_plan(
        source, targets, replace(wish, layout="grouped", plain=frozenset(t.name for t in targets))
    )


def one(path: str) -> dict[str, float]:
    """Open and one rank's plan, and how far memory grew."""
    gc.collect()
    base = status("VmRSS")
    start = time.process_time()
    source = restow.open(path)
    opened = time.process_time()
    made = rank_plan(source, 3)
    done = time.process_time()
    memory = status("VmHWM") - base
    return {"open": opened - start, "rank": done - opened, "memory": memory, "copies": len(made.copies)}


def traced(path: str) -> dict[str, float]:
    """The peak of what Python allocates for the same."""
    tracemalloc.start()
    rank_plan(restow.open(path), 3)
    return {"memory": tracemalloc.get_traced_memory()[1]}


def every(path: str) -> dict[str, float]:
    """All ranks' plans, each thrown away; their bytes."""
    source = restow.open(path)
    took, volume = [], 0
    for rank in range(RANKS):
        start = time.process_time()
        made = rank_plan(source, rank)
        took.append(time.process_time() - start)
        volume += sum(made.parts[copy.source].end - made.parts[copy.source].begin for copy in made.copies)
    return {"all": sum(took), "median": statistics.median(took), "bytes": volume}


def simulated(path: str) -> dict[str, float]:
    """1,024 ranks in one process: their plans, and the elements that they write in all."""
    source = restow.open(path)
    wish = Wish()
    start = time.process_time()
    targets = default_targets(source, None, wish)
    prepared = prepare(source, targets, replace(wish, layout="grouped"))
    experts, parts = PARTS
    written = 0
    for rank in range(experts * parts):
        chosen = {t.name: _part(t, t.name in prepared.owners, rank, experts, parts) for t in targets}
        made = plan_of(replace(prepared, known={}), {n: t for n, t in chosen.items() if all(t.local_shape)})
        written += made.written
    whole = sum(t.end - t.begin for entry in source.tensors.values() for t in entry.pieces)
    assert written == whole, (written, whole)
    return {"seconds": time.process_time() - start}


def _part(target: Target, grouped: bool, rank: int, experts: int, parts: int) -> Target:
    cuts = {0: Shard("e", rank // parts, experts)} if grouped else {0: Shard("d", rank, experts * parts)}
    if grouped:
        cuts[1 if target.name.endswith("gate_and_up_projs") else 2] = Shard("d", rank % parts, parts)
    runs = []
    for dim, length in enumerate(target.shape):
        run = cuts[dim].run(length) if dim in cuts else (0, length)
        runs.append((run,) if run[1] else ())
    return target._replace(runs=tuple(runs))


MODES = {"one": one, "traced": traced, "every": every, "simulated": simulated}


def seconds_of(command: Sequence[str]) -> float:
    """The median wall time of a command."""
    took = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def runs(mode: str, path: Path, times: int = 3) -> dict[str, float]:
    """The median of each number over runs of a mode."""
    found = [child(__file__, "--mode", mode, path) for _ in range(times)]
    return {key: statistics.median(float(str(one[key])) for one in found) for key in found[0]}


def main(small: bool, save: bool) -> int:
    layers, experts = (8, 64) if small else (58, 256)
    with tempfile.TemporaryDirectory(prefix="restow-bench-") as folder:
        root = Path(folder)
        rows, bars = [], []
        growth = {}
        for share in (4, 2, 1):
            count = write(root / str(share), "deepseek_v3", layers // share, 3, experts, SHARDS // share)
            found = growth[share] = runs("one", root / str(share))
            rows.append([f"open + one rank of 64, {layers // share} MoE layers", f"{count:,}", f"{found['open']:.2f}",
                         f"{found['rank']:.3f}", f"{found['memory'] / MIB:.0f}"])  # fmt: skip
        full = growth[1]
        bars.append(("open + one rank's plan, CPU seconds", full["open"] + full["rank"], "<", 3.0))
        path = root / "1"
        found = runs("every", path, 1)
        rows.append(["64 ranks, one after another", f"{count:,}", "", f"{found['median']:.3f} each", ""])
        bars.append(("one more rank's plan, CPU seconds", found["median"], "<", 0.1))
        found = runs("simulated", path, 1)
        rows.append(["1,024 ranks, volumes added up", f"{count:,}", "", f"{found['seconds']:.1f} in all", ""])
        bars.append(("1,024 ranks' plans, CPU seconds", found["seconds"], "<", 60.0))
        count = write(
            root / "k2", "kimi_k2", 60 if not small else layers, 1, 384 if not small else experts, 61
        )
        found, trace = runs("one", root / "k2"), runs("traced", root / "k2", 1)
        rows.append(["Kimi-K2: open + one rank of 64", f"{count:,}", f"{found['open']:.2f}", f"{found['rank']:.3f}",
                     f"{found['memory'] / MIB:.0f} ({trace['memory'] / MIB:.0f} traced)"])  # fmt: skip
        bars.append(("Kimi-K2: open + one rank's plan, CPU seconds", found["open"] + found["rank"], "<", 2.0))
        every_rank = runs("simulated", root / "k2", 1)["seconds"]
        rows.append(
            ["Kimi-K2: 1,024 ranks, volumes added up", f"{count:,}", "", f"{every_rank:.1f} in all", ""]
        )
        bars.append(("Kimi-K2: 1,024 ranks' plans, CPU seconds", every_rank, "<", 60.0))
        bars.append(("Kimi-K2: memory to open and plan, MiB", found["memory"] / MIB, "<=", 64))
        bars.append(("Kimi-K2: the same as Python counts it, MiB", trace["memory"] / MIB, "<=", 64))
        text = [
            f"# {machine()}; one core",
            "",
            table(["", "tensors", "open, CPU s", "plan, CPU s", "peak MiB"], rows),
            "",
        ]
        bare = seconds_of([sys.executable, "-c", "pass"])
        took = seconds_of([sys.executable, "-c", "import restow"]) - bare
        bars.append(("import restow, seconds", took, "<", 0.1))
        text.append(f"import restow: {1000 * took:.0f} ms "
                    f"over an interpreter's own {1000 * bare:.0f}")  # fmt: skip
        tool = Path(sys.executable).with_name("restow")
        if (
            tool.exists()
            and subprocess.run([tool, "--help"], capture_output=True, check=False).returncode == 0
        ):
            text.append(f"restow inspect: {seconds_of([str(tool), 'inspect', str(path)]):.2f} s, all in")
        lines, good = verdicts(bars)
        text += ["", *lines]
        print("\n".join(text))
        if save:
            (Path(__file__).parent / "results" / "plan.md").write_text("\n".join(text) + "\n")
        shutil.rmtree(path)
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("path", nargs="?")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.mode:
        print(json.dumps(MODES[options.mode](options.path)))
        sys.exit(0)
    sys.exit(main(options.small, options.save))
