"""Running a plan into the memory of a CUDA device: small pinned trays filled by reader threads, slots moved on one by one.

Threads read shares, from a list that was made before, each into a pinned tray. The trays are few and small, so that the
caches of the processor hold them all: what is read goes to the device before memory sees it. The calling thread alone
talks to the device: it sends a full tray to its place in a slot there, gives the tray back once it has left, and moves a
full slot into the parameters' own storage on a second stream: transposes by one kernel driven by a table, the rest by
torch's own copies, one for a run of experts. Trays and slots are allocated once a call, and nothing else is there.
Sources in memory and host destinations are `read`'s, and rejected by `on_one_device`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch

from restow.plans import Plan
from restow.torch.across import COLUMNS, launch
from restow.torch.ledger import Ledger
from restow.torch.packing import LARGE, SHARE, Piece, Shape
from restow.torch.raw import raw
from restow.torch.read import Booked, Progress
from restow.torch.slotwork import TABLE, Job, Run, prepared
from restow.torch.sources import Files
from restow.torch.threads import local_ranks

SLOTS = 4  # on the device
SLOT = 64 << 20  # bytes of one
SPARE = 2  # trays more than readers: on their way to the device
BATCH = 4  # trays that are sent in one call, at most: more would come back all at once
PINNED = 256 << 20  # bytes of all trays, at most

Fill = Callable[[Sequence[Piece], memoryview], int]


class Sent(NamedTuple):
    """The first `size` bytes of a tray on their way to byte `at` of a device slot."""

    tray: int
    size: int
    slot: int
    at: int


class Lane(Protocol):
    """The way from trays on the host to slots on the device. Only the calling thread uses it, inside `with`."""

    trays: list[torch.Tensor]
    there: list[torch.Tensor]

    def __enter__(self) -> Lane: ...

    def __exit__(self, *error: object) -> None: ...

    def send(self, batch: Sequence[Sent]) -> None:
        """Bring parts of trays to device slots, after the work that read what lay there."""

    def gone(self, batch: Sequence[Sent], wait: bool) -> bool:
        """Whether a batch has left its trays; True after waiting for it."""

    def table(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        """Bring a table to the end of a slot that has been sent to; the table there."""

    def move(self, slot: int, work: Callable[[], None]) -> None:
        """Do work that reads the device slot, after what was sent last; what is sent to that slot later waits for it."""

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
    lane: Callable[[torch.device, int, int], Lane] | None = None,
) -> Booked:
    """Run a plan whose targets all lie on one device; like `read.run_plan` in all else."""
    device = tensors[plan.targets[plan.copies[0].target].name].device
    with ExitStack() as stack:
        files = Files(stack, root, stamps)
        size = (
            LARGE if large else SHARE // 2 if local_ranks() > 1 else SHARE
        )  # ranks of a host share its caches
        made = (lane or Streams)(device, max(2, min(threads + SPARE, PINNED // size)), size)
        way = stack.enter_context(made)
        job = prepared(plan, tensors, way.there, share=way.trays[0].numel())
        ledger = Ledger()
        ledger.book(*pump(job, way, filling(files), threads, progress))
        files.check()
    return Booked(ledger.read, ledger.compare(plan))


def filling(files: Files) -> Fill:
    """How a share is read: its pieces into a view of its slot's bytes, of which a tray has the part that it spans."""

    def fill(pieces: Sequence[Piece], tray: memoryview) -> int:
        first, done = pieces[0][3], 0
        for file, begin, length, at in pieces:
            done += files.get(file).preadv(begin, [tray[at - first : at - first + length]])
        return done

    return fill


class _Desk:
    """Between the readers and the caller: trays that may be filled, and shares that lie in a tray."""

    def __init__(self, trays: int) -> None:
        self.free: SimpleQueue[int] = SimpleQueue()  # numbers of trays; -1 when there is no more to do
        self.full: SimpleQueue[tuple[int, int, int]] = SimpleQueue()  # (share, tray, bytes read)
        self.errors: list[tuple[int, BaseException]] = []
        for tray in range(trays):
            self.free.put(tray)


def pump(
    job: Job, lane: Lane, fill: Fill, threads: int, progress: Progress | None = None
) -> tuple[int, dict[int, int]]:
    """Fill, send and move slot after slot; the bytes read, and the elements written by target."""
    shares, desk, taken = job.packed.shares, _Desk(len(lane.trays)), count()
    views = [raw(tray) for tray in lane.trays]
    pool = [
        threading.Thread(target=_reader, args=(job, fill, desk, taken, views), daemon=True)
        for _ in range(min(threads, len(shares)))
    ]
    sending, read, left = _Sending(job, lane, max(0, len(views) - len(pool))), 0, len(shares)
    try:
        for thread in pool:
            thread.start()
        while left and not desk.errors:
            sending.give_back(desk)
            come = [desk.full.get()]
            while len(come) < BATCH and not desk.full.empty():
                come.append(desk.full.get())
            read += sum(size for _, _, size in come)
            left -= len(come)
            sending.take([(share, tray) for share, tray, _ in come if share >= 0])
            if progress is not None:
                progress(read, job.size)
    finally:
        for _ in pool:
            desk.free.put(-1)
        for thread in pool:
            if thread.ident is not None:
                thread.join()
        lane.finish()
    if desk.errors:
        raise min(desk.errors, key=lambda item: item[0])[1]
    return read, sending.written


def _reader(job: Job, fill: Fill, desk: _Desk, taken: Iterator[int], views: Sequence[memoryview]) -> None:
    """One thread: share after share, in order, none of them another thread's. A tray comes first, so that the next
    share in order always has one."""
    shares = job.packed.shares
    while (tray := desk.free.get()) >= 0:
        share = next(taken)
        if share >= len(shares):
            return
        try:
            desk.full.put((share, tray, fill(shares[share].pieces, views[tray])))
        except BaseException as error:
            desk.errors.append((share, error))
            desk.full.put((-1, tray, 0))
            return


class _Sending:
    """The caller's side: what was sent from which tray, what still has to come to each slot."""

    def __init__(self, job: Job, lane: Lane, spare: int) -> None:
        self._job, self._lane, self._spare = job, lane, spare
        self._due = [slot.shares for slot in job.packed.slots]
        self._early: dict[int, list[tuple[int, int]]] = {}  # by slot number: what its place is not free for
        self._under_way: deque[list[Sent]] = deque()
        self.written = dict[int, int]()

    def give_back(self, desk: _Desk) -> None:
        """Trays that have left may be filled again; wait for those that a reader lacks, if there is nothing to send."""
        while self._under_way:
            wait = sum(map(len, self._under_way)) > self._spare and desk.full.empty()
            if not self._lane.gone(self._under_way[0], wait):
                return
            for sent in self._under_way.popleft():
                desk.free.put(sent.tray)

    def take(self, come: Sequence[tuple[int, int]]) -> None:
        """Send shares, all at once, since every call gives up the interpreter; keep those whose place is still in use."""
        places = len(self._lane.there)
        batch, numbers = list[Sent](), list[int]()
        for share, tray in come:
            number, at, size, _ = self._job.packed.shares[share]
            if number >= places and self._due[number - places]:
                self._early.setdefault(number, []).append((share, tray))
            else:
                batch.append(Sent(tray, size, number % places, at))
                numbers.append(number)
        if not batch:
            return
        self._lane.send(batch)
        self._under_way.append(batch)
        for number in numbers:
            self._due[number] -= 1
        whole = [number for number in sorted(set(numbers)) if not self._due[number]]
        for number in whole:
            self._move(number)
        self.take([early for number in whole for early in self._early.pop(number + places, [])])

    def _move(self, number: int) -> None:
        """Move the tiles of a slot that is whole."""
        job, lane = self._job, self._lane
        work, slot = job.work[number], number % len(lane.there)
        base, there = 0, lane.there[slot]
        if work.launches:
            base = work.launches[0].first
            table = lane.table(job.rows[base : work.launches[-1].last], slot)

        def move() -> None:
            for what in work.launches:
                launch(table[what.first - base : what.last - base], what)
            for run in work.runs:
                shape = job.packed.shapes[run.shape]
                _copy(run, shape, there, job.targets[shape.target])

        lane.move(slot, move)
        for target, elements in work.written.items():
            self.written[target] = self.written.get(target, 0) + elements


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
    """A CUDA device: pinned trays, one stream for raw copies, which is the current one inside `with`, one for tiles."""

    def __init__(self, device: torch.device, trays: int, size: int) -> None:
        pinned = torch.empty(trays * size, dtype=torch.uint8, pin_memory=True)
        self.trays = [pinned[i * size : (i + 1) * size] for i in range(trays)]
        self.there = [torch.empty(SLOT, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._device = device
        self._sending, self._moving = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(device)
        self._sending.wait_stream(now)
        self._moving.wait_stream(now)
        self._gone = [torch.cuda.Event() for _ in range(trays)]  # type: ignore[no-untyped-call]
        self._done = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]  # device slot free
        self._current = torch.cuda.stream(self._sending)
        self._used = [False] * SLOTS  # slots whose next sending has to wait for `_done`

    def __enter__(self) -> Streams:
        self._current.__enter__()  # type: ignore[no-untyped-call]  # once, since entering costs as much as a small copy
        return self

    def __exit__(self, *error: object) -> None:
        self._current.__exit__(*error)

    def send(self, batch: Sequence[Sent]) -> None:
        for slot in {sent.slot for sent in batch if self._used[sent.slot]}:
            self._sending.wait_event(self._done[slot])
            self._used[slot] = False
        torch._foreach_copy_(
            [self.there[slot][at : at + size] for _, size, slot, at in batch],
            [self.trays[tray][:size] for tray, size, _, _ in batch],
            non_blocking=True,
        )
        self._gone[batch[0].tray].record(self._sending)

    def gone(self, batch: Sequence[Sent], wait: bool) -> bool:
        last = self._gone[batch[0].tray]
        if wait:
            last.synchronize()
        return wait or bool(last.query())  # type: ignore[no-untyped-call]

    def table(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        room = self.there[slot][-TABLE:].view(torch.int64)
        return room[: rows.numel()].view(-1, COLUMNS).copy_(rows, non_blocking=True)

    def move(self, slot: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._moving):
            self._moving.wait_stream(self._sending)
            work()
            self._done[slot].record(self._moving)
        self._used[slot] = True

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)
