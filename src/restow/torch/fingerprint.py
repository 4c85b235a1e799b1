"""`restow.fingerprint`: one number a leaf, the same in every layout, and parts add up.

What the number is and what it guards against, `sums` tells. It rejects what `storage` rejects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch

from restow.checkpoint import Checkpoint
from restow.decoded import decoded
from restow.family import Family
from restow.find import candidates_of, find_modules
from restow.landing import Wish, layout_of
from restow.layout import Layout
from restow.module import Module, Owner, owners_of
from restow.opening import by_config, family_of, open_checkpoint
from restow.prepare import Prepared, raise_fatal
from restow.problems import merged
from restow.targets import Runs, whole_target
from restow.torch.chunks import CHUNK, fill, grouped, room, slices
from restow.torch.leafviews import leaf_views
from restow.torch.storage import Into, slots_of
from restow.torch.sums import MASK, bilinear, plain_sum


def fingerprint(
    source: Into | str | os.PathLike[str] | Checkpoint,
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    threads: int | None = None,
) -> Mapping[str, int]:
    """One number from 0 to 2**64 - 1 for every leaf that is held here, whatever its layout, placement and prefix.

    `source`: a module, a list of them, names to tensors or DTensors (on any device), or a checkpoint's path. Keys are
    `LAYER.experts.E.gate`, `.up`, `.down` for experts (`.bias` and the like after them; `experts.bank2` for a second
    bank), the canonical name for other tensors. For DTensors the number is of the local part: sum over ranks, modulo
    2**64, one rank a replica. Values count in their own dtype. Raises what `restow.open` and `restow.load` raise for
    such a source.
    """
    known = family_of(family)
    found: dict[str, int] = {}
    count = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        if isinstance(source, str | os.PathLike | Checkpoint):
            opened = source
            if not isinstance(opened, Checkpoint):
                opened = open_checkpoint(opened, family=known, layout=layout)
            groups = _of_checkpoint(opened, threads)
        else:
            groups = iter([_of_state(source, known, layout)])
        for jobs in groups:
            queue = _Queue(jobs)
            for key, number in chain.from_iterable(pool.map(_work, [queue] * min(count, len(jobs)))):
                found[key] = (found.get(key, 0) + number) & MASK
    return MappingProxyType(found)


Job = tuple[str, Callable[[], int]]  # a leaf's key, and the sum over a part of it


class _Queue:
    """Jobs that threads take one by one, with no future for each: those cost more than many a job."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs, self._lock = iter(jobs), Lock()

    def take(self) -> Job | None:
        with self._lock:
            return next(self._jobs, None)


def _work(queue: _Queue) -> list[tuple[str, int]]:
    found = []
    while (job := queue.take()) is not None:
        found.append((job[0], job[1]()))
    return found


def _of_state(state: Into, family: Family | None, layout: str | Layout | None) -> list[Job]:
    slots = slots_of(state).slots
    shapes = {name: slot.target.shape for name, slot in slots.items()}
    config = _config(state)
    if family is None and config is not None:
        family, _ = by_config(config, "")
    sizes = {} if family is None or config is None else dict(family.read_sizes(config))
    sizes.setdefault("p", len(family.labels) if family else 2)
    candidates = candidates_of(family, layout_of(layout, family))
    found = find_modules(
        shapes, candidates, sizes, family=family, claimed=lambda name: True, what="the state"
    )
    if found.errors:
        raise merged(found.errors)
    owners = owners_of(found.modules)
    jobs: list[Job] = []
    for name, slot in slots.items():
        owner = owners.get(name)
        module = found.modules[owner[0]] if owner else None
        jobs += _of_tensor(name, owner, module, slot.target.shape, slot.target.runs, slot.local, family)
    return jobs


def _config(state: Into) -> Mapping[str, Any] | None:
    """The config of a model that carries one, as transformers' do."""
    models = [state] if isinstance(state, torch.nn.Module) else [] if isinstance(state, Mapping) else state
    for model in models:
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return dict(config.to_dict())
        if isinstance(config, Mapping):
            return config
    return None


def _of_checkpoint(opened: Checkpoint, threads: int | None) -> Iterator[list[Job]]:
    """The jobs of each chunk; they must be done before the next is asked for."""
    raise_fatal(opened)
    opened = decoded(opened)
    owners = owners_of(opened.modules)
    targets = {n: whole_target(n, e.shape, e.dtype) for n, e in opened.tensors.items() if all(e.shape)}
    own = Prepared(opened, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    parts = (part for target in targets.values() for part in slices(target, CHUNK))
    for group in grouped(parts, CHUNK):
        need = sum(room(part.target) for part in group)
        buffer = buffer if buffer.numel() >= need else torch.empty(need, dtype=torch.uint8)
        filled, _ = fill(own, group, buffer, threads=threads)
        jobs: list[Job] = []
        for one in filled:
            target = one.slice.target
            owner = owners.get(target.name)
            module = opened.modules[owner[0]] if owner else None
            shape, runs = target.shape, target.runs
            jobs += _of_tensor(target.name, owner, module, shape, runs, one.tensor, opened.family)
        yield jobs


def _of_tensor(
    name: str,
    owner: Owner | None,
    module: Module | None,
    shape: tuple[int, ...],
    runs: Runs,
    local: torch.Tensor,
    family: Family | None,
) -> Iterator[Job]:
    if not local.numel():
        return
    if owner is None or module is None:
        key = family.canonical(name) if family is not None else name
        yield key, partial(plain_sum, shape, runs, local)
        return
    for view in leaf_views(owner, module, runs, local, family):
        rows, cols = (range(start, start + count) for start, count in (view.rows, view.cols))
        yield view.key, partial(bilinear, view.matrix, rows, cols)
