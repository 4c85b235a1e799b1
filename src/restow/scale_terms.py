"""How an element's place in a weight gives its scale's place: terms, from the rows of both.

Places follow from axes, never from a ratio of shapes. Rejected are scales along an axis or a group that the weight's row
does not have (`QuantizationError`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from restow.boxes import strides_of
from restow.coding import Term
from restow.errors import QuantizationError
from restow.layout import axis_size, shape_of
from restow.notation import Dim, Row


def terms_of(row: Row, scale: Row, sizes: Mapping[str, int]) -> tuple[Term, ...]:
    """How an element's place in a weight of `row` gives its scale's place in a tensor of `scale`."""
    terms = []
    for to, dim in enumerate(scale.dims):
        keys = dim.keys
        lengths = [axis_size(scale, key, sizes) for key in keys]
        for key, step in zip(keys, strides_of(lengths), strict=True):
            at = _axis_in(row, key, dim, sizes)
            if at is not None:
                terms.append(Term(*at, to, step))
    return tuple(terms)


def _axis_in(row: Row, key: str, dim: Dim, sizes: Mapping[str, int]) -> tuple[int, int, int, int] | None:
    """(dim, stride there, size, divisor) of a scale's axis in the weight's row; None for a fixed size and name axes."""
    if dim.divisor != 1:  # over a whole group: (p f)/128
        for i, there in enumerate(row.dims):
            if [f.axis for f in there.factors] == [f.axis for f in dim.factors]:
                return i, 1, shape_of(replace(row, dims=(there,)), sizes)[0], dim.divisor
        raise QuantizationError(f"a dim ({' '.join(map(str, dim.factors))}) in the codes' row", f"'{row}'")
    axis, _, by = key.partition("/")
    if axis.isdecimal():
        return None
    for i, there in enumerate(row.dims):
        keys = there.keys
        if axis in keys:
            lengths = [axis_size(row, k, sizes) for k in keys]
            at = keys.index(axis)
            return i, strides_of(lengths)[at], lengths[at], int(by or 1)
    raise QuantizationError(f"an axis '{axis}' in the codes' row", f"'{row}'")
