"""Making a plan: layouts x headers x targets -> reads and copies, proved before the first byte is touched.

Work that does not depend on a tensor's place (which element goes where) is done once per kind of module and shared by
all layers; a rank's own share is what remains. It raises what concerns the tensors it plans for, and leaves what is
missing or unused to the caller, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from restow.boxes import held, whole
from restow.checkpoint import Checkpoint
from restow.entries import Entry
from restow.errors import AmbiguousTensorError, MissingTensorError, ShapeMismatchError, show
from restow.find import Module
from restow.landing import Wish, chosen_experts, find_landing, held_side, layout_of, pair_modules
from restow.layout import Layout, axis_size, name_of, shape_of
from restow.moves import Move, Pattern, Side, freeze, moves
from restow.named import GENERAL
from restow.naming import check_rename, renamed
from restow.notation import Dim, Factor, Row
from restow.plans import Copy, Part, Plan
from restow.problems import merged
from restow.targets import Runs, Target, whole_target

Take = tuple[tuple[str, tuple[int, ...]], ...]


def make_plan(source: Checkpoint, targets: Sequence[Target], wish: Wish) -> Plan:
    """Plan how `targets` are filled from `source`. Raises the source's fatal problems, and what contradicts it."""
    check_rename(wish.rename)
    raise_fatal(source)
    by_name = {target.name: target for target in targets}
    found = find_landing(source, by_name, wish)
    pairs = pair_modules(source, found.modules, wish)
    draft = _Draft(source, by_name)
    layouts = []
    for path, module in found.modules.items():
        if path not in pairs:
            continue
        from_module = source.modules[pairs[path]]
        experts = chosen_experts(wish.experts, from_module.path, from_module.sizes.get("e", 0))
        layouts.append((from_module.path, _called(from_module), _called(module)))
        for row in module.layout.rows:
            if row.role in from_module.tensors and any(from_module.tensors[row.role]):
                side = held_side(row, module, by_name, wish, from_module)
                draft.add_role(from_module, module, side, (("e", experts),) if experts is not None else ())
    draft.add_others(wish, {name for name in by_name if name not in draft.filled}, found.modules)
    return draft.plan(layouts, _unused(source, draft, wish))


def raise_fatal(source: Checkpoint) -> None:
    """Raise the source's first fatal problem, listing all; what only some tensors lack is raised by who needs them."""
    fatal = [p.error for p in source.problems if p.fatal and not isinstance(p.error, MissingTensorError)]
    if fatal:
        raise merged(fatal)


def default_targets(source: Checkpoint, layout: str | Layout | None, wish: Wish) -> list[Target]:
    """The tensors that `source` has in another layout (`grouped` if None), whole, or a rank's part by `wish.shard`."""
    targets = []
    done: set[str] = set()
    for path, module in source.modules.items():
        to = layout_of(layout or "grouped", source.family)
        assert to is not None
        experts = chosen_experts(wish.experts, path, module.sizes.get("e", 0))
        sizes = {**module.sizes, **({"e": len(experts)} if experts is not None else {})}
        for row in to.rows:
            if row.role not in module.tensors:
                continue
            first = next(n for n in module.tensors[row.role] if n is not None)
            dtype, shape = source.tensors[first].dtype, shape_of(row, sizes)
            if wish.shard is not None and wish.shard.axis in row.axes:
                start, length = wish.shard.run(axis_size(row, wish.shard.axis, sizes))
                local = {wish.shard.axis: length}
                keep = {wish.shard.axis: range(start, start + length)}
                shape = shape_of(row, {**sizes, **local})
            else:
                keep = {}
            for name in _names(row, sizes, keep):
                targets.append(whole_target(f"{path}.{name}", shape, dtype))
        done.update(n for names in module.tensors.values() for n in names if n is not None)
    targets += [whole_target(n, e.shape, e.dtype) for n, e in source.tensors.items() if n not in done]
    return targets


def _names(row: Row, sizes: Mapping[str, int], keep: Mapping[str, Iterable[int]]) -> list[str]:
    from itertools import product

    axes = [keep.get(axis, range(axis_size(row, axis, sizes))) for axis in row.name_axes]
    return [name_of(row, index, sizes) for index in product(*axes)]


def _called(module: Module) -> str:
    return "/".join(module.names)


def _unused(source: Checkpoint, draft: _Draft, wish: Wish) -> list[str]:
    """Source tensors that no destination took, in the order of the files; experts by whole roles."""
    experts = source.expert_tensors
    return [
        name
        for name in source.tensors
        if name not in draft.used and (name not in experts or experts[name] not in draft.roles)
    ]


class _Draft:
    """A plan in the making: local to one call of `make_plan`."""

    def __init__(self, source: Checkpoint, targets: Mapping[str, Target]) -> None:
        self.source = source
        self.targets = targets
        self.target_ids = {name: i for i, name in enumerate(targets)}
        self.local = dict(targets)
        self.parts: list[Part] = []
        self.part_ids: dict[tuple[str, int], int] = {}
        self.patterns: dict[Pattern, int] = {}
        self.copies: list[Copy] = []
        self.filled: set[str] = set()
        self.used: set[str] = set()
        self.roles: set[tuple[str, str]] = set()
        self.known: dict[object, tuple[Move, ...]] = {}

    def add_role(self, source: Module, module: Module, side: Side, take: Take) -> None:
        """Every copy of one role of one experts module."""
        role = side.row.role
        row, names = source.layout.row(role), source.tensors[role]
        needed = self._moves(self._held(row, source, names), side, take)
        lost = sorted({m.source for m in needed if names[m.source] is None})
        if lost:
            raise _lost_error(source, row, lost)
        self.roles.add((source.path, role))
        for place, name in enumerate(module.tensors[role]):
            if name is not None and side.held[place]:
                self.filled.add(name)
                self.local[name] = self.targets[name]._replace(
                    shape=shape_of(side.row, dict(side.sizes)), runs=side.held[place][0]
                )
        self._book(needed, [n or "" for n in names], [n or "" for n in module.tensors[role]])

    def _held(self, row: Row, source: Module, names: Sequence[str | None]) -> Side:
        full = (whole(shape_of(row, source.sizes)),)
        several = self.source.several
        pieces = (pieces_of(self.source.tensors[n]) if n in several else full for n in names)
        return Side(row, freeze(source.sizes), tuple(pieces))

    def _moves(self, source: Side, side: Side, take: Take) -> tuple[Move, ...]:
        key = (source, side, take)
        if key not in self.known:
            self.known[key] = moves(source, side, take)
        return self.known[key]

    def add_others(self, wish: Wish, open_names: set[str], modules: Mapping[str, Module]) -> None:
        """Every tensor outside the experts: by its renamed name, else by the family's hub and runtime names."""
        experts = self.source.expert_tensors
        by_name: dict[str, str] = {}
        by_canonical: dict[str, list[str]] = {}
        family = wish.family or self.source.family
        for name in self.source.tensors:
            if name in experts:
                continue
            to = renamed(name, wish.rename)
            if to is None:
                self.used.add(name)  # the caller's table says that it has no place
                continue
            by_name[to] = name
            if family is not None:
                by_canonical.setdefault(family.canonical(to), []).append(name)
        taken = {name for module in modules.values() for names in module.tensors.values() for name in names}
        for name, target in self.targets.items():
            if name not in open_names or name in taken:
                continue
            found = by_name.get(name)
            if found is None and family is not None:
                near = by_canonical.get(family.canonical(name), [])
                if len(near) > 1:
                    raise AmbiguousTensorError(
                        f"one tensor of the source for {show(name)}",
                        f"{len(near)}",
                        tensor=name,
                        sections=[("tensors", map(show, near))],
                        hint="say which with rename=",
                    )
                found = near[0] if near else None
            if found is not None:
                self._add_plain(found, name, target, wish)

    def _add_plain(self, source_name: str, name: str, target: Target, wish: Wish) -> None:
        entry = self.source.tensors[source_name]
        row, shape = plain_row(len(entry.shape)), entry.shape
        take: Take = ()
        router = self.source.routers.get(source_name)
        if router is not None and wish.experts is not None and target.shape != shape:
            at = next(i for i, dim in enumerate(router.dims) if str(dim) == "e")
            experts = chosen_experts(wish.experts, self._owner(source_name), shape[at])
            if experts is not None:
                take = ((f"x{at}", experts),)
                shape = (*shape[:at], len(experts), *shape[at + 1 :])
        if target.shape != shape:
            raise ShapeMismatchError(
                f"shape {list(shape)} for {show(name)}, as the source's {show(source_name)} has",
                f"{list(target.shape)}",
                tensor=name,
                sections=[("tensor", [show(name)])],
                hint="only expert weights may be held in part as plain tensors; use a DTensor for others",
            )
        source = Side(row, _plain_sizes(entry.shape), (pieces_of(entry),))
        side = Side(row, _plain_sizes(target.shape), ((target.runs,),))
        self._book(self._moves(source, side, take), [source_name], [name])
        self.used.add(source_name)
        self.filled.add(name)

    def _owner(self, router: str) -> str:
        """The experts module that a router tensor belongs to: the one below the longest common path."""

        def shared(path: str) -> int:
            return sum(1 for a, b in zip(path.split("."), router.split("."), strict=False) if a == b)

        return max(self.source.modules, key=shared, default="")

    def _book(self, made: Iterable[Move], sources: Sequence[str], targets: Sequence[str]) -> None:
        for move in made:
            pattern = self.patterns.setdefault(move.pattern, len(self.patterns))
            part = self._part(sources[move.source], move.piece)
            self.copies.append(
                Copy(part, move.at, self.target_ids[targets[move.target]], move.start, pattern)
            )

    def _part(self, name: str, number: int) -> int:
        if (name, number) not in self.part_ids:
            entry = self.source.tensors[name]
            piece = entry.pieces[number]
            self.part_ids[name, number] = len(self.parts)
            self.parts.append(Part(name, entry.dtype, piece.file, piece.begin, piece.end))
        return self.part_ids[name, number]

    def plan(self, layouts: Sequence[tuple[str, str, str]], left: Sequence[str]) -> Plan:
        order = sorted(range(len(self.parts)), key=lambda i: (self.parts[i].file, self.parts[i].begin, i))
        place = {old: new for new, old in enumerate(order)}
        copies = sorted(copy._replace(source=place[copy.source]) for copy in self.copies)
        empty = [name for name, target in self.targets.items() if not all(held(target.runs))]
        return Plan(
            parts=tuple(self.parts[i] for i in order),
            targets=tuple(self.local.values()),
            patterns=tuple(self.patterns),
            copies=tuple(copies),
            missing=tuple(n for n in self.targets if n not in self.filled and n not in empty),
            unused=tuple(name for name in left if not self.source.ignorable(name)),
            passed=tuple(name for name in left if self.source.ignorable(name)),
            layouts=tuple(layouts),
        )


def pieces_of(entry: Entry) -> tuple[Runs, ...]:
    """The runs per dim of every piece of a tensor."""
    return tuple(tuple((run,) for run in piece.box) for piece in entry.pieces)


def plain_row(rank: int) -> Row:
    """A row for a tensor without a layout: one axis a dim."""
    return Row("tensor", (), tuple(Dim((Factor(f"x{i}"),)) for i in range(rank)))


def _plain_sizes(shape: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return freeze({f"x{i}": n for i, n in enumerate(shape)})


def _lost_error(source: Module, row: Row, lost: Sequence[int]) -> MissingTensorError:
    from itertools import product

    lengths = [axis_size(row, axis, source.sizes) for axis in row.name_axes]
    names = [f"{source.path}.{name_of(row, index, source.sizes)}" for index in product(*map(range, lengths))]
    missing = [names[i] for i in lost]
    return MissingTensorError(
        f"{source.sizes.get('e', 0)} experts in {show(source.path)}",
        f"{len(missing)} of the tensors needed here missing",
        tensor=missing[0],
        sections=[("missing", map(show, missing))],
        hint="get the checkpoint again: nothing is filled in their place",
    )


__all__ = ["GENERAL", "default_targets", "make_plan", "plain_row", "raise_fatal"]
