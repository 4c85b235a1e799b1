"""`restow.fingerprint`: one number a leaf, the same in every layout, and parts add up.

For a leaf W of R rows and C columns (an expert's matrix in the order of `split`; any other tensor with its last dim as
columns), with w(r, c) the bits of an element as an unsigned number:

    D = sum of w(r, c) * a(r) * b(c)  mod 2**64,   a(r) = mix(2 r) | 1,   b(c) = mix(2 c + 1) | 1

where `mix` is SplitMix64 (Steele, Lea, Flood 2014). Odd factors make any single changed element change D for certain;
exchanged rows, columns, elements, experts or projections meet other factors. Since D is a sum, the numbers of disjoint
parts add up modulo 2**64. It guards against accidents, not against an attacker. It rejects what `storage` rejects.

The sum over the contiguous axis is a matrix product in float64 that is exact: elements go as 16-bit halves against the
16-bit limbs of the factors, and 2**21 such products fit 53 bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType

import torch

from restow.checkpoint import Checkpoint
from restow.family import Family
from restow.find import Module, candidates_of, find_modules
from restow.landing import Wish, layout_of
from restow.layout import Layout
from restow.opening import family_of, open_checkpoint
from restow.planning import Prepared, raise_fatal
from restow.problems import merged
from restow.targets import Runs, whole_target
from restow.torch.chunks import CHUNK, fill, grouped, room, slices
from restow.torch.leafviews import Owner, leaf_views, owners_of
from restow.torch.storage import Into, slots_of

MASK = (1 << 64) - 1
BLOCK = 1 << 19  # elements that are turned into float64 at once
TERMS = 1 << 20  # products of one exact sum


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
    if isinstance(source, str | os.PathLike | Checkpoint):
        opened = source if isinstance(source, Checkpoint) else open_checkpoint(source, family=known, layout=layout)
        parts = _of_checkpoint(opened, threads)
    else:
        parts = _of_state(source, known, layout)
    for key, number in parts:
        found[key] = (found.get(key, 0) + number) & MASK
    return MappingProxyType(found)


def _of_state(state: Into, family: Family | None, layout: str | Layout | None) -> Iterator[tuple[str, int]]:
    slots = slots_of(state).slots
    shapes = {name: slot.target.shape for name, slot in slots.items()}
    sizes = {"p": len(family.labels) if family else 2}
    candidates = candidates_of(family, layout_of(layout, family))
    found = find_modules(shapes, candidates, sizes, claimed=lambda name: True, what="the state")
    if found.errors:
        raise merged(found.errors)
    owners = owners_of(found.modules)
    for name, slot in slots.items():
        owner = owners.get(name)
        module = found.modules[owner[0]] if owner else None
        yield from _of_tensor(name, owner, module, slot.target.shape, slot.target.runs, slot.local, family)


def _of_checkpoint(opened: Checkpoint, threads: int | None) -> Iterator[tuple[str, int]]:
    raise_fatal(opened)
    owners = owners_of(opened.modules)
    targets = {n: whole_target(n, e.shape, e.dtype) for n, e in opened.tensors.items() if all(e.shape)}
    own = Prepared(opened, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    parts = (part for target in targets.values() for part in slices(target, CHUNK))
    for group in grouped(parts, CHUNK):
        need = sum(room(part.target) for part in group)
        buffer = buffer if buffer.numel() >= need else torch.empty(need, dtype=torch.uint8)
        filled, _ = fill(own, group, buffer, threads=threads)
        for one in filled:
            target = one.slice.target
            owner = owners.get(target.name)
            module = opened.modules[owner[0]] if owner else None
            yield from _of_tensor(
                target.name, owner, module, target.shape, target.runs, one.tensor, opened.family
            )


def _of_tensor(
    name: str,
    owner: Owner | None,
    module: Module | None,
    shape: tuple[int, ...],
    runs: Runs,
    local: torch.Tensor,
    family: Family | None,
) -> Iterator[tuple[str, int]]:
    if not local.numel():
        return
    if owner is None or module is None:
        key = family.canonical(name) if family is not None else name
        yield key, plain_sum(shape, runs, local)
        return
    for view in leaf_views(owner, module, runs, local, family):
        rows, cols = (torch.arange(start, start + count) for start, count in (view.rows, view.cols))
        yield view.key, bilinear(view.matrix, rows, cols)


def plain_sum(shape: tuple[int, ...], runs: Runs, local: torch.Tensor) -> int:
    """A tensor outside the experts: rows are all dims but the last, flattened as in the whole tensor."""
    if not shape:
        return bilinear(local.reshape(1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    index = [torch.cat([torch.arange(a, a + n) for a, n in dim]) for dim in runs]
    rows = torch.zeros(1, dtype=torch.int64)
    for i, dim in enumerate(index[:-1]):
        rows = (rows[:, None] + dim * prod(shape[i + 1 : -1])).reshape(-1)
    return bilinear(local.reshape(-1, local.shape[-1]), rows, index[-1])


def bilinear(matrix: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> int:
    """The sum of this module's text over a [rows, cols] matrix of any strides; `rows`, `cols` are places in the leaf."""
    left, right = (_factors(index, odd) for index, odd in ((rows, 0), (cols, 1)))
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:
        matrix, left, right = matrix.t(), right, left
    width = matrix.element_size()
    if matrix.stride(-1) != 1 or (width > 1 and matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]):
        matrix = matrix.contiguous()
    halves = max(1, width // 2)
    bits = matrix.view(torch.uint8 if width == 1 else torch.uint16)
    step = max(1, min(TERMS, BLOCK) // halves)
    total = 0
    for first in range(0, matrix.shape[1], step):
        count = min(step, matrix.shape[1] - first)
        limbs = _limbs(right[first : first + count], halves).to(matrix.device)
        part = bits[:, first * halves : (first + count) * halves]
        deep = max(1, BLOCK // part.shape[1])
        for top in range(0, part.shape[0], deep):
            sums = (part[top : top + deep].to(torch.float64) @ limbs).to(torch.int64).cpu()
            line = sums[:, 0] + (sums[:, 1] << 16) + (sums[:, 2] << 32) + (sums[:, 3] << 48)
            total += int((line * left[top : top + deep]).sum())
    return total & MASK


def _limbs(factors: torch.Tensor, halves: int) -> torch.Tensor:
    """[count * halves, 4] of 16-bit limbs, low first; a later half of an element weighs 2**16 more."""
    weighed = torch.stack([factors << (16 * half) for half in range(halves)], dim=1).reshape(-1)
    return torch.stack([(weighed >> (16 * limb)) & 0xFFFF for limb in range(4)], dim=1).to(torch.float64)


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
