"""Factors of an adapter in memory: read by their rows into one form, an axis a dim, and put together or taken apart.

A `Block` is B @ A of some projections of all experts of one role: `a` [e, r, i], `b` [e, p, o, r] (`out`: [e, o, r]).
Gate and up that share A are one block; where they do not they are two, and formats with one A hold both side by side
along the rank, B block-diagonal. Which block lies where is a list of places that serves both directions. Everything is
moved, bits and all; only scales that differ are multiplied, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import frexp

import torch

from restow.adapter_config import Number, alpha_of, scale_of
from restow.adapter_formats import CANON
from restow.adapter_pair import Factor, Pair
from restow.boxes import whole
from restow.errors import AdapterError, show
from restow.layout import axis_size, shape_of
from restow.moves import Frozen, Move, Side, freeze, moves
from restow.notation import Row
from restow.targets import Runs
from restow.torch.strides import real_places
from restow.torch.tiles import move

Get = Callable[[str], torch.Tensor]
Take = tuple[tuple[str, tuple[int, ...]], ...]
Place = tuple[tuple[int, ...], int, int]  # projections, first rank column, columns


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
    dtype = _common(tensors)
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


def _common(tensors: Sequence[torch.Tensor | None]) -> torch.dtype:
    found = [t.dtype for t in tensors if t is not None]
    dtype = found[0]
    for other in set(found):
        dtype = torch.promote_types(dtype, other)
    return dtype


def bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal to the bit: -0.0 is not 0.0."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.view(width), two.view(width))


def shared(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of single projections that have one A, put together: the compact form of what was trained on both."""
    ins = [block for block in blocks if block.role == "in"]
    if len(ins) < 2 or any(len(b.labels) != 1 for b in ins):
        return list(blocks)
    first = ins[0]
    alike = all(
        (b.rank, b.alpha, b.experts) == (first.rank, first.alpha, first.experts) and bits_equal(b.a, first.a)
        and b.b.dtype == first.b.dtype for b in ins[1:]
    )  # fmt: skip
    if not alike:
        return list(blocks)
    labels = tuple(label for block in ins for label in block.labels)
    one = replace(first, labels=labels, b=torch.cat([block.b for block in ins], 1))
    return [one, *(block for block in blocks if block.role != "in")]


def places_of(blocks: Sequence[Block]) -> list[Place]:
    """Where each block lies along the rank when they are put side by side."""
    places: list[Place] = []
    at = 0
    for block in blocks:
        places.append((block.labels, at, block.rank))
        at += block.rank
    return places


def views(a: torch.Tensor, b: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of joined factors that one place means."""
    labels, at, count = place
    first, last = labels[0], labels[-1]
    return a.narrow(1, at, count), b.narrow(3, at, count).narrow(1, first, last - first + 1)


def joined(blocks: Sequence[Block], labels: int, rslora: bool) -> tuple[Block, list[tuple[Block, float]]]:
    """The blocks of `in` as one that serves all projections, its A and B the blocks side by side.

    Also the blocks whose scale is another than the first's, and what their B was multiplied by.
    """
    first = blocks[0]
    if len(blocks) == 1 and len(first.labels) == labels:
        return first, []
    places = places_of(blocks)
    rank = sum(block.rank for block in blocks)
    sizes = {**first.sizes, "r": rank, "p": labels}
    a = torch.zeros(shape_of(CANON["in.A"], sizes), dtype=_common([block.a for block in blocks]))
    b = torch.zeros(shape_of(CANON["in.B"], sizes), dtype=_common([block.b for block in blocks]))
    scale = scale_of(first.rank, first.alpha, rslora)
    folded = []
    for block, place in zip(blocks, places, strict=True):
        to_a, to_b = views(a, b, place)
        to_a.copy_(block.a)
        ratio = scale_of(block.rank, block.alpha, rslora) / scale
        to_b.copy_(block.b if ratio == 1 else times(block.b, ratio))
        folded += [(block, ratio)] if ratio != 1 else []
    experts = tuple(sorted({i for block in blocks for i in block.experts}))
    alpha = first.alpha if rank == first.rank else alpha_of(rank, scale, rslora)
    return replace(
        first, labels=tuple(range(labels)), rank=rank, alpha=alpha, experts=experts, a=a, b=b
    ), folded


def times(tensor: torch.Tensor, ratio: float) -> torch.Tensor:
    """`tensor * ratio`, rounded once; exact where the ratio is a power of two."""
    return (tensor.double() * ratio).to(tensor.dtype)


def exact(ratio: float) -> bool:
    """Whether multiplying by it rounds nothing (denormals apart): a power of two."""
    return ratio != 0 and abs(frexp(ratio)[0]) == 0.5


def unfolded(tensor: torch.Tensor, ratio: float, original: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor` before it was multiplied by `ratio`: by a power of two, or as `original` kept it; None where neither can
    say it. An original that does not give `tensor` is another's."""
    if exact(ratio):
        return times(tensor, 1 / ratio)
    if original is None or original.shape != tensor.shape or original.dtype != tensor.dtype:
        return None
    again = times(original, ratio).double()
    near = 4 * torch.finfo(tensor.dtype).eps
    return original if torch.allclose(again, tensor.double(), rtol=near, atol=0.0) else None


def parts(block: Block, known: Sequence[Place] | None) -> list[Place]:
    """The places of a joined block of `in`: those that a stamp knows, if they hold; else what its zeros say.

    Columns whose B is zero for one projection belong to the other; one run of columns each, gate first, is what
    joining makes. Columns that are zero for both say nothing: a fresh adapter stays whole.
    """
    labels = block.labels
    used = (block.b != 0).any(dim=2).any(dim=0)  # [p, r]
    if known is not None and _hold(known, used, block.rank):
        return list(known)
    if len(labels) != 2 or not bool(used.any()):
        return [(labels, 0, block.rank)]
    gate, up = used[0].nonzero().flatten(), used[1].nonzero().flatten()
    if not len(up):
        return [(labels[:1], 0, block.rank)]
    if not len(gate):
        return [(labels[1:], 0, block.rank)]
    low, high = int(gate[-1]) + 1, int(up[0])
    if low > high:
        return [(labels, 0, block.rank)]
    cut = min(max(block.rank // 2, low), high)
    return [(labels[:1], 0, cut), (labels[1:], cut, block.rank - cut)]


def _hold(places: Sequence[Place], used: torch.Tensor, rank: int) -> bool:
    """Whether a stamp's places are those of a block: they fill its rank, and all that lies outside them is zero."""
    if sum(count for *_, count in places) != rank:
        return False
    outside = used.clone()
    for labels, at, count in places:
        for label in labels:
            outside[label, at : at + count] = False
    return not bool(outside.any())


def split(block: Block, places: Sequence[Place], rslora: bool) -> list[Block]:
    """The blocks that lie at these places of a joined one; their scale is its scale."""
    if list(places) == [(block.labels, 0, block.rank)]:
        return [block]
    scale = scale_of(block.rank, block.alpha, rslora)
    found = []
    for place in places:
        a, b = views(block.a, block.b, place)
        alpha = block.alpha if place[2] == block.rank else alpha_of(place[2], scale, rslora)
        found.append(replace(block, labels=place[0], rank=place[2], alpha=alpha, a=a, b=b))
    return found


def resized(block: Block, rank: int, rslora: bool) -> Block:
    """A block at another rank: columns of zeros more, or zero columns less; its scale stays."""
    if rank == block.rank:
        return block
    keep = min(rank, block.rank)
    a = torch.zeros((block.a.shape[0], rank, block.a.shape[2]), dtype=block.a.dtype)
    b = torch.zeros((*block.b.shape[:-1], rank), dtype=block.b.dtype)
    a[:, :keep].copy_(block.a[:, :keep])
    b[..., :keep].copy_(block.b[..., :keep])
    alpha = alpha_of(rank, scale_of(block.rank, block.alpha, rslora), rslora)
    return replace(block, rank=rank, alpha=alpha, a=a, b=b)


def filled_rank(block: Block) -> int:
    """The rank without the last columns in which both factors are zero for every expert."""
    b = block.b.flatten(1, -2)
    used = (block.a != 0).any(2).any(0) | (b != 0).any(1).any(0)
    found = used.nonzero().flatten()
    return int(found[-1]) + 1 if len(found) else block.rank


def there(block: Block) -> tuple[int, ...]:
    """The experts that are in the adapter: those of which anything is not zero, or all if nothing is."""
    used = (block.a != 0).flatten(1).any(1) | (block.b != 0).flatten(1).any(1)
    found = tuple(int(i) for i in used.nonzero().flatten())
    known = tuple(i for i in found if i in set(block.experts))
    return known or block.experts
