"""One expert-parallel rank of the demo, a process of its own: DTensors with Shard(0), loaded and checked.

`python -m restow.torch.demo_rank CHECKPOINT RANK WORLD RENDEZVOUS [KEEP]` prints what it did as JSON. The
ranks meet through a file, so that no port is taken; they talk to set up the mesh and to start together, never
to load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, empty

from restow.opening import open_checkpoint
from restow.torch.demo_model import EXPERTS, TIMES, compared, loaded_shapes
from restow.torch.load import load, plan


def one_rank(
    checkpoint: str, rank: int, world: int, rendezvous: str, keep: str | None = None
) -> dict[str, Any]:
    """Load this rank's part, check it, and say what was planned and done."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    try:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        state: dict[str, torch.Tensor] = {}
        for name, shape in loaded_shapes().items():
            if ".experts." in name:
                state[name] = empty(shape, dtype=torch.bfloat16, device_mesh=mesh, placements=[Shard(0)])
            else:
                state[name] = torch.empty(shape, dtype=torch.bfloat16)
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}
        opened = open_checkpoint(checkpoint)
        made = plan(opened, state)
        seconds = float("inf")
        for _ in range(TIMES):
            for tensor in local.values():
                tensor.zero_()  # memory that was never touched would be made by the system, on the clock
            distributed.barrier()
            started = time.perf_counter()
            report = load(opened, state, threads=1)
            seconds = min(seconds, time.perf_counter() - started)
        first = rank * -(-EXPERTS // world)
        count, wrong = compared(local, first)
        experts = set(opened.expert_tensors)
        if keep is not None:
            save_file(local, keep)
        held = next(len(t) for name, t in local.items() if ".experts." in name)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return {
        "rank": rank,
        "experts": [first, first + held - 1],
        "planned_bytes": made.bytes,
        "reads": len(made.reads),
        "read_bytes": report.bytes_read,
        "written_bytes": report.bytes_written,
        "expert_bytes": sum(part.end - part.begin for part in made.parts if part.name in experts),
        "seconds": seconds,
        "checked": count,
        "wrong": wrong,
    }


def main(words: list[str]) -> None:
    """The process: its answer is one line on stdout."""
    checkpoint, rank, world, rendezvous, *keep = words
    answer = one_rank(checkpoint, int(rank), int(world), rendezvous, keep[0] if keep else None)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
