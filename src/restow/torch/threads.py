"""How many threads a verb takes where nobody says: from the cores of this process and the ranks that share a machine.

It reads the scheduler and the launcher's environment. Rejected are numbers of threads that are none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from restow.errors import UsageError


def check_threads(threads: int | None) -> None:
    """Raise `UsageError` for a number that cannot be meant; None leaves it to us."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError("threads as a whole number of at least 1", repr(threads))


@contextmanager
def as_before() -> Iterator[None]:
    """After it ATen has as many threads as before: what one thread sets for itself holds for all that begin after it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads() -> int:
    """Cores for each process of this machine's job, at most 8: more readers do not make one file system faster."""
    return max(1, min(8, cores() // local_ranks()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks() -> int:
    """Processes of this job on this machine, as its launcher says: nothing else tells it without a word between them."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdecimal() and int(said) and torch.distributed.is_initialized() else 1


def default_readers() -> int:
    """Three of four cores of this process, at most 12; 6 where ranks share a machine (see docs/log.md)."""
    ranks = local_ranks()
    return max(1, min(12 if ranks == 1 else 6, cores() // ranks * 3 // 4))
