"""A plan in the making: moves of roles and of plain tensors, booked column by column, then parts and copies in order.

Whatever does not depend on a tensor's place (which element goes where) is worked out once per kind of module; what is
left for each layer is its names and its bytes' places. It raises what concerns the tensors that it plans for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from restow.boxes import whole
from restow.checkpoint import Checkpoint
from restow.coded_rows import ragged
from restow.entries import FLOATS, Entry
from restow.errors import CoverageError, QuantizationError, ShapeMismatchError, show
from restow.landing import Wish, chosen_experts, chosen_rows, held_side
from restow.layout import shape_of
from restow.lost import Lost
from restow.module import Module
from restow.moves import Side, freeze, moves
from restow.notation import Dim, Factor, Row
from restow.notes import Take, note_pairs
from restow.parts import Parts
from restow.plans import Copy, Plan
from restow.proof import Move, Pattern
from restow.quantized import no_values, refuse_cast
from restow.targets import Runs, Target


class Columns(NamedTuple):
    """Moves column by column, as every module of one kind has them.

    `reads` are their (source, piece), each once; `which` counts these, `along` counts `patterns`, one for each move.
    """

    reads: tuple[tuple[int, int], ...]
    patterns: tuple[Pattern, ...]
    which: tuple[int, ...]
    at: tuple[int, ...]
    target: tuple[int, ...]
    start: tuple[tuple[int, ...], ...]
    along: tuple[int, ...]


Known = dict[object, list[Columns]]


def columns_of(made: Sequence[Move]) -> Columns:
    """Moves as columns, in their order."""
    reads: dict[tuple[int, int], int] = {}
    patterns: dict[Pattern, int] = {}
    which = [reads.setdefault(move[:2], len(reads)) for move in made]
    same: dict[int, int] = {}  # most moves share one, and it takes its time to hash
    along = []
    for move in made:
        if id(move.pattern) not in same:
            same[id(move.pattern)] = patterns.setdefault(move.pattern, len(patterns))
        along.append(same[id(move.pattern)])
    _, _, at, target, start, _ = zip(*made, strict=True) if made else ((),) * 6
    return Columns(tuple(reads), tuple(patterns), tuple(which), at, target, start, tuple(along))


class _Booked(NamedTuple):
    """Moves between named tensors: the parts of their reads, the targets by place, the plan's patterns."""

    moves: Columns
    parts: list[int]
    targets: dict[int, int]
    patterns: list[int]


class Draft:
    """A plan in the making, local to one call. `known` keeps what plans of one destination share."""

    def __init__(self, source: Checkpoint, wish: Wish, chosen: Mapping[str, Target], known: Known) -> None:
        self.source, self.wish, self.known = source, wish, known
        self.chosen = dict(chosen)
        self.target_ids = {name: i for i, name in enumerate(chosen)}
        self.parts = Parts(source)
        self.patterns: dict[Pattern, int] = {}
        self.booked: list[_Booked] = []
        self.lost: list[Lost] = []

    def add_role(self, source: Module, module: Module, role: str) -> None:
        """Every copy of one role of one experts module."""
        wish = self.wish
        experts = chosen_experts(wish.experts, source.path, source.sizes.get("e", 0))
        take: Take = (("e", experts),) if experts is not None else ()
        row, names = source.layout.row(role), source.tensors[role]
        if ragged(row):
            self._add_notes(source, module, role, take)
            return
        side = held_side(module.layout.row(role), module, self.chosen, wish, source)
        needed = self._moves(self._held(row, source, names), side, take)
        lost = sorted({source for source, _ in needed.reads if names[source] is None})
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

    def _moves(self, source: Side, side: Side, take: Take) -> Columns:
        found = self.known.setdefault((source, side, take), [])  # such keys take their time to hash
        if not found:
            found.append(columns_of(moves(source, side, take)))
        return found[0]

    def add_plain(self, source_name: str, name: str) -> None:
        """The copies of a tensor outside the experts."""
        wish, target = self.wish, self.chosen[name]
        refuse_cast(self.source, source_name, target.dtype)
        entry = self.source.tensors[source_name]
        row, shape = plain_row(len(entry.shape)), entry.shape
        take: Take = ()
        if wish.experts is not None and (wish.routers or target.shape != shape):
            take, shape = self._router_rows(source_name, shape)
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
        pieces = pieces_of(entry)
        found = self.known.setdefault((pieces, entry.shape, target.shape, target.runs, take), [])
        if not found:  # most are like another, and need no sides
            source = Side(row, _plain_sizes(entry.shape), (pieces,))
            side = Side(row, _plain_sizes(target.shape), ((target.runs,),))
            found.append(self._moves(source, side, take))
        self._book(found[0], [source_name], [name])

    def _router_rows(self, name: str, shape: tuple[int, ...]) -> tuple[Take, tuple[int, ...]]:
        """The rows of a router that belong to the chosen experts, and its shape with them alone; all of another's."""
        router = self.source.routers.get(name)
        if router is None:
            return (), shape
        at = next(i for i, dim in enumerate(router.dims) if str(dim) == "e")
        path = self._owner(name)
        owner = self.source.modules.get(path)
        size = owner.sizes.get("e", shape[at]) if owner is not None else shape[at]
        experts = chosen_rows(self.wish.experts, path, size, shape[at])
        if experts is None:
            return (), shape
        return ((f"x{at}", experts),), (*shape[:at], len(experts), *shape[at + 1 :])

    def _owner(self, router: str) -> str:
        """The experts module that a router tensor belongs to: the one below the longest common path."""

        def shared(path: str) -> int:
            return sum(1 for a, b in zip(path.split("."), router.split("."), strict=False) if a == b)

        return max(self.source.modules, key=shared, default="")

    def _book(self, made: Columns, sources: Sequence[str | None], targets: Sequence[str | None]) -> None:
        names = [name for name in (sources[source] for source, _ in made.reads) if name is not None]
        filled = {place: name for place in set(made.target) if (name := targets[place]) is not None}
        assert len(names) == len(made.reads)
        parts = self.parts.numbers(names, [piece for _, piece in made.reads])
        if self.parts.codings:
            for which, place in zip(made.which, made.target, strict=True):
                name, dtype = names[which], self.chosen[filled[place]].dtype
                if self.parts.is_coded(parts[which]) and dtype not in FLOATS:
                    raise no_values(name, filled[place], dtype)
        ids = {place: self.target_ids[name] for place, name in filled.items()}
        patterns = [self.patterns.setdefault(pattern, len(self.patterns)) for pattern in made.patterns]
        self.booked.append(_Booked(made, parts, ids, patterns))

    def plan(
        self,
        layouts: tuple[tuple[str, str, str], ...],
        missing: tuple[str, ...],
        unused: tuple[str, ...],
        passed: tuple[str, ...],
    ) -> Plan:
        """All that was booked, in the order of the source's bytes."""
        parts, place = self.parts.ordered()
        copies = sorted(chain.from_iterable(_copies(one, place) for one in self.booked))
        return Plan(
            parts=parts,
            targets=tuple(self.chosen.values()),
            patterns=tuple(self.patterns),
            copies=tuple(copies),
            missing=missing,
            unused=unused,
            passed=passed,
            layouts=layouts,
            codings=tuple(self.parts.codings),
        )


def _copies(booked: _Booked, place: Sequence[int]) -> Iterator[Copy]:
    """The copies of what was booked, by the places that its parts have in the end."""
    made, parts = booked.moves, [place[part] for part in booked.parts]
    columns = (
        map(parts.__getitem__, made.which),
        made.at,
        map(booked.targets.__getitem__, made.target),
        made.start,
        map(booked.patterns.__getitem__, made.along),
    )
    return map(Copy._make, zip(*columns, strict=True))


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
