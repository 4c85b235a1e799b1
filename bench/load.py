"""Loading one MoE layer (128 experts, 2048 x 768, bfloat16, 1.2 GB, one tensor per expert) as a fraction of memcpy.

usage: python bench/load.py [--small] [--rounds N] [--save]

CPU, warm page cache, every destination touched before: what is measured is neither the disk nor the first touch of
memory. restow's ways take turns in one process, peers in another and streamers in a third, each beside a memcpy of the
same bytes (as many Python threads, one `copy_` each, into touched memory); a ratio is the median over the rounds.
Destinations are filled with -1 before each run, and compared whole with what `safetensors` itself reads after the last.
Ways that bring their own memory get it from an allocator that keeps it, so that they do not pay for first touches
either: kinder to them than life is. "as it comes" is the peer with the allocator that everybody has; the bar is against
that, the other ratio is printed beside.

    preadv                      bare preadv of the files, 16 MiB at a time, into touched memory: what the system gives
    restow grouped              restow.load into [E, d, 2f] and [E, f, d]: every matrix is transposed on the way
    restow fused                restow.load into [E, 2f, d] and [E, d, f]: the order of the files
    restow grouped, file order  restow.load into the grouped shapes over memory in the order of the files
    restow grouped, float32     the first, cast to float32
    nemo                        load_file of each shard, then NeMo AutoModel's MoESplitExpertsStateDictMixin
    dcp                         torch's HuggingFaceStorageReader into views of the grouped tensors, one per expert
    transformers                from_pretrained of a model of one layer: fused
    load_file                   safetensors.torch.load_file, which maps, and copies from it into the fused tensors
    fastsafetensors             its loader to the CPU, and copies from its buffers into the fused tensors
    runai streamer              its tensors as they arrive, and copies of them into the fused tensors

The last two are measured where they are installed; they belong to no extra.

"preadv" is no loader: it knows no names, and puts the experts' bytes down as they come. It says how far a load is from
what its reads alone cost.

Extra memory is the peak of a process's own memory (RssAnon) over what it had once its destination was touched, in a
process per way. Exits 1 if a bar is missed or a peer cannot be measured. `--save` writes bench/results/load.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from _common import child, machine, status, table, verdicts

MIB = 2**20
FULL = {"e": 128, "d": 2048, "f": 768}
SMALL = {"e": 16, "d": 512, "f": 384}
SHARDS = 4
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 36),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}

Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A checkpoint and its sizes."""

    path: str
    e: int
    d: int
    f: int


def others(case: Case) -> Mapping[str, tuple[int, ...]]:
    """The tensors that a model of one layer has besides its experts: small ones."""
    names = {f"{LAYER}.self_attn.{p}_proj.weight": (64, case.d) for p in "qkv"}
    names |= {f"{LAYER}.self_attn.{p}_norm.weight": (64,) for p in "qk"}
    names |= {f"{LAYER}.self_attn.o_proj.weight": (case.d, 64), f"{LAYER}.mlp.gate.weight": (case.e, case.d)}
    names |= {f"{LAYER}.{p}_layernorm.weight": (case.d,) for p in ("input", "post_attention")}
    names |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32, case.d))
    return names | {"model.norm.weight": (case.d,)}


def write(folder: Path, sizes: Mapping[str, int]) -> Case:
    """Write the checkpoint, as qwen3_moe spells it; random bits that are all finite."""
    case = Case(str(folder), **sizes)
    rng = torch.Generator().manual_seed(7)
    index, total = {}, 0

    def noise(*shape: int) -> torch.Tensor:
        bits = torch.randint(-(2**15), 2**15, shape, generator=rng, dtype=torch.int32).to(torch.int16)
        return (bits & -0x4001).view(torch.bfloat16)  # never the exponent of infinities and NaN

    for shard in range(SHARDS + 1):
        tensors = {}
        numbers = range(shard * case.e // SHARDS, (shard + 1) * case.e // SHARDS)
        for expert in numbers if shard < SHARDS else ():
            tensors[f"{EXPERTS}.{expert}.down_proj.weight"] = noise(case.d, case.f)
            for p in ("gate", "up"):
                tensors[f"{EXPERTS}.{expert}.{p}_proj.weight"] = noise(case.f, case.d)
        if shard == SHARDS:
            tensors = {name: noise(*shape) for name, shape in others(case).items()}
        file = f"model-{shard + 1:05}-of-{SHARDS + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": case.e,
        "moe_intermediate_size": case.f, "hidden_size": case.d, "num_hidden_layers": 1, "vocab_size": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "dtype": "bfloat16",
        "intermediate_size": case.f, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return case


def shards(case: Case) -> list[Path]:
    return sorted(Path(case.path).glob("*.safetensors"))


class Room:
    """Memory for one destination at a time, touched when it is made and used again by every way; and for a memcpy."""

    def __init__(self, size: int, spare: int = 0) -> None:
        self.bytes = torch.ones(size, dtype=torch.uint8)
        self.spare = torch.ones(spare, dtype=torch.uint8)

    def tensors(self, kind: str, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The `in` and the `out` tensor of a kind of destination, all elements -1."""
        e, d, f = case.e, case.d, case.f
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        files = kind in ("fused", "file order")
        shapes = [(e, 2 * f, d), (e, d, f)] if files else [(e, d, 2 * f), (e, f, d)]
        cut = [e * 2 * f * d * dtype.itemsize, e * d * f * dtype.itemsize]
        both = self.bytes[: sum(cut)].view(dtype).fill_(-1)
        first, second = both.split([n // dtype.itemsize for n in cut])
        pair = first.view(shapes[0]), second.view(shapes[1])
        return (pair[0].transpose(1, 2), pair[1].transpose(1, 2)) if kind == "file order" else pair


Pair = tuple[torch.Tensor, torch.Tensor]
Way = Callable[[Case, Pair, int], Pair]


def restow_load(names: tuple[str, str]) -> Way:
    def load(case: Case, room: Pair, threads: int) -> Pair:
        import restow

        into = {f"{EXPERTS}.{name}": t for name, t in zip(names, room, strict=True)}
        into |= {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in others(case).items()}
        restow.load(case.path, into, threads=threads)
        return room

    return load


GROUPED, FUSED = ("gate_and_up_projs", "down_projs"), ("gate_up_proj", "down_proj")


def nemo(case: Case, room: Pair, threads: int) -> Pair:
    from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin

    class Adapter(MoESplitExpertsStateDictMixin):
        config, dtype, _uses_model_prefix = SimpleNamespace(), torch.bfloat16, True
        moe_config = SimpleNamespace(n_routed_experts=case.e, moe_inter_dim=case.f, dim=case.d, expert_bias=False,
                                     expert_activation="swiglu")  # fmt: skip
        backend = SimpleNamespace(dispatcher="torch", experts="torch_mm")

    torch.set_num_threads(threads)
    state: Tensors = {}
    for shard in shards(case):
        state |= load_file(shard)
    native = Adapter()._from_hf_w_merged_experts(state)
    return native[f"{EXPERTS}.gate_and_up_projs"], native[f"{EXPERTS}.down_projs"]


def dcp(case: Case, room: Pair, threads: int) -> Pair:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    torch.set_num_threads(1)
    both, down = room
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in others(case).items()}
    for expert in range(case.e):
        state[f"{EXPERTS}.{expert}.gate_proj.weight"] = both[expert, :, : case.f].t()
        state[f"{EXPERTS}.{expert}.up_proj.weight"] = both[expert, :, case.f :].t()
        state[f"{EXPERTS}.{expert}.down_proj.weight"] = down[expert].t()
    load(state, storage_reader=HuggingFaceStorageReader(case.path, thread_count=threads), no_dist=True)
    return room


def transformers(case: Case, room: Pair, threads: int) -> Pair:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.bfloat16)
    experts = model.get_submodule(EXPERTS)
    return experts.gate_up_proj.detach(), experts.down_proj.detach()


def put(case: Case, room: Pair, tensors: Iterable[tuple[str, torch.Tensor]]) -> Pair:
    """Copy the experts' tensors into the fused ones, one after another."""
    both, down = room
    for name, tensor in tensors:
        if not name.startswith(EXPERTS):
            continue
        number, word = name[len(EXPERTS) + 1 :].split(".")[:2]
        half = slice(case.f) if word == "gate_proj" else slice(case.f, None)
        (down[int(number)] if word == "down_proj" else both[int(number), half]).copy_(tensor)
    return room


def plain(case: Case, room: Pair, threads: int) -> Pair:
    """`load_file` maps the files: the bytes move when they are copied, here into the fused tensors."""
    torch.set_num_threads(1)
    return put(case, room, (item for shard in shards(case) for item in load_file(shard).items()))


def fast(case: Case, room: Pair, threads: int) -> Pair:
    from fastsafetensors import SafeTensorsFileLoader

    torch.set_num_threads(threads)
    loader = SafeTensorsFileLoader(None, "cpu", nogds=True, max_threads=threads)
    loader.add_filenames({0: list(map(str, shards(case)))})
    buffers = loader.copy_files_to_device()
    put(case, room, ((name, buffers.get_tensor(name)) for name in loader.get_keys()))
    buffers.close()
    loader.close()
    return room


def runai(case: Case, room: Pair, threads: int) -> Pair:
    from runai_model_streamer import SafetensorsStreamer

    torch.set_num_threads(1)
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(threads)
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(map(str, shards(case))), owned=False)
        return put(case, room, streamer.get_tensors())


WAYS: Mapping[str, tuple[str, Way]] = {
    "restow grouped": ("grouped", restow_load(GROUPED)),
    "restow fused": ("fused", restow_load(FUSED)),
    "restow grouped, file order": ("file order", restow_load(GROUPED)),
    "restow grouped, float32": ("float32", restow_load(GROUPED)),
    "nemo": ("grouped", nemo),
    "dcp": ("grouped", dcp),
    "transformers": ("fused", transformers),
    "load_file": ("fused", plain),
    **({"fastsafetensors": ("fused", fast)} if find_spec("fastsafetensors") else {}),
    **({"runai streamer": ("fused", runai)} if find_spec("runai_model_streamer") else {}),
}
STREAMERS = tuple(name for name in ("fastsafetensors", "runai streamer") if name in WAYS)
BARE = ("restow grouped", "nemo")
LIMIT, PIECE = "preadv", 16 << 20
OURS = [name for name in WAYS if name.startswith("restow")]
FILE_ORDER = ("restow fused", "restow grouped, file order")


def check(case: Case, name: str, kind: str, found: Pair) -> None:
    """Every element against the files, as safetensors reads them."""
    both, down = (t if kind == "fused" else t.transpose(1, 2) for t in found)
    seen = 0
    for shard in shards(case):
        with safe_open(shard, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - no mapping
                if not tensor.startswith(EXPERTS):
                    continue
                number, word = tensor[len(EXPERTS) + 1 :].split(".")[:2]
                half = slice(case.f) if word == "gate_proj" else slice(case.f, None)
                got = down[int(number)] if word == "down_proj" else both[int(number), half]
                want = file.get_tensor(tensor).to(got.dtype)
                width = torch.int16 if want.element_size() == 2 else torch.int32
                if not torch.equal(got.contiguous().view(width), want.view(width)):
                    raise SystemExit(f"{name}: {tensor} differs from the file")
                seen += 1
    assert seen == 3 * case.e


def memcpy(source: torch.Tensor, target: torch.Tensor, threads: int) -> float:
    """Seconds that `threads` Python threads take to copy all bytes, a part each."""
    torch.set_num_threads(1)
    pairs = list(zip(target.chunk(threads), source.chunk(threads), strict=True))
    start = time.perf_counter()
    pool = [threading.Thread(target=to.copy_, args=(part,)) for to, part in pairs]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return time.perf_counter() - start


def preadv(case: Case, target: torch.Tensor, threads: int) -> float:
    """Seconds that `threads` threads take to read all files in pieces, as they come, into `target` and nothing else."""
    room, at, pieces = memoryview(target.numpy()), 0, []
    with contextlib.ExitStack() as stack:
        for path in shards(case)[:SHARDS]:
            file = stack.enter_context(path.open("rb", buffering=0))
            data = path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
            for begin in range(path.stat().st_size - data, path.stat().st_size, PIECE):
                size = min(PIECE, path.stat().st_size - begin)
                pieces.append((file.fileno(), room[at : at + size], begin))
                at += size
        assert at == len(room)
        start = time.perf_counter()
        left = iter(pieces)

        def work() -> None:
            for fd, piece, begin in left:  # one iterator for all: the interpreter hands out each piece once
                if os.preadv(fd, [piece], begin) != len(piece):
                    raise SystemExit("a file became shorter")

        pool = [threading.Thread(target=work) for _ in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        return time.perf_counter() - start


def quiet() -> contextlib.AbstractContextManager[object]:
    return contextlib.redirect_stderr(io.StringIO())


Times = dict[str, dict[str, list[float]]]


def times(case: Case, rounds: int, names: Sequence[str]) -> Times:
    """By "way threads": the seconds of each round, and those of the memcpy beside it."""
    size = 3 * case.e * case.d * case.f * 2
    room, source = Room(2 * size, size), torch.ones(size, dtype=torch.uint8)
    found: Times = {}

    def note(key: str, took: float, copied: float) -> None:
        line = found.setdefault(key, {"seconds": [], "memcpy": []})
        line["seconds"].append(took)
        line["memcpy"].append(copied)

    for turn in range(-1, rounds):
        for threads in (1, 2):
            if LIMIT in names:
                copied = memcpy(source, room.spare[:size], threads)
                took = preadv(case, room.bytes[:size], threads)
                copied = (copied + memcpy(source, room.spare[:size], threads)) / 2
                if turn >= 0:
                    note(f"{LIMIT} {threads}", took, copied)
            for name in [name for name in names if name != LIMIT]:
                kind, way = WAYS[name]
                pair = room.tensors(kind, case)
                copied = memcpy(source, room.spare[:size], threads)
                start = time.perf_counter()
                with quiet():
                    got = way(case, pair, threads)
                took = time.perf_counter() - start
                if turn in (-1, rounds - 1):
                    check(case, name, kind, got)
                del got, pair
                copied = (copied + memcpy(source, room.spare[:size], threads)) / 2
                if turn >= 0:
                    note(f"{name} {threads}", took, copied)
    return found


def memory(case: Case, name: str) -> dict[str, float]:
    """The peak of one way's own memory over what was there once its destination was touched, in bytes."""
    import restow

    assert restow.load
    kind, way = WAYS[name]
    size = 3 * case.e * case.d * case.f * (4 if kind == "float32" else 2)
    pair = Room(size).tensors(kind, case)
    if name == "transformers":  # its imports are no part of its load
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    if name == "nemo":
        import nemo_automodel.components.moe.experts
        import nemo_automodel.components.moe.state_dict_mixin  # noqa: F401
    if name == "dcp":
        import torch.distributed.checkpoint  # noqa: F401
    before = peak = status("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    with quiet():
        got = way(case, pair, 2)
    peak = max(peak, status("RssAnon"))
    done.set()
    thread.join()
    check(case, name, kind, got)
    return {"bytes": peak - before}


def main(small: bool, save: bool, rounds: int) -> int:
    with tempfile.TemporaryDirectory(prefix="restow-bench-") as folder:
        case = write(Path(folder), SMALL if small else FULL)
        size = 3 * case.e * case.d * case.f * 2
        rounds = rounds or (2 if small else 5)
        taken: Times = {}
        for mode in (
            "ours",
            "peers",
            "streamers",
        ):  # what a way leaves behind in its process slows no other group
            taken |= cast(Times, child(__file__, "--mode", mode, *case, rounds, env=ALLOCATOR))
        bare = cast(Times, child(__file__, "--mode", "bare", *case, rounds))
        extra = {name: float(str(child(__file__, "--mode", "memory", *case, name)["bytes"])) for name in WAYS}
    ratios, rows = {}, []
    for name in (LIMIT, *WAYS):
        line: list[object] = [name]
        for threads in (2, 1):
            found = taken[f"{name} {threads}"]
            pairs = list(zip(found["memcpy"], found["seconds"], strict=True))
            ratio = ratios[name, threads] = statistics.median(copied / took for copied, took in pairs)
            line += [f"{size / statistics.median(found['seconds']) / 1e9:.2f}", f"{ratio:.3f}"]
        rows.append([*line, f"{extra[name] / MIB:,.0f}" if name in extra else ""])
    as_it_comes = {}
    for name in BARE:
        line = [f"{name}, as it comes"]
        for threads in (2, 1):
            found = bare[f"{name} {threads}"]
            pairs = list(zip(found["memcpy"], found["seconds"], strict=True))
            ratio = as_it_comes[name, threads] = statistics.median(copied / took for copied, took in pairs)
            line += [f"{size / statistics.median(found['seconds']) / 1e9:.2f}", f"{ratio:.3f}"]
        rows.append([*line, ""])
    line = ["memcpy"]
    for threads in (2, 1):
        copied = [s for key, found in taken.items() if key.endswith(f" {threads}") for s in found["memcpy"]]
        line += [f"{size / statistics.median(copied) / 1e9:.2f}", "1"]
    rows.insert(0, [*line, ""])
    head = ["", "GB/s, 2 threads", "of memcpy", "GB/s, 1 thread", "of memcpy", "extra MiB"]
    packed = ratios["restow grouped", 2]
    bars = [
        *((f"{name}, extra MiB", extra[name] / MIB, "<=", 64.0) for name in OURS),
    ]
    speed = [
        ("restow grouped, of memcpy", packed, ">=", 0.25),
        ("restow grouped, times nemo as it comes", as_it_comes[BARE[0], 2] / as_it_comes["nemo", 2], ">=", 5),
        ("restow grouped, times dcp", packed / ratios["dcp", 2], ">=", 3),
        *((f"{name}, of memcpy", ratios[name, 2], ">=", 0.85) for name in FILE_ORDER),
    ]
    lines, good = verdicts(bars if small else [*speed, *bars])  # a small layer says nothing about speed
    what = f"# {machine()}\n\n{size / 1e9:.2f} GB: {case.e} experts, d = {case.d}, f = {case.f}, bfloat16, {rounds} rounds"
    for name in FILE_ORDER:
        limit, took = (statistics.median(taken[f"{one} 2"]["seconds"]) for one in (LIMIT, name))
        lines.append(f"      {name}, of {LIMIT}: {limit / took:.3g}")
    lines.append(
        f"      restow grouped, times nemo with memory that is kept: {packed / ratios['nemo', 2]:.3g}"
    )
    text = f"{what}; GB/s are of the source\n\n{table(head, rows)}\n\n" + "\n".join(lines)
    print(text)
    if save:
        (Path(__file__).parent / "results" / "load.md").write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--mode", choices=["ours", "peers", "streamers", "bare", "memory"])
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    if options.mode:
        path, e, d, f, last = options.rest
        here = Case(path, int(e), int(d), int(f))
        peers = tuple(name for name in WAYS if name not in (*OURS, *STREAMERS))
        ways = {"ours": (LIMIT, *OURS), "peers": peers, "streamers": STREAMERS, "bare": BARE}.get(
            options.mode
        )
        print(json.dumps(memory(here, last) if ways is None else times(here, int(last), ways)))
        sys.exit(0)
    assert os.name == "posix"
    sys.exit(main(options.small, options.save, options.rounds))
