"""The jobs of a plan, and how threads take them: in the order of the files, neighbours together, fewer towards the end;
from a disk each along a run of its own.

A job is one read, or a slice of one that is large. It rejects nothing: a plan was proved.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, count, pairwise
from math import prod
from typing import NamedTuple

from restow.coding import jobs as coded_jobs
from restow.plans import Copy, Plan
from restow.proof import Pattern
from restow.reads import spans
from restow.torch.rows import side_by_side, turned
from restow.torch.strides import even
from restow.torch.transpose import LINE

JOB = 16 << 20  # bytes of one job, where the outermost axis lets it be cut
AT_ONCE = (
    64 << 20
)  # bytes of what a thread takes at once out of memory: each take costs the interpreter's start
PIECE = 8 << 20  # bytes of what a thread takes at once from a disk
LEAST = 1 << 20  # bytes of what a thread takes towards the end, where there are more


class Job(NamedTuple):
    """A batch of copies that share one read, or a slice of one along its outermost axis."""

    number: int
    copies: tuple[Copy, ...]
    first: int
    steps: int
    size: int  # bytes, gaps not counted
    beside: tuple[Copy, ...] | None = None  # where the first fills whole rows with these, each its own read

    def alone(self) -> tuple[Job, ...]:
        """The same as jobs of one read each."""
        if not self.beside:
            return (self._replace(beside=None),)
        size = self.size // (1 + len(self.beside))
        copies = (*self.copies, *self.beside)
        return tuple(self._replace(copies=(copy,), size=size, beside=None) for copy in copies)


class Queue:
    """Jobs in order, handed out to any thread: neighbours together, so that their reads can be one.

    Fewer at a time towards the end, so that no thread is left with much to do when the others have nothing.
    """

    def __init__(self, jobs: Iterator[Job], left: int, workers: int, most: int = JOB) -> None:
        self._jobs = jobs
        self._next = next(jobs, None)
        self._left = left
        self._share, self._most = 2 * workers, most
        self._lock = threading.Lock()

    def take(self) -> list[Job]:
        """The next jobs, at most `most` bytes or one that is larger; none when all are taken."""
        group: list[Job] = []
        with self._lock:
            size, limit = 0, max(LEAST, min(self._most, self._left // self._share))
            while self._next is not None and (not group or size + self._next.size <= limit):
                group.append(self._next)
                size += self._next.size
                self._next = next(self._jobs, None)
            self._left -= size
        return group


class Streams:
    """Jobs as one long run for each thread, since a disk is fastest where each reads on from where it was.

    Who is done takes the second half of the longest run that is left, until the last jobs.
    """

    def __init__(self, jobs: Iterable[Job], workers: int, most: int = PIECE) -> None:
        self._jobs = list(jobs)
        self._places = list(accumulate((job.size for job in self._jobs), initial=0))  # bytes before each
        ends = [bisect_left(self._places, self._places[-1] * i // workers) for i in range(workers + 1)]
        self._runs = list(pairwise(ends))  # by thread, what is left of its run
        self._most = most
        self._lock = threading.Lock()

    def take(self, worker: int) -> list[Job]:
        """A thread's next jobs, at most `most` bytes or one that is larger; none when all are taken."""
        with self._lock:
            first, last = self._runs[worker]
            if first == last:
                first, last = self._half(worker)
            begin, end = first, min(first + 1, last)
            while end < last and self._places[end + 1] - self._places[begin] <= self._most:
                end += 1
            self._runs[worker] = (end, last)
        return self._jobs[begin:end]

    def _half(self, worker: int) -> tuple[int, int]:
        """The second half of the longest run, its one job where it has no other; it is its thread's no more."""
        places = self._places
        left = [(places[last] - places[first], last - first) for first, last in self._runs]
        longest = left.index(max(left))
        first, last = self._runs[longest]
        middle = min(
            bisect_left(places, (places[first] + places[last]) // 2, first, last), max(first, last - 1)
        )
        self._runs[longest] = (first, middle)
        return middle, last


def volume(plan: Plan) -> int:
    """The bytes of all jobs."""
    volumes = [prod(pattern.sizes) for pattern in plan.patterns]
    return sum(volumes[copy.pattern] * plan.itemsize(copy) for copy in plan.copies)


def jobs(plan: Plan) -> Iterator[Job]:
    numbers = count()
    for batches, whole in _neighbours(plan):
        pattern = plan.patterns[batches[0][0].pattern]
        itemsize = plan.itemsize(batches[0][0])
        size = len(batches) * prod(pattern.sizes) * itemsize
        if whole and size <= JOB:
            others = tuple(copy for batch in batches[1:] for copy in batch)
            yield Job(next(numbers), batches[0], 0, pattern.sizes[0], size, others)
            continue
        for batch in batches:
            yield from _cut_up(plan, batch, pattern, itemsize, numbers)


def _neighbours(plan: Plan) -> Iterator[tuple[list[tuple[Copy, ...]], bool]]:
    """Batches in order, those that fill whole rows side by side together; and whether they do."""
    held: list[tuple[Copy, ...]] = []
    alone: dict[int, bool] = {}  # by pattern: those that fill no rows with others
    for batch in plan.batches():
        first = batch[0]
        if first.pattern not in alone:
            alone[first.pattern] = not turned(plan.patterns[first.pattern], len(first.start) - 1)
        if alone[first.pattern] and not held:
            yield [batch], False
            continue
        held.append(batch)
        whole = side_by_side(plan, held)
        if whole is False and len(held) > 1:  # those before it stand alone; it may begin others
            yield from (([one], False) for one in held[:-1])
            held = [batch]
            whole = side_by_side(plan, held)
        if whole is not None:
            yield held, whole
            held = []
    yield from (([one], False) for one in held)


def _cut_up(
    plan: Plan, batch: tuple[Copy, ...], pattern: Pattern, itemsize: int, numbers: Iterator[int]
) -> Iterator[Job]:
    """One read as jobs."""
    if not pattern.sizes:
        yield Job(next(numbers), batch, 0, 1, itemsize)
        return
    coding = plan.parts[batch[0].source].coding
    if coding >= 0:
        for first, steps in coded_jobs(plan.codings[coding], batch[0].at, *pattern[:2]):
            yield Job(next(numbers), batch, first, steps, steps * prod(pattern.sizes[1:]))
        return
    step, inner = _cut(*pattern[:2], itemsize)
    for first in range(0, pattern.sizes[0], step):
        steps = min(step, pattern.sizes[0] - first)
        yield Job(next(numbers), batch, first, steps, steps * inner)


@lru_cache(maxsize=256)
def _cut(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """How many steps of the outermost axis make one job, and the bytes of a step."""
    outer, rows, _ = spans(sizes, steps, itemsize)
    inner = max(1, prod(sizes[1:]) * itemsize)
    step = even(sizes[0], JOB // inner, LINE // itemsize)
    if rows and outer == 0:
        step = max(rows, step // rows * rows)
    return step, inner
