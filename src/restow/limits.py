"""How large a file's own numbers may be before they are taken for damage; every one can be raised."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a checkpoint may ask of its reader; `Limits(header=...)` raises one."""

    header: int = 100_000_000  # bytes of one header; the format's own limit
    index: int = 512 * 2**20  # bytes of an index
    config: int = 64 * 2**20  # bytes of a config
    depth: int = 64  # nested lists and objects in any JSON
    tensors: int = 5_000_000  # tensors of one file
    name: int = 4096  # bytes of a tensor's name
    rank: int = 16  # dims of a tensor
    empty: int = 1000  # tensors without elements in one file before they are reported


LIMITS = Limits()
