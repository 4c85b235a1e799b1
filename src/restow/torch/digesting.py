"""Every digest of a conversion, and what its values show, made from the chunks that are written, by a thread of its own.

While one thread writes a chunk another hashes it: per tensor in its own order, per leaf, and per file if that
is asked for. It rejects what `digests` rejects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import xxhash

from restow.outfiles import OutFile, nbytes
from restow.prepare import Prepared
from restow.problems import Problem
from restow.torch.chunks import Filled
from restow.torch.digests import Known, Leaves
from restow.torch.raw import raw
from restow.torch.values import Tie, Values, no_values, source_names


class Digests:
    """The digests of a destination while it is filled: each tensor in order, with `sha256` each file too."""

    def __init__(
        self, prepared: Prepared, files: Sequence[OutFile], *, sha256: bool, known: Known | None
    ) -> None:
        self.tensors: dict[str, str] = {}
        self.places = {t.name: (file.name, t.begin) for file in files for t in file.tensors}
        self.leaves = Leaves(prepared.modules, prepared.owners, prepared.source.family, known)
        self._named = source_names(prepared)
        self._values = Values({}, self._named)
        self._tie = Tie(prepared.source)
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._files = {file.name: hashlib.sha256(file.head) for file in files} if sha256 else {}
        self._leaf_bytes: dict[str, tuple[str, int]] = {}
        for file in files:
            for tensor in file.tensors:
                if tensor.end == tensor.begin:
                    self.tensors[tensor.name] = xxhash.xxh3_128().hexdigest()

    def look(self, filled: Sequence[Filled]) -> None:
        """Digest a chunk now."""
        self._look(filled)
        if self._files:
            self._sum(filled)

    @contextmanager
    def beside(self, filled: Sequence[Filled]) -> Iterator[None]:
        """Digest a chunk while the block runs; both have ended after it."""
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._look, filled)]
            if self._files:
                jobs.append(pool.submit(self._sum, filled))
            yield
            for job in jobs:
                job.result()

    def _sum(self, filled: Sequence[Filled]) -> None:
        for one in filled:
            self._files[self.places[one.slice.target.name][0]].update(raw(one.tensor))

    def _look(self, filled: Sequence[Filled]) -> None:
        torch.set_num_threads(1)
        for one in filled:
            target = one.slice.target
            running = self._hashes.pop(target.name, None) or xxhash.xxh3_128()
            running.update(data := raw(one.tensor))
            digest = None
            if one.slice.offset + len(data) == nbytes(target.dtype, target.shape):
                digest = self.tensors[target.name] = running.hexdigest()
            else:
                self._hashes[target.name] = running
            self.leaves.look(one, digest if one.slice.offset == 0 else None)
            self._values.look(one)
            self._tie.look(one)

    def sums(self) -> dict[str, str]:
        """sha256 by file."""
        return {name: digest.hexdigest() for name, digest in self._files.items()}

    def problems(self) -> tuple[Problem, ...]:
        """What the values show, when all of them have passed."""
        empty = self.leaves.empty()
        names = {self._named(name, index): "only zeros" for name, index in empty}
        return (*self._values.problems(), *self._tie.problems(), *((no_values(names),) if names else ()))
