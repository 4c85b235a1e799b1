"""A and B of one role as a pair: its sizes solved from the shapes of its tensors, and every shape and rank judged.

A `Pair` is A and B of one role of one experts module (of one projection, where projections are stored apart), with the
rows and sizes that say where its elements lie. Rejected (`AdapterError`) are experts that the base lacks, ranks that the
config does not give, exchanged factors, and shapes that the base's sizes do not give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

from restow.adapter_config import Number
from restow.adapter_faults import exchanged, no_expert, other_rank, other_shape
from restow.adapter_keys import module_of
from restow.errors import AdapterError, RestowError
from restow.layout import axis_size, shape_of, solve_sizes
from restow.module import Shapes
from restow.notation import Row

Names = Mapping[tuple[int, ...], str]  # by the index of the name's axes, the expert's number first


@dataclass(frozen=True)
class Factor:
    """One factor of a pair: its row, its sizes (`e` is 1 where all experts share it), its tensors in the row's order.

    None stands for an expert that is not in the adapter.
    """

    row: Row
    sizes: Mapping[str, int]
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Pair:
    """A and B of one role: `labels` are the projections (of `in`) that they serve, `experts` those that are there."""

    path: str
    role: str
    labels: tuple[int, ...]
    a: Factor
    b: Factor
    sizes: Mapping[str, int]
    experts: tuple[int, ...]
    rank: int
    alpha: Number


class Stored(NamedTuple):
    """The tensors of a pair as they are stored. `rank` and `alpha` are the config's, `label` the projection if it is
    stored apart; a `shared` factor with one expert is all experts', and a `free` rank may be another than the config's.
    """

    path: str
    role: str
    label: int | None
    rows: tuple[Row, Row]
    names: tuple[Names, Names]
    rank: int
    alpha: Number
    shared: bool = False
    free: bool = False


def judged(stored: Stored, sizes: Mapping[str, int], labels: int, shapes: Shapes, path: object) -> Pair:
    """The pair, its sizes solved from its shapes; `sizes` are the base's, of `labels` projections in all.

    `path` is where the adapter lies. Raises `AdapterError`.
    """
    role, label, (row_a, row_b), (a, b) = stored.role, stored.label, stored.rows, stored.names
    known = {**sizes, **({"p": 1} if label is not None else {})}
    limit = known.get(f"e@{role}", known.get("e"))
    for (i, *_), name in a.items() if "e" in row_a.name_axes else ():
        if limit is not None and i >= limit:
            raise no_expert(path, name, i, limit)
    first_a, first_b = next(iter(a.values())), next(iter(b.values()))
    one_a, one_b = ({"e": 1} if stored.shared and shapes[n][:1] == (1,) else {} for n in (first_a, first_b))
    sizes_a = _solved(row_a, first_a, {**known, **one_a}, stored.rank, shapes, path)
    inner = {axis: n for axis, n in sizes_a.items() if axis != "e"}
    sizes_b = _solved(row_b, first_b, {**inner, **known, **one_b}, stored.rank, shapes, path)
    sizes_a, sizes_b = {**sizes_b, **sizes_a}, {**sizes_a, **sizes_b}
    if sizes_a["r"] != stored.rank and not stored.free:
        raise other_rank(path, shapes, module_of(first_a), (first_a, first_b), stored.rank, sizes_a["r"])
    for row, names, of in ((row_a, a, sizes_a), (row_b, b, sizes_b)):
        want = shape_of(row, of)
        for name in names.values():
            if shapes[name] != want:
                raise _misfit(name, row, want, stored.rank, shapes, path)
    count = limit or max(sizes_a["e"], sizes_b["e"])
    serves = () if role == "out" else (label,) if label is not None else tuple(range(labels))
    experts = tuple(sorted({i for i, *_ in a})) if "e" in row_a.name_axes else tuple(range(count))
    return Pair(
        stored.path, role, serves, _factor(row_a, sizes_a, a), _factor(row_b, sizes_b, b),
        {**sizes_a, "e": count}, experts, sizes_a["r"], stored.alpha,
    )  # fmt: skip


def _factor(row: Row, sizes: Mapping[str, int], names: Names) -> Factor:
    lengths = [axis_size(row, axis, sizes) for axis in row.name_axes]
    return Factor(row, sizes, tuple(names.get(index) for index in product(*map(range, lengths))))


def _solved(
    row: Row, name: str, known: Mapping[str, int], rank: int, shapes: Shapes, path: object
) -> dict[str, int]:
    """The sizes of a factor, known ones and those that its shape gives."""
    of = dict(known)
    folded = any(len(dim.factors) == 2 and "e" in str(dim) for dim in row.dims)
    if folded and "e" not in of and f"e@{row.base}" not in of:
        of["r"] = rank  # (e r) is one dim: without the number of experts the config's rank parts it
    fresh = solve_sizes(row, shapes[name], of)
    if fresh is None:
        raise _misfit(name, row, _expected(row, {**of, "r": of.get("r", rank)}), rank, shapes, path)
    return {**of, **fresh}


def _expected(row: Row, sizes: Mapping[str, int]) -> tuple[object, ...]:
    """The shape that a row has by these sizes; a dim as the row spells it where they do not say it."""
    out: list[object] = []
    for dim in row.dims:
        try:
            out.append(prod(axis_size(row, f.axis, sizes) for f in dim.factors))
        except RestowError:
            out.append(str(dim))
    return tuple(out)


def _misfit(
    name: str, row: Row, want: Sequence[object], rank: int, shapes: Shapes, path: object
) -> AdapterError:
    """A shape that is wrong: exchanged factors and another rank are told from other sizes."""
    word, partner_word = ("lora_A", "lora_B") if "lora_A" in name else ("lora_B", "lora_A")
    partner = name.replace(word, partner_word)
    if len(shapes[name]) == len(shapes.get(partner, ())) == 2:
        one, other = (name, partner) if word == "lora_A" else (partner, name)
        a, b = shapes[one], shapes[other]
        if (a[0], b[1]) != (rank, rank) and (a[1], b[0]) == (rank, rank):
            return exchanged(path, shapes, one, other)
        if a[0] == b[1] != rank and "e" in row.name_axes:
            return other_rank(path, shapes, module_of(name), (name, partner), rank, a[0])
    return other_shape(path, shapes, module_of(name), name, want)
