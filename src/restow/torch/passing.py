"""Digests of leaves from the bytes of the source, where those lie in a leaf's order, while readers have them in the cache.

A conversion that transposes reads each matrix in the very order in which its leaf is counted; out of what is written
that order would have to be made again. So a reader tells every tile that lies in its file in one piece before it is
moved. A leaf whose bytes came from its first to its last has a digest; any other (cast or decoded on the way, read by
several threads, cut into pieces) has none, and is hashed out of what is written. It rejects nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from sys import maxsize
from threading import Lock
from typing import NamedTuple

import torch
import xxhash

from restow.boxes import whole
from restow.landing import chosen_experts
from restow.module import Owner, owners_of
from restow.plans import Part
from restow.prepare import Prepared
from restow.targets import Target
from restow.torch.dtypes import torch_dtype
from restow.torch.leafviews import inner_axes, leaf_views, whole_sizes
from restow.torch.leaves import Leaf, name_index

Place = tuple[str, Leaf]  # module path, leaf


class _Span(NamedTuple):
    """The bytes of a source tensor, from its first, that are one leaf in order."""

    begin: int
    end: int
    place: Place


@dataclass
class _Running:
    digest: xxhash.xxh3_128
    done: int  # the byte of the tensor that comes next


class Passing:
    """What passes by on its way from a source to its targets; `look` is called by any number of threads."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        source = prepared.source
        wanted: dict[tuple[str, str], set[str]] = {}
        for name, (path, role, _) in prepared.owners.items():
            if name in prepared.targets and path in prepared.pairs:
                wanted.setdefault((prepared.pairs[path], role), set()).add(prepared.targets[name].dtype)
        self._owners = {
            name: owner
            for name, owner in owners_of(source.modules).items()
            if source.tensors[name].dtype in wanted.get(owner[:2], ())
            and len(source.tensors[name].pieces) == 1
        }
        self._spans: dict[str, list[_Span]] = {}
        self._alike: dict[tuple[str, str, tuple[int, ...], str], list[_Span]] = {}  # of a role's first tensor
        self._running: dict[Place, _Running] = {}
        self._found: dict[Place, tuple[str, str]] = {}  # digest, dtype
        self._lock = Lock()

    def look(self, part: Part, begin: int, data: memoryview) -> None:
        """Bytes of a source tensor as they lie in its file, from byte `begin` of the tensor."""
        spans = self._spans_of(part.name)
        end = begin + len(data)
        for i in range(max(0, bisect_right(spans, (begin, maxsize)) - 1), len(spans)):
            span = spans[i]
            if span.begin >= end:
                return
            low, high = max(begin, span.begin), min(end, span.end)
            if low < high:
                self._hash(span, low, data[low - begin : high - begin], part.dtype)

    def digest(self, target: Target, leaf: Leaf) -> str | None:
        """The digest of a target's leaf, if all of it passed in order and in the target's dtype."""
        path, role, _ = self._prepared.owners[target.name]
        there = self._prepared.pairs.get(path)
        if there is None:
            return None
        source = self._prepared.source.modules[there]
        chosen = chosen_experts(self._prepared.wish.experts, there, source.sizes.get("e", 0))
        e = chosen[leaf[1]] if chosen is not None else leaf[1]
        digest, dtype = self._found.get((there, (role, e, leaf[2])), (None, ""))
        return digest if dtype == target.dtype else None

    def _hash(self, span: _Span, begin: int, data: memoryview, dtype: str) -> None:
        if (begin, begin + len(data)) == span[:2]:
            self._found[span.place] = xxhash.xxh3_128_hexdigest(data), dtype
            return
        with self._lock:
            running = self._running.pop(span.place, None)
        if begin == span.begin:
            running = _Running(xxhash.xxh3_128(), begin)
        if running is None or running.done != begin:
            return  # another thread has what lies before: this leaf is never finished
        running.digest.update(data)
        running.done += len(data)
        if running.done == span.end:
            self._found[span.place] = running.digest.hexdigest(), dtype
            return
        with self._lock:
            self._running[span.place] = running

    def _spans_of(self, name: str) -> list[_Span]:
        """The leaves that lie in a tensor in one piece and in order; two threads may find the same twice."""
        if name not in self._spans:
            self._spans[name] = sorted(self._find(name))
        return self._spans[name]

    def _find(self, name: str) -> list[_Span]:
        owner = self._owners.get(name)
        if owner is None:
            return []
        path, role, place = owner
        module, entry = self._prepared.source.modules[path], self._prepared.source.tensors[name]
        key = path, role, entry.shape, entry.dtype
        if key not in self._alike:
            self._alike[key] = list(self._spans_like(owner, entry.shape, entry.dtype))
        # Tensors of a role are cut alike: which expert and projection each is says its name alone. Hundreds are met
        # while other threads wait for the interpreter, so views are made of the first alone.
        at = name_index(module.layout.row(role), place, module.sizes)
        return [
            _Span(begin, end, (path, (role, at.get("e", e), at.get("p", p))))
            for begin, end, (_, (_, e, p)) in self._alike[key]
        ]

    def _spans_like(self, owner: Owner, shape: tuple[int, ...], dtype: str) -> Iterator[_Span]:
        source = self._prepared.source
        module = source.modules[owner[0]]
        row = module.layout.row(owner[1])
        if len(inner_axes(row, row.axes)) > 2:
            return  # several matrices an expert
        like = torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for view in leaf_views(owner, module, whole(shape), like, source.family):
            if view.matrix.is_contiguous() and view.matrix.shape == whole_sizes(module, view):
                begin = int(view.matrix.storage_offset()) * like.element_size()
                yield _Span(begin, begin + view.matrix.nbytes, (owner[0], view.leaf))
