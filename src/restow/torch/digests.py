"""Digests of leaves: xxh3-128 of an expert's matrix in the order of the split layout, so equal in every layout.

A leaf is hashed as its tensor passes by, in whole rows from the first to the last; one that does not come in that order
(a transposed leaf larger than a chunk) has no digest. It rejects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.family import Family
from restow.find import Module
from restow.landing import Wish
from restow.layout import axis_size
from restow.planning import Prepared
from restow.targets import whole_target
from restow.torch.chunks import Filled, raw, slices, stream
from restow.torch.explain import text_order, why
from restow.torch.leafviews import LeafView, Owner, inner_axes, leaf_views
from restow.torch.leaves import Leaf
from restow.torch.tiles import move, strips
from restow.torch.verify_report import Difference

STRIP = 1 << 18  # bytes that are brought into the order of a leaf at once: they are hashed from the cache


class Leaves:
    """The digests of the leaves of expert tensors that pass by; `look` is called by one thread."""

    def __init__(
        self, modules: Mapping[str, Module], owners: Mapping[str, Owner], family: Family | None
    ) -> None:
        self._modules, self._owners, self._family = modules, owners, family
        self._open: dict[str, tuple[xxhash.xxh3_128, int]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.found: dict[str, str] = {}
        self.places: dict[str, tuple[str, Leaf]] = {}  # key -> module path, leaf
        self._firsts: dict[
            str, tuple[str, tuple[int, ...], int]
        ] = {}  # key -> its first element, and its bytes

    def look(self, filled: Filled, digest: str | None = None) -> None:
        """Hash the leaves in a slice; `digest` is that of the whole tensor, where the slice is all of it."""
        target = filled.slice.target
        owner = self._owners.get(target.name)
        if owner is None:
            return
        module = self._modules[owner[0]]
        for view in leaf_views(owner, module, target.runs, filled.tensor, self._family):
            self.places[view.key] = (owner[0], view.leaf)
            if view.key not in self._firsts and view.leaf[0] in ("in", "out"):
                rows, cols = _sizes(module, view)
                flat = int(view.matrix.storage_offset() - filled.tensor.storage_offset())
                index = np.unravel_index(flat, filled.tensor.shape)
                starts = (runs[0][0] for runs in target.runs)
                place = tuple(int(i) + start for i, start in zip(index, starts, strict=True))
                self._firsts[view.key] = (target.name, place, rows * cols * filled.tensor.element_size())
            if digest is not None and _is_whole(view, filled.tensor):
                self.found[view.key] = digest
            else:
                self._part(view, *_sizes(module, view))

    def empty(self) -> list[tuple[str, tuple[int, ...]]]:
        """The leaves that hold only zeros: tensor and first element."""
        zeros: dict[int, str] = {}
        found = []
        for key, (name, place, size) in self._firsts.items():
            if size not in zeros:
                zeros[size] = xxhash.xxh3_128(bytes(size)).hexdigest()
            if self.found.get(key) == zeros[size]:
                found.append((name, place))
        return found

    def _part(self, view: LeafView, rows: int, cols: int) -> None:
        running, done = self._open.pop(view.key, (None, 0))
        if view.cols != (0, cols) or view.rows[0] != done:
            self._open[view.key] = (xxhash.xxh3_128(), -1)  # never to be finished
            return
        running = running or xxhash.xxh3_128()
        for strip in strips(view.matrix, STRIP):
            running.update(raw(self._packed(strip)))
        if done + view.rows[1] == rows:
            self.found[view.key] = running.hexdigest()
        else:
            self._open[view.key] = (running, done + view.rows[1])

    def _packed(self, matrix: torch.Tensor) -> torch.Tensor:
        if matrix.is_contiguous():
            return matrix
        if self._scratch.numel() < matrix.nbytes:
            self._scratch = torch.empty(matrix.nbytes, dtype=torch.uint8)
        packed = self._scratch[: matrix.nbytes].view(matrix.dtype).view(matrix.shape)
        move(packed, matrix)
        return packed


def _is_whole(view: LeafView, tensor: torch.Tensor) -> bool:
    return view.matrix.numel() == tensor.numel() and view.matrix.is_contiguous()


def _sizes(module: Module, view: LeafView) -> tuple[int, int]:
    """Rows and columns of a whole leaf."""
    row = module.layout.row(view.leaf[0])
    axes = inner_axes(row, row.axes)
    rows, cols = (axis_size(row, axis, module.sizes) if axis else 1 for axis in ["", "", *axes][-2:])
    return rows, cols


def leaf_differences(
    checkpoint: Checkpoint, record: Mapping[str, object], wrong: Sequence[str], threads: int | None
) -> list[Difference]:
    """Tensors whose digest is not the recorded one, by the leaves at fault where the manifest has those."""
    recorded = record.get("leaves")
    owners = {
        name: (path, role, place)
        for path, module in checkpoint.modules.items()
        for role, names in module.tensors.items()
        for place, name in enumerate(names)
        if name in set(wrong)
    }
    why_not = "other bytes than its manifest recorded"
    if not isinstance(recorded, dict) or not owners:
        return [Difference("digest", name, why=why_not) for name in wrong]
    leaves = Leaves(checkpoint.modules, owners, checkpoint.family)
    names: dict[str, str] = {}
    targets = {n: whole_target(n, checkpoint.tensors[n].shape, checkpoint.tensors[n].dtype) for n in owners}
    own = Prepared(checkpoint, targets, Wish(), {}, {}, {}, {name: name for name in targets})

    def look(filled: Sequence[Filled]) -> None:
        for one in filled:
            known = set(leaves.places)
            leaves.look(one)
            names.update(dict.fromkeys(leaves.places.keys() - known, one.slice.target.name))

    stream(own, (part for t in targets.values() for part in slices(t, 64 << 20)), look, threads=threads)
    found: list[Difference] = []
    told: set[str] = set()
    labels = checkpoint.family.labels if checkpoint.family is not None else ("gate", "up")
    prefixes = {key.rsplit(".experts", 1)[0] for key in leaves.found}
    theirs = {d: k for k, d in recorded.items() if k.rsplit(".experts", 1)[0] in prefixes}
    where = {key: leaf for key, (_, leaf) in leaves.places.items()}
    for key, digest in leaves.found.items():
        if recorded.get(key) == digest:
            continue
        other = where.get(theirs.get(digest, "")) or _leaf_of(theirs.get(digest, ""), labels)
        places = {digest: other} if other is not None else {}
        text = why(where[key], (digest, ""), places, {}, _order(leaves.found, theirs, where, labels))
        name = names[key]
        told.add(name)
        found.append(
            Difference("digest", name, where[key], why=why_not + (f"; {text}" if text else ""), labels=labels)
        )
    return found + [Difference("digest", name, why=why_not) for name in wrong if name not in told]


def _order(
    found: Mapping[str, str], theirs: Mapping[str, str], where: Mapping[str, Leaf], labels: Sequence[str]
) -> str:
    pairs = {}
    for key, digest in found.items():
        other = _leaf_of(theirs.get(digest, ""), labels)
        if other is not None:
            pairs[where[key][1]] = other[1]
    return text_order(pairs)


def _leaf_of(key: str, labels: Sequence[str]) -> Leaf | None:
    """The leaf that a key names."""
    *_, e, word = key.split(".") if key.count(".") > 1 else ("", "")
    if not e.isdecimal() or word not in (*labels, "down"):
        return None
    return ("out", int(e), 0) if word == "down" else ("in", int(e), labels.index(word))
