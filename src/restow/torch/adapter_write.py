"""The blocks of one experts module as a format stores them, and its tensors by name.

`arrange` puts gate and up together or takes them apart as the format asks; `spell` gives names, rows and shapes; `make`
the tensors. It rejects what a format cannot hold: factors that differ between experts where it has one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, alpha_of
from restow.adapter_emit import Wanted
from restow.adapter_formats import CANON, Format, faces_of, leaf, one_label, parameter, rows
from restow.adapter_keys import PREFIX
from restow.adapter_pair import Pair
from restow.adapter_read import alias_names
from restow.adapter_stamp import Place, Stamp
from restow.errors import AdapterError, show
from restow.layout import axis_size, name_of, shape_of
from restow.notation import Row
from restow.torch.adapter_factors import (
    Block,
    Get,
    Take,
    bits_equal,
    exact,
    filled_rank,
    joined,
    parts,
    places_of,
    read_block,
    relay,
    resized,
    shared,
    split,
    there,
    times,
    unfolded,
)


@dataclass(frozen=True)
class Module:
    """One experts module, arranged: where it is written, its blocks, what a stamp should keep, what was said."""

    path: str
    blocks: tuple[Block, ...]
    parts: tuple[tuple[Place, ...], int] | None
    notes: tuple[str, ...]
    folded: Mapping[str, float]  # by key: the true scale of what was multiplied
    originals: Mapping[str, torch.Tensor]  # by key: B as it was, where multiplying rounded


Original = Callable[[str], "torch.Tensor | None"]


def key_of(base: Base, path: str, role: str, labels: Sequence[int]) -> str:
    """A block's key in a stamp, whatever the containers are called."""
    layer, which = base.family.place(path)
    return f"{layer}|{which}|{role}|{''.join(map(str, labels))}"


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


def arrange(
    pairs: Sequence[Pair], get: Get, fmt: Format, base: Base, config: AdapterConfig, stamp: Stamp,
    original: Original,
) -> Module:  # fmt: skip
    """Read one module and arrange its blocks for a format."""
    rslora, path = config.rslora, pairs[0].path
    back = _Back(base, config, stamp, original)
    blocks = shared([back.unfold(read_block(pair, get)) for pair in pairs])
    ins, outs = ([b for b in blocks if b.role == role] for role in ("in", "out"))
    place = "|".join(map(str, base.family.place(path)))
    known = stamp.parts.get(place)
    notes: list[str] = []
    folded: dict[str, float] = {}
    originals: dict[str, torch.Tensor] = {}
    keep: tuple[tuple[Place, ...], int] | None = known
    to, _ = place_of(base, path, fmt)
    if fmt.kind in ("expert", "outer", "apart"):
        ins, cut = _apart(ins, known, rslora)
        ins = [back.unfold(block) for block in ins]
        if outs and cut and outs[0].rank == cut:
            outs = [resized(outs[0], _unpadded(outs[0], ins, known), rslora)]
        blocks = [replace(block, experts=there(block)) for block in (*ins, *outs)]
        if fmt.kind == "outer":
            _check_outer(blocks)
    elif ins:
        one, times_ = joined(ins, len(base.family.labels), rslora)
        for block, ratio in times_:
            key = key_of(base, path, "in", block.labels)
            folded[key] = config.scale(block.rank, block.alpha)
            if not exact(ratio):
                originals[key] = block.b
        if times_:
            notes.append(f"{show(to)}: gate and up have different scales; their ratio was multiplied into B")
        if one is ins[0]:  # parts that lie in it, from a conversion before
            for label in one.labels:
                back.carry(key_of(base, path, "in", (label,)), folded, originals)
        else:
            keep = (tuple(places_of(ins)), outs[0].rank if outs else 0)
            notes += _said(ins, one, to)
            if fmt.kind == "native" and outs:
                outs = [resized(outs[0], max(outs[0].rank, one.rank), rslora)]
        blocks = [one, *outs]
    absent = [b for b in blocks if len(b.experts) < b.a.shape[0]]
    if absent and fmt.kind not in ("expert",):
        b = absent[0]
        notes.append(
            f"{show(to)}: {len(b.experts)} of {b.a.shape[0]} experts are adapted; the others hold zeros"
        )
    return Module(to, tuple(replace(b, path=to) for b in blocks), keep, tuple(notes),
                  folded, originals)  # fmt: skip


def _said(ins: Sequence[Block], one: Block, path: str) -> list[str]:
    labels = [label for block in ins for label in block.labels]
    if len(labels) < len(one.labels):
        return [f"{show(path)}: one of gate and up is not adapted; its part of B holds zeros"]
    return [f"{show(path)}: gate and up have A of their own; side by side, rank {one.rank}"]


def _apart(
    ins: Sequence[Block], known: tuple[tuple[Place, ...], int] | None, rslora: bool
) -> tuple[list[Block], int]:
    """One block a projection; and the joined rank, where blocks lay side by side."""
    found: list[Block] = []
    cut = 0
    for block in ins:
        places = parts(block, known[0] if known else None) if len(block.labels) > 1 else places_of([block])
        if places != [(block.labels, 0, block.rank)]:
            cut = block.rank
        for piece in split(block, places, rslora):
            for i, label in enumerate(piece.labels):
                found.append(replace(piece, labels=(label,), b=piece.b[:, i : i + 1]))
    return sorted(found, key=lambda block: block.labels), cut


def _unpadded(out: Block, ins: Sequence[Block], known: tuple[tuple[Place, ...], int] | None) -> int:
    """The rank that `out` had before it was made as long as gate and up together."""
    need = filled_rank(out)
    for rank in ([known[1]] if known else []) + [block.rank for block in ins]:
        if need <= rank < out.rank:
            return rank
    return out.rank if need == out.rank else need


class _Back:
    """What a stamp knows about scales that were multiplied into B."""

    def __init__(self, base: Base, config: AdapterConfig, stamp: Stamp, original: Original) -> None:
        self.base, self.config, self.stamp, self.original = base, config, stamp, original

    def unfold(self, block: Block) -> Block:
        """A block with the scale that it had, where B can be given back exactly."""
        key = key_of(self.base, block.path, block.role, block.labels)
        scale = self.stamp.folded.get(key)
        if scale is None:
            return block
        ratio = scale / self.config.scale(block.rank, block.alpha)
        b = unfolded(block.b, ratio, self.original(key))
        if b is None:
            return block
        return replace(block, alpha=alpha_of(block.rank, scale, self.config.rslora), b=b)

    def carry(self, key: str, folded: dict[str, float], originals: dict[str, torch.Tensor]) -> None:
        """What is still folded stays known."""
        if key in self.stamp.folded:
            folded[key] = self.stamp.folded[key]
            kept = self.original(key)
            if kept is not None:
                originals[key] = kept


def fold(block: Block, config: AdapterConfig, scale: float) -> tuple[Block, float]:
    """A block whose scale is `scale`: the ratio goes into B. Also the ratio."""
    ratio = config.scale(block.rank, block.alpha) / scale
    if abs(ratio - 1) < 1e-12:
        return block, 1.0
    return replace(block, alpha=alpha_of(block.rank, scale, config.rslora), b=times(block.b, ratio)), ratio


def _check_outer(blocks: Sequence[Block]) -> None:
    for block in blocks:
        factor, word = (block.a, "A") if block.role == "in" else (block.b, "B")
        if any(not bits_equal(factor[0], factor[i]) for i in range(1, factor.shape[0])):
            raise AdapterError(
                f"one {word} for all experts of {show(block.path)}, as this format has",
                f"experts that differ in {word} of '{block.role}'",
                hint="choose a format with factors for every expert",
            )


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


def spell(module: Module, fmt: Format, base: Base) -> list[Spelled]:
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


def wanted(module: Module, source: str, fmt: Format, base: Base, config: AdapterConfig) -> list[Wanted]:
    """What the config must say about a module's blocks; `source` is the module's path there."""
    family = base.family
    _, container = place_of(base, source, fmt)
    found = []
    for block in module.blocks:
        scale = config.scale(block.rank, block.alpha)
        if fmt.kind == "expert":
            row = one_label(rows("expert", family)[f"{block.role}.A"], (block.labels or (0,))[0])
            end = name_of(replace_number(row), (0,) * (len(row.name_axes) - 1), {}).removesuffix(
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


def parameter_of(fmt: Format, base: Base, role: str, labels: Sequence[int]) -> str:
    """The stacked parameter that a block is for: where projections have parameters of their own, the block's."""
    apart = fmt.kind == "apart" and len(base.family.labels) > 1
    return leaf(base.family, role, (*labels, 0)[0]) if apart else parameter(base.family, role)


def replace_number(row: Row) -> Row:
    """A row's name after its expert's number."""
    at = next(i for i, part in enumerate(row.name) if not isinstance(part, str) and part.axis == "e")
    rest = row.name[at + 1 :]
    first = rest[0].removeprefix(".") if isinstance(rest[0], str) else rest[0]
    return Row(row.role, (first, *rest[1:]), row.dims, row.exact)
