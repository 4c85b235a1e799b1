"""Running a plan: byte runs of files, or tensors in memory, into the destination's own storage; every element booked.

Threads take jobs in the order of the files. Where source and destination agree in order, `preadv` writes straight into
the parameter; where they do not, a cache-sized tile is read into one reused buffer a thread and moved from there. It
raises the first error by plan order after all threads have stopped; nothing is retried or skipped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.coding import jobs as coded_jobs
from restow.errors import CoverageError, UsageError, show
from restow.files import SourceFile
from restow.plans import Copy, Part, Plan
from restow.reads import GAP, Spans, merged, spans
from restow.torch.decode import Decoder
from restow.torch.decode import Landing as Decoded
from restow.torch.dtypes import dtype_name, torch_dtype
from restow.torch.raw import raw
from restow.torch.sources import Files
from restow.torch.strides import contiguous_from, dot, even, places, real_places, tile_axis
from restow.torch.tiles import move
from restow.torch.transpose import LINE

JOB = (
    16 << 20
)  # bytes of one job, where the outermost axis lets it be cut, and of what a thread takes at once
STAGE = 16 << 20  # bytes of one tile on its way to a device
TILE = (
    4 << 20
)  # bytes of one tile, its cast copy included: more rows are longer runs for a transpose to write
WINDOW = 48 << 20  # bytes of all threads' tiles together where reads are to be large
KEPT = 64  # storages whose bytes a thread keeps at hand

Progress = Callable[[int, int], None]
Watch = Callable[[Part, int, memoryview], None]  # the part, a byte of it, and what lies there in the file


class Booked(NamedTuple):
    """What was really done: bytes that the files gave, bytes that the destination took."""

    bytes_read: int
    bytes_written: int


class _Job(NamedTuple):
    """A batch of copies that share one read, or a slice of one along its outermost axis."""

    number: int
    copies: tuple[Copy, ...]
    first: int
    steps: int
    size: int  # bytes, gaps not counted


@dataclass
class _Ledger:
    """What happened in one call, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    written: dict[int, int] = field(default_factory=dict)  # elements by target
    read: int = 0
    errors: list[tuple[int, BaseException]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def book(self, read: int, written: Mapping[int, int]) -> None:
        with self.lock:
            self.read += read
            for target, count in written.items():
                self.written[target] = self.written.get(target, 0) + count


def run_plan(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    *,
    root: str | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    stamps: Mapping[str, tuple[int, ...]] | None = None,
    threads: int | None = None,
    large: bool = False,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Booked:
    """Run `plan` into `tensors` (target name -> local tensor of the shape the target holds), in place.

    `root` is the folder of the plan's files, `memory` holds the sources that are tensors. `stamps` are the files' as
    they were when the plan was made: raises `IntegrityError` where one has changed since. Raises `CoverageError` if not
    every planned element was written, `UsageError` for `threads` below 1, and what `files` raises. `large` asks the
    system for all that a thread takes at once, and reads tiles as large as memory allows, not as the cache does. `watch`
    is told, by the thread that read them, the bytes of every tile that lies in its file in one piece, before it is moved.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError("threads as a whole number of at least 1", repr(threads))
    ledger = _Ledger()
    workers = min(threads or default_threads(), max(1, len(plan.copies)))
    queue = _Queue(_jobs(plan))
    tile = max(TILE, min(JOB, WINDOW // workers)) if large else TILE
    total = plan.bytes if progress is not None else 0
    before = torch.get_num_threads()
    with ExitStack() as stack:
        files = Files(stack, root, stamps or {})
        pool = [
            threading.Thread(
                target=_work,
                args=(plan, tensors, memory or {}, files, queue, ledger, tile, watch),
                daemon=True,
            )
            for _ in range(workers)
        ]
        try:
            for thread in pool:
                thread.start()
            for thread in pool:
                while thread.is_alive():
                    thread.join(0.1 if progress is not None else None)
                    if progress is not None:
                        progress(ledger.read, total)
        except BaseException:
            ledger.stop.set()
            for thread in pool:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            torch.set_num_threads(before)
        if ledger.errors:
            raise min(ledger.errors, key=lambda item: item[0])[1]
        files.check()
    if progress is not None:
        progress(ledger.read, total)
    written = _compare(plan, ledger)
    return Booked(ledger.read, written)


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


def _compare(plan: Plan, ledger: _Ledger) -> int:
    planned: dict[int, int] = {}
    for copy in plan.copies:
        planned[copy.target] = planned.get(copy.target, 0) + prod(plan.patterns[copy.pattern].sizes)
    wrong = [i for i in planned.keys() | ledger.written.keys() if planned.get(i) != ledger.written.get(i)]
    if wrong:
        names = [plan.targets[i].name for i in sorted(wrong)]
        raise CoverageError(
            f"{sum(planned.values())} elements written, as planned",
            f"{sum(ledger.written.values())}",
            tensor=names[0],
            sections=[("tensors", map(show, names))],
            hint="do not use these tensors; this is a defect of restow: please report it",
        )
    return plan.written


class _Queue:
    """Jobs in order, handed out to any thread: neighbours together, so that their reads can be one."""

    def __init__(self, jobs: Iterator[_Job]) -> None:
        self._jobs = jobs
        self._next = next(jobs, None)
        self._lock = threading.Lock()

    def take(self) -> list[_Job]:
        """The next jobs, at most `JOB` bytes or one that is larger; none when all are taken."""
        group: list[_Job] = []
        with self._lock:
            size = 0
            while self._next is not None and (not group or size + self._next.size <= JOB):
                group.append(self._next)
                size += self._next.size
                self._next = next(self._jobs, None)
        return group


def _jobs(plan: Plan) -> Iterator[_Job]:
    number = 0
    for batch in plan.batches():
        pattern = plan.patterns[batch[0].pattern]
        itemsize = plan.itemsize(batch[0])
        if not pattern.sizes:
            yield _Job(number, batch, 0, 1, itemsize)
            number += 1
            continue
        coding = plan.parts[batch[0].source].coding
        if coding >= 0:
            for first, steps in coded_jobs(plan.codings[coding], batch[0].at, *pattern[:2]):
                yield _Job(number, batch, first, steps, steps * prod(pattern.sizes[1:]))
                number += 1
            continue
        outer, rows, _ = spans(*pattern[:2], itemsize)
        inner = max(1, prod(pattern.sizes[1:]) * itemsize)
        step = even(pattern.sizes[0], JOB // inner, LINE // itemsize)
        if rows and outer == 0:
            step = max(rows, step // rows * rows)
        for first in range(0, pattern.sizes[0], step):
            steps = min(step, pattern.sizes[0] - first)
            yield _Job(number, batch, first, steps, steps * inner)
            number += 1


def _work(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
    files: Files,
    queue: _Queue,
    ledger: _Ledger,
    tile: int,
    watch: Watch | None,
) -> None:
    torch.set_num_threads(1)  # this thread is one of ours: ATen must not start a second pool below it
    worker = _Worker(plan, tensors, memory, files, tile, watch)
    while not ledger.stop.is_set():
        jobs = queue.take()
        if not jobs:
            return
        try:
            read, written = worker.run(jobs)
        except BaseException as error:
            with ledger.lock:
                ledger.errors.append((jobs[0].number, error))
            ledger.stop.set()
            return
        ledger.book(read, written)


class _Landing(NamedTuple):
    """Where one copy of a job goes: its tensor, the first element in storage, and a stride per axis of the pattern."""

    target: int
    tensor: torch.Tensor
    offset: int
    strides: tuple[int, ...]


class _Worker:
    """One thread's buffers, reused from job to job; local to one call."""

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        files: Files,
        tile: int,
        watch: Watch | None,
    ) -> None:
        self._plan, self._tensors, self._memory, self._files = plan, tensors, memory, files
        self._limit, self._watch = tile, watch
        self._scratch, self._cast = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        self._view = raw(self._scratch)
        self._bytes: dict[int, memoryview] = {}
        self._decoder = Decoder(files.get)
        self._due: tuple[SourceFile, int, int, list[memoryview]] | None = (
            None  # a file's run, and where it goes
        )

    def run(self, jobs: Sequence[_Job]) -> tuple[int, dict[int, int]]:
        """Do jobs; the bytes read, and the elements written by target."""
        if self._limit > TILE:
            self._announce(jobs)
        written: dict[int, int] = {}
        read = sum(self._run(job, written) for job in jobs)
        return read + self._read_due(), written

    def _announce(self, jobs: Sequence[_Job]) -> None:
        """Ask for the bytes of jobs that are whole runs of one file, neighbours in one word."""
        runs: list[tuple[str, int, int]] = []
        for job in jobs:
            copy = job.copies[0]
            part, (sizes, steps, _) = self._plan.parts[copy.source], self._plan.patterns[copy.pattern]
            if (
                not part.file
                or part.coding >= 0
                or not sizes
                or spans(sizes, steps, self._plan.itemsize(copy))[:2] != (0, 0)
            ):
                continue
            begin = part.begin + (copy.at + job.first * steps[0]) * self._plan.itemsize(copy)
            runs.append((part.file, begin, begin + job.size))
        for file, begin, end in merged(runs):
            self._files.get(file).announce(begin, end - begin)

    def _run(self, job: _Job, written: dict[int, int]) -> int:
        plan, copy = self._plan, job.copies[0]
        part = plan.parts[copy.source]
        pattern = plan.patterns[copy.pattern]
        sizes = (job.steps, *pattern.sizes[1:]) if pattern.sizes else ()
        at = copy.at + (job.first * pattern.source[0] if pattern.sizes else 0)
        landings = [self._landing(c, job.first) for c in job.copies]
        if part.coding >= 0:
            scales = [plan.parts[i] for i in part.scales]
            coding, into = plan.codings[part.coding], [Decoded(*landing[1:]) for landing in landings]
            read = self._decoder.run(coding, part, scales, at, sizes, pattern.source, into)
        elif not part.file:
            self._from_memory(part, at, sizes, pattern.source, landings)
            read = 0
        else:
            read = self._from_file(part, at, sizes, pattern.source, landings)
        for landing in landings:
            written[landing.target] = written.get(landing.target, 0) + prod(sizes)
        return read

    def _landing(self, copy: Copy, first: int) -> _Landing:
        pattern = self._plan.patterns[copy.pattern]
        tensor = self._tensors[self._plan.targets[copy.target].name]
        strides = tuple(step * tensor.stride(dim) for dim, step in pattern.target)
        offset = int(tensor.storage_offset()) + sum(
            i * stride for i, stride in zip(copy.start, tensor.stride(), strict=True)
        )
        return _Landing(copy.target, tensor, offset + (first * strides[0] if strides else 0), strides)

    def _from_memory(
        self, part: Part, at: int, sizes: Sequence[int], steps: Sequence[int], landings: Sequence[_Landing]
    ) -> None:
        """Row-major places of the source are turned into its real strides, so that any view can be a source."""
        source = self._memory[part.name]
        offset, strides = real_places(source, at, steps)
        view = source.as_strided(sizes, strides, offset)
        for landing in landings:
            move(landing.tensor.as_strided(sizes, landing.strides, landing.offset), view)

    def _from_file(
        self,
        part: Part,
        at: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
        landings: Sequence[_Landing],
    ) -> int:
        source = self._files.get(part.file)
        dtype = torch_dtype(part.dtype)
        itemsize = dtype.itemsize
        base = part.begin + at * itemsize
        how = spans(sizes, steps, itemsize)
        if len(landings) == 1 and dtype_name(landings[0].tensor.dtype) == part.dtype:
            run = contiguous_from(sizes, landings[0].strides)
            block = itemsize * prod(sizes[run:])
            on_cpu = landings[0].tensor.device.type == "cpu"
            if on_cpu and not how.rows and (block >= GAP or run <= how.outer):
                return self._straight(source, base, sizes, steps, itemsize, how, run, landings[0])
        return self._tiled(source, part, base, sizes, steps, dtype, how, landings)

    def _straight(
        self,
        source: SourceFile,
        base: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
        itemsize: int,
        how: Spans,
        run: int,
        landing: _Landing,
    ) -> int:
        """Runs of the file into runs of the tensor's storage: no buffer in between, one call for what adjoins."""
        storage = self._storage(landing)
        outer = how.outer
        block = itemsize * prod(sizes[max(run, outer) :])
        scatter = places(sizes[outer : max(run, outer)], landing.strides[outer : max(run, outer)])
        read = 0
        for index in product(*(range(n) for n in sizes[:outer])):
            offset = base + itemsize * dot(index, steps)
            to = landing.offset + dot(index, landing.strides)
            for first in range(0, len(scatter), 1024):
                begins = [(to + place) * itemsize for place in scatter[first : first + 1024]]
                buffers = [storage[begin : begin + block] for begin in begins]
                read += self._read_soon(source, offset + first * block, len(buffers) * block, buffers)
        return read

    def _read_soon(self, source: SourceFile, begin: int, size: int, buffers: list[memoryview]) -> int:
        """Note a read; what adjoins it in the file joins it. The bytes of an earlier one that had to go first."""
        if self._due is not None and self._due[0] is source and self._due[2] == begin:
            self._due[3].extend(buffers)
            self._due = (source, self._due[1], begin + size, self._due[3])
            return 0
        read = self._read_due()
        self._due = (source, begin, begin + size, buffers)
        return read

    def _read_due(self) -> int:
        """Read what is noted; its bytes."""
        due, self._due = self._due, None
        return due[0].preadv(due[1], due[3]) if due is not None else 0

    def _tiled(
        self,
        source: SourceFile,
        part: Part,
        base: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
        dtype: torch.dtype,
        how: Spans,
        landings: Sequence[_Landing],
    ) -> int:
        """Tiles through one buffer, then moved: transposed, cast, or to another device."""
        itemsize = dtype.itemsize
        device = any(landing.tensor.device.type != "cpu" for landing in landings)
        cast = max((x.tensor.dtype.itemsize for x in landings if x.tensor.dtype != dtype), default=0)
        limit = STAGE if device else self._limit * itemsize // (itemsize + cast)
        axis, length = tile_axis(sizes, itemsize, how, landings[0].strides, limit)
        read = 0
        for index in product(*(range(n) for n in sizes[:axis])):
            for first in range(0, sizes[axis] if sizes else 1, length):
                count = min(length, sizes[axis] - first) if sizes else 1
                place = (*index, first)[: len(sizes)]
                shape = (count, *sizes[axis + 1 :]) if sizes else ()
                offset = base + itemsize * dot(place, steps)
                tile, got = self._tile(source, offset, shape, steps[axis:], dtype, how, axis)
                read += got
                if self._watch is not None and how.outer <= axis and not how.rows:
                    self._watch(part, offset - part.begin, self._view[: tile.nbytes])
                for landing in landings:
                    to = landing.offset + dot(place, landing.strides)
                    into = landing.tensor.as_strided(shape, landing.strides[axis:], to)
                    move(into, tile if device or into.dtype == dtype else self._casted(tile, into.dtype))
        return read

    def _tile(
        self,
        source: SourceFile,
        offset: int,
        shape: tuple[int, ...],
        steps: tuple[int, ...],
        dtype: torch.dtype,
        how: Spans,
        axis: int,
    ) -> tuple[torch.Tensor, int]:
        """Read one tile: a window with its gaps as it lies in the file, everything else packed."""
        itemsize = dtype.itemsize
        if how.rows:
            span = (shape[0] - 1) * steps[0] * itemsize + how.run
            buffer = self._buffer(span, itemsize)
            read = source.preadv(offset, [self._view[:span]])
            return buffer[: -(-span // itemsize) * itemsize].view(dtype).as_strided(shape, steps), read
        size = prod(shape) * itemsize
        buffer, view = self._buffer(size, itemsize), self._view
        loops = max(0, how.outer - axis)
        run = itemsize * prod(shape[loops:])
        read = 0
        for i, index in enumerate(product(*(range(n) for n in shape[:loops]))):
            at = offset + itemsize * dot(index, steps)
            read += source.preadv(at, [view[i * run : (i + 1) * run]])
        return buffer[:size].view(dtype).view(shape), read

    def _buffer(self, size: int, itemsize: int) -> torch.Tensor:
        need = -(-size // itemsize) * itemsize
        if self._scratch.numel() < need:
            self._scratch = torch.empty(need, dtype=torch.uint8)
            self._view = raw(self._scratch)
        return self._scratch

    def _casted(self, tile: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tile in another dtype, in one reused buffer: a fresh one would be paid for page by page."""
        need = tile.numel() * dtype.itemsize
        if self._cast.numel() < need:
            self._cast = torch.empty(need, dtype=torch.uint8)
        return self._cast[:need].view(dtype).view(tile.shape).copy_(tile)

    def _storage(self, landing: _Landing) -> memoryview:
        """The bytes of a tensor's whole storage."""
        if landing.target not in self._bytes:
            storage = landing.tensor.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            if len(self._bytes) == KEPT:
                self._bytes.clear()
            self._bytes[landing.target] = raw(flat)
        return self._bytes[landing.target]
