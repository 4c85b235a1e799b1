"""Ranks of a save as forked processes of a gloo group, which may fail, die or stop; what each returned or raised.

`ranks` runs `work(rank, ...)` in every process and waits for all; `start` does not wait.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
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


class Ranks(NamedTuple):
    """Ranks at work: each one's process and the pipe that its end comes out of."""

    children: list[tuple[int, int]]
    rendezvous: Path

    def ended(self, stopped: Sequence[int] = ()) -> list[Ended]:
        """Wait for all: how each ended. Those in `stopped` are killed when all others have ended."""
        ended: dict[int, Ended] = {}
        for rank in sorted(range(len(self.children)), key=lambda rank: rank in stopped):
            child, pipe = self.children[rank]
            if rank in stopped:
                os.kill(child, signal.SIGKILL)
            with os.fdopen(pipe, "rb") as data:
                text = data.read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended[rank] = pickle.loads(text) if status == 0 else Ended(None, None, -status, 0.0)
        self.rendezvous.unlink(missing_ok=True)
        return [ended[rank] for rank in range(len(self.children))]


def start(world: int, folder: Path, work: Work, *arguments: object) -> Ranks:
    """`work(rank, *arguments)` in `world` forked processes. From the main thread alone, as `faults.fork`."""
    assert threading.current_thread() is threading.main_thread()
    children: list[tuple[int, int]] = []
    rendezvous = folder / f"group-{time.monotonic_ns()}"
    for rank in range(world):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _child(rank, world, rendezvous, work, arguments, theirs)
        os.close(theirs)
        children.append((child, ours))
    return Ranks(children, rendezvous)


def ranks(
    world: int, folder: Path, work: Work, *arguments: object, stopped: Sequence[int] = ()
) -> list[Ended]:
    """`work(rank, *arguments)` in `world` forked processes: how each ended. Those in `stopped` stop themselves and
    are killed when all others have ended."""
    return start(world, folder, work, *arguments).ended(stopped)


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
