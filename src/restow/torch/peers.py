"""The other ranks of a save: what they hold, how far they are, whether they live. On a store, never in a collective.

Every rank beats on a key of its own; whoever waits for a rank watches its beat. A rank that failed leaves its error, one
that died stops beating: both end the waiting of all others within seconds. One process alone is the same with no store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from restow.errors import PeerFailedError, PeerTimeoutError, RestowError, UsageError

BEAT = 0.5  # seconds between two beats
SILENCE = 6.0  # seconds without a beat after which a rank counts as gone
POLL = 0.02


class Peers:
    """The ranks of `group`, seen from this one. `rank` and `size` count inside the group; rank 0 publishes."""

    def __init__(self, group: dist.ProcessGroup | None, *, alone: bool) -> None:
        if alone or not dist.is_initialized():
            self.rank, self.size, self._store = 0, 1, None
            return
        chosen = group if group is not None else dist.group.WORLD
        self.rank, self.size = dist.get_rank(chosen), dist.get_world_size(chosen)
        if self.rank < 0:
            raise UsageError("a rank of the group", "a process outside it")
        self._store: dist.Store | None = None
        if self.size == 1:
            return
        whole = dist.distributed_c10d._get_default_store()
        name = f"restow/{getattr(chosen, 'group_name', 'world')}"
        # Ranks that call in the same order count alike, so the count names the attempt without a word between them.
        attempt = whole.add(f"{name}/{self.rank}", 1)
        self._store = dist.PrefixStore(f"{name}/{attempt}", whole)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The time of one save: this rank beats, and tells the others how it ended."""
        if self._store is None:
            yield
            return
        self._store.set(f"host/{self.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            stop.set()
            beat.join()

    def _beat(self, stop: threading.Event) -> None:
        assert self._store is not None
        while not stop.wait(BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except Exception:
                return  # the store went with its host: whoever waits says so

    def _tell(self, error: BaseException) -> None:
        assert self._store is not None
        kind = type(error).__name__
        text = str(error) if isinstance(error, RestowError) else f"{kind}: {error}"
        try:
            self._store.set(f"failed/{self.rank}", json.dumps([kind, text]))
        except Exception:
            return

    def say(self, key: str, text: str) -> None:
        """Leave a text under `key` for the others, in this rank's name."""
        if self._store is not None:
            self._store.set(f"{key}/{self.rank}", text)

    def hear(self, key: str, rank: int) -> str:
        """The text that `rank` left under `key`; waits while it lives.

        Raises `PeerFailedError` for a rank that failed or died, `PeerTimeoutError` for one that does not answer.
        """
        assert self._store is not None
        name, since, last = f"{key}/{rank}", time.monotonic(), -1
        while True:
            try:
                if self._store.check([name]):
                    return self._store.get(name).decode()
                self._watch(key)
                beat = self._store.add(f"beat/{rank}", 0)
            except RestowError:
                raise
            except Exception as error:
                raise PeerFailedError(
                    f"rank 0, which keeps the store, to live until '{key}'", f"{error}", rank=self.rank
                ) from error
            if beat != last:
                last, since = beat, time.monotonic()
            if self._gone(rank) or time.monotonic() - since > SILENCE:
                self._lost(rank, key)
            time.sleep(POLL)

    def hear_all(self, key: str, mine: str) -> list[str]:
        """Leave `mine` under `key` and hear everybody's, in the order of ranks."""
        if self._store is None:
            return [mine]
        self.say(key, mine)
        return [mine if rank == self.rank else self.hear(key, rank) for rank in range(self.size)]

    def _watch(self, key: str) -> None:
        """Raise if any rank has failed: nobody waits for one rank while another has given up."""
        assert self._store is not None
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"failed/{rank}"]):
                kind, text = json.loads(self._store.get(f"failed/{rank}"))
                raise PeerFailedError(
                    f"rank {rank} to reach '{key}'",
                    f"{kind} there",
                    rank=self.rank,
                    sections=[("rank " + str(rank), text.splitlines())],
                )

    def _gone(self, rank: int) -> bool:
        """Whether a rank's process on this very host is no more."""
        assert self._store is not None
        if not self._store.check([f"host/{rank}"]):
            return False
        host, pid = json.loads(self._store.get(f"host/{rank}"))
        if host != socket.gethostname():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _zombie(pid)

    def _lost(self, rank: int, key: str) -> None:
        assert self._store is not None
        host = json.loads(self._store.get(f"host/{rank}"))[0] if self._store.check([f"host/{rank}"]) else "?"
        if self._gone(rank):
            raise PeerFailedError(
                f"rank {rank} on {host} to reach '{key}'", "its process gone", rank=self.rank,
                hint="nothing was published; the old checkpoint is as it was",
            )  # fmt: skip
        raise PeerTimeoutError(
            f"a sign of rank {rank} on {host} before '{key}'", f"none for {SILENCE:g} s", rank=self.rank,
            hint="nothing was published; the old checkpoint is as it was",
        )  # fmt: skip


def _zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
