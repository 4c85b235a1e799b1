"""Leaves: one matrix of one expert, wherever its layout keeps it. Which part of a tensor is which leaf; their digests.

It rejects nothing: a tensor that belongs to no experts, or whose dims cannot be cut into leaves, is one part.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from restow.layout import Sizes, axis_size
from restow.notation import Row
from restow.prepare import Prepared
from restow.targets import Target

Leaf = tuple[str, int, int]  # role, expert, projection


def leaves_of(
    prepared: Prepared, target: Target, local: tuple[int, ...]
) -> Iterator[tuple[Leaf | None, tuple[slice, ...] | None]]:
    """(leaf, slices of the held part) for every leaf that lies in it; (None, None) for what is no expert weight."""
    owner = prepared.owners.get(target.name)
    if owner is None:
        yield None, None
        return
    path, role, place = owner
    module = prepared.modules[path]
    row = module.layout.row(role)
    named = name_index(row, place, module.sizes)
    cuts = [_cut(str(dim), row, module.sizes, runs[0], n)
            for dim, runs, n in zip(row.dims, target.runs, local, strict=True)]  # fmt: skip
    if any(cut is None for cut in cuts):
        yield (role, named.get("e", 0), named.get("p", 0)), None
        return
    for choice in product(*(cut for cut in cuts if cut is not None)):
        at = {**named, **{axis: i for marks, _ in choice for axis, i in marks}}
        yield (role, at.get("e", 0), at.get("p", 0)), tuple(part for _, part in choice)


def name_index(row: Row, place: int, sizes: Sizes) -> dict[str, int]:
    """The indices of the name axes of the tensor at `place` in row-major order."""
    found = {}
    for axis in reversed(row.name_axes):
        place, found[axis] = divmod(place, axis_size(row, axis, sizes))
    return found


Marks = tuple[tuple[str, int], ...]


def _cut(
    dim: str, row: Row, sizes: Sizes, run: tuple[int, int], length: int
) -> list[tuple[Marks, slice]] | None:
    """A dim's held run by leaf: one part per index of `e` or `p`; None where a cut is no plain slice."""
    start, _ = run
    words = dim.strip("()").split()
    if not {"e", "p"} & set(words):
        return [((), slice(0, length))]
    size = [axis_size(row, word, sizes) for word in words]
    if len(words) == 1:
        return [(((words[0], start + i),), slice(i, i + 1)) for i in range(length)]
    if len(words) != 2:
        return None
    outer, inner = words
    if inner in ("e", "p"):  # interleaved
        return [(((inner, i),), slice((i - start) % size[1], length, size[1])) for i in range(size[1])]
    parts: list[tuple[Marks, slice]] = []
    for i in range(start // size[1], (start + length - 1) // size[1] + 1):
        low, high = max(start, i * size[1]) - start, min(start + length, (i + 1) * size[1]) - start
        parts.append((((outer, i),), slice(low, high)))
    return parts
