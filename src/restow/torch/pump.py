"""Readers that send what they read: share after share from files into a tray of their own, and on into slots on a device.

A reader takes the next share from a list that was made before, reads it into its tray, and sends it to its place in a
slot. The trays are few and small, so that the caches of the processor hold them all: what is read goes to the device
before memory sees it. A share is one thread's from the first to the last, and as little as can be is done for each while
the interpreter is held: what threads hand over to each other costs more than what they do (see docs/log.md). The calling
thread has only slots: it moves a full one into the parameters' own storage and lets it be filled again. Nothing is
rejected: an error of a reader ends the others, and the first one in the order of shares is raised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import count
from queue import SimpleQueue
from typing import Protocol

import torch

from restow.torch.across import Launch, launch
from restow.torch.device_decode import decode_there
from restow.torch.packing import Piece, Shape
from restow.torch.raw import raw
from restow.torch.read import Progress
from restow.torch.slotwork import Job, Run

Fill = Callable[[Sequence[Piece], memoryview], int]


class Lane(Protocol):
    """The way from trays on the host to slots on the device. A tray is one reader's, all else the calling thread's."""

    trays: list[torch.Tensor]
    there: list[torch.Tensor]

    def begin(self, tray: int) -> None:
        """What the reader of a tray does in its thread before anything else."""

    def left(self, tray: int) -> None:
        """Return when what was sent from a tray has left it."""

    def send(self, tray: int, size: int, slot: int, at: int) -> None:
        """Bring the first `size` bytes of a tray to byte `at` of a slot, after the work that read what lay there."""

    def table(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        """Bring a table to the end of a slot that is full; the table there."""

    def move(self, slot: int, work: Callable[[], None]) -> None:
        """Do work that reads a slot, after all that was sent there; what is sent there later waits for it."""

    def finish(self) -> None:
        """Return when all is done."""


class _Turns:
    """What readers and the caller tell each other: which slots are full, and which may be filled again."""

    def __init__(self, job: Job, places: int) -> None:
        self.full: SimpleQueue[int] = SimpleQueue()  # numbers of slots; -1 when a reader has failed
        self.errors: list[tuple[int, BaseException]] = []
        self.read: list[int] = []  # bytes, by reader
        self.taken = count()
        self._shares = [slot.shares for slot in job.packed.slots]
        self._sent = [count(1) for _ in self._shares]  # counting on is one step of the interpreter: no lock
        self._moved = [False] * len(self._shares)
        self._places, self._over = places, False
        self._changed = threading.Condition()

    def may_send(self, number: int) -> bool:
        """Wait until the place of a slot is free; False where all is over."""
        before = number - self._places
        if before >= 0 and not self._moved[before]:
            with self._changed:
                self._changed.wait_for(lambda: self._moved[before] or self._over)
        return not self._over

    def sent(self, number: int) -> None:
        if next(self._sent[number]) == self._shares[number]:
            self.full.put(number)

    def failed(self, share: int, error: BaseException) -> None:
        self.errors.append((share, error))
        self.full.put(-1)

    def moved(self, number: int) -> None:
        with self._changed:
            self._moved[number] = True
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


def pump(
    job: Job, lane: Lane, fill: Fill, threads: int, progress: Progress | None = None
) -> tuple[int, dict[int, int]]:
    """Fill, send and move slot after slot; the bytes read, and the elements written by target."""
    turns = _Turns(job, len(lane.there))
    readers = min(threads, len(job.packed.shares), len(lane.trays))
    pool = [
        threading.Thread(target=_reader, args=(job, lane, fill, turns, tray), daemon=True)
        for tray in range(readers)
    ]
    bytes_of = [0] * len(job.packed.slots)
    for share in job.packed.shares if progress is not None else ():
        bytes_of[share.slot] += sum(length for _, _, length, _ in share.pieces)
    done, written = 0, dict[int, int]()
    try:
        for thread in pool:
            thread.start()
        for _ in job.packed.slots:
            number = turns.full.get()
            if number < 0:
                break
            _move(job, lane, number)
            turns.moved(number)
            for target, elements in job.work[number].written.items():
                written[target] = written.get(target, 0) + elements
            if progress is not None:
                done += bytes_of[number]
                progress(done, job.size)
    finally:
        turns.end()
        try:
            for thread in pool:
                if thread.ident is not None:
                    thread.join()
        finally:  # a second Ctrl-C ends the waiting, not what the device still does with slots and tables
            lane.finish()
    if turns.errors:
        raise min(turns.errors, key=lambda item: item[0])[1]
    return sum(turns.read), written


def _reader(job: Job, lane: Lane, fill: Fill, turns: _Turns, tray: int) -> None:
    """One thread: share after share, in order, none of them another thread's. Whoever waits for a slot waits for shares
    that were taken before its own, so that the first of those who wait never does."""
    shares, places, number, read = job.packed.shares, len(lane.there), 0, 0
    try:
        lane.begin(tray)
        view = raw(lane.trays[tray])
        while (number := next(turns.taken)) < len(shares):
            slot, at, size, pieces = shares[number]
            lane.left(tray)
            read += fill(pieces, view)
            if not turns.may_send(slot):
                return
            lane.send(tray, size, slot % places, at)
            turns.sent(slot)
        turns.read.append(read)
    except BaseException as error:
        turns.failed(number, error)


def _move(job: Job, lane: Lane, number: int) -> None:
    """Move the tiles of a slot that is full."""
    work, slot = job.work[number], number % len(lane.there)
    there, (base, end) = lane.there[slot], work.table
    table = lane.table(job.rows[base:end], slot) if base < end else there

    def moved(launches: Sequence[Launch], runs: Sequence[Run], memory: torch.Tensor) -> None:
        for what in launches:
            launch(table[what.first - base : what.last - base], what)
        for run in runs:
            shape = job.packed.shapes[run.shape]
            _copy(run, shape, memory, job.targets[shape.target])

    def move() -> None:
        moved(work.launches, work.runs, there)
        for batch in work.batches:
            assert job.scratch is not None
            for one in batch.decodings:
                decode_there(one, job.decodes[one.decode], there, job.scratch)
            moved(batch.launches, batch.runs, job.scratch.room)

    lane.move(slot, move)


def _copy(run: Run, shape: Shape, slot: torch.Tensor, into: torch.Tensor) -> None:
    """Tiles of one shape from the slot into the destination, in one launch."""
    width = shape.dtype.itemsize
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape.sizes, shape.source, strict=True))
    box = slot[run.at : run.at + (run.times - 1) * run.step + span * width].view(shape.dtype)
    if run.times == 1:
        source = box.as_strided(shape.sizes, shape.source)
        into.as_strided(shape.sizes, shape.strides, run.to).copy_(source)
        return
    sizes, steps = (run.times, *shape.sizes), (run.step // width, *shape.source)
    into.as_strided(sizes, (run.far, *shape.strides), run.to).copy_(box.as_strided(sizes, steps))
