"""One gloo process of the end-to-end test: build the model on its mesh, load it, keep logits and the report.

`python tests/moe_ranks.py FOLDER RANK WORLD` runs every case of FOLDER/cases.json, and writes
FOLDER/rank-RANK.pt. It needs no transformers: what the logits must be is for the test to know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import restow
from moe_model import Config, MoEModel, parallelize

VOCABULARY, LENGTH = 56, 8
Case = dict[str, Any]


@cache
def mesh_of(world: int, ep: int) -> DeviceMesh:
    """The mesh ("dp", "ep") of all ranks; made once, since groups take their time to meet."""
    return init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("dp", "ep"))


def sequence(rank: int) -> torch.Tensor:
    """The tokens of one rank: [1, LENGTH]."""
    return (torch.arange(LENGTH) * (2 * rank + 3) + rank)[None] % VOCABULARY


def one(case: Case, rank: int, world: int) -> dict[str, Any]:
    """A case on this rank. Every parameter is NaN before it is loaded."""
    folder = Path(case["folder"])
    model = MoEModel(Config.read(json.loads((folder / "config.json").read_text())))
    parallelize(model, mesh_of(world, case["ep"]), fsdp=case["fsdp"])
    before = {}
    for name, parameter in model.named_parameters():
        local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
        local.fill_(torch.nan)
        before[name] = (id(parameter), local.data_ptr(), tuple(local.shape))
    plan = restow.plan(folder, model)
    report = restow.load(folder, model)
    after = {}
    for name, parameter in model.named_parameters():
        local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
        after[name] = (id(parameter), local.data_ptr(), tuple(local.shape))
    logits = model(sequence(rank))
    logits.square().mean().backward()  # the whole path has a gradient
    grads = [parameter.grad for parameter in model.parameters()]
    return {
        "logits": logits.detach(),
        "graded": all(grad is not None for grad in grads),
        "names": list(before),
        "same memory": before == after,
        "shapes": {name: shape for name, (*_, shape) in after.items()},
        "in_place": report.in_place,
        "staged": dict(report.staged),
        "missing": report.missing,
        "unused": report.unused,
        "bytes_read": report.bytes_read,
        "planned": plan.bytes,
        "reads": [tuple(read) for read in plan.reads],
    }


def main(folder: Path, rank: int, world: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    found = {case["name"]: one(case, rank, world) for case in json.loads((folder / "cases.json").read_text())}
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def run(folder: Path, cases: Sequence[Case], world: int, patience: float = 300) -> list[dict[str, Any]]:
    """All ranks as processes of their own: by rank, what each case gave. Fails with their last words."""
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    words = [sys.executable, __file__, str(folder)]
    logs = [(folder / f"rank-{rank}.log").open("w+") for rank in range(world)]
    ranks = [
        subprocess.Popen([*words, str(rank), str(world)], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(patience) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    said = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said))
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
