"""The other ranks of a save: what they say, how far they are, whether they live. On a store, never in a collective.

Every rank beats on a key of its own and watches its neighbour's beat; who waits for a rank watches that one too. A
rank that failed leaves its error for all, and whoever finds one dead leaves that: all others raise within seconds, also
while they write. A rank that has not come yet is given longer. One process alone is the same with no store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from restow.errors import PeerFailedError, PeerTimeoutError, RestowError, UsageError

BEAT = 0.5  # seconds between two beats
SILENCE = 6.0  # seconds without a beat after which a rank counts as gone
LATE = 300.0  # seconds that a rank may come after the others
LINGER = 3.0  # seconds that the store's host stays for the others to hear how it ended
POLL = 0.005, 0.25  # seconds between two looks: that times the ranks, but no more
INTACT = "nothing was published; the old checkpoint is as it was"


class Peers:
    """The ranks of `group`, seen from this one. `rank` and `size` count inside the group; rank 0 publishes."""

    def __init__(self, group: dist.ProcessGroup | None, *, alone: bool) -> None:
        self._store: Store | None = None
        self.rank, self.size = 0, 1
        if alone or not dist.is_initialized():
            return
        chosen = group if group is not None else dist.group.WORLD
        self.rank, self.size = dist.get_rank(chosen), dist.get_world_size(chosen)
        if self.rank < 0:
            raise UsageError("a rank of the group", "a process outside it")
        if self.size == 1:
            return
        self._host = dist.get_rank() == 0  # the store lies with it, or with the agent that started all
        whole = dist.distributed_c10d._get_default_store()
        name = f"restow/{getattr(chosen, 'group_name', 'world')}"
        # Ranks that call in the same order count alike, so the count names the attempt without a word between them.
        attempt = whole.add(f"{name}/{self.rank}", 1)
        self._group = PrefixStore(name, whole)
        self._store = PrefixStore(f"{name}/{attempt}", whole)
        self._looked = 0.0
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was new

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The time of one save: this rank beats, and tells the others how it ended."""
        if self._store is None:
            yield
            return
        self._group.set(
            f"process/{self.rank}", json.dumps([socket.gethostname(), process_space(), os.getpid()])
        )
        self._store.add(f"beat/{self.rank}", 1)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        try:
            yield
        except BaseException as error:
            self._tell(self.rank, error)
            raise
        finally:
            with suppress(Exception):
                self._leave()
            stop.set()
            beat.join()

    def _beat(self, stop: threading.Event) -> None:
        assert self._store is not None
        while not stop.wait(BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except Exception:
                return  # the store went with its host: whoever waits says so

    def _leave(self) -> None:
        """Where the store goes with this process, let the others hear first, but those that are no more."""
        assert self._store is not None
        self._store.set(f"left/{self.rank}", "")
        others, until = set(range(self.size)) - {self.rank}, time.monotonic() + LINGER
        while self._host and others and time.monotonic() < until:
            others = {other for other in others if self._listens(other)}
            time.sleep(min(POLL[0] * self.size, POLL[1]))

    def _listens(self, rank: int) -> bool:
        """Whether a rank may still come to hear: it has not left, and is not known to be gone."""
        assert self._store is not None
        if self._store.check([f"left/{rank}"]):
            return False
        now = time.monotonic()
        since, process = self._beat_of(rank, now)[1], self._process(rank)
        return now - since <= SILENCE and not (process and _gone(*process[1:]))

    def _tell(self, rank: int, error: BaseException) -> None:
        """Leave an error for all: this rank's own, or what it found of another."""
        assert self._store is not None
        kind = type(error).__name__
        text = str(error) if isinstance(error, RestowError) else f"{kind}: {error}"
        with suppress(Exception):
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps([rank, kind, text]))

    def say(self, key: str, text: str) -> None:
        """Leave a text under `key` for the others, in this rank's name."""
        if self._store is not None:
            self._store.set(f"{key}/{self.rank}", text)

    def hear(self, key: str, rank: int) -> str:
        """The text that `rank` left under `key`; waits while it lives.

        Raises `PeerFailedError` for a rank that failed or died, `PeerTimeoutError` for one that does not answer.
        """
        assert self._store is not None
        name = f"{key}/{rank}"
        while True:
            try:
                left = self._store.check(
                    [f"left/{rank}"]
                )  # before the look for its text, which it left earlier
                if self._store.check([name]):
                    return bytes(self._store.get(name)).decode()
            except Exception as error:
                raise self._no_store(key, error) from error
            self.watch(key, rank)
            if left:
                raise PeerFailedError(f"rank {rank} to reach '{key}'", "it gone on without", rank=self.rank)
            time.sleep(min(POLL[0] * self.size, POLL[1]))

    def pool(self, key: str, mine: str, judge: Callable[[Sequence[str]], str]) -> str:
        """What rank 0's `judge` makes of everybody's texts, in the order of ranks."""
        if self.rank:
            self.say(key, mine)
            return self.hear(f"judged {key}", 0)
        judged = judge([mine, *(self.hear(key, rank) for rank in range(1, self.size))])
        self.say(f"judged {key}", judged)
        return judged

    def watch(self, key: str, rank: int | None = None) -> None:
        """Raise if a rank has failed, or if the neighbour or `rank` no longer lives. Cheap enough to call often."""
        if self._store is None:
            return
        now = time.monotonic()
        try:
            if self._store.check(["failed"]):
                self._raise_failed(key)
            if now - self._looked < BEAT:
                return
            self._looked = now
            for other in {(self.rank + 1) % self.size, self.rank if rank is None else rank} - {self.rank}:
                self._look(other, key, now)
        except RestowError:
            raise
        except Exception as error:
            raise self._no_store(key, error) from error

    def ask_why(self, key: str) -> None:
        """Files were taken away under this rank: raise the reason, which is told just after, if it comes."""
        until = time.monotonic() + SILENCE
        while self._store is not None and time.monotonic() < until:
            self.watch(key, 0)
            time.sleep(POLL[1])

    def _raise_failed(self, key: str) -> None:
        assert self._store is not None
        rank, kind, text = json.loads(self._store.get("failed"))
        if rank == self.rank:
            raise PeerTimeoutError(
                f"this rank to be waited for until '{key}'", "it given up by the others", rank=self.rank,
                sections=[("they said", text.splitlines())],
            )  # fmt: skip
        if kind == PeerTimeoutError.__name__:
            raise PeerTimeoutError(
                f"rank {rank} to reach '{key}'", "no sign of it", rank=self.rank,
                sections=[(f"rank {rank}", text.splitlines())],
            )  # fmt: skip
        raise PeerFailedError(
            f"rank {rank} to reach '{key}'", f"{kind} there", rank=self.rank,
            sections=[(f"rank {rank}", text.splitlines())], hint=INTACT,
        )  # fmt: skip

    def _look(self, rank: int, key: str, now: float) -> None:
        assert self._store is not None
        if self._store.check([f"left/{rank}"]):
            return  # it ended well, or its error is there
        beat, since = self._beat_of(rank, now)
        process = self._process(rank)
        where = f"rank {rank} on {process[0]}" if process else f"rank {rank}"
        error: RestowError | None = None
        if process and _gone(*process[1:]):
            error = PeerFailedError(
                f"{where} to reach '{key}'", "its process gone", rank=self.rank, hint=INTACT
            )
        elif beat and now - since > SILENCE:
            found = f"none for {SILENCE:g} s"
            error = PeerTimeoutError(f"a sign of {where} before '{key}'", found, rank=self.rank, hint=INTACT)
        elif not beat and now - since > LATE:
            hint = f"every rank of the group must call save; {INTACT}"
            error = PeerTimeoutError(
                f"{where} to come", f"it has not in {LATE:g} s", rank=self.rank, hint=hint
            )
        if error is not None:
            self._tell(rank, error)
            raise error

    def _beat_of(self, rank: int, now: float) -> tuple[int, float]:
        """The last beat of a rank (0 before its first), and when this rank saw it change."""
        assert self._store is not None
        beat = self._store.add(f"beat/{rank}", 0)
        last, since = self._beats.get(rank, (-1, now))
        self._beats[rank] = beat, since if beat == last else now
        return self._beats[rank]

    def _process(self, rank: int) -> tuple[str, str, int] | None:
        """Host, process space and number of a rank, as it left them in this save or an earlier one."""
        if not self._group.check([f"process/{rank}"]):
            return None
        host, space, number = json.loads(self._group.get(f"process/{rank}"))
        return host, space, number

    def _no_store(self, key: str, error: Exception) -> PeerFailedError:
        return PeerFailedError(
            f"the store, which lives with rank 0, to answer until '{key}'", f"{type(error).__name__}: {error}",
            rank=self.rank, hint="rank 0 has most likely ended: its own output says why",
        )  # fmt: skip


def process_space() -> str:
    """The machine and the space in which process numbers mean something: containers have their own."""
    return f"{machine()} {_read_link('/proc/self/ns/pid')}"


def machine() -> str:
    """What runs this process, as long as it is not started anew: names of hosts repeat, this does not."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return socket.gethostname()


def _read_link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _gone(space: str, number: int) -> bool:
    """Whether a process that shares our process numbers is no more."""
    if space != process_space():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
