"""Leaves that hold nothing but zeros, found as the slices of their tensors pass by.

A leaf with values shows one at its first element as a rule, so little is read twice. It changes no value and rejects
nothing: what it finds is a `Problem` that is not fatal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from restow.codecs import WEIGHTS
from restow.problems import Problem
from restow.torch.chunks import Filled
from restow.torch.leafviews import LeafView
from restow.torch.transpose import bits
from restow.torch.values import BLOCK, LIMITS, Names, no_values

Array = np.ndarray[Any, Any]


class Zeros:
    """The leaves of experts that hold nothing but zeros, of either sign; `look` is called by one thread."""

    def __init__(self, named: Names) -> None:
        self._named = named
        self._full: set[str] = set()  # keys
        self._empty: dict[str, tuple[str, tuple[int, ...]]] = {}  # key -> tensor, first element

    def look(self, filled: Filled, views: Sequence[LeafView]) -> None:
        """Look at what a slice holds of each leaf: at its first value, and at the others only if that is 0."""
        target = filled.slice.target
        for view in views:
            if view.leaf[0] not in WEIGHTS or view.key in self._full or not view.matrix.numel():
                continue
            if _has_value(bits(view.matrix), signed=target.dtype in LIMITS):
                self._full.add(view.key)
                self._empty.pop(view.key, None)
            elif view.key not in self._empty:
                flat = int(view.matrix.storage_offset() - filled.tensor.storage_offset())
                index = np.unravel_index(flat, filled.tensor.shape)
                starts = (runs[0][0] for runs in target.runs)
                place = tuple(int(i) + start for i, start in zip(index, starts, strict=True))
                self._empty[view.key] = target.name, place

    def problems(self) -> tuple[Problem, ...]:
        """That there are such leaves, if there are."""
        names = {self._named(name, index): "only zeros" for name, index in self._empty.values()}
        return (no_values(names),) if names else ()


def _has_value(elements: Array, *, signed: bool) -> bool:
    """Whether any element has other bits than 0, its sign not counted where it is `signed`."""
    mask = np.array(-1 if not signed else (1 << (8 * elements.itemsize - 1)) - 1).astype(elements.dtype)
    if elements[0, 0] & mask:
        return True
    step = max(1, BLOCK // elements.shape[1])
    return any(bool((elements[i : i + step] & mask).any()) for i in range(0, len(elements), step))
