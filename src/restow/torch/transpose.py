"""Exact transposed copies on the CPU: a tile of contiguous rows into a view whose first dim is contiguous.

Bits are moved, never computed on: elements travel as integers of their own width, or as floats that no
arithmetic touches, so NaN payloads, signed zeros and subnormals survive. Three kernels, best first:

- `simd`: fbgemm's SIMD transpose, found by its mangled name in the libraries that torch has loaded. It writes
  the strided destination itself, or through a temporary of `SPAN` bytes where the stride would make the lines
  of one column of tiles share a cache set. The name spells out the types of the arguments: another build of
  torch has either this very signature or no such name.
- `shuffle`: `torch.native_channel_shuffle`: its channels_last path runs the same code into a temporary.
- `plain`: ATen's block transpose into a temporary, then a row copy. Works everywhere and for every width.

A kernel is used only after it moved test patterns exactly and beat `plain` once in this process. Rejected:
tensors off the CPU, elements that are not 1, 2, 4 or 8 bytes wide, tensors of two shapes or dtypes, a source
whose rows are not contiguous. The two tensors must not overlap.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any, Final, Literal

import numpy as np
import torch

from restow.torch.dtypes import INTS

__all__ = ["Entry", "Kernel", "bits", "copy_transposed", "entry_for", "kernel_for", "tile_shape", "turn"]

Name = Literal["simd", "shuffle", "plain"]
Array = np.ndarray[Any, Any]
Entry = Callable[[int, int, int, int, int, int], None]
Kernel = Callable[[Array, Array], None]  # (out [cols, rows], src [rows, cols]), rows of both contiguous

TILE_BYTES: Final = 1 << 20  # half of a common second-level cache
LINE: Final = 64  # bytes of a cache line: fewer rows than that write each destination line more than once
COLUMNS: Final = (
    512  # per direct call beyond a cache: lines that a pass over 16 rows wrote in part are at hand
)
ALIAS: Final = 2048  # row strides of whole multiples of this fall on one or two sets of a first-level cache
SPAN: Final = 1 << 18  # bytes of the temporary that such strides are written through
SHUFFLE_BYTES: Final = 1 << 19  # the shuffle's temporary beside its source: both stay in the second level
PLAIN_ROWS: Final = 128


def copy_transposed(dst: torch.Tensor, src: torch.Tensor, *, kernel: Name | None = None) -> None:
    """`dst.copy_(src)`, fast where `dst` [rows, cols] has strides (1, ld >= rows); other strides work too.

    A leading batch dim, [n, rows, cols] on both sides, is a loop. `kernel` forces one, for tests and benches;
    one that does not apply to the width or to this build of torch gives way to `plain`.
    """
    if dst.device.type != "cpu" or src.device.type != "cpu":
        raise ValueError(f"expected CPU tensors, found {dst.device} and {src.device}")
    if dst.shape != src.shape or src.dim() not in (2, 3) or dst.dtype != src.dtype:
        found = f"{dst.dtype} {tuple(dst.shape)} and {src.dtype} {tuple(src.shape)}"
        raise ValueError(f"expected two tiles of one dtype and shape ([n,] rows, cols), found {found}")
    if src.element_size() not in INTS or not _rows_contiguous(src):
        raise ValueError(f"expected contiguous rows, 1 to 8 bytes wide, found {src.dtype} {src.stride()}")
    width = src.element_size()
    if min(src.shape[-2:]) <= 1 or dst.stride(-2) != 1 or dst.stride(-1) < src.shape[-2]:
        dst.detach().view(INTS[width]).copy_(src.detach().view(INTS[width]))
        return
    move = kernel_for(width) if kernel is None else _named(kernel, width)
    outs, tile = bits(dst).swapaxes(-1, -2), bits(src)
    for out, one in zip(outs, tile, strict=True) if tile.ndim == 3 else ((outs, tile),):
        move(out, one)


def turn(out: Array, src: Array) -> None:
    """`out[:] = src.T` of arrays of whole numbers whose rows are contiguous.

    Arrays, so that a loop over small tiles gives the interpreter lock away only where something is to be moved: every
    view that torch makes does so too, and threads that do this with each other wait more than they work.
    """
    if min(src.shape) <= 1:
        np.copyto(out, src.T)
    else:
        kernel_for(src.itemsize)(out, src)


def bits(tensor: torch.Tensor) -> Array:
    """A CPU tensor's elements as whole numbers of their width, in its own storage."""
    whole: Array = tensor.detach().view(INTS[tensor.element_size()]).numpy()
    return whole


def _rows_contiguous(src: torch.Tensor) -> bool:
    """Whether the elements of each row adjoin and no two rows share any."""
    rows, cols = src.shape[-2:]
    return (cols <= 1 or src.stride(-1) == 1) and (rows <= 1 or src.stride(-2) >= cols)


def tile_shape(itemsize: int, rows: int, cols: int, limit: int = TILE_BYTES) -> tuple[int, int]:
    """The (rows, cols) of the tiles in which to feed a [rows, cols] tensor through `copy_transposed`.

    Whole rows, as many as `limit` bytes hold, spread evenly over the tiles in multiples of a cache line. Rows
    are cut only where not even one line's worth of them fits. A higher limit pays for rows over 4 KiB: a tile
    writes runs of `rows` elements, and runs under 512 bytes are slow.
    """
    line = LINE // itemsize
    fit = limit // max(1, itemsize * cols)
    if fit >= rows:
        return rows, cols
    if fit >= line:
        even = -(-rows // -(-rows // (fit // line * line)))
        return -(-even // line) * line, cols
    tall = min(rows, line)
    return tall, min(cols, limit // (itemsize * tall))


@functools.cache
def kernel_for(width: int) -> Kernel:
    """The kernel for elements of `width` bytes: the first that is exact and faster than `plain` here."""
    for name in ("simd", "shuffle"):
        kernel = _named(name, width)
        usable = kernel is not plain and is_exact(kernel, width)
        if usable and _seconds(kernel, width) < _seconds(plain, width):
            return kernel
    return plain


def is_exact(kernel: Kernel, width: int) -> bool:
    """Whether `kernel` moves tiles of many remainders bit for bit and leaves the memory around them alone."""
    shapes = ((2, 2), (3, 5), (7, 4), (16, 16), (17, 33), (48, 67), (65, 31), (64, COLUMNS + 9))
    for rows, cols in shapes:
        for ld, src in product((rows + 3, ALIAS // width), _tiles(width, rows, cols)):
            found, wanted = (_noise(width, cols * ld + 1)[1:].reshape(cols, ld) for _ in range(2))
            wanted[:, 1 : rows + 1] = src.T
            try:
                kernel(found[:, 1 : rows + 1], src)
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return False
            if not np.array_equal(found, wanted):
                return False
    return True


def _tiles(width: int, rows: int, cols: int) -> tuple[Array, Array]:
    """Two tiles that are not aligned: one in one piece, one whose rows lie apart."""
    return (
        _noise(width, rows * cols + 1)[1:].reshape(rows, cols),
        _noise(width, rows * (cols + 5)).reshape(rows, cols + 5)[:, 2:-3],
    )


def plain(out: Array, src: Array) -> None:
    """Blocks of rows through a temporary: ATen's transpose needs a contiguous target to be fast."""
    into, tile = torch.from_numpy(out), torch.from_numpy(src)
    for r in range(0, tile.shape[0], PLAIN_ROWS):
        block = tile[r : r + PLAIN_ROWS]
        into[:, r : r + block.shape[0]].copy_(block.t().contiguous())


def shuffle(out: Array, src: Array) -> None:
    """Blocks of rows through `native_channel_shuffle`; 16-bit elements go as pairs, split on the way out."""
    into, tile = torch.from_numpy(out), torch.from_numpy(src)
    width, even = tile.element_size(), tile.shape[1] // 2 * 2
    step = max(1, SHUFFLE_BYTES // (tile.shape[1] * width))
    for r in range(0, tile.shape[0], step):
        block, part = tile[r : r + step], into[:, r : r + step]
        if width != 2:
            part.copy_(_shuffled(block.view(torch.float32) if width == 4 else block).view(tile.dtype))
            continue
        part[even:].copy_(block[:, even:].t())  # the last of an odd number of columns has no partner
        block = block[:, :even]
        if block.storage_offset() % 2 or block.data_ptr() % 4 or not block.is_contiguous():
            block = block.clone(memory_format=torch.contiguous_format)
        pairs = _shuffled(block.view(torch.float32)).view(torch.int32)
        part[0:even:2].copy_(pairs)  # narrowing keeps the low half: the even columns
        part[1:even:2].copy_(pairs.bitwise_right_shift_(16))


def _shuffled(block: torch.Tensor) -> torch.Tensor:
    """Contiguous [n, c] to contiguous [c, n]: one pixel of n * c channels in n groups, channels_last."""
    n, c = block.shape
    pixel = block.reshape(1, 1, 1, n * c).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(pixel, n).permute(0, 2, 3, 1).reshape(c, n)


def _named(name: str, width: int) -> Kernel:
    """The kernel of that name, or `plain` where it does not apply: 8 bytes, another byte order, no symbol."""
    if width == 8 or sys.byteorder != "little" or name == "plain":
        return plain
    return shuffle if name == "shuffle" else _simd(width) or plain


def entry_for(width: int) -> Entry | None:
    """The function below the kernel for elements of `width` bytes, for who counts in addresses; None where it is none:
    (rows, cols, address of src, its elements from row to row, address of out, its elements from row to row)."""
    return _entry(width) if kernel_for(width) is not plain and kernel_for(width) is not shuffle else None


@functools.cache
def _entry(width: int) -> Entry | None:
    """void fbgemm::transpose_simd<T>(int64 M, int64 N, const T* src, int64 ld_src, T* dst, int64 ld_dst)."""
    mangled = f"_ZN6fbgemm14transpose_simdI{ {1: 'h', 2: 't', 4: 'f'}[width] }EEvllPKT_lPS1_l"
    try:  # the extension module's handle also resolves names of the libraries it was linked with
        entry = getattr(ctypes.CDLL(torch._C.__file__), mangled)
    except (OSError, AttributeError, TypeError):
        return None
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    entry.argtypes, entry.restype = (long, long, pointer, long, pointer, long), None
    found: Entry = entry
    return found


@functools.cache
def _simd(width: int) -> Kernel | None:
    entry = _entry(width)
    if entry is None:
        return None

    def simd(out: Array, src: Array) -> None:
        rows, cols = src.shape
        ld, ahead, read, write = (
            out.strides[0] // width, src.strides[0] // width, src.ctypes.data, out.ctypes.data
        )  # fmt: skip
        size = ld * width * cols
        if ld * width % ALIAS or size <= SPAN:
            wide = cols if size <= TILE_BYTES else COLUMNS
            for c in range(0, cols, wide):  # the interpreter lock is free during each call
                entry(rows, min(wide, cols - c), read + c * width, ahead, write + c * ld * width, ld)
            return
        step = min(cols, max(LINE, SPAN // (rows * width)))
        padded = rows + LINE // width  # so that the temporary's own stride does not alias
        span = np.empty((step, padded), src.dtype)
        for c in range(0, cols, step):
            n = min(step, cols - c)
            entry(rows, n, read + c * width, ahead, span.ctypes.data, padded)
            np.copyto(out[c : c + n], span[:n, :rows])  # in no threads of its own, as torch's copy would be

    return simd


def _noise(width: int, count: int) -> Array:
    """Bits that look random and are the same every time; the caller's random state is left alone."""
    noise: Array = np.random.default_rng(count).integers(0, 256, count * width, dtype=np.uint8)
    return noise.view(f"i{width}" if width > 1 else "u1")


def _seconds(kernel: Kernel, width: int) -> float:
    """The best of some runs over a tile just too small for torch to call its other threads in."""
    src = _noise(width, 62 * 528).reshape(62, 528)
    out, best = np.empty((src.shape[1], 96), src.dtype), float("inf")
    for _ in range(7):
        start = time.perf_counter()
        kernel(out[:, :62], src)
        best = min(best, time.perf_counter() - start)
    return best
