"""Scales that a conversion multiplies into B, and takes out again.

A power of two rounds nothing. Where another ratio did, B is kept as it was beside the adapter, by key, so that the way
back is exact; a scale that cannot be taken out exactly stays in, and in the stamp. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import frexp, isclose

import torch

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, alpha_of
from restow.adapter_pair import Pair
from restow.adapter_place import key_of, plain_key
from restow.adapter_read import Plain
from restow.adapter_stamp import Stamp
from restow.torch.adapter_factors import Block, Get, read_block

Original = Callable[[str], "torch.Tensor | None"]


@dataclass(frozen=True)
class Reading:
    """What a conversion reads: an adapter's tensors by name, what they are for, and what conversions before left.

    `original` gives B by key as it was before multiplying rounded it, or None.
    """

    base: Base
    config: AdapterConfig
    stamp: Stamp
    get: Get
    original: Original

    def block(self, pair: Pair) -> Block:
        """A pair's block, at the scale that it had."""
        return self.unfolded(read_block(pair, self.get))

    def unfolded(self, block: Block) -> Block:
        """A block with the scale that it had, where B can be given back exactly."""
        key = key_of(self.base, block.path, block.role, block.labels)
        scale = self.stamp.folded.get(key)
        said = self.config.scale(block.rank, block.alpha)
        if scale is None or said == 0:
            return block
        b = unfolded(block.b, scale / said, self.original(key))
        if b is None:
            return block
        return replace(block, alpha=alpha_of(block.rank, scale, self.config.rslora), b=b)

    def folded(self, block: Block, scale: float) -> tuple[Block, float]:
        """A block whose scale is `scale`: the ratio goes into B. Also the ratio."""
        ratio = ratio_of(self.config.scale(block.rank, block.alpha), scale)
        if ratio == 1:
            return block, ratio
        alpha = alpha_of(block.rank, scale, self.config.rslora)
        return replace(block, alpha=alpha, b=times(block.b, ratio)), ratio

    def plain_b(self, plain: Plain) -> tuple[torch.Tensor, float]:
        """An ordinary module's B, a scale that was multiplied into it taken out, and the scale that is left to say."""
        tensor, key = self.get(plain.names[1]), plain_key(plain.module)
        said, before = self.config.scale(plain.rank, plain.alpha), self.stamp.folded.get(key)
        if before is not None and said != 0:
            back = unfolded(tensor, before / said, self.original(key))
            if back is not None:
                return back, before
        return tensor, said


def ratio_of(scale: float, one: float) -> float:
    """How many times one scale is another: 1 where they differ by less than alpha and rank can say."""
    return 1.0 if isclose(scale, one, rel_tol=1e-12) else scale / one


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
