"""Where a format puts an experts module and what it calls its parameters; and keys that are alike in all formats.

Paths follow the family's containers, keys its places, so that they hold whatever the containers are called. Nothing
here sees a tensor, and nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

from restow.adapter_base import Base
from restow.adapter_formats import Format, leaf, parameter


def module_key(base: Base, path: str) -> str:
    """An experts module's key in a stamp."""
    layer, which = base.family.place(path)
    return f"{layer}|{which}"


def key_of(base: Base, path: str, role: str, labels: Sequence[int]) -> str:
    """A block's key in a stamp."""
    return f"{module_key(base, path)}|{role}|{''.join(map(str, labels))}"


def plain_key(module: str) -> str:
    """An ordinary module's key in a stamp."""
    return f"plain|{module}"


def place_of(base: Base, path: str, fmt: Format) -> tuple[str, str]:
    """(the module's path in a format, its container there)."""
    family = base.family
    layer, (_, which) = family.layer(path), family.place(path)
    own = path[len(layer) :].lstrip(".")
    if fmt.place == "keep" or which < 0:
        return path, own
    line = family.containers[which]
    container = line[0] if fmt.place == "hub" or len(line) == 1 else line[1]
    return f"{layer}.{container}" if layer else container, container


def parameter_of(fmt: Format, base: Base, role: str, labels: Sequence[int]) -> str:
    """The stacked parameter that a block is for: where projections have parameters of their own, the block's."""
    apart = fmt.kind == "apart" and len(base.family.labels) > 1
    return leaf(base.family, role, (*labels, 0)[0]) if apart else parameter(base.family, role)
