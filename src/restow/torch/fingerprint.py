"""`restow.fingerprint`: one number a leaf, the same in every layout, and parts add up.

A leaf W has R rows and C columns (an expert's matrix in the order of `split`; any other tensor with its last dim as
columns). A row is read as words of 8 bytes, little-endian, the last one filled up with zeros, and

    D = sum of word(r, q) * a(r) * b(q)  mod 2**64,   a(r) = mix(2 r) | 1,   b(q) = mix(2 q + 1) | 1

where `mix` is SplitMix64 (Steele, Lea, Flood 2014). Odd factors can be undone, so any single changed element changes D
for certain; exchanged elements, rows, columns, experts or projections meet other factors or other places of a word.
Since D is linear in the elements, the numbers of disjoint parts add up modulo 2**64, wherever a word is cut. It guards
against accidents, not against an attacker. It rejects what `storage` rejects.

Parts whose columns do not lie in memory one after another are brought into that order block by block. On the CPU the
sums are products of matrices of 64-bit integers, which wrap; elsewhere they are made without such a product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from restow.checkpoint import Checkpoint
from restow.decoded import decoded
from restow.family import Family
from restow.find import Module, candidates_of, find_modules
from restow.landing import Wish, layout_of
from restow.layout import Layout
from restow.opening import by_config, family_of, open_checkpoint
from restow.planning import Prepared, raise_fatal
from restow.problems import merged
from restow.targets import Runs, whole_target
from restow.torch.chunks import CHUNK, fill, grouped, room, slices
from restow.torch.leafviews import Owner, leaf_views, owners_of
from restow.torch.storage import Into, slots_of
from restow.torch.tiles import move

MASK = (1 << 64) - 1
BLOCK = 1 << 20  # bytes that are brought into the order of a leaf at once: they stay in the cache
WORD = 8  # bytes


def fingerprint(
    source: Into | str | os.PathLike[str] | Checkpoint,
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    threads: int | None = None,
) -> Mapping[str, int]:
    """One number from 0 to 2**64 - 1 for every leaf that is held here, whatever its layout, placement and prefix.

    `source`: a module, a list of them, names to tensors or DTensors (on any device), or a checkpoint's path. Keys are
    `LAYER.experts.E.gate`, `.up`, `.down` for experts (`.bias` and the like after them), the canonical name for other
    tensors. For DTensors the number is of the local part: sum over ranks, modulo 2**64, one rank a replica. Values count
    in their own dtype. Raises what `restow.open` and `restow.load` raise for such a source.
    """
    known = family_of(family)
    found: dict[str, int] = {}
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        if isinstance(source, str | os.PathLike | Checkpoint):
            opened = source
            if not isinstance(opened, Checkpoint):
                opened = open_checkpoint(opened, family=known, layout=layout)
            groups = _of_checkpoint(opened, threads)
        else:
            groups = iter([_of_state(source, known, layout)])
        for jobs in groups:
            for key, number in pool.map(_done, jobs):
                found[key] = (found.get(key, 0) + number) & MASK
    return MappingProxyType(found)


Job = tuple[str, Callable[[], int]]  # a leaf's key, and the sum over a part of it


def _done(job: Job) -> tuple[str, int]:
    return job[0], job[1]()


def _of_state(state: Into, family: Family | None, layout: str | Layout | None) -> list[Job]:
    slots = slots_of(state).slots
    shapes = {name: slot.target.shape for name, slot in slots.items()}
    config = _config(state)
    if family is None and config is not None:
        family, _ = by_config(config, "")
    sizes = {} if family is None or config is None else dict(family.read_sizes(config))
    sizes.setdefault("p", len(family.labels) if family else 2)
    candidates = candidates_of(family, layout_of(layout, family))
    found = find_modules(shapes, candidates, sizes, claimed=lambda name: True, what="the state")
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
        rows, cols = (torch.arange(start, start + count) for start, count in (view.rows, view.cols))
        yield view.key, partial(bilinear, view.matrix, rows, cols)


def plain_sum(shape: tuple[int, ...], runs: Runs, local: torch.Tensor) -> int:
    """A tensor outside the experts: rows are all dims but the last, flattened as in the whole tensor."""
    if not shape:
        return bilinear(
            local.reshape(1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        )
    index = [torch.cat([torch.arange(a, a + n) for a, n in dim]) for dim in runs]
    rows = torch.zeros(1, dtype=torch.int64)
    for i, dim in enumerate(index[:-1]):
        rows = (rows[:, None] + dim * prod(shape[i + 1 : -1])).reshape(-1)
    return bilinear(local.reshape(-1, local.shape[-1]), rows, index[-1])


def bilinear(matrix: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> int:
    """The sum of this module's text over a [rows, cols] matrix of any strides; `rows`, `cols` are places in the leaf."""
    left = _factors(rows, 0)
    total = 0
    for first, start, count in _runs(cols):
        per = max(1, WORD // matrix.element_size())
        inner = min(-start % per, count)  # columns before the first whole word
        whole = (count - inner) // per * per
        for begin, n in ((0, inner), (inner + whole, count - inner - whole)):
            if n:
                total += _edge(matrix[:, first + begin : first + begin + n], left, start + begin, per)
        if whole:
            words = _factors(torch.arange((start + inner) // per, (start + inner + whole) // per), 1)
            total += _words(matrix[:, first + inner : first + inner + whole], left, words)
    return total & MASK


def _runs(cols: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Columns as runs of neighbours: (the first's number here, its place in the leaf, how many)."""
    breaks = (torch.diff(cols) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), cols.numel()]
    for a, b in pairwise(starts):
        if b > a:
            yield a, int(cols[a]), b - a


def _words(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> int:
    """Whole words: blocks of rows, or of columns where those lie in memory, as [rows, words] of int64."""
    size, per = matrix.element_size(), matrix.shape[1] // right.numel()
    if matrix.device.type != "cpu":
        deep = max(1, (64 << 20) // (matrix.shape[1] * size))
    elif matrix.stride(1) == 1 and all(
        (int(n) * size) % WORD == 0 for n in (matrix.stride(0), matrix.storage_offset())
    ):
        return _product(matrix.view(torch.int64), left, right)
    elif matrix.stride(0) == 1:
        step = max(1, BLOCK // (matrix.shape[0] * size * per))
        blocks = range(0, right.numel(), step)
        parts = (_packed(matrix[:, per * at : per * (at + step)]) for at in blocks)
        return sum(
            _product(p.view(torch.int64), left, right[at : at + step])
            for at, p in zip(blocks, parts, strict=True)
        )
    else:
        deep = max(1, BLOCK // (matrix.shape[1] * size))
    total = 0
    for top in range(0, matrix.shape[0], deep):
        block = _packed(matrix[top : top + deep])
        total += _product(block.view(torch.int64), left[top : top + deep], right)
    return total


def _packed(part: torch.Tensor) -> torch.Tensor:
    room = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    move(room, part)
    return room


def _product(words: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> int:
    if words.device.type == "cpu":
        line = words.numpy().view(np.uint64) @ right.numpy().view(np.uint64)
        return int(np.dot(line, left.numpy().view(np.uint64)))
    sums = (words * right.to(words.device)).sum(1)  # there is no product of integer matrices there
    return int((sums * left.to(words.device)).sum())


def _edge(matrix: torch.Tensor, left: torch.Tensor, start: int, per: int) -> int:
    """Columns of a word that is not here as a whole: each element at its place in the word."""
    bits = _bits(matrix)
    places = torch.arange(start, start + matrix.shape[1])
    factors = _factors(places // per, 1) << (places % per * (8 * WORD // per))
    sums = (bits * factors.to(bits.device)).sum(1)
    return int((sums * left.to(bits.device)).sum())


def _bits(matrix: torch.Tensor) -> torch.Tensor:
    """The bits of every element as a number that is not below 0 (of 8 bytes: as int64)."""
    size = matrix.element_size()
    if size == WORD:
        return matrix.contiguous().view(torch.int64)
    signed = matrix.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).to(torch.int64)
    return signed & ((1 << (8 * size)) - 1)


def _factors(index: torch.Tensor, odd: int) -> torch.Tensor:
    """mix(2 i + odd) | 1 for every place, as int64 that wraps."""
    if index.numel() and bool((torch.diff(index) == 1).all()):
        return _run_factors(int(index[0]), index.numel(), odd)
    return mix(2 * index + odd) | 1


@lru_cache(maxsize=64)
def _run_factors(start: int, count: int, odd: int) -> torch.Tensor:
    return mix(2 * torch.arange(start, start + count) + odd) | 1


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser of int64 numbers, wrapping."""
    z = x + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch shifts signed numbers with their sign


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
