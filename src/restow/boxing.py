"""Boxes of elements in codes that are written: which of their axes run over whole blocks, and where the scales lie.

The reverse of `coding`, from the same terms: what a read needs of codes and scales is what a write of whole blocks
makes. Rejected are boxes that cut a block, whose scale nobody could know (`QuantizationError`, by name).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from restow.boxes import strides_of
from restow.coding import Coding, dim_of, index_of
from restow.errors import QuantizationError, show
from restow.packing import blocks_along


class CodedBox(NamedTuple):
    """A box with axes that go on in one another joined: `sizes` and `steps` of its elements, how many along each axis
    share a scale, and the scales' first place and steps in their tensor."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    blocks: tuple[int, ...]
    scale_at: int
    scale_steps: tuple[int, ...]


def coded_box(coding: Coding, name: str, at: int, sizes: Sequence[int], steps: Sequence[int]) -> CodedBox:
    """A box of elements of a piece of codes, from element `at`. Raises `QuantizationError` for one that cuts a block."""
    (grid,) = coding.grids
    strides, scale_strides = strides_of(coding.shape), strides_of(grid.shape)
    blocks = blocks_along(coding.shape, grid, name)
    units = [0] * len(coding.shape)
    for term in grid.terms:
        units[term.dim] = scale_strides[term.to]
    joined: list[tuple[int, int, int]] = []  # dim, size, step in places of the dim
    for size, step in zip(sizes, steps, strict=True):
        if size == 1:
            continue
        dim = dim_of(coding.shape, strides, step)
        local = step // strides[dim]
        if joined and joined[-1][0] == dim and joined[-1][2] == local * size:
            joined[-1] = (dim, joined[-1][1] * size, local)
        else:
            joined.append((dim, size, local))
    starts = index_of(coding, at)
    along: list[int] = []
    for dim, size, local in joined:
        block = blocks[dim]
        if local == 1 and not _whole(starts[dim], size, block, coding.shape[dim]):
            raise _cut(coding, name, dim, (starts[dim], size), block)
        if local > 1 and local % block:
            raise _cut(coding, name, dim, (starts[dim], 1), block)
        along.append(block if local == 1 else 1)
    inner = {dim for dim, _, local in joined if local == 1}
    for dim, block in enumerate(blocks):
        if dim not in inner and not _whole(starts[dim], 1, block, coding.shape[dim]):
            raise _cut(coding, name, dim, (starts[dim], 1), block)
    if coding.bits != 8 and (not joined or joined[-1][2] * strides[joined[-1][0]] != 1 or joined[-1][1] % 2):
        raise _cut(coding, name, len(coding.shape) - 1, (starts[-1], 1), 8 // coding.bits)
    return CodedBox(
        tuple(size for _, size, _ in joined),
        tuple(local * strides[dim] for dim, _, local in joined),
        tuple(along),
        sum(start // block * unit for start, block, unit in zip(starts, blocks, units, strict=True)),
        tuple(units[dim] * max(1, local // blocks[dim]) for dim, _, local in joined),
    )


def _whole(start: int, size: int, block: int, whole: int) -> bool:
    """Whether a run consists of whole blocks, of which the last of a dim may be short."""
    return start % block == 0 and (size % block == 0 or start + size == whole)


def _cut(coding: Coding, name: str, dim: int, run: tuple[int, int], block: int) -> QuantizationError:
    return QuantizationError(
        f"parts of whole blocks of {block} along dim {dim} of {show(name)}, which share a {coding.codec} scale",
        f"one from {run[0]} to {run[0] + run[1]} of {coding.shape[dim]}",
        tensor=name,
        sections=[("tensor", [show(name)])],
        hint="save without quantize=, and encode the files: restow.convert(..., quantize=...)",
    )
