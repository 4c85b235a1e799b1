"""Which native tensors are filled through views: what is known of the memory, so that a record can never be
wrong.

A name alone does not say that a tensor was loaded in place: a save makes the same views, and a caller may
cast them to new memory before it reads into them. So a record keeps which storage the views lie in (weakly:
it keeps no memory alive), and a tensor counts as loaded in place only where the values given back are still
of that storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Lent(NamedTuple):
    """Memory that views were made of: its storage, the experts in it, and whether it is of another namespace
    (MTP).
    """

    storage: StorageWeakRef
    experts: tuple[int, ...]
    other: bool


class Record:
    """The memory behind the native names of one mixin that views were made of since they were last loaded."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._lent: dict[str, list[Lent]] = {name: [] for name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (
            tuple(self._lent),
        )  # a copy of the model has memory of its own: only the names are true of it

    def lend(self, name: str, tensor: torch.Tensor, experts: tuple[int, ...], other: bool) -> None:
        """Note that views of `tensor` were handed out under a native name; what is gone meanwhile is
        forgotten.
        """
        new = Lent(_weak(tensor), experts, other)
        old = [one for one in self._lent.get(name, ()) if one.storage != new.storage]
        gone = [one.storage.expired() for one in old]  # type: ignore[no-untyped-call]
        self._lent[name] = [*(one for one, lost in zip(old, gone, strict=True) if not lost), new]

    def holder(self, name: str, values: Iterable[torch.Tensor]) -> Lent | None:
        """The memory of `name` that all of these values are views of, or None."""
        if not self._lent.get(name):
            return None
        found = {_weak(value) for value in values}
        return next((lent for lent in self._lent[name] if found == {lent.storage}), None)

    def knows(self, name: str) -> bool:
        """Whether views were made under a name: then memory decides; else the name was registered by hand."""
        return name in self._lent

    def done(self, name: str, lent: Lent | None) -> bool:
        """Forget the memory that `name` was loaded through, all of it if None; whether none is left."""
        rest = [one for one in self._lent.pop(name, ()) if lent is not None and one is not lent]
        if rest:
            self._lent[name] = rest
        return not rest

    def empty(self, other: bool) -> list[tuple[str, Lent]]:
        """The names of which this rank holds no expert: nothing is to be loaded, so they are."""
        return [
            (n, one)
            for n, lent in self._lent.items()
            for one in lent
            if not one.experts and one.other == other
        ]


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
