"""Which tensors several ranks fill alike, and who reads each: figures that every rank computes alike.

Two ranks hold replicas where name, shape, dtype, held runs, sources and places are the same; what is read with others'
scales, comes from memory or lies on another kind of device than the group talks over has no replicas. It moves no data
and rejects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from restow.plans import Plan

Keys = npt.NDArray[np.int64]


class Held(NamedTuple):
    """What one rank tells: a key for each tensor that it could share, and its bytes."""

    keys: Keys
    sizes: Keys


class Shared(NamedTuple):
    """Tensors that the same ranks hold and one of them reads: `keys` in the order in which they travel."""

    holders: tuple[int, ...]
    reader: int
    keys: tuple[int, ...]


def keys_of(plan: Plan, tensors: Mapping[str, torch.Tensor], kinds: Sequence[str]) -> dict[int, int]:
    """Key -> target of every tensor that may have replicas; `kinds` are the devices that the group talks over."""
    copies: dict[int, list[object]] = {}
    barred = set()
    for copy in plan.copies:
        part = plan.parts[copy.source]
        if not part.file or part.coding >= 0:
            barred.add(copy.target)
        what = (part.file, part.begin, part.dtype, copy.at, copy.start, plan.patterns[copy.pattern])
        copies.setdefault(copy.target, []).append(what)
    found = {}
    for i, read in copies.items():
        target = plan.targets[i]
        if i in barred or tensors[target.name].device.type not in kinds:
            continue
        text = repr((target.name, target.shape, target.dtype, target.runs, read))
        found[int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)] = i
    return found


def told(plan: Plan, tensors: Mapping[str, torch.Tensor], keys: Mapping[int, int]) -> Held:
    sizes = [tensors[plan.targets[i].name].nbytes for i in keys.values()]
    return Held(np.array(list(keys), np.int64), np.array(sizes, np.int64))


def shared(held: Sequence[Held]) -> list[Shared]:
    """What all ranks do together: the largest tensors first, each read by the holder that has read least so far."""
    keys = np.concatenate([one.keys for one in held])
    sizes = np.concatenate([one.sizes for one in held])
    ranks = np.repeat(np.arange(len(held)), [len(one.keys) for one in held])
    order = np.lexsort((ranks, keys))
    keys, sizes, ranks = keys[order], sizes[order], ranks[order]
    first = np.flatnonzero(np.concatenate([[True], np.diff(keys) != 0])) if len(keys) else np.zeros(0, int)
    last = np.concatenate([first[1:], [len(keys)]]) if len(keys) else first
    several = [
        (-int(sizes[a]), int(keys[a]), tuple(map(int, ranks[a:b])))
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
        if b - a > 1
    ]
    load = [0] * len(held)
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for size, key, holders in sorted(several):
        reader = min(holders, key=lambda rank: (load[rank], rank))
        load[reader] -= size
        groups.setdefault((holders, reader), []).append(key)
    return [Shared(*who, tuple(what)) for who, what in sorted(groups.items())]


def own_part(plan: Plan, keys: Mapping[int, int], ours: Sequence[Shared], rank: int) -> Plan:
    """The plan without what other ranks read for this one."""
    theirs = {keys[key] for one in ours if one.reader != rank and rank in one.holders for key in one.keys}
    return replace(plan, copies=tuple(copy for copy in plan.copies if copy.target not in theirs))
