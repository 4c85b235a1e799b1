"""Making a plan: layouts x headers x targets -> reads and copies, proved before the first byte is touched.

Work that does not depend on a tensor's place (which element goes where) is done once per kind of module and shared by
all layers; a rank's own share is what remains. It raises what concerns the tensors it plans for: shapes that differ,
weights that are lost, casts that codes forbid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from restow.boxes import strides_of, whole
from restow.checkpoint import Checkpoint
from restow.codecs import ragged
from restow.coding import Coding
from restow.decoded import FLOATS, Coded, DecodedTensors
from restow.entries import Entry
from restow.errors import CoverageError, QuantizationError, RestowError, ShapeMismatchError, show
from restow.landing import Wish, chosen_experts, chosen_rows, held_side
from restow.layout import shape_of
from restow.lost import Lost, lost_error
from restow.module import Module
from restow.moves import Move, Pattern, Side, freeze, moves
from restow.notation import Dim, Factor, Row
from restow.notes import Take, note_pairs
from restow.plans import Copy, Part, Plan
from restow.prepare import Prepared, prepare
from restow.problems import merged
from restow.quantized import no_values, refuse_cast
from restow.targets import Runs, Target


def make_plan(source: Checkpoint, targets: Sequence[Target], wish: Wish) -> Plan:
    """Plan how `targets` are filled from `source`. Raises the source's fatal problems, and what contradicts it."""
    prepared = prepare(source, targets, wish)
    return plan_of(prepared, prepared.targets)


def plan_of(prepared: Prepared, chosen: Mapping[str, Target]) -> Plan:
    """The plan that fills `chosen`: targets of the destination, whole or (by their runs) in part."""
    draft = _Draft(prepared, chosen)
    asked: dict[tuple[str, str], None] = {}
    unlike: list[RestowError] = []
    for name in chosen:
        if name in prepared.owners:
            asked[prepared.owners[name][:2]] = None
        elif name in prepared.plain:
            try:
                draft.add_plain(prepared.plain[name], name)
            except ShapeMismatchError as error:
                unlike.append(error)
    if unlike:
        raise merged(unlike)
    layouts: dict[str, tuple[str, str, str]] = {}
    for path, role in asked:
        if path not in prepared.pairs or (prepared.pairs[path], role) not in prepared.roles:
            continue
        module, from_module = prepared.modules[path], prepared.source.modules[prepared.pairs[path]]
        layouts[path] = (from_module.path, _called(from_module), _called(module))
        draft.add_role(from_module, module, role)
    if draft.lost:
        raise lost_error(prepared.source, draft.lost)
    return draft.plan(tuple(layouts.values()))


def _called(module: Module) -> str:
    return "/".join(module.names)


class _Draft:
    """A plan in the making: local to one call of `plan_of`."""

    def __init__(self, prepared: Prepared, chosen: Mapping[str, Target]) -> None:
        self.prepared = prepared
        self.source = prepared.source
        self.chosen = dict(chosen)
        self.target_ids = {name: i for i, name in enumerate(chosen)}
        self.parts: list[Part] = []
        self.part_ids: dict[tuple[str, int], int] = {}
        self.patterns: dict[Pattern, int] = {}
        self.copies: list[Copy] = []
        self.codings: dict[Coding, int] = {}
        self.lost: list[Lost] = []

    def add_role(self, source: Module, module: Module, role: str) -> None:
        """Every copy of one role of one experts module."""
        wish = self.prepared.wish
        experts = chosen_experts(wish.experts, source.path, source.sizes.get("e", 0))
        take: Take = (("e", experts),) if experts is not None else ()
        row, names = source.layout.row(role), source.tensors[role]
        if ragged(row):
            self._add_notes(source, module, role, take)
            return
        side = held_side(module.layout.row(role), module, self.chosen, wish, source)
        needed = self._moves(self._held(row, source, names), side, take)
        lost = sorted({m.source for m in needed if names[m.source] is None})
        if lost:
            self.lost.append((source, role, lost))
            return
        whole_shape = shape_of(side.row, dict(side.sizes))
        for place, name in enumerate(module.tensors[role]):
            if name is not None and side.held[place]:
                self.chosen[name] = self.chosen[name]._replace(shape=whole_shape, runs=side.held[place][0])
        self._book(needed, names, module.tensors[role])

    def _add_notes(self, source: Module, module: Module, role: str, take: Take) -> None:
        """Every copy of a role whose tensors have lengths of their own: each is carried whole."""
        names, row = module.tensors[role], module.layout.row(role)
        wanted = [name is not None and name in self.chosen for name in names]
        pairs = note_pairs(source, row, module.sizes, take, wanted)
        lost = sorted({place for place in pairs.values() if source.tensors[role][place] is None})
        if lost:
            self.lost.append((source, role, lost))
            return
        for place, other in pairs.items():
            name, note = names[place], source.tensors[role][other]
            assert name is not None
            assert note is not None
            entry, target = self.source.tensors[note], self.chosen[name]
            if target.shape != entry.shape:
                raise QuantizationError(
                    f"{entry.shape[0]} bytes in {show(name)}, as {show(note)} of the source has",
                    f"{list(target.shape)}",
                    tensor=name,
                    sections=[("tensor", [show(name)])],
                    hint="make the destination of this source: notes have lengths of their own",
                )
            sizes, plain = _plain_sizes(entry.shape), plain_row(1)
            held = Side(plain, sizes, (pieces_of(entry),))
            self._book(self._moves(held, Side(plain, sizes, ((target.runs,),)), ()), [note], [name])

    def _held(self, row: Row, source: Module, names: Sequence[str | None]) -> Side:
        full = (whole(shape_of(row, source.sizes)),)
        several = self.source.several
        if not several:
            return Side(row, freeze(source.sizes), (full,) * len(names))
        pieces = (pieces_of(self.source.tensors[n]) if n in several else full for n in names)
        return Side(row, freeze(source.sizes), tuple(pieces))

    def _moves(self, source: Side, side: Side, take: Take) -> tuple[Move, ...]:
        found = self.prepared.known.setdefault((source, side, take), [])  # such keys take their time to hash
        if not found:
            found.append(moves(source, side, take))
        return found[0]

    def add_plain(self, source_name: str, name: str) -> None:
        """The copies of a tensor outside the experts."""
        wish, target = self.prepared.wish, self.chosen[name]
        refuse_cast(self.source, source_name, target.dtype)
        entry = self.source.tensors[source_name]
        row, shape = plain_row(len(entry.shape)), entry.shape
        take: Take = ()
        router = self.source.routers.get(source_name)
        if router is not None and wish.experts is not None and (wish.routers or target.shape != shape):
            at = next(i for i, dim in enumerate(router.dims) if str(dim) == "e")
            path = self._owner(source_name)
            owner = self.source.modules.get(path)
            size = owner.sizes.get("e", shape[at]) if owner is not None else shape[at]
            experts = chosen_rows(wish.experts, path, size, shape[at])
            if experts is not None:
                take = ((f"x{at}", experts),)
                shape = (*shape[:at], len(experts), *shape[at + 1 :])
        if source_name in self.source.several and _longer(target.shape, shape):
            raise CoverageError(
                f"all of {list(target.shape)} of {show(name)} in the ranks' files",
                f"{list(shape)}",
                path=self.source.path,
                tensor=name,
                hint="the last ranks' files are not there: get them, or save again",
            )
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

    def _owner(self, router: str) -> str:
        """The experts module that a router tensor belongs to: the one below the longest common path."""

        def shared(path: str) -> int:
            return sum(1 for a, b in zip(path.split("."), router.split("."), strict=False) if a == b)

        return max(self.source.modules, key=shared, default="")

    def _book(
        self, made: Iterable[Move], sources: Sequence[str | None], targets: Sequence[str | None]
    ) -> None:
        last, pattern = None, -1
        for move in made:
            if move.pattern is not last:  # most share one
                last, pattern = move.pattern, self.patterns.setdefault(move.pattern, len(self.patterns))
            source, target = sources[move.source], targets[move.target]
            assert source is not None
            assert target is not None
            part = self.part_ids.get((source, move.piece), -1)
            if part < 0:
                part = self._part(source, move.piece)
            if self.codings and self.parts[part].coding >= 0 and self.chosen[target].dtype not in FLOATS:
                raise no_values(source, target, self.chosen[target].dtype)
            self.copies.append(Copy(part, move.at, self.target_ids[target], move.start, pattern))

    def _part(self, name: str, number: int) -> int:
        """The number of a new part."""
        entry = self.source.tensors[name]
        piece = entry.pieces[number]
        made = self.part_ids[name, number] = len(self.parts)
        coded = self.source.coded.get(name) if self.source.coded is not None else None
        if coded is None:
            self.parts.append(Part(name, entry.dtype, piece.file, piece.begin, piece.end))
        else:
            self._coded_part(coded, entry, number)
        return made

    def _coded_part(self, coded: Coded, entry: Entry, number: int) -> None:
        """The codes of a weight as a part, and after it its scales."""
        assert isinstance(self.source.tensors, DecodedTensors)
        piece, raw = entry.pieces[number], self.source.tensors.raw
        shape, start = tuple(n for _, n in piece.box), tuple(begin for begin, _ in piece.box)
        if len(entry.pieces) == 1:
            shape, start = coded.shape, (0,) * len(coded.shape)
        codec = coded.codec
        grids = tuple(grid for _, grid in coded.scales)
        apart = strides_of(shape)[coded.packed]
        coding = Coding(codec.name, codec.element, codec.bits, shape, start, grids, apart)
        scales = range(len(self.parts) + 1, len(self.parts) + 1 + len(coded.scales))
        dtype = raw[coded.name].dtype
        at = self.codings.setdefault(coding, len(self.codings))
        self.parts.append(Part(coded.name, dtype, piece.file, piece.begin, piece.end, at, tuple(scales)))
        for name, _ in coded.scales:
            (held,) = raw[name].pieces
            self.parts.append(Part(name, raw[name].dtype, held.file, held.begin, held.end))

    def plan(self, layouts: tuple[tuple[str, str, str], ...]) -> Plan:
        order = sorted(range(len(self.parts)), key=lambda i: (self.parts[i].file, self.parts[i].begin, i))
        place = {old: new for new, old in enumerate(order)}
        copies = sorted(Copy(place[old], at, to, start, along) for old, at, to, start, along in self.copies)
        unused, passed = self.prepared.left
        missing = frozenset(self.prepared.missing)
        return Plan(
            parts=tuple(
                self.parts[i]._replace(scales=tuple(place[k] for k in self.parts[i].scales)) for i in order
            )
            if self.codings
            else tuple(self.parts[i] for i in order),
            targets=tuple(self.chosen.values()),
            patterns=tuple(self.patterns),
            copies=tuple(copies),
            missing=tuple(name for name in self.chosen if name in missing),
            unused=unused,
            passed=passed,
            layouts=layouts,
            codings=tuple(self.codings),
        )


def _longer(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a shape holds another and more."""
    return len(one) == len(other) and one != other and all(a >= b for a, b in zip(one, other, strict=True))


def pieces_of(entry: Entry) -> tuple[Runs, ...]:
    """The runs per dim of every piece of a tensor."""
    return tuple(tuple((run,) for run in piece.box) for piece in entry.pieces)


@lru_cache(maxsize=64)
def plain_row(rank: int) -> Row:
    """A row for a tensor without a layout: one axis a dim."""
    return Row("tensor", (), tuple(Dim((Factor(f"x{i}"),)) for i in range(rank)))


def _plain_sizes(shape: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return freeze({f"x{i}": n for i, n in enumerate(shape)})
