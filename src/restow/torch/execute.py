"""Which executor runs a plan: trays and streams for one CUDA device, a kernel between tensors of one, threads for the rest.

Nothing is rejected here. What lies on CUDA devices is waited for before and after: threads of our own know nothing of
the stream on which the caller works.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from restow.errors import CoverageError
from restow.plans import Plan
from restow.torch.device import halves, on_one_device, run_on_device
from restow.torch.on_device import moved_on_device
from restow.torch.read import Booked, Progress, run_plan
from restow.torch.threads import check_threads, default_readers


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
        return _on_device(plan, tensors, root, stamps or {}, threads, large, progress)
    devices = {t.device for t in (*tensors.values(), *(memory or {}).values()) if t.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
    rest, moved = moved_on_device(plan, tensors, memory) if memory else (plan, 0)
    if moved and moved != plan.written - rest.written:
        raise CoverageError(
            f"{plan.written - rest.written} bytes moved by the kernel, as planned",
            f"{moved}",
            hint="do not use these tensors; this is a defect of restow: please report it",
        )
    booked = run_plan(
        rest,
        tensors,
        root=root,
        memory=memory,
        stamps=stamps,
        threads=threads,
        large=large,
        progress=progress,
    )
    for device in devices:
        torch.cuda.synchronize(device)
    return booked._replace(bytes_written=booked.bytes_written + moved)


def _on_device(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    root: str | None,
    stamps: Mapping[str, tuple[int, ...]],
    threads: int | None,
    large: bool,
    progress: Progress | None,
) -> Booked:
    """By the pump, and after it what the pump does not decode."""
    check_threads(threads)
    ours, rest = halves(plan, tensors)
    done = Booked(0, 0)
    whole = plan.bytes if progress is not None else 0

    def told(read: int, _: int) -> None:
        assert progress is not None
        progress(done.bytes_read + read, whole)

    tell = told if progress is not None else None
    if ours.copies:
        done = run_on_device(
            ours,
            tensors,
            root=root,
            stamps=stamps,
            threads=threads or default_readers(),
            large=large,
            progress=tell,
        )
    if rest is None:
        return done
    device = tensors[plan.targets[plan.copies[0].target].name].device
    torch.cuda.synchronize(device)
    more = run_plan(rest, tensors, root=root, stamps=stamps, threads=threads, large=large, progress=tell)
    torch.cuda.synchronize(device)
    return Booked(done.bytes_read + more.bytes_read, done.bytes_written + more.bytes_written)
