"""An experts module as it was found: what finding gives, and all that comes later asks. It rejects nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from restow.codecs import Codec
from restow.layout import Layout

Shapes = Mapping[str, tuple[int, ...]]  # of stored tensors, by name
Owner = tuple[str, str, int]  # module path, role, place among the role's tensors


@dataclass(frozen=True, slots=True)
class Module:
    """An experts module as it was found.

    `tensors` gives, per role, the full name of each stored tensor in row-major order of the row's name axes; None
    stands for one that is not there (only where the caller admits parts).
    """

    path: str
    layout: Layout
    names: tuple[str, ...]  # what the layout is called here: ("hf", "split")
    sizes: Mapping[str, int]
    tensors: Mapping[str, tuple[str | None, ...]]
    codec: Codec | None = None  # what its weights are coded in


def owners_of(modules: Mapping[str, Module]) -> dict[str, Owner]:
    """Every stored tensor of experts modules: name -> (module path, role, place among the role's tensors)."""
    return {
        name: (path, role, place)
        for path, module in modules.items()
        for role, names in module.tensors.items()
        for place, name in enumerate(names)
        if name is not None
    }
