"""The jobs of a plan, and how threads take them: in the order of the files, neighbours together, fewer towards the end.

A job is one read, or a slice of one that is large. It rejects nothing: a plan was proved.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from restow.coding import jobs as coded_jobs
from restow.plans import Copy, Plan
from restow.reads import spans
from restow.torch.strides import even
from restow.torch.transpose import LINE

JOB = (
    16 << 20
)  # bytes of one job, where the outermost axis lets it be cut, and of what a thread takes at once
LEAST = 1 << 20  # bytes of what a thread takes towards the end, where there are more


class Job(NamedTuple):
    """A batch of copies that share one read, or a slice of one along its outermost axis."""

    number: int
    copies: tuple[Copy, ...]
    first: int
    steps: int
    size: int  # bytes, gaps not counted


class Queue:
    """Jobs in order, handed out to any thread: neighbours together, so that their reads can be one.

    Fewer at a time towards the end, so that no thread is left with much to do when the others have nothing.
    """

    def __init__(self, jobs: Iterator[Job], left: int, workers: int) -> None:
        self._jobs = jobs
        self._next = next(jobs, None)
        self._left = left
        self._share = 2 * workers
        self._lock = threading.Lock()

    def take(self) -> list[Job]:
        """The next jobs, at most `JOB` bytes or one that is larger; none when all are taken."""
        group: list[Job] = []
        with self._lock:
            size, limit = 0, max(LEAST, min(JOB, self._left // self._share))
            while self._next is not None and (not group or size + self._next.size <= limit):
                group.append(self._next)
                size += self._next.size
                self._next = next(self._jobs, None)
            self._left -= size
        return group


def volume(plan: Plan) -> int:
    """The bytes of all jobs."""
    volumes = [prod(pattern.sizes) for pattern in plan.patterns]
    return sum(volumes[copy.pattern] * plan.itemsize(copy) for copy in plan.copies)


def jobs(plan: Plan) -> Iterator[Job]:
    number = 0
    for batch in plan.batches():
        pattern = plan.patterns[batch[0].pattern]
        itemsize = plan.itemsize(batch[0])
        if not pattern.sizes:
            yield Job(number, batch, 0, 1, itemsize)
            number += 1
            continue
        coding = plan.parts[batch[0].source].coding
        if coding >= 0:
            for first, steps in coded_jobs(plan.codings[coding], batch[0].at, *pattern[:2]):
                yield Job(number, batch, first, steps, steps * prod(pattern.sizes[1:]))
                number += 1
            continue
        step, inner = _cut(*pattern[:2], itemsize)
        for first in range(0, pattern.sizes[0], step):
            steps = min(step, pattern.sizes[0] - first)
            yield Job(number, batch, first, steps, steps * inner)
            number += 1


@lru_cache(maxsize=256)
def _cut(sizes: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """How many steps of the outermost axis make one job, and the bytes of a step."""
    outer, rows, _ = spans(sizes, steps, itemsize)
    inner = max(1, prod(sizes[1:]) * itemsize)
    step = even(sizes[0], JOB // inner, LINE // itemsize)
    if rows and outer == 0:
        step = max(rows, step // rows * rows)
    return step, inner
