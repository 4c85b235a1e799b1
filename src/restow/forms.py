"""A named layout in the form that a family gives it: its order of p and f, its labels, its biases, its banks.

A family changes the names of a named layout and the order inside a group, never its dims. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from restow.layout import Layout
from restow.notation import Dim, Factor, Labels, Number, Part, Row
from restow.roles import bank_of, in_bank


def form_of(
    layout: Layout, order: Sequence[str], labels: Sequence[str], vendor: Layout, biased: bool
) -> Layout:
    """A named layout in a family's `order` of p and f and with its `labels`; bias rows only where it is `biased`.

    The banks of experts past the first, and how they are numbered, are those of the `vendor`'s layout.
    """
    rows = []
    for row in layout.rows:
        if row.role.endswith(".bias") and not biased:
            continue
        dims = tuple(Dim(_ordered(dim, order), dim.divisor) for dim in row.dims)
        rows.append(replace(row, name=tuple(_labelled(part, labels) for part in row.name), dims=dims))
    more = {bank_of(row.role): row for row in vendor.rows if bank_of(row.role)}
    return Layout((*rows, *(_in_bank(row, bank, like) for bank, like in more.items() for row in rows)))


def _in_bank(row: Row, bank: str, like: Row) -> Row:
    """A row for another bank of experts: numbered past the first as `like` is, or below a name of its own."""
    plus = next(part.plus for part in like.name if isinstance(part, Number))
    if "e" in row.name_axes:
        name = tuple(replace(part, plus=plus) if isinstance(part, Number) else part for part in row.name)
    else:
        name = (f"bank{bank}.", *row.name)
    return replace(row, role=in_bank(row.role, bank), name=_joined(name))


def _joined(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts with neighbouring texts made one, as parsing a row makes them."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def _ordered(dim: Dim, order: Sequence[str]) -> tuple[Factor, ...]:
    axes = [factor.axis for factor in dim.factors]
    if sorted(axes) != sorted(order) or len(axes) != 2:
        return dim.factors
    return tuple(sorted(dim.factors, key=lambda factor: order.index(factor.axis)))


def _labelled(part: Part, labels: Sequence[str]) -> Part:
    """`{p:gate|up}` and `{p:1|3}` in a family's own labels: reordered, or one of them where it is not gated."""
    if not isinstance(part, Labels) or part.axis != "p":
        return part
    general = ("gate", "up")
    return Labels("p", tuple(part.labels[general.index(label)] for label in labels))
