"""An arranged experts module in a format's names: its tensors, and what the config must say about them.

`spell` gives names, rows and shapes without data; `make` the tensors; `wanted` ranks and scales by name. Nothing is
rejected: `adapter_arrange` gives only what the format can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig
from restow.adapter_emit import Wanted
from restow.adapter_formats import CANON, Format, faces_of, one_label, rows
from restow.adapter_keys import PREFIX
from restow.adapter_place import parameter_of, place_of
from restow.adapter_read import alias_names
from restow.layout import axis_size, name_of, shape_of
from restow.notation import Row
from restow.torch.adapter_arrange import Arranged
from restow.torch.adapter_factors import Block, Take, relay


@dataclass(frozen=True)
class Spelled:
    """One factor of a block as a format stores it: its row and sizes there, and its tensors' names."""

    block: Block
    factor: str
    row: Row
    sizes: Mapping[str, int]
    names: tuple[str, ...]
    take: Take

    @property
    def dtype(self) -> torch.dtype:
        return (self.block.a if self.factor == "A" else self.block.b).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.row, self.sizes)

    def make(self) -> dict[str, torch.Tensor]:
        """The tensors, each with memory of its own."""
        made = [torch.empty(self.shape, dtype=self.dtype) for _ in self.names]
        tensor = self.block.a if self.factor == "A" else self.block.b
        relay(CANON[f"{self.block.role}.{self.factor}"], self.block.sizes, [tensor], self.row, self.sizes, made,
              take=self.take)  # fmt: skip
        return dict(zip(self.names, made, strict=True))


def spell(module: Arranged, fmt: Format, base: Base) -> list[Spelled]:
    """Every factor of a module in a format."""
    family = base.family
    faces = faces_of(fmt.era, family) if fmt.era else "input"
    found = []
    for depth, block in zip(reversed(range(len(module.blocks))), module.blocks, strict=True):
        table = rows(fmt.kind, family, faces=faces, depth={block.role: depth})
        for factor in ("A", "B"):
            row = table[f"{block.role}.{factor}"]
            if "p" in row.labels:
                row = one_label(row, block.labels[0])
            sizes = dict(block.sizes)
            sizes.setdefault("p", 1)
            take: Take = ()
            experts: Sequence[int] = range(sizes["e"])
            if fmt.kind == "expert" and len(block.experts) < sizes["e"]:
                experts, sizes["e"] = block.experts, len(block.experts)
                take = (("e", block.experts),)
            if fmt.kind == "outer" and (block.role, factor) in (("in", "A"), ("out", "B")):
                sizes["e"], take = 1, (("e", (0,)),)
            axes = [experts if axis == "e" else range(axis_size(row, axis, sizes)) for axis in row.name_axes]
            names = tuple(f"{PREFIX}{module.path}.{name_of(row, i, sizes)}" for i in product(*axes))
            found.append(Spelled(block, factor, row, sizes, names, take))
    return found


def wanted(module: Arranged, source: str, fmt: Format, base: Base, config: AdapterConfig) -> list[Wanted]:
    """What the config must say about a module's blocks; `source` is the module's path there."""
    family = base.family
    _, container = place_of(base, source, fmt)
    found = []
    for block in module.blocks:
        scale = config.scale(block.rank, block.alpha)
        if fmt.kind == "expert":
            row = one_label(rows("expert", family)[f"{block.role}.A"], (block.labels or (0,))[0])
            end = name_of(_after_number(row), (0,) * (len(row.name_axes) - 1), {}).removesuffix(
                ".lora_A.weight"
            )
            names = tuple(f"{module.path}.{e}.{end}" for e in block.experts)
            found.append(Wanted(names, rf"{container}\..*\.{end}", block.rank, scale))
            continue
        name = parameter_of(fmt, base, block.role, block.labels)
        if fmt.kind in ("wrapper", "wrapper3", "apart"):
            found.append(Wanted((f"{module.path}.{name}",), f"{container}.{name}", block.rank, scale))
        else:
            names = tuple(alias_names(module.path, block.role, block.labels or None, base))
            found.append(Wanted(names, f"{container}.{name}", block.rank, scale, True))
    return found


def _after_number(row: Row) -> Row:
    """A row's name after its expert's number."""
    at = next(i for i, part in enumerate(row.name) if not isinstance(part, str) and part.axis == "e")
    rest = row.name[at + 1 :]
    first = rest[0].removeprefix(".") if isinstance(rest[0], str) else rest[0]
    return Row(row.role, (first, *rest[1:]), row.dims, row.exact)
