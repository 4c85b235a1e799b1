"""One candidate against one experts module: sizes solved from config and shapes together, and every reason against it.

Global sizes come first, shapes give what is left, and both must agree. It rejects tensors too few, too many, of other
shapes, and scales that are lost or have other grids; as a list of errors, since another candidate may fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import prod
from operator import ge, mul
from typing import NamedTuple

from restow.boxes import strides_of
from restow.codec import Announced, lost_scales, odd_grids
from restow.codecs import COMPANIONS
from restow.coded_rows import ragged
from restow.errors import RestowError, SizeError
from restow.family import Spelling
from restow.layout import Layout, SizeLine, axis_size, drop_own_count, name_of, shape_of, solve_sizes
from restow.misfits import count_errors, shape_error
from restow.module import Module, Shapes
from restow.notation import Row

HOLES = 1000  # tensors named at most when nearly all of a module is missing


class Known(NamedTuple):
    """What is known before a module is looked at: global sizes, sizes of dims held in part, whether parts are fine.

    `lines` are the family's, which tell the sizes that a role has of its own.
    """

    sizes: Mapping[str, int]
    lines: Sequence[SizeLine]
    local: Mapping[str, int]
    partial: bool
    what: str
    codec: Announced | None = None


def fit(
    path: str,
    matched: Mapping[tuple[str, tuple[int, ...]], str],
    spelling: Spelling,
    shapes: Shapes,
    known: Known,
) -> tuple[Module, list[RestowError]]:
    """One candidate against one module: the module as it would be, and every reason against it."""
    layout, local = spelling.layout, known.local
    by_row: dict[str, dict[tuple[int, ...], str]] = {row.role: {} for row in layout.rows}
    for (role, index), name in matched.items():
        by_row[role][index] = name
    solved = _solved(layout, by_row, shapes, known)
    errors: list[RestowError] = []
    tensors: dict[str, tuple[str | None, ...]] = {}
    wrong: list[tuple[str, str]] = []
    missing, lacking = list[str](), 0
    unscaled: list[str] = []
    extra: list[str] = []
    for row in layout.rows:
        found = by_row[row.role]
        lengths = [axis_size(row, axis, solved) for axis in row.name_axes]
        strides = strides_of(lengths)
        slots: list[str | None] = [None] * prod(lengths)
        expected = _expected(row, {**solved, **local})
        loose = ragged(row)
        for index, name in found.items():
            if any(map(ge, index, lengths)):
                extra.append(name)
                continue
            slots[sum(map(mul, index, strides))] = name
            shape = shapes[name]
            if shape != expected and not (loose and len(shape) == 1):
                wrong.append((name, _shape_text(row, {**solved, **local})))
        if row.role.endswith(COMPANIONS):
            names = (name_of(row, _index(i, lengths), solved) for i, name in enumerate(slots) if name is None)
            unscaled += [f"{path}.{name}" for name in names]
        elif not known.partial or not found:
            gaps = (i for i, name in enumerate(slots) if name is None)
            missing += [f"{path}.{name_of(row, _index(i, lengths), solved)}" for i in islice(gaps, HOLES)]
            lacking += slots.count(None)
        tensors[row.role] = tuple(slots)
    module = Module(path, layout, spelling.names, solved, tensors, spelling.codec)
    errors += count_errors(module, missing, lacking, extra, by_row, known.what)
    scales = {name for role, names in tensors.items() if role.endswith(COMPANIONS) for name in names}
    grids = [(name, want, shapes[name]) for name, want in wrong if name in scales]
    if len(grids) < len(wrong):
        told = bool(known.sizes.keys() - {"p"})
        errors.append(shape_error(module, [(n, want) for n, want in wrong if n not in scales], shapes, told))
    if not errors and unscaled:  # without its weight a scale is not missing
        errors.append(lost_scales(unscaled))
    if not errors and grids:
        errors.append(odd_grids(grids, known.codec))
    return module, errors


def _solved(
    layout: Layout, by_row: Mapping[str, Mapping[tuple[int, ...], str]], shapes: Shapes, known: Known
) -> dict[str, int]:
    """The sizes of a module: those that are known, then those that its names and one tensor a row give, row by row."""
    own = _own_sizes((*known.lines, *layout.sizes))
    solved = dict(known.sizes)
    for row in layout.rows:
        drop_own_count(row, by_row[row.role], shapes, solved)
        _count_name_axes(row, by_row[row.role], solved)
    for row in layout.rows:
        mine = own.get(row.base, {})
        for name in list(by_row[row.role].values())[:1]:
            given = {**solved, **known.local}
            for axis in mine.keys() - known.sizes.keys():
                given.pop(axis, None)
            for axis, size in (solve_sizes(row, shapes[name], given) or {}).items():
                if axis in mine:
                    solved |= dict.fromkeys(mine[axis], size)
                elif axis not in known.local:
                    solved[axis] = size
    return solved


def _own_sizes(lines: Sequence[SizeLine]) -> dict[str, dict[str, list[str]]]:
    """Role -> axis -> the sizes that are the same one: `f` of `in2` is `f@in2`, and `f@out2` if its line says the same.

    Numbers of experts are not among them: a role with fewer than others has lost some, unless the config says more.
    """
    mine = [line for line in lines if line.role and line.axis != "e"]
    own: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for line in mine:
        alike = [other.key for other in mine if (other.axis, other.terms) == (line.axis, line.terms)]
        own[line.role or ""][line.axis] = alike
    return own


def _expected(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of a row's tensors; None where neither config nor shapes give every size."""
    try:
        return shape_of(row, sizes)
    except SizeError:
        return None


def _shape_text(row: Row, sizes: Mapping[str, int]) -> str:
    """The shape of a row's tensors for people: `[12, (p f), 32]` where f is not known."""
    shapes = (_expected(replace(row, dims=(dim,)), sizes) for dim in row.dims)
    return f"[{', '.join(str(s[0] if s else dim) for s, dim in zip(shapes, row.dims, strict=True))}]"


def _count_name_axes(row: Row, found: Mapping[tuple[int, ...], str], solved: dict[str, int]) -> None:
    """A name axis without a size from the config has one more than the largest number in the names.

    A number out of all proportion to the names is a stray: it must not make the rest a list of holes.
    """
    for position, axis in enumerate(row.name_axes):
        if axis in row.labels or axis in solved or f"{axis}@{row.base}" in solved or not found:
            continue
        numbers = {index[position] for index in found}
        solved[axis] = 1 + max(n for n in numbers if n < HOLES + 4 * len(numbers))


def _index(at: int, lengths: Sequence[int]) -> tuple[int, ...]:
    index = []
    for length in reversed(lengths):
        at, i = divmod(at, length)
        index.append(i)
    return tuple(reversed(index))
