"""Bytes on their way to a CUDA device by the driver's own calls, made without giving up the interpreter.

torch gives the interpreter away for calls of a few microseconds, and beside other threads of this process getting it back
takes ten times as long, for every tray that a reader sends (see docs/log.md). The driver's library and the four symbols used
here have been the same since CUDA 4, and are there wherever CUDA is. `driver` rejects what is no CUDA (ROCm), and a library
that lacks one of them: the caller then sends by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

Call = Callable[..., int]


class Driver(NamedTuple):
    """Calls that give back the driver's error, 0 for none. Handles and addresses are integers.

    `copy` takes (to, from, bytes, stream), `record` (event, stream), `query` and `wait` an event. All but `wait`, which sleeps,
    keep the interpreter.
    """

    copy: Call
    record: Call
    query: Call
    wait: Call


@cache
def driver() -> Driver | None:
    """The driver's calls, or None where there are none."""
    if torch.version.cuda is None:
        return None
    try:
        keeps, gives = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
        made = Driver(
            keeps.cuMemcpyHtoDAsync_v2, keeps.cuEventRecord, keeps.cuEventQuery, gives.cuEventSynchronize
        )
    except (OSError, AttributeError):
        return None
    word, size = ctypes.c_void_p, ctypes.c_size_t
    for call, kinds in zip(made, ((word, word, size, word), (word, word), (word,), (word,)), strict=True):
        call.argtypes, call.restype = kinds, ctypes.c_int  # type: ignore[attr-defined]
    return made
