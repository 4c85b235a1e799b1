"""Notes beside codes, texts with lengths of their own: which note of the source is which of the destination.

A row of tensors has one shape, and a row of notes has none; so they are paired as if each were one element, and carried
whole. Rejected by name are layouts in which weights that have notes of their own are one tensor (`QuantizationError`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from restow.boxes import whole
from restow.codecs import Codec
from restow.errors import QuantizationError, show
from restow.layout import axis_size
from restow.module import Module
from restow.moves import Side, freeze, moves
from restow.notation import Dim, Factor, Row

Take = tuple[tuple[str, tuple[int, ...]], ...]


def note_pairs(
    source: Module, row: Row, sizes: Mapping[str, int], take: Take, wanted: Sequence[bool] | None = None
) -> dict[int, int]:
    """For each place of a row of the destination, or each that is `wanted`, the place of its note in the source's row."""
    own = source.layout.row(row.role)
    if len(row.dims) != 1 or set(row.name_axes) != set(own.name_axes):
        assert source.codec is not None
        raise _joined(source.codec, source.path, row)
    from_side = _side(own, source.sizes, None)
    return {move.target: move.source for move in moves(from_side, _side(row, sizes, wanted), take)}


def _side(row: Row, sizes: Mapping[str, int], wanted: Sequence[bool] | None) -> Side:
    """A row of notes as one of single elements."""
    count = 1
    for axis in row.name_axes:
        count *= axis_size(row, axis, sizes)
    held = wanted if wanted is not None else (True,) * count
    single = replace(row, dims=(Dim((Factor("", 1, 1),)),))
    return Side(single, freeze(sizes), tuple((whole((1,)),) if one else () for one in held))


def _joined(codec: Codec, path: str, row: Row) -> QuantizationError:
    return QuantizationError(
        f"a tensor for each of the {codec.name} weights of {show(path)}, to carry them along: each has a note of its own",
        f"'{row}'",
        hint="take a layout such as split, or decode them: without keep_quantized any layout can hold them",
    )
