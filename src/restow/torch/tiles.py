"""Moving one tile: from a scratch buffer, or a source in memory, into the destination's own storage.

A tile is two strided views of the same sizes. Equal order is a plain copy; a transpose goes through `transpose`; a
cast is made on the contiguous tile before it is moved. Views only: nothing here allocates more than one tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from restow.torch.dtypes import whole_numbers
from restow.torch.transpose import copy_transposed

Axes = list[tuple[int, int, int]]  # (size, source stride, destination stride), slowest in the source first


def move(dst: torch.Tensor, src: torch.Tensor) -> None:
    """`dst.copy_(src)` for strided views of one shape, exact bits where dtypes agree, fast where dims are exchanged."""
    if src.device.type != "cpu" or dst.device.type != "cpu":
        dst.copy_(src, non_blocking=False)
        return
    if src.dtype != dst.dtype:
        src = src.to(dst.dtype)
    axes = simplified(src.shape, src.stride(), dst.stride())
    pair = transposed(axes)
    if pair is None:
        _copy(_view(dst, axes, 2), _view(src, axes, 1))
        return
    rows, cols = axes[pair], axes[-1]
    outer = [axis for i, axis in enumerate(axes) if i not in (pair, len(axes) - 1)]
    for at, to in offsets(outer):
        tile = src.as_strided((rows[0], cols[0]), (rows[1], cols[1]), src.storage_offset() + at)
        into = dst.as_strided((rows[0], cols[0]), (rows[2], cols[2]), dst.storage_offset() + to)
        copy_transposed(into, tile)


def _copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    if dst.dtype.is_floating_point or dst.dtype == torch.bool:
        dst, src = whole_numbers(dst), whole_numbers(src)  # bits: no NaN is quieted on the way
    dst.copy_(src)


def simplified(sizes: Sequence[int], source: Sequence[int], target: Sequence[int]) -> Axes:
    """The axes without those of length 1, and with neighbours joined that both sides run through in one stride."""
    axes: Axes = sorted(
        ((n, a, b) for n, a, b in zip(sizes, source, target, strict=True) if n != 1),
        key=lambda axis: -axis[1],
    )
    joined: Axes = []
    for n, a, b in axes:
        if joined and joined[-1][1] == a * n and joined[-1][2] == b * n:
            joined[-1] = (joined[-1][0] * n, a, b)
        else:
            joined.append((n, a, b))
    return joined


def transposed(axes: Axes) -> int | None:
    """Which axis is contiguous in the destination, where that is another than the source's; None where none is."""
    if len(axes) < 2 or axes[-1][1] != 1 or axes[-1][2] == 1:
        return None
    for i, (n, a, b) in enumerate(axes[:-1]):
        if b == 1 and axes[-1][2] >= n and a >= axes[-1][0]:
            return i
    return None


def _view(tensor: torch.Tensor, axes: Axes, which: int) -> torch.Tensor:
    return tensor.as_strided(
        [axis[0] for axis in axes], [axis[which] for axis in axes], tensor.storage_offset()
    )


def offsets(axes: Axes) -> list[tuple[int, int]]:
    found = [(0, 0)]
    for n, a, b in axes:
        found = [(at + i * a, to + i * b) for at, to in found for i in range(n)]
    return found
