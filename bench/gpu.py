"""One CUDA device: how fast a checkpoint in the page cache goes into packed grouped parameters, against limits and peers.

    python bench/gpu.py [--layers 4] [--threads 8 16] [--save FILE]

Prints one table of rates and ratios, checks every value, and exits 1 if a peer could not be measured or a bar is missed.
A second table takes the load apart, by the same plan and slots: what comes before the first read, the pump with only its
reads, only its raw copies, only its launches, in pairs, and all of it, with the kernel and with torch's copies alone.
Peers: safetensors' own loader to the device, torch DCP's Hugging Face reader into strided views; fastsafetensors and NVIDIA's
model streamer (runai_model_streamer) where they are installed. Limits: pinned copies host to device, page cache to pinned
memory, copies on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

E, D, F = 128, 2048, 768
SHARDS = 4


def values(layer: int, kind: int, device: str) -> torch.Tensor:
    """Distinct bf16 values of a layer's projection: [E, rows, cols], from the element's own number."""
    rows, cols = (F, D) if kind < 2 else (D, F)
    n = torch.arange(E * rows * cols, dtype=torch.int64, device=device)
    n = (n * 2654435761 + 97 * layer + kind) & 0x7FFF
    n = torch.where((n >> 7 & 0xFF) == 0xFF, n ^ 0x4000, n)
    return n.to(torch.int16).view(torch.bfloat16).view(E, rows, cols)


def make(folder: Path, layers: int) -> int:
    """A Qwen3-MoE-shaped checkpoint, experts only, written file by file; the bytes of all tensors."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    total = 0
    for layer in range(layers):
        table = {}
        for kind, name in enumerate(("gate", "up", "down")):
            for e, one in enumerate(values(layer, kind, "cpu")):
                key = f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight"
                table[key] = one.contiguous()
                total += one.nbytes
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        save_file(table, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(table, name)
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": F, "hidden_size": D,
              "num_hidden_layers": layers, "tie_word_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.sync()  # what is still being written to the disk takes its share of the memory's rate
    return total


def grouped(layers: int) -> dict[str, torch.Tensor]:
    """Packed destinations, filled with -1."""
    out = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        out[f"{at}.gate_and_up_projs"] = torch.full((E, D, 2 * F), -1, dtype=torch.bfloat16, device="cuda")
        out[f"{at}.down_projs"] = torch.full((E, F, D), -1, dtype=torch.bfloat16, device="cuda")
    return out


def check(state: dict[str, torch.Tensor], layers: int) -> None:
    """Every value of every tensor against its own number."""
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (values(layer, kind, "cuda").transpose(1, 2) for kind in range(3))
        both = state[f"{at}.gate_and_up_projs"]
        same = [(both[..., :F], gate), (both[..., F:], up), (state[f"{at}.down_projs"], down)]
        for found, wanted in same:
            if not torch.equal(found.contiguous().view(torch.int16), wanted.contiguous().view(torch.int16)):
                sys.exit("wrong values")


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds, the device idle before and after."""
    out = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return statistics.median(out)


def host_limits(threads: int) -> dict[str, float]:
    """GB/s of pinned copies to the device and of copies on the device."""
    size = 1 << 30
    host, there, other = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    there.copy_(host)
    return {
        "pinned memory to the device": size / timed(lambda: there.copy_(host, non_blocking=True), 5) / 1e9,
        "copy on the device": size / timed(lambda: other.copy_(there), 5) / 1e9,
    }


def cache_to_pinned(folder: Path, threads: int) -> float:
    """GB/s of reading all files into one pinned buffer, again and again, with this many threads."""
    files = sorted(folder.glob("*.safetensors"))
    buffer = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    view = memoryview(buffer.numpy())
    jobs = [(f, at) for f in files for at in range(0, f.stat().st_size, 4 << 20)]

    def work(part: list[tuple[Path, int]], slot: int) -> None:
        fds: dict[Path, int] = {}
        base = slot * (4 << 20)
        for file, at in part:
            fd = fds.setdefault(file, -1)
            if fd < 0:
                fd = fds[file] = os.open(file, os.O_RDONLY)
            os.preadv(fd, [view[base : base + (4 << 20)]], at)
        for fd in fds.values():
            os.close(fd)

    def run() -> None:
        pool = [threading.Thread(target=work, args=(jobs[i::threads], i)) for i in range(threads)]
        for one in pool:
            one.start()
        for one in pool:
            one.join()

    run()
    return sum(f.stat().st_size for f in files) / timed(run, 3) / 1e9


def apart(
    folder: Path, opened: Any, state: dict[str, torch.Tensor], counts: Sequence[int]
) -> list[tuple[str, float]]:
    """Milliseconds of each stage of a load."""
    import restow
    from restow.torch import device, packing, slotwork
    from restow.torch.pump import pump
    from restow.torch.sources import Files

    def seconds(call: Callable[[], object]) -> float:
        return timed(call, 5) * 1000

    class Part(device.Streams):
        """The lane without what is not named; tables always travel, since the kernel writes where they say."""

        stages: Collection[str] = ()

        def send(self, tray: int, size: int, slot: int, at: int) -> None:
            if "send" in self.stages:
                super().send(tray, size, slot, at)

        def move(self, slot: int, work: Callable[[], None]) -> None:
            super().move(slot, work if "launch" in self.stages else lambda: None)

    plan = restow.plan(opened, state)
    rows = [("plan", seconds(lambda: restow.plan(opened, state)))]
    here = torch.device("cuda", torch.cuda.current_device())
    lanes = {count: Part(here, count, packing.SHARE) for count in counts}
    there = lanes[counts[0]].there
    for name, worth in (("kernel", 0), ("torch", 1 << 60)):
        job = slotwork.prepared(plan, state, there, worth)
        rows.append(
            (
                f"slots and tables, {name}",
                seconds(lambda w=worth: slotwork.prepared(plan, state, there, w)),
            )
        )
        launches = sum(len(w.launches) + len(w.runs) for w in job.work)
        rows.append((f"(launches, {name})", float(launches)))
        rows.append((f"(of them the kernel's, {name})", float(sum(len(w.launches) for w in job.work))))
    with ExitStack() as stack:
        read = device.filling(Files(stack, str(folder), {}))

        def nothing(pieces: Sequence[tuple[str, int, int, int]], slot: memoryview) -> int:
            return sum(piece[2] for piece in pieces)

        for threads, lane in lanes.items():
            jobs = {
                name: slotwork.prepared(plan, state, lane.there, worth)
                for name, worth in (("kernel", 0), ("torch", 1 << 60))
            }
            for words in (
                "read",
                "send",
                "launch",
                "read send",
                "send launch",
                "read launch",
                "read send launch",
            ):
                for name in ("kernel", "torch") if "launch" in words else ("kernel",):
                    lane.stages, fill = words.split(), read if "read" in words else nothing
                    took = seconds(lambda: pump(jobs[name], lane, fill, threads))  # noqa: B023 - called here
                    rows.append(
                        (f"pump: {words}{f', {name}' if 'launch' in words else ''}, {threads} threads", took)
                    )
    return rows


def on_device(state: dict[str, torch.Tensor], layers: int) -> tuple[list[tuple[str, float, str]], float]:
    """(what, ms, GB/s of the experts' bytes) of moving layouts on the device; the kernel's rate of a plain copy's.

    Grouped to split is views, so tensors of their own are filled by a load from memory. The plain copies are of the same
    bytes, in one piece and leaf by leaf.
    """
    import restow
    from restow.torch import on_device

    split = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": torch.empty(
            (F, D) if kind < 2 else (D, F), dtype=torch.bfloat16, device="cuda"
        )
        for layer in range(layers)
        for e in range(E)
        for kind, name in enumerate(("gate", "up", "down"))
    }
    total = sum(t.nbytes for t in split.values())
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    plain = on_device.launch

    def marked(table: torch.Tensor, what: Any) -> None:
        one = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        one[0].record()
        plain(table, what)
        one[1].record()
        spans.append(one)

    def kernel(call: Callable[[], object]) -> float:
        took = []
        for _ in range(6):
            spans.clear()
            call()
            torch.cuda.synchronize()
            took.append(sum(a.elapsed_time(b) for a, b in spans) / 1000)
        if not spans:
            sys.exit("the kernel was not used")
        return statistics.median(took[1:])

    def to_split() -> object:
        return restow.load(state, split, family="qwen3_moe")

    def to_grouped() -> object:
        return restow.relayout(split, src="split", dst="grouped", family="qwen3_moe")

    flat = torch.empty(2, total // 2, dtype=torch.bfloat16, device="cuda")
    found = [("copy of all in one", timed(lambda: flat[0].copy_(flat[1]), 9)),
             ("copy leaf by leaf", timed(lambda: [t.clone() for t in split.values()], 5))]  # fmt: skip
    flat = torch.empty(0)
    on_device.launch = marked
    try:
        found += [("kernel alone, grouped -> split", kernel(to_split)),
                  ("kernel alone, split -> grouped", kernel(to_grouped))]  # fmt: skip
    finally:
        on_device.launch = plain
    for layer in range(layers):
        for kind, name in enumerate(("gate", "up", "down")):
            for e, one in enumerate(values(layer, kind, "cuda")):
                if not torch.equal(split[f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight"], one):
                    sys.exit("wrong values")
    check(to_grouped(), layers)  # type: ignore[arg-type]
    found += [("restow.load grouped -> split, in memory", timed(to_split, 3)),
              ("restow.relayout grouped -> split, views",
               timed(lambda: restow.relayout(state, dst="split", family="qwen3_moe"), 3)),
              ("restow.relayout split -> grouped", timed(to_grouped, 3))]  # fmt: skip
    rate = found[0][1] / max(found[2][1], found[3][1])
    return [(what, 1000 * took, f"{total / took / 1e9:.0f}") for what, took in found], rate


def views_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The grouped tensors expert by expert, as the files have them."""
    views = {}
    for name, tensor in state.items():
        at = name.rpartition(".")[0]
        for e in range(E):
            if name.endswith("down_projs"):
                views[f"{at}.{e}.down_proj.weight"] = tensor[e].t()
            else:
                views[f"{at}.{e}.gate_proj.weight"] = tensor[e, :, :F].t()
                views[f"{at}.{e}.up_proj.weight"] = tensor[e, :, F:].t()
    return views


def fast(files: list[str], views: dict[str, torch.Tensor] | None) -> None:
    """fastsafetensors' loader by pinned buffers, and its tensors into the grouped ones if there are `views`."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cuda:0", nogds=True)
    loader.add_filenames({0: files})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        tensor = buffers.get_tensor(name)
        if views is not None:
            views[name].copy_(tensor)
    torch.cuda.synchronize()
    buffers.close()
    loader.close()


def runai(files: list[str], views: dict[str, torch.Tensor] | None) -> None:
    """NVIDIA's model streamer, a tensor to the device as it arrives, or into its place if there are `views`."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        kept = []
        for name, tensor in streamer.get_tensors():
            if views is None:
                kept.append(tensor.to("cuda"))
            else:
                views[name].copy_(tensor)


def others(files: list[str], state: dict[str, torch.Tensor], layers: int) -> list[tuple[str, float]]:
    """(what, seconds) of the peers that are installed: their tensors as they are, and brought into the grouped ones."""
    found = []
    for name, module, call in (("fastsafetensors", "fastsafetensors", fast),
                               ("runai streamer", "runai_model_streamer", runai)):  # fmt: skip
        if find_spec(module) is None:
            continue
        found.append((f"{name}, tensors as in the files", timed(lambda: call(files, None), 3)))  # noqa: B023
        for tensor in state.values():
            tensor.fill_(-1)
        views = views_of(state)
        found.append((f"{name}, into the grouped tensors", timed(lambda: call(files, views), 3)))  # noqa: B023
        check(state, layers)
    return found


def dcp_load(folder: Path, state: dict[str, torch.Tensor], threads: int) -> None:
    """torch DCP's reader into per-expert strided views of the grouped tensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    views = views_of(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(
            views, storage_reader=HuggingFaceStorageReader(str(folder), thread_count=threads), no_dist=True
        )


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--peers", type=int, default=1)
    options.add_argument("--threads", type=int, nargs="+", default=[8, 12, 16])
    options.add_argument("--save", type=Path)
    words = options.parse_args()
    import restow
    from restow.torch.threads import default_threads

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.environ.get("BENCH_SHM") else None))
    total = make(folder, words.layers)
    threads = min(16, os.cpu_count() or 1)
    rows: list[tuple[str, float]] = []
    state = grouped(words.layers)
    opened = restow.open(folder)
    report = restow.load(opened, state, threads=threads)
    check(state, words.layers)
    for tensor in state.values():
        tensor.fill_(-1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    restow.load(opened, state, threads=threads)
    extra = (torch.cuda.max_memory_allocated() - before) >> 20
    check(state, words.layers)
    assert report.bytes_read == total
    for count in words.threads:
        seconds = timed(lambda n=count: restow.load(opened, state, threads=n), words.repeats)
        rows.append((f"restow.load, split -> packed grouped, {count} threads", total / seconds / 1e9))
    best = max(rate for _, rate in rows)
    limits = host_limits(threads)
    limits[f"page cache to pinned memory, {threads} threads"] = cache_to_pinned(folder, threads)
    rows += list(limits.items())
    if words.peers:
        from safetensors.torch import load_file

        files = sorted(folder.glob("*.safetensors"))
        seconds = timed(lambda: [load_file(f, device="cuda") for f in files], 3)
        rows.append(("safetensors load_file(device='cuda')", total / seconds / 1e9))
        seconds = timed(lambda: dcp_load(folder, state, 4), 1)
        rows.append(("torch DCP reader into strided views, 4 threads", total / seconds / 1e9))
        rows += [
            (what, total / took / 1e9) for what, took in others(list(map(str, files)), state, words.layers)
        ]
    name = torch.cuda.get_device_name()
    text = [f"{name}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            f"{total / 1e9:.2f} GB in {words.layers} files, page cache warm, {default_threads()} default threads",
            "", "| what | GB/s | restow is |", "|---|---|---|"]  # fmt: skip
    text += [f"| {what} | {rate:.1f} | {best / rate:.2f} x |" for what, rate in rows]
    stages = apart(folder, opened, state, words.threads)
    check(state, words.layers)
    text += ["", "| stage | ms | GB/s |", "|---|---|---|"]
    text += [
        f"| {what} | {took:.1f} | {'' if what[0] == '(' else f'{total / took / 1e6:.1f}'} |"
        for what, took in stages
    ]
    moves, share = on_device(state, words.layers)
    text += ["", "| on the device | ms | GB/s |", "|---|---|---|"]
    text += [f"| {what} | {took:.1f} | {rate} |" for what, took, rate in moves]
    text += ["", f"the kernel's slower way is {share:.2f} of a plain copy"]
    text += ["", f"extra memory on the device while loading: {extra} MiB"]
    peers = dict(rows)
    bars = [("at least 30 GB/s", best >= 30), ("at most 256 MiB extra", extra <= 256),
            ("relayout kernel at least 0.8 of a plain copy", share >= 0.8)]  # fmt: skip
    if words.peers:
        bars += [
            ("6 x safetensors", best >= 6 * peers["safetensors load_file(device='cuda')"]),
            ("8 x DCP with 4 threads", best >= 8 * peers["torch DCP reader into strided views, 4 threads"]),
        ]
    text += [f"{'held' if held else 'MISSED'}: {what}" for what, held in bars]
    print("\n".join(text))
    if words.save:
        words.save.write_text("\n".join(text) + "\n")
    return 0 if all(held for _, held in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
