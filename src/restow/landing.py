"""The destination's side of a plan: its experts modules, and which module of the source fills which of them.

It sees targets (names, shapes, held runs) and never tensors. What it cannot place it reports; what contradicts the
source it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from restow.boxes import Run
from restow.checkpoint import Checkpoint
from restow.codec import Announced, with_scales
from restow.decoded import decoded
from restow.errors import AmbiguousTensorError, ShapeMismatchError, UsageError, show
from restow.family import Family, Spelling
from restow.find import Findings, candidates_of, find_modules
from restow.layout import Layout, axis_size, shape_of
from restow.module import Module
from restow.moves import Side, freeze
from restow.named import GENERAL
from restow.naming import Rename, renamed
from restow.notation import Row
from restow.problems import merged
from restow.targets import Runs, Shard, Target, axis_runs

Experts = Sequence[int] | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller said about the destination, besides its tensors.

    `layout` and `family` as in `restow.load`; `plain` names targets that are plain tensors, which alone `shard`
    concerns; `experts` are expert numbers, for all modules or by the source's module path; `routers` says that they
    order the router tensors too, even where their number stays; `places` are the paths of all experts modules where
    the destination is our own making, so that a layout's names mean nothing elsewhere.
    """

    layout: str | Layout | None = None
    family: Family | None = None
    rename: Rename = ()
    shard: Shard | None = None
    experts: Experts = None
    part: bool = False
    plain: frozenset[str] = frozenset()
    routers: bool = False
    places: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.shard is not None and not isinstance(self.shard, Shard):
            raise UsageError("a restow.Shard as shard=", type(self.shard).__name__)


def layout_of(layout: str | Layout | None, family: Family | None) -> Layout | None:
    """A layout by name (the family's own meaning first) or as it is. Raises `UsageError` for an unknown name."""
    if layout is None or isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise UsageError("a layout's name, or a restow.Layout", type(layout).__name__)
    if family is not None:
        return family.form(layout)
    if layout not in GENERAL:
        raise UsageError(f"a layout name, one of {', '.join(GENERAL)}", f"'{show(layout)}'")
    return GENERAL[layout]


def chosen_experts(experts: Experts, path: str, size: int) -> tuple[int, ...] | None:
    """The expert numbers for a module of `size` experts, or None for all. Raises `UsageError` for numbers it lacks."""
    numbers = experts.get(path) if isinstance(experts, Mapping) else experts
    if numbers is None:
        return None
    bad = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < size]
    if bad:
        raise UsageError(f"expert numbers from 0 to {size - 1} for {show(path)}", f"{bad[0]!r}")
    return tuple(numbers)


def with_count(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes of a module with so many experts, and after a first bank of as many (`{e+E}`) where there are two."""
    return {**sizes, "e": count, **({"E": count} if "E" in sizes else {})}


def chosen_rows(experts: Experts, path: str, size: int, length: int) -> tuple[int, ...] | None:
    """The rows of a router of `length` for the experts chosen of `size`, or None for all.

    Rows past the experts (shared ones, those that do nothing) belong to no expert that could be left out: they stay.
    """
    chosen = chosen_experts(experts, path, size)
    return None if chosen is None else (*chosen, *range(size, length))


def check_modules(source: Checkpoint, experts: Experts) -> None:
    """Raise `UsageError` where experts are chosen for a module that the source does not have."""
    strangers = [p for p in experts if p not in source.modules] if isinstance(experts, Mapping) else []
    if strangers:
        known = ", ".join(map(show, list(source.modules)[:3]))
        raise UsageError(f"experts by module, such as {known}", f"{show(strangers[0])}", path=source.path)


def find_landing(
    source: Checkpoint, targets: Mapping[str, Target], wish: Wish, codec: Announced | None = None
) -> Findings:
    """The experts modules of the destination, which may be in the source's codes or in those of `codec`.

    Raises what `find_modules` found wrong, all of it in one error.
    """
    family = wish.family or source.family
    sizes = _common_sizes(source)
    if isinstance(wish.experts, Mapping):
        sizes.pop("e", None)
    elif wish.experts is not None:
        sizes = with_count(sizes, len(wish.experts))
    local: dict[str, int] = {}
    if wish.shard is not None:
        axis = wish.shard.axis
        axes = _axes(source) & set(sizes)
        if axis not in axes:  # codes may be packed flat: then only what they decode to has the axis
            axes = _axes(decoded(source)) & set(sizes)
        if axis not in axes:
            raise UsageError(
                f"an axis whose size the source gives, one of {', '.join(sorted(axes))}", f"'{axis}'"
            )
        local = {axis: wish.shard.run(sizes[axis])[1]}
    shapes = {name: target.shape for name, target in targets.items()}
    layout = layout_of(wish.layout, family)
    candidates: tuple[Spelling, ...] = with_scales(candidates_of(family, layout), codec or source.codec)
    if family is None and layout is None:
        candidates += tuple(
            {m.layout: Spelling(m.names, "", m.layout) for m in source.modules.values()}.values()
        )
    found = find_modules(
        shapes,
        candidates,
        sizes,
        family=family,
        claimed=lambda name: True,  # whatever else lies there is filled by its name, or missing
        beside=lambda name: _beside(name, family, wish.places),
        local=local,
        partial=wish.shard is not None or wish.part,
        what="the destination",
    )
    if found.errors:
        raise merged(found.errors)
    return found


def _axes(source: Checkpoint) -> set[str]:
    return {axis for m in source.modules.values() for row in m.layout.rows for axis in row.axes}


def _beside(name: str, family: Family | None, places: frozenset[str]) -> bool:
    """Whether a name is no expert weight of the destination, whatever its end spells."""
    if family is not None and family.passes_over(name):
        return True
    return bool(places) and not any(name[:at] in places for at, char in enumerate(name) if char == ".")


def _common_sizes(source: Checkpoint) -> dict[str, int]:
    """The sizes on which the config and every experts module of the source agree."""
    sizes = dict(source.sizes)
    for module in source.modules.values():
        for axis, size in module.sizes.items():
            sizes.setdefault(axis, size)
    for module in source.modules.values():
        for axis in [a for a, size in sizes.items() if module.sizes.get(a, size) != size]:
            del sizes[axis]
    return sizes


def pair_modules(source: Checkpoint, found: Mapping[str, Module], wish: Wish) -> dict[str, str]:
    """Destination module path -> source module path: by the renamed path, else by the family's hub and runtime paths.

    Raises `AmbiguousTensorError` where two modules of the source have one place.
    """
    family = wish.family or source.family
    by_path: dict[str, str] = {}
    by_place: dict[object, list[str]] = {}
    owner = {
        name: path for path, module in found.items() for names in module.tensors.values() for name in names
    }
    for path, module in source.modules.items():
        if isinstance(wish.rename, Mapping):
            first = next((n for names in module.tensors.values() for n in names if n is not None), path)
            to = owner.get(renamed(first, wish.rename))
        else:
            to = renamed(path, wish.rename)
        if to is not None:
            by_path[to] = path
            if family is not None:
                by_place.setdefault(family.place(to), []).append(path)
    pairs = {}
    for path in found:
        if path in by_path:
            pairs[path] = by_path[path]
            continue
        near = by_place.get(family.place(path), []) if family is not None else []
        if len(near) > 1:
            raise AmbiguousTensorError(
                f"one experts module of the source for {show(path)}",
                f"{len(near)}",
                sections=[("modules", map(show, near))],
                hint="say which with rename=",
            )
        if near:
            pairs[path] = near[0]
    return pairs


def held_side(row: Row, module: Module, targets: Mapping[str, Target], wish: Wish, source: Module) -> Side:
    """One role of a destination module: what is held of each of its tensors, in global terms.

    A plain tensor that `wish.shard` cuts has its part's shape; everything else has the global one. Raises
    `ShapeMismatchError` for a tensor that is neither.
    """
    sizes = dict(module.sizes)
    part: dict[str, Run] = {}
    if wish.shard is not None and wish.shard.axis in row.axes:
        part = {wish.shard.axis: wish.shard.run(axis_size(row, wish.shard.axis, sizes))}
    held: list[tuple[Runs, ...]] = []
    whole = shape_of(row, sizes)
    for name in module.tensors[row.role]:
        target = targets.get(name) if name is not None else None
        if target is None:
            held.append(())
        elif name in wish.plain and part:
            held.append((axis_runs(row, sizes, part),))
        elif target.shape != whole:
            raise ShapeMismatchError(
                f"shape {list(whole)} for {show(name)}",
                f"{list(target.shape)}",
                tensor=name,
                sections=[("tensor", [show(name)]), ("filled by", [show(source.path)])],
                hint="sizes come from the source; if this tensor holds a part, say which with shard=",
            )
        else:
            held.append((target.runs,))
    return Side(row, freeze(sizes), tuple(held))


NOTHING: Mapping[str, Module] = MappingProxyType({})
