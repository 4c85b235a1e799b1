"""Copies of a save whose files are in codes: whole blocks of the state, encoded, into the places of codes and scales.

A decode job run the other way. `check_blocks` raises for every copy that cuts a block before a byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod

import torch

from restow.boxing import coded_box
from restow.entries import DTYPE_BITS
from restow.plans import Copy, Plan
from restow.torch.encode import encode
from restow.torch.raw import raw
from restow.torch.strides import contiguous_from, dot
from restow.torch.tiles import move

JOB = 4 << 20  # elements of one job, where the outermost axis lets it be cut between blocks

Write = Callable[[str, int, memoryview], int]  # file, offset, bytes -> bytes written


def check_blocks(plan: Plan) -> None:
    """Raise `QuantizationError` for the first copy into codes that holds a part of a block."""
    seen: set[tuple[object, ...]] = set()
    for copy in plan.copies:
        part, pattern = plan.parts[copy.source], plan.patterns[copy.pattern]
        if part.coding >= 0 and (key := (part.coding, copy.at, copy.pattern)) not in seen:
            seen.add(key)
            coded_box(plan.codings[part.coding], part.name, copy.at, *pattern[:2])


def coded_jobs(plan: Plan, copy: Copy) -> Iterator[tuple[int, int]]:
    """The (first, length) slices of a copy into codes along its outermost axis."""
    part, (sizes, steps, _) = plan.parts[copy.source], plan.patterns[copy.pattern]
    coding = plan.codings[part.coding]
    whole = coded_box(coding, part.name, copy.at, sizes, steps)
    apart = bool(sizes) and whole.sizes[:1] == sizes[:1]  # else it is joined with the next
    step = sizes[0] if sizes else 1
    if apart:
        inner, block = prod(sizes[1:]), whole.blocks[0]
        step = block * max(1, JOB // (block * inner))
        if len(whole.sizes) == 1 and coding.bits != 8:
            step += step % 2
    for first in range(0, sizes[0] if sizes else 1, step):
        yield first, min(step, sizes[0] - first) if sizes else 1


def write_coded(plan: Plan, copy: Copy, first: int, view: torch.Tensor, write: Write) -> int:
    """Encode and write a slice of a copy, from place `first` of its outermost axis; `view` is the state's part of it.

    The bytes written.
    """
    part, (_, steps, _) = plan.parts[copy.source], plan.patterns[copy.pattern]
    coding, scale = plan.codings[part.coding], plan.parts[part.scales[0]]
    at = copy.at + (first * steps[0] if steps else 0)
    box = coded_box(coding, part.name, at, tuple(view.shape), steps)
    tile = torch.empty(view.shape, dtype=torch.float32)
    move(tile, view)
    values = tile.view(box.sizes or (1,))
    made = encode(values, box.blocks or (1,), coding.element, scale.dtype, name=part.name)
    per = 8 // coding.bits
    sizes, code_steps = box.sizes, box.steps
    if per > 1:
        sizes, code_steps = (*sizes[:-1], sizes[-1] // per), (*(s // per for s in code_steps[:-1]), 1)
    written = _spread(write, part.file, part.begin + at // per, sizes, code_steps, 1, raw(made.codes))
    width, scales = DTYPE_BITS[scale.dtype] // 8, made.scales
    counts = tuple(scales.shape) if box.sizes else ()
    data = raw(scales.reshape(-1).view(torch.uint8))
    begin = scale.begin + width * box.scale_at
    return written + _spread(write, scale.file, begin, counts, box.scale_steps, width, data)


def _spread(
    write: Write,
    file: str,
    begin: int,
    sizes: Sequence[int],
    steps: Sequence[int],
    width: int,
    data: memoryview,
) -> int:
    """Write packed elements to strided places, run by run."""
    real = [(n, s) for n, s in zip(sizes, steps, strict=True) if n > 1]
    sizes, steps = [n for n, _ in real], [s for _, s in real]
    run = contiguous_from(sizes, steps)
    block = width * prod(sizes[run:])
    written = 0
    for i, index in enumerate(product(*(range(n) for n in sizes[:run]))):
        to = begin + width * dot(index, steps)
        written += write(file, to, data[i * block : (i + 1) * block])
    return written
