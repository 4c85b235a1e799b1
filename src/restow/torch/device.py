"""Running a plan into the memory of a CUDA device: the pump, with pinned trays, streams, and slots on the device.

What is sent to a slot travels on a stream of that slot; a full one is moved into the parameters' own storage on one more
stream: transposes by one kernel driven by a table, the rest by torch's own copies, one for a run of experts. Trays and
slots are allocated once a call, and nothing else is there; where codes are decoded, one of the slots is their scratch.
Sources in memory and host destinations are `read`'s, and rejected by `on_one_device`; codes that need more than
`coded_tiles` says are `read`'s too, by `halves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from restow.plans import Plan
from restow.torch.across import COLUMNS
from restow.torch.coded_slots import decodable, is_coded
from restow.torch.driver import Driver, driver
from restow.torch.ledger import Ledger
from restow.torch.packing import LARGE, SHARE, Piece
from restow.torch.pump import Fill, Lane, pump
from restow.torch.read import Booked, Progress
from restow.torch.slotwork import TABLE, prepared, room_of
from restow.torch.sources import Files
from restow.torch.threads import local_ranks

SLOTS = 4  # on the device
SLOT = 64 << 20  # bytes of one
PINNED = 256 << 20  # bytes of all trays, at most


def on_one_device(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is a plan of ours: files only, into one CUDA device only."""
    filled = {plan.targets[copy.target].name for copy in plan.copies}
    devices = {tensors[name].device for name in filled}
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and all(part.file for part in plan.parts)


def halves(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> tuple[Plan, Plan | None]:
    """What the pump does of a plan of ours, and what it leaves: codes that it does not decode."""
    return decodable(plan, tensors, room_of(SLOT, SLOT))


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
    size = LARGE if large else SHARE // 2 if local_ranks() > 1 else SHARE  # ranks of a host share its caches
    readers = min(threads, PINNED // size)
    with ExitStack() as stack:
        files = Files(stack, root, stamps)
        way = (lane or streams)(device, readers, size)
        coded = bool(plan.codings) and any(is_coded(plan, copy) for copy in plan.copies)
        scratch = way.there.pop() if coded else None  # one slot less
        job = prepared(plan, tensors, way.there, share=way.trays[0].numel(), scratch=scratch)
        ledger = Ledger()
        ledger.book(*pump(job, way, filling(files), readers, progress))
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


def streams(device: torch.device, trays: int, size: int) -> Streams:
    """The way to a CUDA device: by its driver where that has what is needed, else by torch."""
    calls = driver()
    return Streams(device, trays, size) if calls is None else Driven(calls, device, trays, size)


class Streams:
    """A CUDA device: pinned trays, a stream of raw copies for each slot, and one for what moves slots on."""

    def __init__(self, device: torch.device, trays: int, size: int) -> None:
        pinned = torch.empty(trays * size, dtype=torch.uint8, pin_memory=True)
        self.trays = [pinned[i * size : (i + 1) * size] for i in range(trays)]
        self.there = [torch.empty(SLOT, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._device = device
        self._moving = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sending = [torch.cuda.Stream(device) for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(device)
        for stream in (self._moving, *self._sending):
            stream.wait_stream(now)
        self._gone = [torch.cuda.Event() for _ in range(trays)]  # type: ignore[no-untyped-call]
        self._parts: dict[tuple[int, int, int, int], torch.Tensor] = {}
        self._now = [-1] * trays  # of a tray's reader the slot whose stream is its thread's

    def begin(self, tray: int) -> None:
        torch.cuda.set_device(self._device)
        self._now[tray] = -1

    def left(self, tray: int) -> None:
        gone = self._gone[tray]
        if not gone.query():  # type: ignore[no-untyped-call]
            gone.synchronize()

    def send(self, tray: int, size: int, slot: int, at: int) -> None:
        stream = self._sending[slot]
        if self._now[tray] != slot:
            torch.cuda.set_stream(stream)
            self._now[tray] = slot
        self._part(self.there, slot, at, size).copy_(self._part(self.trays, tray, 0, size), non_blocking=True)
        self._gone[tray].record(stream)

    def _part(self, buffers: list[torch.Tensor], number: int, at: int, size: int) -> torch.Tensor:
        """A part of a buffer. Shares lie alike in most slots, and making a view gives the interpreter away."""
        key = id(buffers), number, at, size
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = buffers[number][at : at + size]
        return part

    def table(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        room = self.there[slot][-TABLE:].view(torch.int64)
        with torch.cuda.stream(self._sending[slot]):
            return room[: rows.numel()].view(-1, COLUMNS).copy_(rows, non_blocking=True)

    def move(self, slot: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._moving):
            self._moving.wait_stream(self._sending[slot])
            work()
        self._sending[slot].wait_stream(self._moving)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


class Driven(Streams):
    """The same, but what a reader does for each share goes to the driver itself, which keeps the interpreter."""

    def __init__(self, calls: Driver, device: torch.device, trays: int, size: int) -> None:
        super().__init__(device, trays, size)
        self._calls = calls
        for event in self._gone:
            event.record(self._moving)  # an event has a handle from its first use on
        self._events = [event.cuda_event for event in self._gone]
        self._handles = [stream.cuda_stream for stream in self._sending]
        self._from, self._to = ([one.data_ptr() for one in buffers] for buffers in (self.trays, self.there))

    def left(self, tray: int) -> None:
        event = self._events[tray]
        if self._calls.query(event):
            self._check(self._calls.wait(event))

    def send(self, tray: int, size: int, slot: int, at: int) -> None:
        stream = self._handles[slot]
        self._check(self._calls.copy(self._to[slot] + at, self._from[tray], size, stream))
        self._check(self._calls.record(self._events[tray], stream))

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"the CUDA driver says error {error} to a copy to {self._device}")
