"""Running a plan into the memory of a CUDA device: pinned slots filled by reader threads, moved on one by one.

A fixed number of pinned host slots and as many on the device, allocated once a call. Threads read shares of slots, side
by side, from a list that was made before; one stream copies a full slot raw to the device, another writes its tiles into
the parameters' own storage: transposes by one kernel driven by a table that travels in the slot, the rest by torch's own
copies, one for a run of experts. Nothing else is allocated there. Sources in memory and host destinations are `read`'s,
and rejected by `on_one_device`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from queue import SimpleQueue
from typing import Protocol

import torch

from restow.plans import Plan
from restow.torch.across import COLUMNS, launch
from restow.torch.packing import LARGE, SHARE, Piece, Shape
from restow.torch.raw import raw
from restow.torch.read import Booked, Progress, _compare, _Ledger
from restow.torch.slotwork import Job, Run, prepared
from restow.torch.sources import Files

SLOTS = 4
SLOT = 64 << 20  # bytes of one slot, on the host and on the device

Fill = Callable[[Sequence[Piece], memoryview], int]


class Lane(Protocol):
    """The way of slots from the host to the device. Reader threads call `wait`, the calling thread all else."""

    host: list[torch.Tensor]
    there: list[torch.Tensor]

    def wait(self, slot: int) -> None:
        """Return when the host slot may be filled again."""

    def send(self, slot: int, size: int) -> None:
        """Bring the first bytes of the host slot to the device slot."""

    def move(self, slot: int, work: Callable[[], None]) -> None:
        """Do work that reads the device slot, after what was sent last."""

    def finish(self) -> None:
        """Return when all is done."""


def on_one_device(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is a plan of ours: files only, into one CUDA device only."""
    filled = {plan.targets[copy.target].name for copy in plan.copies}
    devices = {tensors[name].device for name in filled}
    return (
        len(devices) == 1
        and next(iter(devices)).type == "cuda"
        and not plan.codings
        and all(part.file and part.coding < 0 for part in plan.parts)
    )


def run_on_device(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    *,
    root: str | None,
    stamps: Mapping[str, tuple[int, ...]],
    threads: int,
    large: bool = False,
    progress: Progress | None = None,
    lane: Callable[[torch.device], Lane] | None = None,
) -> Booked:
    """Run a plan whose targets all lie on one device; like `read.run_plan` in all else."""
    device = tensors[plan.targets[plan.copies[0].target].name].device
    with ExitStack() as stack:
        files = Files(stack, root, stamps)
        way = (lane or Streams)(device)
        job = prepared(plan, tensors, way.there, share=LARGE if large else SHARE)
        ledger = _Ledger()
        ledger.book(*pump(job, way, filling(files), threads, progress))
        files.check()
    return Booked(ledger.read, _compare(plan, ledger))


def filling(files: Files) -> Fill:
    """How a share is read."""

    def fill(pieces: Sequence[Piece], slot: memoryview) -> int:
        return sum(
            files.get(file).preadv(begin, [slot[at : at + length]]) for file, begin, length, at in pieces
        )

    return fill


class _Turns:
    """Which filling each host slot is at, and how much of it has arrived; between the readers and the caller."""

    def __init__(self, job: Job, slots: int) -> None:
        self.ready: SimpleQueue[int] = SimpleQueue()  # numbers of full slots; -1 when a reader has failed
        self.errors: list[tuple[int, BaseException]] = []
        self.read: list[int] = []
        self._shares = [slot.shares for slot in job.packed.slots]
        self._turn, self._arrived = list(range(slots)), [count(1) for _ in range(slots)]
        self._changed, self._stopped = threading.Condition(), False

    def mine(self, number: int) -> bool:
        """Wait until filling `number` of its slot has its turn; whether there is anything left to do then."""
        slot = number % len(self._turn)
        if self._turn[slot] != number:
            with self._changed:
                while self._turn[slot] != number and not self._stopped:
                    self._changed.wait()
        return not self._stopped

    def arrived(self, number: int, read: int) -> None:
        self.read.append(read)
        if next(self._arrived[number % len(self._turn)]) == self._shares[number]:
            self.ready.put(number)

    def sent(self, number: int) -> None:
        """The slot is on its way: the next filling may begin once the device has it."""
        slot = number % len(self._turn)
        with self._changed:
            self._arrived[slot] = count(1)
            self._turn[slot] = number + len(self._turn)
            self._changed.notify_all()

    def fail(self, share: int, error: BaseException) -> None:
        self.errors.append((share, error))
        self.stop()
        self.ready.put(-1)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def pump(
    job: Job, lane: Lane, fill: Fill, threads: int, progress: Progress | None = None
) -> tuple[int, dict[int, int]]:
    """Fill, send and move slot after slot; the bytes read, and the elements written by target."""
    turns = _Turns(job, len(lane.host))
    written = dict[int, int]()
    taken = count()
    views = [raw(slot) for slot in lane.host]
    pool = [
        threading.Thread(target=_reader, args=(job, lane, fill, turns, taken, views), daemon=True)
        for _ in range(min(threads, len(job.packed.shares)))
    ]
    try:
        for thread in pool:
            thread.start()
        for _ in job.packed.slots:
            number = turns.ready.get()
            if number < 0:
                break
            _move_on(job, lane, number, written)
            turns.sent(number)
            if progress is not None:
                progress(sum(turns.read), job.size)
    finally:
        turns.stop()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        lane.finish()
    if turns.errors:
        raise min(turns.errors, key=lambda item: item[0])[1]
    return sum(turns.read), written


def _reader(
    job: Job, lane: Lane, fill: Fill, turns: _Turns, taken: Iterator[int], views: Sequence[memoryview]
) -> None:
    """One thread: share after share, in order, none of them another thread's."""
    shares = job.packed.shares
    for share in taken:
        if share >= len(shares):
            return
        number, pieces = shares[share]
        slot = number % len(views)
        try:
            if not turns.mine(number):
                return
            lane.wait(slot)
            turns.arrived(number, fill(pieces, views[slot]))
        except BaseException as error:
            turns.fail(share, error)
            return


def _move_on(job: Job, lane: Lane, number: int, written: dict[int, int]) -> None:
    """Send a full slot with its table behind it, and move its tiles."""
    work, slot = job.work[number], number % len(lane.host)
    size = job.packed.slots[number].size
    tables = []
    for what in work.launches:
        size = -(-size // 16) * 16
        rows = job.rows[what.first : what.last].view(-1)
        lane.host[slot][size : size + rows.nbytes].copy_(rows.view(torch.uint8))
        tables.append((size, what))
        size += rows.nbytes
    lane.send(slot, size)

    def move() -> None:
        there = lane.there[slot]
        for at, what in tables:
            table = there[at : at + (what.last - what.first) * COLUMNS * 8].view(torch.int64)
            launch(table, what)
        for run in work.runs:
            shape = job.packed.shapes[run.shape]
            _copy(run, shape, there, job.targets[shape.target])

    lane.move(slot, move)
    for target, elements in work.written.items():
        written[target] = written.get(target, 0) + elements


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


class Streams:
    """A CUDA device: pinned host slots, one stream for raw copies, one for what moves tiles."""

    def __init__(self, device: torch.device) -> None:
        self.host = [torch.empty(SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self.there = [torch.empty(SLOT, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._device = device
        self._sending, self._moving = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(device)
        self._sending.wait_stream(now)
        self._moving.wait_stream(now)
        # Many readers wait for one slot: they must sleep, not spin on the cores that the others read with.
        self._gone = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
        self._done = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]  # device slot free

    def wait(self, slot: int) -> None:
        self._gone[slot].synchronize()

    def send(self, slot: int, size: int) -> None:
        with torch.cuda.stream(self._sending):
            self._sending.wait_event(self._done[slot])
            self.there[slot][:size].copy_(self.host[slot][:size], non_blocking=True)
            self._gone[slot].record(self._sending)

    def move(self, slot: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._moving):
            self._moving.wait_event(self._gone[slot])
            work()
            self._done[slot].record(self._moving)

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._moving)
        torch.cuda.synchronize(self._device)
