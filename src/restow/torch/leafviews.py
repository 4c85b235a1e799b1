"""The leaves that lie in an expert tensor, as views of it in the order of the split layout, and what each is called.

A leaf is one matrix of one expert. Every layout's tensor is cut into the same leaves with the same names, so that
digests and fingerprints of them can be compared. It copies nothing and rejects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from restow.boxes import Run, boxes_of
from restow.family import Family
from restow.layout import axis_size
from restow.module import Module, Owner
from restow.notation import Row
from restow.roles import LEAF, bank_of, in_bank
from restow.targets import Runs
from restow.torch.leaves import name_index

ONE: Run = (0, 1)


class LeafView(NamedTuple):
    """Part of a leaf: its key, role, expert and projection; a [rows, cols] view; which rows and columns those are."""

    key: str
    leaf: tuple[str, int, int]
    matrix: torch.Tensor
    rows: Run
    cols: Run


def leaf_views(
    owner: Owner, module: Module, runs: Runs, local: torch.Tensor, family: Family | None
) -> Iterator[LeafView]:
    """Every leaf of which something is held in `local`, whose dims are the `runs` of the whole tensor."""
    row = module.layout.row(owner[1])
    named = name_index(row, owner[2], module.sizes)
    for box in boxes_of(row, module.sizes, runs):
        at = {axis: (i, 1) for axis, i in named.items()} | dict(zip(box.axes, box.runs, strict=True))
        step = dict(zip(box.axes, (int(n * local.stride(dim)) for dim, n in box.steps), strict=True))
        base = int(local.storage_offset()) + sum(
            int(i * s) for i, s in zip(box.start, local.stride(), strict=True)
        )
        inner = inner_axes(row, at)
        rest, (rows, cols) = inner[:-2], ["", "", *inner][-2:]
        r, c = at.get(rows, ONE), at.get(cols, ONE)
        strides = [step.get(rows, 0), step.get(cols, 0)]
        for e, p, *others in product(
            *(range(at.get(axis, ONE)[1]) for axis in ("e", "p")), *(range(at[axis][1]) for axis in rest)
        ):
            place = dict(zip(("e", "p", *rest), (e, p, *others), strict=True))
            offset = base + sum(i * step.get(axis, 0) for axis, i in place.items())
            view = local.as_strided((r[1], c[1]), strides, offset)
            index = {axis: at.get(axis, ONE)[0] + i for axis, i in place.items()}
            leaf = (owner[1], index["e"], index["p"])
            extra = "".join(f".{index[axis]}" for axis in rest)
            yield LeafView(_key(owner[0], leaf, "p" in at, family) + extra, leaf, view, r, c)


def whole_sizes(module: Module, view: LeafView) -> tuple[int, int]:
    """Rows and columns of the whole leaf that a view is part of."""
    row = module.layout.row(view.leaf[0])
    rows, cols = ["", "", *inner_axes(row, row.axes)][-2:]
    return _size(module, row, rows), _size(module, row, cols)


def _size(module: Module, row: Row, axis: str) -> int:
    return axis_size(row, axis, module.sizes) if axis else 1


def inner_axes(row: Row, axes: Iterable[str]) -> list[str]:
    """The axes of a leaf, rows then columns, after those that are neither; a derived axis stands where its own does."""
    order = LEAF.get(row.base, ())

    def rank(axis: str) -> int:
        words = axis.split("/")[0].strip("()").split()
        return max((order.index(word) + 1 for word in words if word in order), default=0)

    return sorted((axis for axis in axes if axis not in ("e", "p")), key=rank)


def _key(path: str, leaf: tuple[str, int, int], projected: bool, family: Family | None) -> str:
    layer, number = family.place(path) if family is not None else (path, 0)
    labels = family.labels if family is not None else ("gate", "up")
    role, e, p = leaf
    base, _, rest = role.partition(".")
    bank = bank_of(base)
    word = "down" if base == in_bank("out", bank) else labels[p] if projected else "+".join(labels)
    where = f"{layer}.experts{number if number > 0 else ''}" + (f".bank{bank}" if bank else "")
    return f"{where}.{e}.{word}" + (f".{rest}" if rest else "")
