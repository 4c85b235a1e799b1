"""What an adapter adds to each tensor of a base: found by the base's own names, rows and sizes; applied leaf by leaf.

A leaf is one matrix of one expert, or an ordinary weight; its delta is scale * B @ A in float32 (float64 for a float64
base), added and rounded once. How much of it the rounding leaves is summed up. It rejects deltas without a place, and
base tensors that are no plain floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import sqrt
from typing import Any

import torch

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig
from restow.adapter_keys import PREFIX
from restow.adapter_pair import Pair
from restow.adapter_read import Adapter, Plain
from restow.entries import FLOATS
from restow.errors import AdapterError, QuantizationError, show
from restow.layout import Sizes, axis_size
from restow.notation import Row
from restow.torch.adapter_factors import Block, Get, read_block

MODULES = 4  # roles of modules whose blocks are kept: a file's tensors come in an order of its own


@dataclass
class Kept:
    """Sums of squares of deltas and of what rounding took from them."""

    delta: float = 0.0
    lost: float = 0.0
    count: int = 0

    def add(self, delta: torch.Tensor, error: torch.Tensor) -> None:
        self.delta += float((delta.double() ** 2).sum())
        self.lost += float((error.double() ** 2).sum())
        self.count += 1

    def join(self, other: Kept) -> None:
        self.delta, self.lost, self.count = (
            self.delta + other.delta, self.lost + other.lost, self.count + other.count,
        )  # fmt: skip

    @property
    def share(self) -> float:
        """The share of the delta's norm that is left: 1 is all of it, 0 none."""
        return max(0.0, 1.0 - sqrt(self.lost / self.delta)) if self.delta else 1.0


@dataclass
class Book:
    """What was applied: by role, and which deltas."""

    roles: dict[str, Kept] = field(default_factory=dict)
    done: set[tuple[str, ...]] = field(default_factory=set)

    def join(self, other: Book) -> None:
        """Take over what another book, of another file, holds."""
        for role, kept in other.roles.items():
            self.roles.setdefault(role, Kept()).join(kept)
        self.done |= other.done

    def note(self) -> dict[str, object]:
        """The book as JSON has it; `from_note` gives it back to the bit."""
        roles = {role: [kept.delta, kept.lost, kept.count] for role, kept in self.roles.items()}
        return {"roles": roles, "done": sorted(map(list, self.done))}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Book:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no note."""
        roles = {
            str(role): Kept(float(d), float(lost), int(n)) for role, (d, lost, n) in note["roles"].items()
        }
        return cls(roles, {tuple(map(str, key)) for key in note["done"]})

    def apply(self, role: str, key: tuple[str, ...], weight: torch.Tensor, delta: torch.Tensor) -> None:
        """Add a delta to a view of a weight, in place."""
        exact = weight.to(delta.dtype) + delta
        rounded = exact.to(weight.dtype)
        self.roles.setdefault(role, Kept()).add(delta, exact - rounded.to(delta.dtype))
        weight.copy_(rounded)
        self.done.add(key)


@dataclass(frozen=True)
class Experts:
    """A base tensor that experts' deltas go into: its row, sizes and the indices that its name has; their pairs."""

    row: Row
    sizes: Sizes
    named: Mapping[str, int]
    pairs: tuple[Pair, ...]

    @property
    def outer(self) -> int:
        """How many equal slices of dim 0 are whole experts; 1 where the tensor cannot be cut so."""
        return axis_size(self.row, "e", self.sizes) if self.row.dims and str(self.row.dims[0]) == "e" else 1


Goal = Experts | Plain | str  # str: the adapter's tensor takes the place of the base's


def goals(adapter: Adapter, base: Base) -> dict[str, Goal]:
    """Base tensor -> what goes into it. Raises `AdapterError` for what has no place in the base."""
    assert base.checkpoint is not None
    entries = base.checkpoint.tensors
    found: dict[str, Goal] = {}
    for path, pairs in adapter.modules.items():
        module = base.experts(path)
        assert module is not None
        for role in dict.fromkeys(pair.role for pair in pairs):
            row = module.layout.row(role)
            lengths = [axis_size(row, axis, module.sizes) for axis in row.name_axes]
            ours = tuple(p for p in pairs if p.role == role)
            for index, name in zip(product(*map(range, lengths)), module.tensors[role], strict=True):
                assert name is not None
                found[name] = Experts(row, module.sizes, dict(zip(row.name_axes, index, strict=True)), ours)
    for plain in adapter.plain:
        name = base.weight(f"{plain.module}.weight")
        assert name is not None
        if name in found:
            raise AdapterError("one adapter for each weight", f"two for {show(name)}", tensor=plain.names[0])
        found[name] = plain
    for other in adapter.others:
        name = base.weight(other.removeprefix(PREFIX))
        assert name is not None
        found[name] = other
    for name, goal in found.items():
        if entries[name].dtype not in FLOATS and not isinstance(goal, str):
            raise QuantizationError(
                "a base of plain floats to merge into", f"{entries[name].dtype}", path=base.path, tensor=name,
                hint="convert the base with dtype= first: a delta has no place in quantised weights",
            )  # fmt: skip
    return found


def expected(adapter: Adapter) -> set[tuple[str, ...]]:
    """Every delta that an adapter holds."""
    keys: set[tuple[str, ...]] = {(plain.module,) for plain in adapter.plain}
    for pair in adapter.pairs:
        keys |= {(pair.path, pair.role, str(e), str(p)) for e in pair.experts for p in pair.labels or (0,)}
    return keys | {(name,) for name in adapter.others}


class Deltas:
    """The blocks of an adapter, those of a few modules in memory."""

    def __init__(self, get: Get, config: AdapterConfig, base: Base) -> None:
        self._get, self._config, self._labels = get, config, base.family.labels
        self._known: dict[tuple[str, str], list[Block]] = {}

    def blocks(self, pairs: tuple[Pair, ...]) -> list[Block]:
        key = (pairs[0].path, pairs[0].role)
        if key not in self._known:
            if len(self._known) >= MODULES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = [read_block(pair, self._get) for pair in pairs]
        return self._known[key]

    def experts(self, goal: Experts, tensor: torch.Tensor, first: int, book: Book) -> None:
        """Add to `tensor`, which holds the experts from `first` on."""
        for axes, view in leaves(goal, tensor, first):
            for block in self.blocks(goal.pairs):
                if axes["e"] not in block.experts:
                    continue
                label = self._label(goal.row, axes["p"]) if "p" in axes else 0
                if block.role == "in" and label not in block.labels:
                    continue
                scale = self._config.scale(block.rank, block.alpha)
                b = (
                    block.b[axes["e"], block.labels.index(label)]
                    if block.role == "in"
                    else block.b[axes["e"]]
                )
                delta = product_of(b, block.a[axes["e"]], scale, tensor.dtype)
                key = (block.path, block.role, str(axes["e"]), str(label))
                book.apply(block.role, key, view, delta)

    def plain(self, goal: Plain, tensor: torch.Tensor, book: Book) -> None:
        """Add to an ordinary weight [out, in] (an embedding: [tokens, width])."""
        a, b = (self._get(name) for name in goal.names)
        scale = self._config.scale(goal.rank, goal.alpha)
        delta = product_of(b.flatten(1), a.flatten(1), scale, tensor.dtype)
        turned = "lora_embedding" in goal.names[0] or bool(self._config.raw.get("fan_in_fan_out"))
        book.apply(goal.module.rpartition(".")[2], (goal.module,), tensor, delta.T if turned else delta)

    def _label(self, row: Row, index: int) -> int:
        """The projection that an index of the base's row means."""
        words = row.labels.get("p", ())
        return self._labels.index(words[index]) if set(words) == set(self._labels) else index


def product_of(b: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale * B @ A, in float32 at least."""
    wide = torch.float64 if torch.float64 in (dtype, a.dtype, b.dtype) else torch.float32
    return (b.to(wide) @ a.to(wide)) * scale


def leaves(goal: Experts, tensor: torch.Tensor, first: int) -> Iterator[tuple[dict[str, int], torch.Tensor]]:
    """Every matrix [out, in] in a base tensor, as a view, with its indices of `e` and `p`.

    The tensor's dims are parted into the row's axes, which a view can always say.
    """
    row, sizes = goal.row, dict(goal.sizes)
    keys = [key for dim in row.dims for key in dim.keys]
    lengths = [axis_size(row, key, sizes) for key in keys]
    if goal.outer > 1:
        lengths[0] = tensor.shape[0]
    wide = tensor.view(lengths)
    out, into = ("f", "d") if row.base == "in" else ("d", "f")
    inner = [i for i, key in enumerate(keys) if key not in (out, into)]
    wide = wide.permute(*inner, keys.index(out), keys.index(into))
    for index in product(*(range(lengths[i]) for i in inner)):
        axes = {**goal.named, **{keys[i]: n for i, n in zip(inner, index, strict=True)}}
        if goal.outer > 1:
            axes["e"] += first
        if row.base == "in":
            axes.setdefault("p", 0)
        yield axes, wide[index]


def roles_text(roles: Mapping[str, Kept]) -> Sequence[str]:
    """A line for each role."""
    return [
        f"{role}: {kept.count:,} deltas, {kept.share:.1%} of their norm kept"
        for role, kept in sorted(roles.items())
    ]
