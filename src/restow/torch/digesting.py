"""Every digest of a conversion, and what its values show, made from the chunks that are written, by a thread of its own.

While one thread writes a chunk another passes over it once, block by block: what has left the cache costs four times
as much to hash as what is there, so a block is looked at, and hashed for its tensor and for its leaves, before the next
is touched. A sum of each file, if that is asked for, is made by a third. It rejects what `digests` rejects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import xxhash

from restow.outfiles import OutFile, nbytes
from restow.prepare import Prepared
from restow.problems import Problem
from restow.torch.chunks import Filled
from restow.torch.digests import Known, Leaves
from restow.torch.leafviews import LeafView, leaf_views
from restow.torch.raw import raw
from restow.torch.threads import as_before
from restow.torch.values import Tie, Values, source_names
from restow.torch.zeros import Zeros

BLOCK = 1 << 20  # bytes: half of a common second-level cache


class Block(NamedTuple):
    """Some bytes of a filled slice, from byte `begin` of the slice."""

    filled: Filled
    begin: int
    data: memoryview


class Digests:
    """The digests of a destination while it is filled: each tensor in order, with `sha256` each file too."""

    def __init__(
        self, prepared: Prepared, files: Sequence[OutFile], *, sha256: bool, known: Known | None
    ) -> None:
        self.tensors: dict[str, str] = {}
        self.places = {t.name: (file.name, t.begin) for file in files for t in file.tensors}
        self.leaves = Leaves(prepared.modules, known)
        self._prepared = prepared
        self._values = Values({}, source_names(prepared))
        self._zeros = Zeros(source_names(prepared))
        self._tie = Tie(prepared.source)
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._views: list[LeafView] = []  # of the slice that is being looked at
        self._files = {file.name: hashlib.sha256(file.head) for file in files} if sha256 else {}
        for file in files:
            for tensor in file.tensors:
                if tensor.end == tensor.begin:
                    self.tensors[tensor.name] = xxhash.xxh3_128().hexdigest()

    def look(self, filled: Sequence[Filled]) -> None:
        """Digest a chunk now."""
        with as_before():
            self._pass(filled)
            self._sum(filled)

    @contextmanager
    def beside(self, filled: Sequence[Filled]) -> Iterator[None]:
        """Digest a chunk while the block runs; both have ended after it."""
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._pass, filled)]
            if self._files:
                jobs.append(pool.submit(self._sum, filled))
            yield
            for job in jobs:
                job.result()

    def _pass(self, filled: Sequence[Filled]) -> None:
        torch.set_num_threads(1)
        for one in filled:
            data = raw(one.tensor)
            for begin in range(0, len(data), BLOCK):
                self._take(Block(one, begin, data[begin : begin + BLOCK]))

    def _take(self, block: Block) -> None:
        if block.begin == 0:
            self._views = self._views_of(block.filled)
        self._look(block)  # first: a largest value is found as fast as memory comes, a hash waits for it
        self._digest(block)

    def _views_of(self, filled: Filled) -> list[LeafView]:
        """The leaves that a slice holds something of."""
        target = filled.slice.target
        owner = self._prepared.owners.get(target.name)
        if owner is None:
            return []
        module, family = self._prepared.modules[owner[0]], self._prepared.source.family
        return list(leaf_views(owner, module, target.runs, filled.tensor, family))

    def _digest(self, block: Block) -> None:
        part = block.filled.slice
        target = part.target
        owner = self._prepared.owners.get(target.name)
        if block.begin == 0 and owner is not None:
            self.leaves.begin(block.filled, owner, self._views)
        running = self._hashes.pop(target.name, None) or xxhash.xxh3_128()
        running.update(block.data)
        self.leaves.take(block.begin, block.data)
        if part.offset + block.begin + len(block.data) == nbytes(target.dtype, target.shape):
            self.tensors[target.name] = running.hexdigest()
        else:
            self._hashes[target.name] = running
        if block.begin + len(block.data) == block.filled.tensor.nbytes:
            self.leaves.end(self.tensors.get(target.name, ""))

    def _look(self, block: Block) -> None:
        if block.begin == 0:
            self._zeros.look(block.filled, self._views)
        self._values.take(block.filled, block.begin, block.data)
        self._tie.take(block.filled.slice.target.name, block.data)

    def _sum(self, filled: Sequence[Filled]) -> None:
        for one in filled if self._files else ():
            self._files[self.places[one.slice.target.name][0]].update(raw(one.tensor))

    def sums(self) -> dict[str, str]:
        """sha256 by file."""
        return {name: digest.hexdigest() for name, digest in self._files.items()}

    def problems(self) -> tuple[Problem, ...]:
        """What the values show, when all of them have passed."""
        return (*self._values.problems(), *self._tie.problems(), *self._zeros.problems())
