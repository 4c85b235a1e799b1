"""What the threads of one call did, in one book: bytes read, elements written by target, errors by their jobs' numbers.

It rejects a book that does not say what its plan says.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from restow.errors import CoverageError, show
from restow.plans import Plan


@dataclass
class Ledger:
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

    def compare(self, plan: Plan) -> int:
        """The bytes written, which are those of the plan; raises `CoverageError` where elements are others."""
        planned: dict[int, int] = {}
        elements = [prod(pattern.sizes) for pattern in plan.patterns]
        for copy in plan.copies:
            planned[copy.target] = planned.get(copy.target, 0) + elements[copy.pattern]
        wrong = [i for i in planned.keys() | self.written.keys() if planned.get(i) != self.written.get(i)]
        if wrong:
            names = [plan.targets[i].name for i in sorted(wrong)]
            raise CoverageError(
                f"{sum(planned.values())} elements written, as planned",
                f"{sum(self.written.values())}",
                tensor=names[0],
                sections=[("tensors", map(show, names))],
                hint="do not use these tensors; this is a defect of restow: please report it",
            )
        return plan.written
