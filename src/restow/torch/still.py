"""Whether a state stayed as it was while it was copied or written, by the counts that torch keeps of writes in place.

Rejects a state of which a tensor was written to meanwhile: what was saved would be of two steps. Writes through `.data`,
and those of kernels that torch does not know, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from restow.errors import IntegrityError, show
from restow.wording import many


def versions(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The count of every tensor that has one; those made in inference mode have none."""
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def check_still(tensors: Mapping[str, torch.Tensor], before: Mapping[str, int]) -> None:
    """Raise `IntegrityError` for tensors whose count is not that of `before`."""
    now = versions(tensors)
    changed = [name for name, count in before.items() if now[name] != count]
    if changed:
        raise IntegrityError(
            "a state that nobody writes to while it is saved",
            f"{many(len(changed), 'tensor')} written to meanwhile",
            tensor=changed[0],
            sections=[("tensors", map(show, changed))],
            hint="save between two steps; with wait=False the next one may begin once save has returned",
        )
