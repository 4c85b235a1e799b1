"""Two ranks, experts as DTensors with Shard(0): each rank reads its own experts, and nothing is sent.

Starts its own two processes; in a cluster torchrun does. The one line that matters is restow.load.
"""

import os
import tempfile

import torch
import torch.multiprocessing as mp
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty

import restow
from tiny_checkpoint import write


def rank_of_two(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = {}  # or any nn.Module: fully_shard, Shard on any dim, HSDP, uneven sizes
    for name, shape, *_ in restow.plan(folder, layout="grouped").targets:
        sharded = {"device_mesh": mesh, "placements": [Shard(0)]} if ".experts." in name else {}
        model[name] = (empty if sharded else torch.empty)(*shape, dtype=torch.bfloat16, **sharded)
    report = restow.load(folder, model)
    for turn in range(2):
        if turn == rank:
            held = len(model["model.layers.0.mlp.experts.down_projs"].to_local())
            print(f"rank {rank}: {held} experts a layer, {report.bytes_read:,} bytes read,", end=" ")
            print(f"{len(report.in_place)} tensors in place, {len(report.staged)} staged", flush=True)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of_two, (str(write(folder)),), nprocs=2)
