"""Weights outside the experts in codes: found by name, dtype, shape and companions together, in no layout's rows.

Each has the rows of a matrix under one of the codecs that the config announces. Rejected (`QuantizationError`) is a note
that should say the shape of such a weight and does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from restow.codecs import Codec, spelled, weight_of
from restow.coded_rows import coded_layouts, logical_row
from restow.entries import Entry
from restow.errors import QuantizationError, show
from restow.files import open_source
from restow.layout import Layout, shape_of
from restow.notation import Dim, Factor, Row

NOTE_LIMIT = 4096  # bytes of the JSON beside a weight of bitsandbytes
_WEIGHT = Row("weight", ("weight",), (Dim((Factor("x0"),)), Dim((Factor("x1"),))))


class Matrix(NamedTuple):
    """A coded weight outside the experts: `name` without what the codec adds, `raw` the name of its codes.

    `row` is that of what it decodes to, `scale_rows` those of its scales, whose raw names are `scales`; `spares` are
    the raw names of what else lies beside it.
    """

    codec: Codec
    name: str
    raw: str
    shape: tuple[int, int]
    row: Row
    scale_rows: tuple[Row, ...]
    scales: tuple[str, ...]
    spares: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the axes of the rows."""
        return _sizes(self.shape)


def find_matrix(
    name: str, raw: Mapping[str, Entry], codecs: Sequence[Codec], path: str | None
) -> Matrix | None:
    """The tensor `name` as a coded weight, if its dtype, its shape and its companions in `raw` say so.

    `path` is the checkpoint's. Raises `QuantizationError`.
    """
    entry = raw[name]
    for codec in codecs:
        weight = weight_of(codec.codes.name, name)
        if weight is None or entry.dtype not in codec.dtypes or len(entry.shape) != 2:
            continue
        scales = tuple(spelled(scale.name, weight) for scale in codec.scales)
        if not all(scale in raw for scale in scales):
            continue
        codes, row, at = _rows(codec)
        if len(row.dims) > 1:
            shape = entry.shape[0], entry.shape[1] * codes.dims[-1].factors[0].divisor
        elif (noted := _noted_shape(codec, weight, raw, path)) is not None:
            shape = noted
        else:
            continue
        if not _fits(codec, at, shape, [raw[scale] for scale in scales]):
            continue
        spares = tuple(s for one in codec.spares if (s := spelled(one.name, weight)) in raw)
        return Matrix(codec, weight, name, shape, row, at, scales, spares)
    return None


@lru_cache(maxsize=64)
def _rows(codec: Codec) -> tuple[Row, Row, tuple[Row, ...]]:
    """The rows of a matrix's codes, of what they decode to, and of its scales in the codec's order."""
    codes, *scales = next(coded_layouts(Layout((_WEIGHT,)), codec, (_WEIGHT.role,))).rows
    return codes, logical_row(codec, codes), tuple(scales)


def _sizes(shape: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("x0", "x1"), shape, strict=True))


def _fits(codec: Codec, rows: Sequence[Row], shape: tuple[int, int], scales: Sequence[Entry]) -> bool:
    """Whether the scales have the dtypes of the table, and the shapes that the weight's gives."""
    for one, row, entry in zip(codec.scales, rows, scales, strict=True):
        odd = len(entry.shape) != 1 if one.how == "offset" else shape_of(row, _sizes(shape)) != entry.shape
        if odd or entry.dtype not in one.dtypes:
            return False
    return True


def _noted_shape(
    codec: Codec, weight: str, raw: Mapping[str, Entry], path: str | None
) -> tuple[int, int] | None:
    """Rows and columns as a note beside flat codes says them; None where there is none."""
    notes = (spelled(one.name, weight) for one in codec.companions(True) if one.dims == ("?",))
    note = next((n for n in notes if n in raw), None)
    if note is None or path is None:
        return None
    (piece,) = raw[note].pieces
    with open_source(Path(path) / piece.file if piece.file else path) as file:
        text = file.pread(piece.begin, min(piece.end - piece.begin, NOTE_LIMIT))
    expected = f"the shape of {show(weight)} in JSON"
    try:
        rows, columns = json.loads(text)["shape"]
    except (ValueError, TypeError, KeyError) as error:
        raise QuantizationError(expected, f"{type(error).__name__}", path=path, tensor=note) from error
    if not all(type(n) is int and 0 < n < 2**31 for n in (rows, columns)):
        raise QuantizationError(expected, show(repr([rows, columns])), path=path, tensor=note)
    return rows, columns
