"""Many transposed copies on one device in one launch, driven by a table of addresses.

torch's strided copy moves a transposed matrix at a fifth of the memory's rate, and takes a launch for each. A table row
is one matrix: its two addresses, its sizes, its two strides. Bits are moved, never computed on. The kernel is used only
after it moved test patterns exactly on that device; where triton is not there, or does not compile, torch's copy stays.
Rejected by `matrix_of`: what is no transpose, and so has no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from restow.torch.dtypes import INTS
from restow.torch.tiles import offsets, simplified, transposed

COLUMNS = 6
SIDE = 64  # elements: a block of the kernel is a square
WORD = 16  # bytes that a device moves at once, at most

Ints = npt.NDArray[np.int64]


class Matrix(NamedTuple):
    """A transpose: sizes and strides in elements, and where each of its like matrices begins on both sides."""

    rows: int
    cols: int
    step: int
    far: int
    places: list[tuple[int, int]]


class Launch(NamedTuple):
    """Rows `first` to `last` of a table: elements of `width` bytes, `even` bytes divide all, `blocks` a row."""

    first: int
    last: int
    width: int
    even: int
    blocks: int


def matrix_of(sizes: Sequence[int], source: Sequence[int], target: Sequence[int]) -> Matrix | None:
    """A strided copy as like transposes, or None where it is none."""
    axes = simplified(sizes, source, target)
    pair = transposed(axes)
    if pair is None:
        return None
    (rows, step, _), (cols, _, far) = axes[pair], axes[-1]
    rest = [axis for i, axis in enumerate(axes) if i not in (pair, len(axes) - 1)]
    return Matrix(rows, cols, step, far, offsets(rest))


def launches(table: Ints, widths: Ints, keys: Ints) -> Iterator[Launch]:
    """Rows that one launch can do: neighbours of one key (never less than the one before) and one width."""
    if not len(table):
        return
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(keys) != 0) | (np.diff(widths) != 0)]))
    lines = table.copy()
    lines[:, 2:] *= widths[:, None]
    even = np.gcd(np.gcd.reduceat(np.gcd.reduce(lines, axis=1), begins), WORD)
    blocks = np.maximum.reduceat(-(-table[:, 2] // SIDE) * -(-table[:, 3] // SIDE), begins)
    ends = [*begins[1:].tolist(), len(table)]
    for first, last, fit, count in zip(begins.tolist(), ends, even.tolist(), blocks.tolist(), strict=True):
        yield Launch(first, last, int(widths[first]), fit, count)


def launch(table: torch.Tensor, what: Launch) -> None:
    """Move the matrices of these rows, on the current stream; `table` lies on the device and holds just them."""
    from restow.torch.kernel import exchange

    grid = (what.blocks, what.last - what.first)
    exchange[grid](table, WIDTH=what.width, EVEN=what.even, SIDE=SIDE)


@cache
def usable(device: torch.device, width: int) -> bool:
    """Whether the kernel moves patterns of this width exactly on the device: whole words, and odd remainders."""
    if device.type != "cuda" and not _interpreted():
        return False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return all(_exact(device, width, *sizes) for sizes in ((3, 128, 72), (2, 65, 33)))
    except Exception:  # no triton, no compiler, a device that it does not know: torch's own copy is there
        return False


def _interpreted() -> bool:
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _exact(device: torch.device, width: int, count: int, rows: int, cols: int) -> bool:
    bits = torch.arange(count * rows * cols * width, dtype=torch.int32, device=device)
    word: Any = INTS[width]
    source = (bits * 97 >> 3).to(torch.uint8).view(word).view(count, rows, cols)
    found = torch.zeros(count, cols, rows + WORD, dtype=word, device=device)
    table = [(source[i].data_ptr(), found[i].data_ptr(), rows, cols, cols, rows + WORD) for i in range(count)]
    lines = np.array(table, np.int64)
    for what in launches(lines, np.full(count, width), np.zeros(count, np.int64)):
        launch(torch.from_numpy(lines[what.first : what.last]).to(device), what)
    same = torch.equal(found[:, :, :rows], source.transpose(1, 2))
    return same and not bool(found[:, :, rows:].any())
