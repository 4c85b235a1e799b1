"""Factors of an adapter in memory: read by their rows into one form, an axis a dim.

A `Block` is B @ A of some projections of all experts of one role: `a` [e, r, i], `b` [e, p, o, r] (`out`: [e, o, r]).
Everything is moved, bits and all. Rejected (`AdapterError`) are values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from restow.adapter_config import Number
from restow.adapter_formats import CANON
from restow.adapter_pair import Factor, Pair
from restow.boxes import whole
from restow.errors import AdapterError, show
from restow.layout import axis_size, shape_of
from restow.moves import Frozen, Side, freeze, moves
from restow.notation import Row
from restow.proof import Move
from restow.targets import Runs
from restow.torch.dtypes import whole_numbers
from restow.torch.strides import real_places
from restow.torch.tiles import move

Get = Callable[[str], torch.Tensor]
Take = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Block:
    """B @ A of one role, or of some of its projections, times alpha / rank. `experts`: those that are there."""

    path: str
    role: str
    labels: tuple[int, ...]
    rank: int
    alpha: Number
    experts: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis, of both factors."""
        i, o = ("d", "f") if self.role == "in" else ("f", "d")
        p = {"p": self.b.shape[1]} if self.role == "in" else {}
        return {"e": self.a.shape[0], "r": self.rank, i: self.a.shape[2], o: self.b.shape[-2], **p}


def relay(
    source: Row, sizes: Mapping[str, int], tensors: Sequence[torch.Tensor | None],
    target: Row, target_sizes: Mapping[str, int], into: Sequence[torch.Tensor], *,
    take: Take = (), runs: Runs | None = None,
) -> None:  # fmt: skip
    """Fill the tensors `into` of one row from the tensors of another, by proved moves.

    `take` maps an axis to the source's index for each index there; `runs`, per dim, are the part of the target's only
    tensor that `into` holds.
    """
    held = runs if runs is not None else whole(shape_of(target, target_sizes))
    for m in _moves(source, freeze(sizes), len(tensors), target, freeze(target_sizes), len(into), take, held):
        tensor, to = tensors[m.source], into[m.target]
        assert tensor is not None
        offset, strides = real_places(tensor, m.at, m.pattern.source)
        start = sum(i * s for i, s in zip(m.start, to.stride(), strict=True))
        steps = tuple(step * to.stride(dim) for dim, step in m.pattern.target)
        move(
            to.as_strided(m.pattern.sizes, steps, to.storage_offset() + start),
            tensor.as_strided(m.pattern.sizes, strides, offset),
        )


@lru_cache(maxsize=256)
def _moves(
    source: Row,
    sizes: Frozen,
    count: int,
    target: Row,
    target_sizes: Frozen,
    into: int,
    take: Take,
    held: Runs,
) -> tuple[Move, ...]:
    full = (whole(shape_of(source, dict(sizes))),)
    return moves(Side(source, sizes, (full,) * count), Side(target, target_sizes, ((held,),) * into), take)


def read_block(pair: Pair, get: Get) -> Block:
    """A pair's tensors as a block. Raises `AdapterError` for values that are not finite."""
    a, b = (_canonical(pair, f, CANON[f"{pair.role}.{x}"], get) for x, f in (("A", pair.a), ("B", pair.b)))
    return Block(pair.path, pair.role, pair.labels, pair.rank, pair.alpha, pair.experts, a, b)


def _canonical(pair: Pair, factor: Factor, row: Row, get: Get) -> torch.Tensor:
    tensors = [None if name is None else get(name) for name in factor.names]
    dtype = common_dtype(tensors)
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    count = pair.sizes["e"]
    sizes = {**factor.sizes, "e": count, "p": factor.sizes["p"]}
    take: Take = ()
    if "e" in factor.row.name_axes and len(pair.experts) < count:
        sizes["e"] = len(pair.experts)
        take = (("e", pair.experts),)
    elif axis_size(factor.row, "e", factor.sizes) != count:
        take = (("e", (0,) * count),)
    out = torch.empty(shape_of(row, sizes), dtype=dtype)
    source = {**factor.sizes, "e": count} if "e" in factor.row.name_axes else factor.sizes
    relay(factor.row, source, tensors, row, sizes, [out], take=take)
    if not bool(torch.isfinite(out.sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32))):
        _check_finite(
            factor.names, tensors
        )  # one pass over all, and a second only where a sum can have run over
    if sizes["e"] == count:
        return out
    full = torch.zeros((count, *out.shape[1:]), dtype=dtype)
    full[list(pair.experts)] = out
    return full


def _check_finite(names: Sequence[str | None], tensors: Sequence[torch.Tensor | None]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                "finite values", f"NaN or infinity in {show(name)}", tensor=name,
                hint="this adapter's training went wrong, or its file is damaged",
            )  # fmt: skip


def common_dtype(tensors: Sequence[torch.Tensor | None]) -> torch.dtype:
    """The dtype that holds the values of all."""
    found = [t.dtype for t in tensors if t is not None]
    dtype = found[0]
    for other in set(found):
        dtype = torch.promote_types(dtype, other)
    return dtype


def bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal to the bit: -0.0 is not 0.0."""
    alike = one.dtype == two.dtype and one.shape == two.shape
    return alike and torch.equal(whole_numbers(one), whole_numbers(two))
