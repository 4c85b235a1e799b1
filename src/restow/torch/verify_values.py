"""Where two tensors differ: bits first, and after a cast values; leaf by leaf where they belong to experts.

What explains a difference without another look at files is said too: equal after rounding. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from restow.boxes import held
from restow.torch.chunks import Filled
from restow.torch.dtypes import torch_dtype, whole_numbers
from restow.torch.leaves import leaves_of
from restow.torch.verify_report import Difference
from restow.torch.verify_sides import Sides


def same(left: torch.Tensor, right: torch.Tensor, cast: bool) -> bool:
    """Whether two tensors are alike; `cast`: in values, since one side was cast."""
    if torch.equal(whole_numbers(left), whole_numbers(right)):
        return True
    return cast and not bool(_unlike(left, right, cast).any())


def _unlike(left: torch.Tensor, right: torch.Tensor, cast: bool) -> torch.Tensor:
    """Where two tensors differ in bits; after a cast, which may renew a NaN's payload, any two NaN are alike."""
    unlike = whole_numbers(left) != whole_numbers(right)
    if cast:
        unlike &= ~(left.isnan() & right.isnan())
    return unlike


def differences_of(sides: Sides, left: Filled, right: Filled) -> Iterator[Difference]:
    """What differs in one slice, leaf by leaf where it belongs to experts."""
    target = right.slice.target
    unlike = _unlike(left.tensor, right.tensor, target.name in sides.cast)
    first = tuple(runs[0][0] for runs in target.runs)
    for leaf, part in leaves_of(sides.prepared, target, held(target.runs)):
        mask = unlike if part is None else unlike[part]
        count = int(mask.sum())
        if not count:
            continue
        one, other = (t if part is None else t[part] for t in (left.tensor, right.tensor))
        flat = int(mask.reshape(-1).to(torch.uint8).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape))
        values = tuple(float(t[at].to(torch.float64)) for t in (one, other))
        cuts = part if part is not None else (slice(None),) * len(at)
        index = tuple(
            (cut.start or 0) + i * (cut.step or 1) + begin
            for i, cut, begin in zip(at, cuts, first, strict=True)
        )
        family = sides.prepared.source.family
        labels = family.labels if family is not None else ("gate", "up")
        why = _rounded(one, other, sides.cast.get(target.name, (target.dtype,)))
        biggest = _apart(one, other)
        yield Difference(
            "values", target.name, leaf, count, mask.numel(), index, values, biggest, why, labels
        )


def _rounded(left: torch.Tensor, right: torch.Tensor, dtypes: Sequence[str]) -> str:
    """Whether the two are equal in a narrower dtype: one of theirs, or bfloat16, which cuts float32 short."""
    if not left.is_floating_point():
        return ""
    for narrow in dict.fromkeys((*dtypes, *(("BF16",) if left.element_size() > 2 else ()))):
        name = torch_dtype(narrow)
        if name.itemsize < left.element_size() and torch.equal(
            whole_numbers(left.to(name)), whole_numbers(right.to(name))
        ):
            return f"equal after rounding to {str(name).removeprefix('torch.')}"
    return ""


def _apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest distance between two elements; infinite where NaN or infinity stands against something else."""
    biggest = 0.0
    step = 1 << 20
    for at in range(0, left.numel(), step):
        one, other = (t.reshape(-1)[at : at + step].to(torch.float64) for t in (left, right))
        apart = (one - other).abs().masked_fill_(whole_numbers(one) == whole_numbers(other), 0.0)
        biggest = max(biggest, float(apart.nan_to_num_(nan=float("inf"), posinf=float("inf")).max()))
    return biggest
