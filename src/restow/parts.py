"""The parts of files that a plan reads, numbered as they are first asked for: pieces of tensors, and scales beside codes.

Many layers ask for parts one after the other, so that new ones are made in bulk where nothing is coded or in several
pieces. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from restow.boxes import strides_of
from restow.checkpoint import Checkpoint
from restow.coding import Coding
from restow.decoded import Coded, DecodedTensors
from restow.entries import Entry
from restow.plans import Part
from restow.tensors import places_of

_Key = str | tuple[str, int]  # a tensor's first piece by its name, a further one with its number


class Parts:
    """The parts of one plan, and the codings that they have; local to one call."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._parts: list[Part] = []
        self._ids: dict[_Key, int] = {}
        self.codings: dict[Coding, int] = {}

    def is_coded(self, number: int) -> bool:
        """Whether a part holds codes."""
        return self._parts[number].coding >= 0

    def numbers(self, names: Sequence[str], pieces: Sequence[int]) -> list[int]:
        """The numbers of the parts that pieces of tensors are; new ones are made."""
        source = self._source
        keys = [(name, piece) if piece else name for name, piece in zip(names, pieces, strict=True)]
        if source.coded is None and not source.several and self._ids.keys().isdisjoint(keys):
            first, places = len(self._parts), places_of(source.tensors, names)
            self._parts += [Part(name, *place) for name, place in zip(names, places, strict=True)]
            self._ids.update(zip(keys, count(first)))
            return list(range(first, len(self._parts)))
        return [
            self._ids[key] if key in self._ids else self._new(key, name, piece)
            for key, name, piece in zip(keys, names, pieces, strict=True)
        ]

    def ordered(self) -> tuple[tuple[Part, ...], list[int]]:
        """The parts in the order of the source's bytes, and the place there of each number."""
        order = [i for *_, i in sorted((part.file, part.begin, i) for i, part in enumerate(self._parts))]
        place = [0] * len(order)
        for new, old in enumerate(order):
            place[old] = new
        parts = [self._parts[i] for i in order]
        if self.codings:
            parts = [part._replace(scales=tuple(place[k] for k in part.scales)) for part in parts]
        return tuple(parts), place

    def _new(self, key: _Key, name: str, number: int) -> int:
        entry = self._source.tensors[name]
        piece = entry.pieces[number]
        made = self._ids[key] = len(self._parts)
        coded = self._source.coded.get(name) if self._source.coded is not None else None
        if coded is None:
            self._parts.append(Part(name, entry.dtype, piece.file, piece.begin, piece.end))
        else:
            self._add_coded(coded, entry, number)
        return made

    def _add_coded(self, coded: Coded, entry: Entry, number: int) -> None:
        """The codes of a weight as a part, and after it its scales."""
        assert isinstance(self._source.tensors, DecodedTensors)
        piece, raw = entry.pieces[number], self._source.tensors.raw
        shape, start = tuple(n for _, n in piece.box), tuple(begin for begin, _ in piece.box)
        if len(entry.pieces) == 1:
            shape, start = coded.shape, (0,) * len(coded.shape)
        codec = coded.codec
        grids = tuple(grid for _, grid in coded.scales)
        apart = strides_of(shape)[coded.packed]
        coding = Coding(codec.name, codec.element, codec.bits, shape, start, grids, apart)
        first = len(self._parts) + 1
        scales = tuple(range(first, first + len(coded.scales)))
        at = self.codings.setdefault(coding, len(self.codings))
        dtype = raw[coded.name].dtype
        self._parts.append(Part(coded.name, dtype, piece.file, piece.begin, piece.end, at, scales))
        for name, _ in coded.scales:
            (held,) = raw[name].pieces
            self._parts.append(Part(name, raw[name].dtype, held.file, held.begin, held.end))
