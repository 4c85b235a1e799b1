"""Jobs that are one run of their file and one run of a tensor's storage, and what those of one pattern share.

A load into the files' order is made of nothing else, hundreds of times: what differs is where each begins. It rejects
nothing: a plan was proved.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from restow.plans import Copy, Part
from restow.proof import Pattern
from restow.torch.strides import dot, in_place


class OneRun(NamedTuple):
    """`storage` is the tensor's, `dims` are its strides; `origin` is its first element, `step` and `source_step` are
    elements from step to step of a job, there and in the file, `elements` and `size` (bytes) those of a whole job.
    """

    storage: memoryview
    dims: tuple[int, ...]
    origin: int
    step: int
    source_step: int
    itemsize: int
    elements: int
    size: int

    def places(self, copy: Copy, part: Part, first: int) -> tuple[int, memoryview]:
        """Where a job that begins at step `first` of a copy lies: its first byte in the file, and its memory."""
        begin = (self.origin + dot(copy.start, self.dims) + first * self.step) * self.itemsize
        at = part.begin + (copy.at + first * self.source_step) * self.itemsize
        return at, self.storage[begin : begin + self.size]


def one_run(
    pattern: Pattern,
    steps: int,
    itemsize: int,
    strides: tuple[int, ...],
    storage: memoryview,
    origin: int,
    dims: tuple[int, ...],
) -> OneRun | None:
    """What jobs of `steps` steps of a pattern share, which lands with `strides`; None where one is more than a run."""
    sizes = (steps, *pattern.sizes[1:]) if pattern.sizes else ()
    blocks = in_place(sizes, pattern.source, strides, itemsize)
    if blocks is None or blocks.outer or len(blocks.places) > 1:
        return None
    step, source_step = (strides[0], pattern.source[0]) if sizes else (0, 0)
    return OneRun(storage, dims, origin, step, source_step, itemsize, prod(sizes), blocks.size)
