"""What the bits of one element mean: the values of codes of 4 bits, by code, and which half of a byte comes first.

Codes of 8 bits (e4m3, e5m2) are torch's own float types. Reading looks a code up here; writing takes the nearest value
of the same table. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

# Quantiles of a normal distribution, as bitsandbytes publishes them (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (
    0.0,
    0.0625,
    8.0,
    12.0,
    4.0,
    6.0,
    2.0,
    3.0,
)  # bitsandbytes' own order of codes; divided by the largest


class Element(NamedTuple):
    """`values` by code; `high` if the first of two elements lies in the high half of their byte; `even` if a value
    midway between two goes to the even code, else it goes to the lower value."""

    values: tuple[float, ...]
    high: bool = False
    even: bool = False


ELEMENTS: Mapping[str, Element] = MappingProxyType({
    "e2m1": Element((*_E2M1, *(-v for v in _E2M1)), even=True),
    "int4": Element(tuple(float(i - 8) for i in range(16))),
    "nf4": Element(_NF4, high=True),
    "bnb_fp4": Element((*(v / 12 for v in _FP4), *(-v / 12 for v in _FP4)), high=True),
})  # fmt: skip
