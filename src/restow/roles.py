"""The roles of expert weights: the axes of a leaf of each, as `split` has them, and the bank of experts it belongs to.

The roles of a second bank are the first one's with its number: `in2`, `out2.bias`. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from restow.named import NAMED

BANKS = ("", "2")  # the numbers of the banks of experts that one module may hold


def in_bank(role: str, bank: str) -> str:
    """A role of the first bank as another bank's: `in2.bias` for `in.bias`."""
    base, dot, rest = role.partition(".")
    return f"{base}{bank}{dot}{rest}"


def bank_of(role: str) -> str:
    """The number of the bank that a role belongs to: '2' for `in2.bias`."""
    base = role.partition(".")[0]
    return next(bank for bank in reversed(BANKS) if base.endswith(bank))


LEAF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        in_bank(row.role, bank): tuple(map(str, row.dims))
        for bank in BANKS
        for row in NAMED["split"].rows
        if row.role == row.base
    }
)
"""By the role of a weight: rows and columns of one matrix of one expert, in the order in which they are counted."""
