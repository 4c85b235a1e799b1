"""Blocks of gate and up put side by side along the rank, and taken apart again.

Gate and up that share A are one block; where they do not they are two, and formats with one A hold both side by side
along the rank, B block-diagonal. Which block lies where is a list of places that serves both directions. What a stamp
says of places counts only where it fits the values. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from restow.adapter_config import alpha_of, scale_of
from restow.adapter_formats import CANON
from restow.adapter_stamp import Place
from restow.layout import shape_of
from restow.torch.adapter_factors import Block, bits_equal, common_dtype
from restow.torch.adapter_scale import ratio_of, times


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
    a = torch.zeros(shape_of(CANON["in.A"], sizes), dtype=common_dtype([block.a for block in blocks]))
    b = torch.zeros(shape_of(CANON["in.B"], sizes), dtype=common_dtype([block.b for block in blocks]))
    scales = [scale_of(block.rank, block.alpha, rslora) for block in blocks]
    scale = next((scale for scale in scales if scale), 0.0)  # of 0 nothing else is a multiple
    folded = []
    for block, place, own in zip(blocks, places, scales, strict=True):
        to_a, to_b = views(a, b, place)
        to_a.copy_(block.a)
        ratio = ratio_of(own, scale)
        to_b.copy_(block.b if ratio == 1 else times(block.b, ratio))
        folded += [(block, ratio)] if ratio != 1 else []
    experts = tuple(sorted({i for block in blocks for i in block.experts}))
    same = rank == first.rank and scales[0] == scale
    alpha = first.alpha if same else alpha_of(rank, scale, rslora)
    return replace(
        first, labels=tuple(range(labels)), rank=rank, alpha=alpha, experts=experts, a=a, b=b
    ), folded


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
