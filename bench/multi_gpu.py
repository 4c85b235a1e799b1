"""Several GPUs of one host: load, check, run, save and reshard a Qwen3-30B-A3B-shaped checkpoint over a mesh.

    torchrun --standalone --nproc-per-node 8 bench/multi_gpu.py [--layers 8] [--folder DIR] [--save FILE]
    python bench/multi_gpu.py --cpu                   # four gloo processes, small sizes: the same steps

The checkpoint is written to the folder (the temporary one, unless said), a file a layer, by all ranks. Then, with NCCL:

    EP=N            experts `Shard(0)` over all ranks, everything else `Shard(0)` over all ranks, as `fully_shard` has it
    EP=N/2 x FSDP   the experts of N/2 ranks cut once more in two, first dim
    HSDP            two replicas of EP=N/2; with `group=`, so that each byte is read by one rank

Each is loaded three times from the opened checkpoint; seconds are the slowest rank's, medians. All values are
compared on the device with their own formula. Collectives raise while a load without `group` plans and reads. A
forward goes through the loaded experts by all-to-all, against the same experts made from the formula. The first
mesh's state is saved by all ranks and that save is loaded on the second. Peers, on the first mesh and in the same
run: torch DCP's Hugging Face reader into strided views, 4 threads; `safe_open` per rank, a tensor at a time. Limits:
one rank loading alone, times N; reading the page cache into pinned memory on all ranks at once; these and the load take
turns, five of each, since a host's rate changes within a run. Exits 1 if a bar is missed. Streaming the state as an RL
step would is not part of it: there is no `restow.stream` yet. NVLink multicast stays off (NCCL_NVLS_ENABLE=0).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, prod
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import restow
from _common import table, verdicts

MIB = 2**20
TALKS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier", "scatter",
    "broadcast_object_list", "reduce_scatter_tensor", "all_to_all_single", "send", "recv", "new_group",
)  # fmt: skip


class Model(NamedTuple):
    """The sizes of a checkpoint."""

    e: int
    d: int
    f: int
    layers: int
    vocabulary: int
    heads: int  # width of the queries

    @property
    def experts(self) -> Iterator[str]:
        return (f"model.layers.{layer}.mlp.experts" for layer in range(self.layers))

    @property
    def others(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.d)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            found |= {
                f"{at}.self_attn.{p}_proj.weight": (self.heads // (1 if p == "q" else 8), self.d)
                for p in "qkv"
            }
            found[f"{at}.self_attn.o_proj.weight"] = (self.d, self.heads)
            found[f"{at}.mlp.gate.weight"] = (self.e, self.d)
            found |= {f"{at}.{n}_layernorm.weight": (self.d,) for n in ("input", "post_attention")}
        return found | {"model.norm.weight": (self.d,), "lm_head.weight": (self.vocabulary, self.d)}


def values(name: str, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Elements `first` and on of a tensor: small bfloat16 values that follow from its name and their numbers."""
    n = torch.arange(first, first + count, dtype=torch.int64, device=device)
    n = (n * 2654435761 + crc32(name.encode())) & 0xFFFFFFFF
    return ((n >> 9 & 0xFF) - 127.5).mul_(2.0**-12).bfloat16()


def rows_of(name: str, shape: Sequence[int], first: int, count: int, device: torch.device) -> torch.Tensor:
    """Rows of a tensor's first dim."""
    inner = prod(shape[1:])
    return values(name, first * inner, count * inner, device).view(count, *shape[1:])


def leaf(at: str, expert: int, p: str, model: Model, device: torch.device) -> torch.Tensor:
    """One matrix of one expert, as the files have it."""
    shape = (model.d, model.f) if p == "down" else (model.f, model.d)
    return rows_of(f"{at}.{expert}.{p}_proj.weight", shape, 0, shape[0], device)


def write(folder: Path, model: Model, rank: int, world: int, device: torch.device) -> int:
    """This rank's files of the checkpoint, the index by the first; the bytes of all tensors."""
    files: dict[str, dict[str, tuple[int, ...]]] = {"model-others.safetensors": dict(model.others)}
    for layer, at in enumerate(model.experts):
        files[f"model-{layer:05}.safetensors"] = {
            f"{at}.{e}.{p}_proj.weight": (model.d, model.f) if p == "down" else (model.f, model.d)
            for e in range(model.e)
            for p in ("gate", "up", "down")
        }
    for number, (file, tensors) in enumerate(files.items()):
        if number % world == rank:
            made = {name: rows_of(name, shape, 0, shape[0], device).cpu() for name, shape in tensors.items()}
            save_file(made, folder / file, metadata={"format": "pt"})
    total = sum(2 * prod(shape) for tensors in files.values() for shape in tensors.values())
    if rank == 0:
        listing = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": listing})
        )
        config = {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": model.e,
            "moe_intermediate_size": model.f, "hidden_size": model.d, "num_hidden_layers": model.layers,
            "vocab_size": model.vocabulary, "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    return total


class Placed(NamedTuple):
    """A mesh, how experts lie on it, how all else does, and which experts this rank holds."""

    name: str
    mesh: DeviceMesh
    experts: tuple[object, ...]
    others: tuple[object, ...]
    first: int
    count: int
    ep: dist.ProcessGroup
    gather: dist.ProcessGroup | None  # ranks that hold the rest of this rank's experts
    replicas: int


def placed(kind: str, model: Model, device: torch.device) -> Placed:
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "EP":
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("ep",))
        each = model.e // world
        group = mesh.get_group("ep")
        return Placed(f"EP={world}", mesh, (Shard(0),), (Shard(0),), rank * each, each, group, None, 1)
    ep = world // 2
    mesh = init_device_mesh(device.type, (2, ep), mesh_dim_names=("dp", "ep"))
    outer, inner = divmod(rank, ep)
    each = model.e // ep
    group = mesh.get_group("ep")
    both = (_StridedShard(0, split_factor=ep), Shard(0))
    if kind == "HSDP":
        other = (Replicate(), Shard(0))
        return Placed(f"HSDP 2 x EP={ep}", mesh, other, other, inner * each, each, group, None, 2)
    half = each // 2
    first = inner * each + outer * half
    return Placed(f"EP={ep} x FSDP=2", mesh, both, both, first, half, group, mesh.get_group("dp"), 1)


def state_of(where: Placed, model: Model, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters of -1 on the mesh, as DTensors."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, shape: Sequence[int], placements: Sequence[object], rows: int) -> None:
        local = torch.full((rows, *shape[1:]), -1, dtype=torch.bfloat16, device=device)
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        found[name] = DTensor.from_local(
            local, where.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    for at in model.experts:
        put(f"{at}.gate_and_up_projs", (model.e, model.d, 2 * model.f), where.experts, where.count)
        put(f"{at}.down_projs", (model.e, model.f, model.d), where.experts, where.count)
    for name, shape in model.others.items():
        put(name, shape, where.others, own_rows(where, shape[0])[1])
    return found


def own_rows(where: Placed, length: int) -> tuple[int, int]:
    """The rows of a tensor besides the experts that this rank holds: (first, count); lengths divide evenly."""
    ranks, at = where.mesh.size(), dist.get_rank()
    if where.replicas == 2:
        ranks, at = ranks // 2, at % (ranks // 2)
    elif where.gather is not None:  # cut over ep first, then in two
        at = at % (ranks // 2) * 2 + at // (ranks // 2)
    return at * length // ranks, length // ranks


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def exact(state: Mapping[str, torch.Tensor], where: Placed, model: Model) -> bool:
    """Every element that this rank holds against its own formula, on the device."""
    device = local(next(iter(state.values()))).device
    good = True
    for at in model.experts:
        both, down = local(state[f"{at}.gate_and_up_projs"]), local(state[f"{at}.down_projs"])
        for i in range(where.count):
            gate, up, out = (leaf(at, where.first + i, p, model, device) for p in ("gate", "up", "down"))
            good = good and torch.equal(both[i], torch.cat([gate, up]).t()) and torch.equal(down[i], out.t())
    for name, shape in model.others.items():
        good = good and torch.equal(
            local(state[name]), rows_of(name, shape, *own_rows(where, shape[0]), device)
        )
    return everywhere(float(good), device, dist.ReduceOp.MIN) == 1.0


def everywhere(value: float, device: torch.device, how: dist.ReduceOp.RedOpType) -> float:
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box, op=how)
    return float(box)


@contextmanager
def silence() -> Iterator[None]:
    """Collectives raise."""

    def refuse(*args: object, **words: object) -> None:
        raise RuntimeError("a load without group talked")

    places = [
        (where, name, getattr(where, name)) for where in (dist, dist.distributed_c10d) for name in TALKS
    ]
    try:
        for where, name, _ in places:
            setattr(where, name, refuse)
        yield
    finally:
        for where, name, before in places:
            setattr(where, name, before)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the slowest rank, all of which begin together."""
    wait(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return everywhere(time.perf_counter() - start, device, dist.ReduceOp.MAX)


def forward(state: Mapping[str, torch.Tensor], where: Placed, model: Model) -> float:
    """Tokens through the first layer's experts by all-to-all; the largest difference from the formula's experts."""
    at = next(model.experts)
    both, down = local(state[f"{at}.gate_and_up_projs"]), local(state[f"{at}.down_projs"])
    device, ranks = both.device, dist.get_world_size(where.ep)
    if where.gather is not None:  # as FSDP does before a forward
        both, down = (gathered(t, where.gather) for t in (both, down))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(16, model.d, device=device).bfloat16()
    expert = torch.randint(model.e, (16,), device=device)
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=model.e).view(ranks, -1)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=where.ep)
    out, into = counts.sum(1).tolist(), theirs.sum(1).tolist()
    arrived = x.new_empty(sum(into), model.d)
    dist.all_to_all_single(arrived, x[order], into, out, group=where.ep)
    mine = torch.arange(theirs.shape[1], device=device).repeat(ranks).repeat_interleave(theirs.flatten())
    sort = mine.argsort(stable=True)
    y = torch.empty_like(arrived)
    y[sort] = through(arrived[sort], both, down, theirs.sum(0))
    back = torch.empty_like(x)
    dist.all_to_all_single(back, y, out, into, group=where.ep)
    found = torch.empty_like(back)
    found[order] = back
    worst = 0.0
    for i, e in enumerate(expert.tolist()):
        gate, up, last = (leaf(at, e, p, model, device) for p in ("gate", "up", "down"))
        wanted = (F.silu(x[i] @ gate.t()) * (x[i] @ up.t())) @ last.t()
        assert wanted.abs().max() > 0, "nothing went through the experts"
        worst = max(worst, float((wanted.float() - found[i].float()).abs().max() / wanted.abs().max()))
    assert isfinite(worst)
    return everywhere(worst, device, dist.ReduceOp.MAX)


def gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
    dist.all_gather(list(whole.chunk(dist.get_world_size(group))), tensor, group=group)
    return whole


def through(x: torch.Tensor, both: torch.Tensor, down: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    ends = counts.cumsum(0).int()
    mm = getattr(F, "grouped_mm", torch._grouped_mm)
    gate, up = mm(x, both, offs=ends).chunk(2, -1)
    return mm((F.silu(gate) * up).contiguous(), down, offs=ends)


def views(state: Mapping[str, torch.Tensor], where: Placed, model: Model) -> dict[str, torch.Tensor]:
    """Strided views of the experts that this rank holds, by the files' names."""
    found = {}
    for at in model.experts:
        both, down = local(state[f"{at}.gate_and_up_projs"]), local(state[f"{at}.down_projs"])
        for i in range(where.count):
            name = f"{at}.{where.first + i}"
            found[f"{name}.gate_proj.weight"] = both[i, :, : model.f].t()
            found[f"{name}.up_proj.weight"] = both[i, :, model.f :].t()
            found[f"{name}.down_proj.weight"] = down[i].t()
    return found


def by_dcp(folder: Path, state: Mapping[str, torch.Tensor], where: Placed, model: Model) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(folder), thread_count=4)
        dcp.load(views(state, where, model), storage_reader=reader, no_dist=True)


def by_safetensors(folder: Path, state: Mapping[str, torch.Tensor], where: Placed, model: Model) -> None:
    left = views(state, where, model)
    for file in sorted(folder.glob("model-0*.safetensors")):
        with safe_open(file, "pt", device=str(next(iter(left.values())).device)) as source:
            for name in left.keys() & set(source.keys()):
                left[name].copy_(source.get_tensor(name))


def cache_to_host(folder: Path, device: torch.device, share: int) -> None:
    """Read this rank's share of the files into one host buffer, pinned where there is a device."""
    from concurrent.futures import ThreadPoolExecutor

    from restow.torch.threads import default_threads

    step, threads = 4 << 20, 2 * default_threads()
    buffer = torch.empty(threads * step, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = memoryview(buffer.numpy())
    pieces = [
        (f, at) for f in sorted(folder.glob("*.safetensors")) for at in range(0, f.stat().st_size, step)
    ]
    pieces = pieces[share :: dist.get_world_size()]

    opened = {file: os.open(file, os.O_RDONLY) for file in {file for file, _ in pieces}}

    def read(number: int) -> None:
        room = view[number * step : (number + 1) * step]
        for file, at in pieces[number::threads]:
            os.preadv(opened[file], [room], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    for one in opened.values():
        os.close(one)


def main(words: argparse.Namespace) -> int:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if words.cpu else torch.device("cuda", torch.cuda.current_device())
    model = Model(16, 64, 48, 2, 96, 64) if words.cpu else Model(128, 2048, 768, words.layers, 32768, 4096)
    folder = Path(words.folder)
    source = folder / "source"
    source.mkdir(exist_ok=True)
    total = write(source, model, rank, world, device)
    os.sync()  # what is still being written to the disk takes its share of the memory's rate
    wait(device)
    rows: list[Sequence[object]] = []
    bars: list[tuple[str, float, str, float]] = []
    rates = {}

    def extra(call: Callable[[], object]) -> float:
        if device.type == "cpu":
            call()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return everywhere((torch.cuda.max_memory_allocated() - before) / MIB, device, dist.ReduceOp.MAX)

    def measured(
        what: str, where: Placed, folder: Path, group: dist.ProcessGroup | None
    ) -> dict[str, torch.Tensor]:
        state = state_of(where, model, device)
        opened, reports = restow.open(folder), []

        def load() -> None:
            if group is not None:
                reports.append(restow.load(opened, state, threads=words.threads, group=group))
                return
            with silence():
                reports.append(restow.load(opened, state, threads=words.threads))

        load()
        seconds = statistics.median(timed(load, device) for _ in range(3))
        for tensor in state.values():
            local(tensor).fill_(-1)
        more = extra(load)
        good = exact(state, where, model)
        read = everywhere(reports[-1].bytes_read, device, dist.ReduceOp.SUM)
        own = sum(local(t).nbytes for t in state.values())
        most = everywhere(reports[-1].bytes_read / own, device, dist.ReduceOp.MAX)
        filled = everywhere(own, device, dist.ReduceOp.SUM)
        rates[what] = filled / seconds / 1e9
        rows.append([what, f"{seconds:.3f}", f"{rates[what]:.2f}", f"{rates[what] / world:.2f}", f"{most:.3f}",
                     f"{read / total:.3f}", f"{more:.0f}", "yes" if good else "NO"])  # fmt: skip
        bars.append((f"{what}: exact on all ranks", float(good), ">=", 1))
        bars.append((f"{what}: bytes read, of the checkpoint", read / total, "<=", 1.02))
        bars.append((f"{what}: extra MiB on a device", more, "<=", 256))
        return state

    kinds = {kind: placed(kind, model, device) for kind in ("EP", "FSDP", "HSDP")}
    first = kinds["EP"]
    state = measured(first.name, first, source, None)
    for kind in ("FSDP", "HSDP"):
        where = kinds[kind]
        other = measured(where.name, where, source, dist.group.WORLD if where.replicas > 1 else None)
        worst = forward(other, where, model)
        bars.append((f"{where.name}: forward, largest difference of the largest value", worst, "<=", 0.03))
        del other
    worst = forward(state, first, model)
    bars.append((f"{first.name}: forward, largest difference of the largest value", worst, "<=", 0.03))

    saved = folder / "saved"
    took = timed(lambda: restow.save(state, saved, like=source, group=dist.group.WORLD), device)
    rows.append([f"save from {first.name}, synced", f"{took:.3f}", f"{total / took / 1e9:.2f}",
                 f"{total / took / 1e9 / world:.2f}", "", "", "", ""])  # fmt: skip
    measured(f"that save into {kinds['FSDP'].name}", kinds["FSDP"], saved, None)

    experts = 2 * 3 * model.e * model.d * model.f * model.layers
    for name, peer in (("torch DCP's reader, 4 threads, experts alone", by_dcp),
                       ("safe_open a tensor, experts alone", by_safetensors)):  # fmt: skip
        took = timed(lambda call=peer: call(source, state, first, model), device)
        rates[name] = experts / took / 1e9
        good = exact(state, first, model)
        rows.append([name, f"{took:.3f}", f"{rates[name]:.2f}", f"{rates[name] / world:.2f}", "", "", "",
                     "yes" if good else "NO"])  # fmt: skip
    took = statistics.median(timed(lambda: restow.open(source), device) for _ in range(3))
    rows.append(["open on all ranks", f"{took:.3f}", "", "", "", "", "", ""])
    opened = restow.open(source)
    calls = (
        lambda: restow.load(opened, state, threads=words.threads),
        lambda: restow.load(opened, state, threads=words.threads) if rank == 0 else None,
        lambda: cache_to_host(source, device, rank),
    )
    turns = [[timed(call, device) for call in calls] for _ in range(5)]
    together, alone, took = (statistics.median(column) for column in zip(*turns, strict=True))
    single = sum(local(t).nbytes for t in state.values()) / alone / 1e9
    for what, seconds, size in ((f"{first.name}, by turns with its limits", together, total), ("one rank alone", alone, None),
                                ("page cache to host memory, all ranks", took, total)):  # fmt: skip
        rate = size / seconds / 1e9 if size else single
        rows.append(
            [what, f"{seconds:.3f}", f"{rate:.2f}", f"{rate / (world if size else 1):.2f}", "", "", "", ""]
        )
    limit = min(world * single, total / took / 1e9)
    speed = (f"{first.name}: rate, of the lower of {world} x one rank and page cache to host", total / together / 1e9 / limit,
             ">=", 0.8)  # fmt: skip
    if not words.cpu:  # small sizes say nothing about speed
        bars.append(speed)
    lines, good = verdicts(bars)
    lines.append(f"      {first.name}: rate, of page cache to host alone: {took / together:.3f}")
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = ["", "seconds", "GB/s", "GB/s a rank", "read / own", "read / checkpoint", "extra MiB", "exact"]
    text = [f"# {world} x {kind}, {os.cpu_count()} cores, torch {torch.__version__}", "",
            f"{total / 1e9:.2f} GB, {model.layers} layers, page cache warm; GB/s count what all ranks fill", "",
            table(head, rows), "", *lines]  # fmt: skip
    if rank == 0:
        print("\n".join(text))
        if words.save:
            words.save.write_text("\n".join(text) + "\n")
    return 0 if good else 1


def on_cpu(processes: int) -> int:
    """This script as gloo processes that meet through a file."""
    with tempfile.TemporaryDirectory(prefix="restow-bench-") as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--cpu", "--folder", folder],
                env={**os.environ, "RANK": str(i), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"},
            )
            for i in range(processes)
        ]
        try:
            return max(abs(one.wait(300)) for one in ranks)
        finally:
            for one in ranks:
                one.kill()
                one.wait()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--cpu", action="store_true")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--threads", type=int, help="readers of each rank; restow's own choice, unless said")
    options.add_argument("--folder", type=Path)
    options.add_argument("--save", type=Path)
    words = options.parse_args()
    if words.cpu and "RANK" not in os.environ:
        sys.exit(on_cpu(4))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if words.cpu:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{words.folder}/meet", rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    made = None
    if words.folder is None:
        box = [tempfile.mkdtemp(prefix="restow-bench-") if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        words.folder = made = Path(str(box[0]))
    try:
        code = main(words)
        dist.barrier()
    finally:
        if made is not None and dist.get_rank() == 0:
            shutil.rmtree(made, ignore_errors=True)
    dist.destroy_process_group()
    sys.exit(code)
