"""Which executor runs a plan: pinned slots and streams for one CUDA device, threads and tiles for everything else."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from restow.plans import Plan
from restow.torch.device import default_readers, on_one_device, run_on_device
from restow.torch.read import Booked, Progress, run_plan


def execute(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    *,
    root: str | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    stamps: Mapping[str, tuple[int, ...]] | None = None,
    threads: int | None = None,
    large: bool = False,
    progress: Progress | None = None,
) -> Booked:
    """Run `plan` into `tensors` (see `read.run_plan`), by the executor that suits where they lie."""
    if plan.copies and on_one_device(plan, tensors):
        return run_on_device(
            plan,
            tensors,
            root=root,
            stamps=stamps or {},
            threads=threads or default_readers(),
            large=large,
            progress=progress,
        )
    return run_plan(
        plan,
        tensors,
        root=root,
        memory=memory,
        stamps=stamps,
        threads=threads,
        large=large,
        progress=progress,
    )
