"""Digests of leaves: xxh3-128 of an expert's matrix in the order of the split layout, so equal in every layout.

A leaf is hashed as its tensor passes by, in whole rows from the first to the last; one that does not come in that order
(a transposed leaf larger than a chunk) has no digest. Where the bytes that a leaf was made from are `known` by their
digest, that is its own, and of each slice one leaf is hashed as well, by turns. It rejects a leaf that has another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.errors import IntegrityError, show
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


class _Span(NamedTuple):
    """Bytes of a slice that are part of a leaf in order, and the hash that takes them in."""

    begin: int
    end: int
    running: xxhash.xxh3_128


class Leaves:
    """The digests of the leaves of expert tensors that pass by slice by slice, by one thread at a time.

    `begin` tells of a slice, `take` its bytes in order, `end` that these were all.
    """

    def __init__(self, modules: Mapping[str, Module], known: Known | None = None) -> None:
        self._modules, self._known, self._turn = modules, known, 0
        self._open: dict[str, tuple[xxhash.xxh3_128, int]] = {}  # rows that came
        self._spans: deque[_Span] = deque()
        self._ends: list[tuple[str, xxhash.xxh3_128]] = []  # leaves that end with this slice
        self._whole = ""  # the leaf that is all of the tensor
        self._scratch = np.empty(0, np.uint8)
        self.found: dict[str, str] = {}
        self.places: dict[str, tuple[str, Leaf]] = {}  # key -> module path, leaf

    def begin(self, filled: Filled, owner: Owner, views: Sequence[LeafView]) -> None:
        """A slice of an expert tensor, and the leaves in it; what does not lie in order is hashed now."""
        target, tensor = filled.slice.target, filled.tensor
        whole = filled.slice.offset == 0 and tensor.numel() == prod(target.shape)
        pieces = Counter(view.key for view in views)
        told: list[tuple[LeafView, str]] = []
        sizes = whole_sizes(self._modules[owner[0]], views[0]) if views else (0, 0)  # those of all
        for view in views:
            self.places[view.key] = (owner[0], view.leaf)
            if whole and view.matrix.numel() == tensor.numel() and view.matrix.is_contiguous():
                self._whole = view.key
            elif (given := self._given(target, view, sizes)) is not None:
                self.found[view.key] = given
                told.append((view, given))
            else:
                at = view.matrix.storage_offset() - tensor.storage_offset()
                in_order = pieces[view.key] == 1 and view.matrix.is_contiguous()
                self._part(view, *sizes, int(at) * tensor.element_size() if in_order else None)
        self._spans = deque(sorted(self._spans, key=lambda span: span.begin))
        if told:
            self._turn += 1
            self._check(target, *told[self._turn % len(told)])

    def take(self, begin: int, data: memoryview) -> None:
        """The next bytes of the slice, from byte `begin` of it."""
        end = begin + len(data)
        while self._spans and self._spans[0].begin < end:
            span = self._spans[0]
            span.running.update(data[max(0, span.begin - begin) : span.end - begin])
            if span.end > end:
                return
            self._spans.popleft()

    def end(self, digest: str) -> None:
        """The slice has ended; `digest` is that of its tensor, of use where the slice is all of it."""
        if self._whole:
            self.found[self._whole] = digest
        self.found.update((key, running.hexdigest()) for key, running in self._ends)
        self._whole, self._ends = "", []

    def _part(self, view: LeafView, rows: int, cols: int, at: int | None) -> None:
        """Take in some rows of a leaf, now or (where they lie in order, from byte `at`) as they come."""
        running, done = self._open.pop(view.key, (None, 0))
        if view.cols != (0, cols) or view.rows[0] != done:
            self._open[view.key] = (xxhash.xxh3_128(), -1)  # never to be finished
            return
        running = running or xxhash.xxh3_128()
        if at is None:
            self._hash(running, view.matrix)
        else:
            self._spans.append(_Span(at, at + view.matrix.nbytes, running))
        if done + view.rows[1] == rows:
            self._ends.append((view.key, running))
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
    leaves = Leaves(checkpoint.modules)
    names: dict[str, str] = {}
    targets = {n: whole_target(n, checkpoint.tensors[n].shape, checkpoint.tensors[n].dtype) for n in owners}
    own = Prepared(checkpoint, targets, Wish(), {}, {}, {}, {name: name for name in targets})

    def look(filled: Sequence[Filled]) -> None:
        for one in filled:
            known = set(leaves.places)
            target = one.slice.target
            owner = owners[target.name]
            views = leaf_views(
                owner, checkpoint.modules[owner[0]], target.runs, one.tensor, checkpoint.family
            )
            leaves.begin(one, owner, list(views))
            leaves.take(0, raw(one.tensor))
            leaves.end(xxhash.xxh3_128_hexdigest(raw(one.tensor)))
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
