"""A tensor's bytes as Python sees them: for reads into them, writes from them, digests of them. CPU, contiguous."""

from __future__ import annotations

import torch


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place. Raises what torch raises for any other tensor."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if tensor.numel() and flat.data_ptr() != tensor.data_ptr():
        raise ValueError("expected a contiguous tensor, found one whose bytes do not lie in order")
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array has a buffer in every Python we support
