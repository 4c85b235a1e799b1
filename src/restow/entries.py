"""What a checkpoint says about its tensors, before any of their bytes is read.

An `Entry` is one logical tensor; its bytes lie in one `Piece` or in several (sharded files, DCP folders). Both are
values: no I/O happens here, and nothing is checked that `header` has not checked before.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A box of a tensor and where its bytes lie: `file[begin:end]`, row-major, offsets from the file's start."""

    box: tuple[tuple[int, int], ...]  # (start, length) per dim of the whole tensor
    file: str  # name inside the checkpoint's folder
    begin: int
    end: int


class Entry(NamedTuple):
    """A tensor of a checkpoint: `dtype` as safetensors spells it ("BF16"), global `shape`, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


FLOATS = ("F64", "F32", "F16", "BF16")  # what plain weights are in, and what may be cast

# Bits of one element, by safetensors' names (safetensors 0.8, tensor.rs).
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
