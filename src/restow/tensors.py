"""The tensors of a checkpoint as a mapping of names to entries, held in the columns of its headers.

An `Entry` is made when it is asked for, so that 70,000 tensors cost their names and a few numbers each. It
rejects nothing: names, places and cover were checked by those who built it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from restow.entries import Entry, Piece
from restow.header import Header


class Sharded(NamedTuple):
    """A tensor in parts: the whole shape, and per part its header's number, its row there, its offset."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, tuple[int, ...]], ...]


@lru_cache(maxsize=256)
def _whole_box(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in shape)


class Tensors(Mapping[str, Entry]):
    """Name -> `Entry`; `rows` counts through all headers: row r is row `r - starts[i]` of header i."""

    __slots__ = ("_headers", "_rows", "_sharded", "_starts")

    def __init__(
        self, headers: Sequence[Header], rows: Mapping[str, int], sharded: Mapping[str, Sharded]
    ) -> None:
        self._headers = tuple(headers)
        self._starts = tuple(accumulate((len(header.names) for header in headers), initial=0))
        self._rows = rows
        self._sharded = sharded

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def sharded(self) -> frozenset[str]:
        """The tensors in parts; all others are one piece."""
        return frozenset(self._sharded)

    def __getitem__(self, name: str) -> Entry:
        at = self._rows[name]
        if name in self._sharded:
            return self._whole(self._sharded[name])
        i = bisect_right(self._starts, at) - 1
        header, row = self._headers[i], at - self._starts[i]
        shape = header.shapes[row]
        piece = Piece(_whole_box(shape), header.file, header.begins[row], header.ends[row])
        return Entry(header.dtypes[row], shape, (piece,))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its entry."""
        if name in self._sharded:
            return self._sharded[name].shape
        at = self._rows[name]
        i = bisect_right(self._starts, at) - 1
        return self._headers[i].shapes[at - self._starts[i]]

    def _whole(self, tensor: Sharded) -> Entry:
        pieces = []
        dtype = ""
        for i, row, offset in tensor.parts:
            header = self._headers[i]
            dtype = header.dtypes[row]
            box = tuple(zip(offset, header.shapes[row], strict=True))
            pieces.append(Piece(box, header.file, header.begins[row], header.ends[row]))
        return Entry(dtype, tensor.shape, tuple(sorted(pieces)))

    def places(self, names: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
        """(dtype, file, first byte, end) of tensors that are one piece."""
        i, first, last = -1, 0, 0
        header = None
        for at in map(self._rows.__getitem__, names):
            if header is None or not first <= at < last:  # neighbours mostly share a file
                i = bisect_right(self._starts, at) - 1
                header, first, last = self._headers[i], self._starts[i], self._starts[i + 1]
            row = at - first
            yield header.dtypes[row], header.file, header.begins[row], header.ends[row]

    def columns(self) -> tuple[Mapping[str, int], Mapping[str, Sharded]]:
        """What was given beside the headers."""
        return self._rows, self._sharded

    def __repr__(self) -> str:
        return f"<{len(self)} tensors in {len(self._headers)} files>"


def places_of(tensors: Mapping[str, Entry], names: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    """(dtype, file, first byte, end) of tensors that are one piece, in any mapping of entries."""
    if isinstance(tensors, Tensors):
        yield from tensors.places(names)
        return
    for name in names:
        entry = tensors[name]
        (piece,) = entry.pieces
        yield entry.dtype, piece.file, piece.begin, piece.end
