"""Running a plan: byte runs of files, or tensors in memory, into the destination's own storage; every element booked.

Threads take jobs in the order of the files. Where source and destination agree in order, `preadv` writes straight into
the parameter; where they do not, a cache-sized tile is read into one reused buffer a thread and moved from there. It
raises the first error by plan order after all threads have stopped; nothing is retried or skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from restow.coding import byte_box
from restow.files import SourceFile
from restow.plans import Copy, Part, Plan
from restow.reads import Spans, merged, spans
from restow.torch.decode import Decoder
from restow.torch.decode import Landing as Decoded
from restow.torch.dtypes import dtype_name, torch_dtype
from restow.torch.jobs import AT_ONCE, JOB, PIECE, Job, Queue, Streams, jobs, volume
from restow.torch.ledger import Ledger
from restow.torch.onerun import OneRun, one_run
from restow.torch.raw import raw
from restow.torch.rows import block, fill_rows
from restow.torch.sources import Files, is_cold
from restow.torch.strides import Blocks, dot, in_place, real_places, tile_axis
from restow.torch.threads import check_threads, default_threads
from restow.torch.tiles import move
from restow.torch.transpose import entry_for

STAGE = 16 << 20  # bytes of one tile on its way to a device
# Bytes of one tile, its cast copy included: more rows are longer runs for a transpose to write.
TILE = 4 << 20
WINDOW = 48 << 20  # bytes of all threads' tiles together where reads are to be large, or fill whole rows
TOLD = 4 << 20  # bytes read before whoever watches is told: each word costs more than a nearer cache saves
READERS = 6  # threads that read from a disk, though there be fewer cores
DESCRIPTORS = 256  # that a call opens at most where it could do with fewer
KEPT = 64  # storages whose bytes a thread keeps at hand

Progress = Callable[[int, int], None]
Watch = Callable[[Part, int, memoryview], None]  # the part, a byte of it, and what lies there in the file


class Booked(NamedTuple):
    """What was really done: bytes that the files gave, bytes that the destination took."""

    bytes_read: int
    bytes_written: int


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
    is told, by the thread that read them, piece by piece, the bytes of every tile that lies in its file in one piece.
    """
    check_threads(threads)
    ledger = Ledger()
    cold = root is not None and is_cold(plan.parts, root)
    usual = default_threads()
    wanted = threads or (max(usual, min(READERS, 3 * usual)) if cold else usual)
    workers = min(wanted, max(1, len(plan.copies)))
    takes = _takes(plan, workers, cold, large)
    tile = max(TILE, min(JOB, WINDOW // workers)) if large else TILE
    total = plan.bytes if progress is not None else 0
    before = torch.get_num_threads()
    with ExitStack() as stack:
        # From a disk every thread reads through descriptors of its own: the system looks ahead by descriptor.
        own = cold and workers * len({part.file for part in plan.parts}) <= DESCRIPTORS
        files = [Files(stack, root, stamps or {}) for _ in range(workers if own else 1)]
        shared = (ledger, plan, tensors, memory or {}, tile, WINDOW // workers, watch)
        pool = [
            threading.Thread(target=_work, args=(take, files[i % len(files)], *shared), daemon=True)
            for i, take in enumerate(takes)
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
        for opened in files:
            opened.check()
    if progress is not None:
        progress(ledger.read, total)
    return Booked(ledger.read, ledger.compare(plan))


def _takes(plan: Plan, workers: int, cold: bool, large: bool) -> list[Callable[[], list[Job]]]:
    """How each thread comes by its next jobs."""
    if cold:
        streams = Streams(jobs(plan), workers, JOB if large else PIECE)
        return [partial(streams.take, worker) for worker in range(workers)]
    queue = Queue(jobs(plan), volume(plan), workers, JOB if large else AT_ONCE)
    return [queue.take] * workers


def _work(
    take: Callable[[], list[Job]],
    files: Files,
    ledger: Ledger,
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
    tile: int,
    window: int,
    watch: Watch | None,
) -> None:
    torch.set_num_threads(1)  # this thread is one of ours: ATen must not start a second pool below it
    worker = _Worker(plan, tensors, memory, files, tile, window, watch)
    while not ledger.stop.is_set():
        jobs = take()
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
    """Where one copy of a job goes: its tensor, the first element in storage, and a stride per axis of the pattern.

    `dtype` is the tensor's where it lies on the CPU, else "".
    """

    target: int
    tensor: torch.Tensor
    offset: int
    strides: tuple[int, ...]
    dtype: str


class _Worker:
    """One thread's buffers, reused from job to job; local to one call."""

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, torch.Tensor],
        memory: Mapping[str, torch.Tensor],
        files: Files,
        tile: int,
        window: int,
        watch: Watch | None,
    ) -> None:
        self._plan, self._tensors, self._memory, self._files = plan, tensors, memory, files
        self._limit, self._window, self._watch = tile, window, watch
        self._scratch, self._cast = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        self._view = raw(self._scratch)
        self._bytes: dict[int, memoryview] = {}
        self._known: dict[tuple[int, int], tuple[_Landing, tuple[int, ...]]] = {}
        self._runs: dict[tuple[int, int, int, str], OneRun | None] = {}
        self._decoder = Decoder(files.get)
        # A file's run, and where it goes.
        self._due: tuple[SourceFile, int, int, list[memoryview]] | None = None

    def run(self, jobs: Sequence[Job]) -> tuple[int, dict[int, int]]:
        """Do jobs; the bytes read, and the elements written by target."""
        if self._limit > TILE:
            self._announce(jobs)
        written: dict[int, int] = {}
        read = sum(self._run(job, written) for job in jobs)
        return read + self._read_due(), written

    def _announce(self, jobs: Sequence[Job]) -> None:
        """Ask for the bytes of jobs that are whole runs of one file, neighbours in one word."""
        runs = (self._run_of(one) for job in jobs for one in job.alone())
        for file, begin, end in merged([run for run in runs if run is not None]):
            self._files.get(file).announce(begin, end - begin)

    def _run_of(self, job: Job) -> tuple[str, int, int] | None:
        """The bytes of a job as (file, begin, end), codes without their scales; None where they are not one run."""
        copy = job.copies[0]
        part, (sizes, steps, _) = self._plan.parts[copy.source], self._plan.patterns[copy.pattern]
        if not part.file or not sizes or not job.size:
            return None
        itemsize, at, sizes = (
            self._plan.itemsize(copy),
            copy.at + job.first * steps[0],
            (job.steps, *sizes[1:]),
        )
        if part.coding >= 0:
            at, sizes, steps = byte_box(self._plan.codings[part.coding], at, sizes, steps)[:3]
        if spans(sizes, steps, itemsize)[:2] != (0, 0):
            return None
        begin = part.begin + at * itemsize
        return part.file, begin, begin + prod(sizes) * itemsize

    def _run(self, job: Job, written: dict[int, int]) -> int:
        if job.beside is None:
            return self._run_alone(job, written)
        read = self._whole_rows(job)
        if read == 0:
            return sum(self._run_alone(one, written) for one in job.alone())
        target = job.copies[0].target
        count = (1 + len(job.beside)) * prod(self._plan.patterns[job.copies[0].pattern].sizes)
        written[target] = written.get(target, 0) + count
        return read

    def _whole_rows(self, job: Job) -> int:
        """Read matrices that share rows, then write these rows in one piece; 0 where memory or the tensor forbid it."""
        copies = sorted((job.copies[0], *(job.beside or ())), key=lambda copy: copy.start[-1])
        landing, parts = self._landing(copies[0], 0), [self._plan.parts[copy.source] for copy in copies]
        rows, cols = self._plan.patterns[copies[0].pattern].sizes
        width = rows * len(copies)
        dtypes = {part.dtype for part in parts}
        if job.size > self._window or landing.strides != (1, width) or dtypes != {landing.dtype}:
            return 0
        dtype = landing.tensor.dtype
        entry = entry_for(dtype.itemsize)
        if entry is None:
            return 0
        buffer, size = self._buffer(job.size, dtype.itemsize), rows * cols * dtype.itemsize
        read = 0
        for i, (copy, part) in enumerate(zip(copies, parts, strict=True)):
            at, into = copy.at * dtype.itemsize, self._view[i * size : (i + 1) * size]
            read += self._read_told(self._files.get(part.file), part, part.begin + at, into)
        room = block(width * dtype.itemsize)
        if self._cast.numel() < room:
            self._cast = torch.empty(room, dtype=torch.uint8)
        storage = landing.tensor.untyped_storage().data_ptr()
        out, scratch = storage + landing.offset * dtype.itemsize, self._cast.data_ptr()
        fill_rows(entry, out, buffer.data_ptr(), (width, cols), dtype.itemsize, scratch)
        return read

    def _run_alone(self, job: Job, written: dict[int, int]) -> int:
        plan, copy = self._plan, job.copies[0]
        part = plan.parts[copy.source]
        run = self._one_run(job, copy, part)
        if run is not None:
            begin, place = run.places(copy, part, job.first)
            written[copy.target] = written.get(copy.target, 0) + run.elements
            return self._read_soon(self._files.get(part.file), begin, run.size, [place])
        pattern = plan.patterns[copy.pattern]
        sizes = (job.steps, *pattern.sizes[1:]) if pattern.sizes else ()
        at = copy.at + (job.first * pattern.source[0] if pattern.sizes else 0)
        landings = [self._landing(c, job.first) for c in job.copies]
        if part.coding >= 0:
            scales = [plan.parts[i] for i in part.scales]
            coding, into = plan.codings[part.coding], [Decoded(*landing[1:4]) for landing in landings]
            read = self._decoder.run(coding, part, scales, at, sizes, pattern.source, into)
        elif not part.file:
            self._from_memory(part, at, sizes, pattern.source, landings)
            read = 0
        else:
            read = self._from_file(part, at, sizes, pattern.source, landings)
        for landing in landings:
            written[landing.target] = written.get(landing.target, 0) + prod(sizes)
        return read

    def _one_run(self, job: Job, copy: Copy, part: Part) -> OneRun | None:
        """What a job shares with others of its pattern where it is one run in its file and in its place."""
        if len(job.copies) > 1 or part.coding >= 0 or not part.file:
            return None
        key = copy.target, copy.pattern, job.steps, part.dtype
        if key not in self._runs:
            if len(self._runs) == KEPT:
                self._runs.clear()
            here, pattern = self._landing(copy, 0), self._plan.patterns[copy.pattern]
            known, dims = self._known[copy.target, copy.pattern]
            size = torch_dtype(part.dtype).itemsize
            self._runs[key] = (
                one_run(pattern, job.steps, size, known.strides, self._storage(known), known.offset, dims)
                if here.dtype == part.dtype
                else None
            )
        return self._runs[key]

    def _landing(self, copy: Copy, first: int) -> _Landing:
        """Where a copy begins at step `first`; but for that all copies along one pattern into one tensor are alike."""
        key = copy.target, copy.pattern
        if key not in self._known:
            if len(self._known) == KEPT:
                self._known.clear()
            pattern, tensor = (
                self._plan.patterns[copy.pattern],
                self._tensors[self._plan.targets[copy.target].name],
            )
            dtype = dtype_name(tensor.dtype) if tensor.device.type == "cpu" else ""
            dims = tuple(tensor.stride())
            strides = tuple(step * dims[dim] for dim, step in pattern.target)
            origin = int(tensor.storage_offset())
            self._known[key] = _Landing(copy.target, tensor, origin, strides, dtype), dims
        known, dims = self._known[key]
        moved = dot(copy.start, dims) + (first * known.strides[0] if first else 0)
        return _Landing(known.target, known.tensor, known.offset + moved, known.strides, known.dtype)

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
        itemsize = torch_dtype(part.dtype).itemsize
        base = part.begin + at * itemsize
        if len(landings) == 1 and landings[0].dtype == part.dtype:
            blocks = in_place(sizes, steps, landings[0].strides, itemsize)
            if blocks is not None:
                return self._straight(source, base, sizes, steps, itemsize, blocks, landings[0])
        how = spans(sizes, steps, itemsize)
        return self._tiled(source, part, base, sizes, steps, torch_dtype(part.dtype), how, landings)

    def _straight(
        self,
        source: SourceFile,
        base: int,
        sizes: tuple[int, ...],
        steps: tuple[int, ...],
        itemsize: int,
        blocks: Blocks,
        landing: _Landing,
    ) -> int:
        """Runs of the file into runs of the tensor's storage: no buffer in between, one call for what adjoins."""
        storage, size = self._storage(landing), blocks.size
        read = 0
        for index in product(*(range(n) for n in sizes[: blocks.outer])):
            offset = base + itemsize * dot(index, steps)
            to = landing.offset + dot(index, landing.strides)
            for first in range(0, len(blocks.places), 1024):
                begins = [(to + place) * itemsize for place in blocks.places[first : first + 1024]]
                buffers = [storage[begin : begin + size] for begin in begins]
                read += self._read_soon(source, offset + first * size, len(buffers) * size, buffers)
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
                tile, got = self._tile(source, part, offset, shape, steps[axis:], dtype, how, axis)
                read += got
                for landing in landings:
                    to = landing.offset + dot(place, landing.strides)
                    into = landing.tensor.as_strided(shape, landing.strides[axis:], to)
                    move(into, tile if device or into.dtype == dtype else self._casted(tile, into.dtype))
        return read

    def _tile(
        self,
        source: SourceFile,
        part: Part,
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
        size, loops = prod(shape) * itemsize, max(0, how.outer - axis)
        buffer, view = self._buffer(size, itemsize), self._view
        if not loops:
            return buffer[:size].view(dtype).view(shape), self._read_told(source, part, offset, view[:size])
        run, read = itemsize * prod(shape[loops:]), 0
        for i, index in enumerate(product(*(range(n) for n in shape[:loops]))):
            at = offset + itemsize * dot(index, steps)
            read += source.preadv(at, [view[i * run : (i + 1) * run]])
        return buffer[:size].view(dtype).view(shape), read

    def _read_told(self, source: SourceFile, part: Part, offset: int, into: memoryview) -> int:
        """Read what lies in its file in one piece; where that is told, in pieces, each told from the cache."""
        if self._watch is None:
            return source.preadv(offset, [into])
        for first in range(0, len(into), TOLD):
            piece = into[first : first + TOLD]
            source.preadv(offset + first, [piece])
            self._watch(part, offset + first - part.begin, piece)
        return len(into)

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
