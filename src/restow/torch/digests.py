"""Digests of leaves: xxh3-128 of an expert's matrix in the order of the split layout, so equal in every layout.

A leaf is hashed as its tensor passes by, in whole rows from the first to the last; one that does not come in that order
(a transposed leaf larger than a chunk) has no digest. Where the bytes that a leaf was made from are `known` by their
digest, that is its own, and of each slice one leaf is hashed as well, by turns. It rejects a leaf that has another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.errors import IntegrityError, show
from restow.family import Family
from restow.landing import Wish
from restow.module import Module, Owner
from restow.prepare import Prepared
from restow.targets import Target, whole_target
from restow.torch.chunks import Filled, slices, stream
from restow.torch.explain import text_order, why
from restow.torch.leafviews import LeafView, leaf_views, whole_sizes
from restow.torch.leaves import Leaf
from restow.torch.raw import raw
from restow.torch.transpose import LINE, bits, turn
from restow.torch.verify_report import Difference

STRIP = 1 << 18  # bytes that are brought into the order of a leaf at once: they are hashed from the cache

Known = Callable[[Target, Leaf], str | None]


class Leaves:
    """The digests of the leaves of expert tensors that pass by; `look` is called by one thread."""

    def __init__(
        self,
        modules: Mapping[str, Module],
        owners: Mapping[str, Owner],
        family: Family | None,
        known: Known | None = None,
    ) -> None:
        self._modules, self._owners, self._family = modules, owners, family
        self._known, self._turn = known, 0
        self._open: dict[str, tuple[xxhash.xxh3_128, int]] = {}
        self._scratch = np.empty(0, np.uint8)
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
        told: list[tuple[LeafView, str]] = []
        for view in leaf_views(owner, module, target.runs, filled.tensor, self._family):
            sizes = whole_sizes(module, view)
            self.places[view.key] = (owner[0], view.leaf)
            if view.key not in self._firsts and view.leaf[0] in ("in", "out"):
                flat = int(view.matrix.storage_offset() - filled.tensor.storage_offset())
                index = np.unravel_index(flat, filled.tensor.shape)
                starts = (runs[0][0] for runs in target.runs)
                place = tuple(int(i) + start for i, start in zip(index, starts, strict=True))
                self._firsts[view.key] = (target.name, place, prod(sizes) * filled.tensor.element_size())
            if digest is not None and _is_whole(view, filled.tensor):
                self.found[view.key] = digest
            elif (given := self._given(target, view, sizes)) is not None:
                self.found[view.key] = given
                told.append((view, given))
            else:
                self._part(view, *sizes)
        if told:
            self._turn += 1
            self._check(target, *told[self._turn % len(told)])

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
        self._hash(running, view.matrix)
        if done + view.rows[1] == rows:
            self.found[view.key] = running.hexdigest()
        else:
            self._open[view.key] = (running, done + view.rows[1])

    def _given(self, target: Target, view: LeafView, sizes: tuple[int, int]) -> str | None:
        """The digest of the bytes that a whole leaf was made from, where its own would take a transpose."""
        if self._known is None or view.matrix.is_contiguous() or view.matrix.shape != sizes:
            return None
        return self._known(target, view.leaf)

    def _check(self, target: Target, view: LeafView, given: str) -> None:
        digest = xxhash.xxh3_128()
        self._hash(digest, view.matrix)
        if digest.hexdigest() != given:
            raise IntegrityError(
                f"the values that were read for {view.key} in {show(target.name)}",
                "others",
                tensor=target.name,
                sections=[("tensor", [show(target.name)])],
                hint="nothing was published; memory has failed, or this is a defect of restow: please report it",
            )

    def _hash(self, digest: xxhash.xxh3_128, matrix: torch.Tensor) -> None:
        """Take in a matrix row by row."""
        if matrix.is_contiguous():
            digest.update(raw(matrix))
            return
        rows, cols = matrix.shape
        turned = matrix.stride(0) == 1 and matrix.stride(1) >= rows
        elements = bits(matrix)
        cuts = list(strips(rows, cols, elements.itemsize))
        size = max(n for _, n in cuts) * cols * elements.itemsize
        if self._scratch.nbytes < size:
            self._scratch = np.empty(size, np.uint8)
        room = self._scratch[:size].view(elements.dtype)
        for first, n in cuts:
            packed = room[: n * cols].reshape(n, cols)
            if turned:
                turn(packed, elements[first : first + n].T)
            else:
                np.copyto(packed, elements[first : first + n])
            digest.update(packed.data)


def strips(rows: int, cols: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of about `STRIP` bytes each: whole cache lines of a column."""
    line = LINE // itemsize
    step = max(line, STRIP // max(1, cols * itemsize) // line * line)
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _is_whole(view: LeafView, tensor: torch.Tensor) -> bool:
    return view.matrix.numel() == tensor.numel() and view.matrix.is_contiguous()


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
