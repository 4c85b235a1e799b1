"""Saving a model from memory as a fraction of `safetensors.torch.save_file` of the same bytes on the same disk, both synced.

usage: python bench/save.py [--small] [--rounds N] [--save] [--folder DIR]

Two layers in the shape of Qwen3-30B-A3B: 128 experts of 2048 x 768 in bfloat16, 2.4 GB. All ways take turns, each beside
a `save_file` of its own state as it lies in memory, followed by an fsync of file and folder, which is what a save does as
well. A ratio is the median over the rounds of (seconds of save_file and sync) / (seconds of restow.save). Before each run
nothing waits to be written. Every save is compared with what `save_file` of the wanted tensors gives, tensor by tensor.

    fused      fused state to fused files: the bytes as they lie
    split      fused state to one tensor per expert and projection: the same bytes in other places
    grouped    grouped state to one tensor per expert and projection: every matrix is transposed on the way

Peak memory is what anonymous memory (RssAnon) rises above the model during a save, seen every 2 ms. Exits 1 if a bar is
missed or a tensor differs. `--save` writes bench/results/save.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import restow
from _common import child, machine, status, table, verdicts

MIB = 2**20
FULL = {"e": 128, "d": 2048, "f": 768, "layers": 2}
SMALL = {"e": 32, "d": 1024, "f": 384, "layers": 2}
WAYS = {"fused": ("fused", "fused"), "split": ("fused", "split"), "grouped": ("grouped", "split")}
RATIO, PEAK = 0.8, 256
State = dict[str, torch.Tensor]


def config(size: dict[str, int]) -> dict[str, object]:
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": size["e"],
            "moe_intermediate_size": size["f"], "hidden_size": size["d"],
            "num_hidden_layers": size["layers"]}  # fmt: skip


def state_of(size: dict[str, int], layout: str) -> State:
    """A model's tensors, noise but for infinities and NaN; the same values in every layout."""
    e, d, f = size["e"], size["d"], size["f"]
    noise = torch.Generator().manual_seed(3)

    def values(*shape: int) -> torch.Tensor:
        bits = torch.empty(shape, dtype=torch.int16).random_(0, 2**14, generator=noise)
        return bits.view(torch.bfloat16)

    out: State = {"model.embed_tokens.weight": values(1024, d), "model.norm.weight": values(d)}
    out["lm_head.weight"] = values(1024, d)
    for layer in range(size["layers"]):
        at = f"model.layers.{layer}.mlp"
        out[f"{at}.gate.weight"] = values(e, d)
        up, down = values(e, 2 * f, d), values(e, d, f)
        if layout == "fused":
            out[f"{at}.experts.gate_up_proj"], out[f"{at}.experts.down_proj"] = up, down
        else:
            out[f"{at}.experts.gate_and_up_projs"] = up.transpose(1, 2).contiguous()
            out[f"{at}.experts.down_projs"] = down.transpose(1, 2).contiguous()
    return out


def floor(state: State, folder: Path) -> None:
    """`save_file` and the two syncs without which nothing is on the disk."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    for path in (folder / "model.safetensors", folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Peak:
    """How far anonymous memory rises above what it was."""

    def __enter__(self) -> Peak:
        self.before = self.most = status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return self.most - self.before


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def one(way: str, small: bool, rounds: int, base: str) -> dict[str, object]:
    """One way in this process: pairs of seconds, the peak above the model, and the tensors that differ."""
    size = SMALL if small else FULL
    source, target = WAYS[way]
    state = state_of(size, source)
    out, plain = Path(base) / "out", Path(base) / "plain"
    pairs, peaks, wrong = [], [], 0
    for number in range(rounds + 1):
        took = seconds(lambda: floor(state, plain))
        shutil.rmtree(plain)
        with Peak() as peak:
            mine = seconds(
                lambda: restow.save(state, out, layout=target, family="qwen3_moe", config=config(size))
            )
        peaks.append(peak.extra)
        if number:  # the first is to warm up
            pairs.append((took, mine))
        else:
            wrong = differing(state, load_file(out / "model.safetensors"), source, target, size)
        shutil.rmtree(out)
    total = sum(t.nbytes for t in state.values())
    return {"pairs": pairs, "peak": max(peaks), "wrong": wrong, "bytes": total}


def differing(state: State, found: State, source: str, target: str, size: dict[str, int]) -> int:
    """How many tensors of the files are not what views of the state say, in other words than restow's."""
    wanted = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    f = size["f"]
    for layer in range(size["layers"]):
        at = f"model.layers.{layer}.mlp.experts"
        if source == "fused":
            up, down = state[f"{at}.gate_up_proj"], state[f"{at}.down_proj"]
        else:
            up, down = state[f"{at}.gate_and_up_projs"].mT, state[f"{at}.down_projs"].mT
        if target == "fused":
            wanted |= {f"{at}.gate_up_proj": up, f"{at}.down_proj": down}
            continue
        for e in range(size["e"]):
            wanted[f"{at}.{e}.gate_proj.weight"], wanted[f"{at}.{e}.up_proj.weight"] = up[e, :f], up[e, f:]
            wanted[f"{at}.{e}.down_proj.weight"] = down[e]
    bad = len(wanted.keys() ^ found.keys())
    for name in wanted.keys() & found.keys():
        bad += not torch.equal(wanted[name].contiguous().view(torch.int16), found[name].view(torch.int16))
    return bad


def check_can_fail() -> None:
    """The looks at memory see 100 MiB that are made and dropped."""
    with Peak() as peak:
        torch.ones(100 * MIB, dtype=torch.uint8)
        time.sleep(0.01)
        kept = torch.ones(100 * MIB, dtype=torch.uint8)
        time.sleep(0.05)
    assert kept.any()
    assert 95 < peak.extra / MIB < 220, peak.extra


def main(small: bool, rounds: int, save: bool, folder: str | None) -> int:
    check_can_fail()
    rows, bars, good = [], [], True
    for way, (source, target) in WAYS.items():
        with tempfile.TemporaryDirectory(prefix="restow-bench-", dir=folder) as base:
            found = child(__file__, "--one", way, base, "--rounds", rounds, *(["--small"] if small else []))
        pairs = found["pairs"]
        assert isinstance(pairs, list)
        total, peak = float(str(found["bytes"])), float(str(found["peak"])) / MIB
        ratios = sorted(took / mine for took, mine in pairs)
        middle = statistics.median(ratios)
        mine, took = (statistics.median(pair[i] for pair in pairs) for i in (1, 0))
        rows.append([
            f"{source} to {target}", f"{total / took / 1e9:.2f}", f"{total / mine / 1e9:.2f}",
            f"{middle:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", f"{peak:.0f}",
        ])  # fmt: skip
        bars.append((f"{way}: fraction of save_file and sync", middle, ">=", RATIO))
        bars.append((f"{way}: MiB over the model", peak, "<=", PEAK))
        if found["wrong"]:
            print(f"{way}: {found['wrong']} tensors differ")
            good = False
    lines, held = verdicts(bars)
    head = ["state to files", "save_file GB/s", "restow GB/s", "ratio", "range", "MiB over the model"]
    text = "\n".join([machine(), "", table(head, rows), "", *lines])
    print(text)
    if save:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "save.md").write_text(f"# Saving, against safetensors.torch.save_file\n\n{text}\n")
    return 0 if good and held else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--one", nargs=2)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], given.small, given.rounds, given.one[1])))
        sys.exit(0)
    sys.exit(main(given.small, given.rounds, given.save, given.folder))
