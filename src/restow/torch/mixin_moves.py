"""One role of one experts module, from one row to another, in memory: as views of what is there, or filled in
place.

A thin layer over `moves`: it makes the plan that a load of these tensors would have and runs it, or reads
strides off it. What it is given are locally held parts with the runs that they hold. Raises
`ShapeMismatchError` where those do not hold all that is asked for, and what `moves` raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

import torch

from restow.errors import CoverageError, ShapeMismatchError, show
from restow.layout import Sizes, axis_size
from restow.moves import Frozen, Side, freeze, moves
from restow.notation import Row
from restow.plans import Copy, Part, Plan
from restow.proof import Move, Pattern, Runs
from restow.targets import whole_target
from restow.torch.dtypes import dtype_name
from restow.torch.read import run_plan
from restow.torch.relayout import Known, as_view

Index = tuple[int, ...]
Held = Mapping[
    Index, tuple[Runs, torch.Tensor]
]  # by the indices of the row's name axes: what is held, and the memory


def indices(row: Row, sizes: Sizes) -> list[Index]:
    """The indices of every stored tensor of a row, in the order of its sides' places."""
    return list(product(*(range(axis_size(row, axis, sizes)) for axis in row.name_axes)))


def views(
    source: Row, target: Row, sizes: Sizes, held: Held, wanted: Mapping[Index, Runs]
) -> dict[Index, torch.Tensor]:
    """Every wanted tensor of `target` as a view of the memory in `held`, in the order of `wanted`."""
    if not wanted:
        return {}
    plan, memory = _plan(source, target, sizes, held, wanted, {})
    by_target: dict[int, list[Copy]] = {}
    for copy in plan.copies:
        by_target.setdefault(copy.target, []).append(copy)
    found = {}
    known: Known = {}
    for number, index in enumerate(wanted):
        view = as_view(plan, number, by_target.get(number, []), memory, known)
        assert view is not None, f"{target} is no view of {source}"
        found[index] = view
    return found


def fill(
    source: Row,
    target: Row,
    sizes: Sizes,
    held: Held,
    wanted: Mapping[Index, Runs],
    into: Mapping[Index, torch.Tensor],
) -> None:
    """Write every wanted tensor of `target` into its place in `into`: local tensors of the shapes their runs
    give.
    """
    if all(tensor.device.type == "meta" or not tensor.numel() for tensor in into.values()):
        return
    plan, memory = _plan(source, target, sizes, held, wanted, into)
    run_plan(plan, {_name(target, index): tensor for index, tensor in into.items()}, memory=memory)


@lru_cache(maxsize=512)
def _moves(source: Side, target: Side) -> tuple[Move, ...]:
    return moves(source, target)


def _plan(
    source: Row,
    target: Row,
    sizes: Sizes,
    held: Held,
    wanted: Mapping[Index, Runs],
    into: Mapping[Index, torch.Tensor],
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan, and the memory that its parts name. Targets are given by what is held of them, as whole
    tensors.
    """
    frozen = freeze(sizes)
    have, want = indices(source, sizes), indices(target, sizes)
    made = _cover(_side(source, frozen, have, {i: runs for i, (runs, _) in held.items()}),
                  _side(target, frozen, want, wanted))  # fmt: skip
    names = {index: _name(source, index) for index in held}
    parts, places = _places(have, held), _places(want, wanted)
    patterns: dict[Pattern, int] = {}
    copies = []
    for move in made:
        pattern = patterns.setdefault(move.pattern, len(patterns))
        copies.append(Copy(parts[move.source], move.at, places[move.target], move.start, pattern))
    first = next(iter(held.values()))[1].dtype
    plan = Plan(
        parts=tuple(Part(names[i], dtype_name(tensor.dtype), "", 0, 0) for i, (_, tensor) in held.items()),
        targets=tuple(
            whole_target(
                _name(target, i), tuple(map(_length, runs)), dtype_name(into[i].dtype if i in into else first)
            )
            for i, runs in wanted.items()
        ),
        patterns=tuple(patterns),
        copies=tuple(sorted(copies)),
    )
    return plan, {names[i]: tensor for i, (_, tensor) in held.items()}


def _places(every: Sequence[Index], some: Mapping[Index, object]) -> dict[int, int]:
    """Place among all of a row's tensors -> number among those that are there."""
    place = {index: i for i, index in enumerate(every)}
    return {place[index]: number for number, index in enumerate(some)}


def _side(row: Row, sizes: Frozen, every: Sequence[Index], runs: Mapping[Index, Runs]) -> Side:
    return Side(row, sizes, tuple((runs[index],) if index in runs else () for index in every))


def _cover(source: Side, target: Side) -> tuple[Move, ...]:
    try:
        return _moves(source, target)
    except CoverageError as error:
        raise ShapeMismatchError(
            f"all that this rank needs of '{show(target.row)}' in what it holds of '{show(source.row)}'",
            error.found,
            sections=error.sections,
            hint="nothing is communicated here: give each rank whole tensors, or DTensors that hold its part",
        ) from error


def _length(runs: Sequence[tuple[int, int]]) -> int:
    return sum(length for _, length in runs)


def _name(row: Row, index: Index) -> str:
    return f"{row.role} {index}"
