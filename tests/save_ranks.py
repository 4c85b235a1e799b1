"""Ranks of a save as forked processes of a gloo group, which may fail, die or stop; what each returned or raised.

`Ranks.run(work)` calls `work(rank)` in every process, without a collective being possible where `silence` is asked for.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Work = Callable[..., Any]


class Ended(NamedTuple):
    """How a rank ended: what it returned, or what it raised, or the signal; when, by the machine's clock."""

    value: Any
    error: BaseException | None
    signal: int
    at: float


def ranks(
    world: int, folder: Path, work: Work, *arguments: object, stopped: Sequence[int] = ()
) -> list[Ended]:
    """`work(rank, *arguments)` in `world` forked processes: how each ended. Those in `stopped` stop themselves and
    are killed when all others have ended."""
    pipes = []
    rendezvous = folder / f"group-{time.monotonic_ns()}"
    for rank in range(world):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _child(rank, world, rendezvous, work, arguments, theirs)
        os.close(theirs)
        pipes.append((child, ours))
    ended: dict[int, Ended] = {}
    order = sorted(range(world), key=lambda rank: rank in stopped)
    for rank in order:
        child, pipe = pipes[rank]
        if rank in stopped:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(pipe, "rb") as data:
            text = data.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended[rank] = pickle.loads(text) if status == 0 else Ended(None, None, -status, 0.0)
    rendezvous.unlink(missing_ok=True)
    return [ended[rank] for rank in range(world)]


def _child(
    rank: int, world: int, rendezvous: Path, work: Work, arguments: Sequence[object], pipe: int
) -> None:
    code = 0
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        try:
            ended = Ended(work(rank, *arguments), None, 0, 0.0)
        except BaseException as error:
            error.__cause__ = error.__context__ = None
            ended = Ended(None, error.with_traceback(None), 0, 0.0)
        ended = ended._replace(at=time.monotonic())
        with os.fdopen(pipe, "wb") as out:
            out.write(pickle.dumps(ended))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 97
    os._exit(code)


def values(ended: Sequence[Ended]) -> list[Any]:
    """What the ranks returned; fails if one did not."""
    for rank, one in enumerate(ended):
        assert one.error is None, f"rank {rank}: {type(one.error).__name__}: {one.error}"
        assert not one.signal, f"rank {rank}: signal {one.signal}"
    return [one.value for one in ended]
