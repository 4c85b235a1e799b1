"""The rows that a weight's row turns into under a codec, and the row of what its codes decode to.

Codes and companions are rows of the layout like all others, so that nobody needs a second mechanism for them. Nothing is
rejected: a layout whose input axis lies where a codec's rows do not have it does not suit the codec.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from restow.codecs import CODES, WEIGHTS, WORD_BITS, Codec, Companion, spelled
from restow.layout import Layout
from restow.notation import Dim, Factor, Row
from restow.roles import LEAF


def coded_layouts(layout: Layout, codec: Codec, roles: Sequence[str] = WEIGHTS) -> Iterator[Layout]:
    """A layout under a codec: with the rows of its codes and companions; once more with spares, if it has any."""
    for spares in (False, True) if codec.spares else (False,):
        rows: list[Row] = []
        for row in layout.rows:
            if row.role not in roles:
                rows.append(row)
                continue
            rows += [_row(row, each, codec) for each in (codec.codes, *codec.companions(spares))]
        yield Layout(tuple(rows))


def is_linear(layout: Layout, at: int = -1) -> bool:
    """Whether every weight has its input axis last, as torch's Linear: then a row of a scale grid is one of outputs.

    `at` -2: whether it has it before the last, as `x @ W` wants it.
    """
    there = {row.role: str(row.dims[at]) for row in layout.rows if row.role in WEIGHTS and len(row.dims) > 1}
    return {"in", "out"} <= there.keys() and all(LEAF[role][-1] == axis for role, axis in there.items())


def suits(layout: Layout, codec: Codec) -> bool:
    """Whether a layout has the input axis where a codec's rows have it."""
    return is_linear(layout, -2 if codec.across else -1)


def ragged(row: Row) -> bool:
    """Whether the tensors of a row have lengths of their own: notes that values depend on."""
    return row.role.startswith(f"{row.base}.scale") and _length(row.base) in row.dims


def _length(base: str) -> Dim:
    return Dim((Factor(f"s{base}"),))


def _row(row: Row, companion: Companion, codec: Codec) -> Row:
    *head, last = row.name if isinstance(row.name[-1], str) else (*row.name, "")
    assert isinstance(last, str)
    word = spelled(companion.name, last)
    name = (*head, word) if word else tuple(head)
    role = row.role + companion.role
    if companion is codec.codes and companion.dims == ("r", "c"):
        role = row.role
    stack, matrix = row.dims[:-2], dict(zip("rc", row.dims[-2:], strict=True))
    dims = [_dim(word, matrix, codec.block, row.base) for word in companion.dims]
    if not companion.dims or (companion.role.startswith(".spare") and companion.dims == ("2",)):
        stack = ()
    return Row(role, name, (*stack, *dims))


def _dim(word: str, matrix: dict[str, Dim], block: tuple[int, int], base: str) -> Dim:
    letter, _, by = word.partition("/")
    if letter == "rc":
        return Dim((*matrix["r"].factors, *matrix["c"].factors), int(by))
    if letter == "?":
        return _length(base)
    if letter not in matrix:
        return Dim((Factor("", 1, int(word)),))
    divisor = int(by) if by.isdecimal() else {"": 1, "R": block[0], "C": block[1]}[by]
    if divisor == 0:  # one scale for all of them
        return Dim((Factor("", 1, 1),))
    return divided(matrix[letter], divisor)


def divided(dim: Dim, by: int) -> Dim:
    """A dim with one place for every `by` of its own."""
    if by == 1:
        return dim
    if len(dim.factors) == 1 and dim.divisor == 1:
        return Dim((replace(dim.factors[0], divisor=by),))
    return Dim(dim.factors, by)


def logical_row(codec: Codec, row: Row) -> Row:
    """The row of what a row of codes decodes to: packed words along an axis put together again.

    `in.codes w1_packed e f d/8` with 4 of 32 bits, and `in.codes w1_blocks e f d/32 16` with 4 of 8 bits, are
    `in ... e f d`.
    """
    per = WORD_BITS[codec.dtypes[0]] // codec.bits
    dims: list[Dim] = []
    left = 1
    for dim in row.dims:
        factor = dim.factors[0]
        if left > 1:
            assert factor.fixed and left % factor.fixed == 0, f"the table of codecs: {row}"
            left //= factor.fixed
            continue
        if factor.fixed == 1:
            continue
        by = dim.divisor if dim.divisor != 1 else factor.divisor if len(dim.factors) == 1 else 1
        if by == 1:
            dims.append(dim)
            continue
        assert by % per == 0, f"the table of codecs: {row}"
        left = by // per
        dims.append(Dim(tuple(replace(f, divisor=1) for f in dim.factors)))
    assert left == 1, f"the table of codecs: {row}"
    return Row(row.role.removesuffix(CODES), row.name, tuple(dims), row.exact)
