"""From Hugging Face to native: one tensor per expert and projection, gathered into grouped tensors, each
filled once.

Names are matched by their ends, so any prefix is taken and kept. Everything is judged before the first value
is let go: missing experts, numbers and names that the model has no place for, shapes, quantised values. Then
each grouped tensor is allocated at its final size and filled by the planned moves, with nothing in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from restow.boxes import held as held_shape
from restow.errors import (
    ExpertShapeError,
    MissingExpertsError,
    QuantizationError,
    RestowError,
    UnexpectedTensorError,
    show,
)
from restow.layout import Layout, Sizes, axis_size, name_of, shape_of, solve_sizes
from restow.match import Matcher
from restow.notation import Row
from restow.torch.mixin_mesh import HERE, Spread, grouped_spread
from restow.torch.mixin_moves import Index, fill, indices
from restow.torch.storage import slot_of


class Group(NamedTuple):
    """The stored tensors of one role of one experts module: names by the indices of the row's name axes."""

    path: str
    row: Row
    names: dict[Index, str]


def native_name(group: Group, target: Row) -> str:
    """The name of the grouped tensor of `target` that a group becomes."""
    return f"{group.path}.{name_of(target, (), {})}" if group.path else name_of(target, (), {})


def groups_of(names: Sequence[str], layout: Layout, segment: str) -> dict[tuple[str, str], Group]:
    """Every group of `layout` among these names, by (module path, role), in the order of the names."""
    matcher = Matcher(((0, segment, row) for row in layout.rows), {})
    found: dict[tuple[str, str], Group] = {}
    for name in names:
        for hit in matcher.match(name):
            found.setdefault((hit.path, hit.row.role), Group(hit.path, hit.row, {})).names[hit.index] = name
    return found


def check_names(state: Mapping[str, Any], layouts: Sequence[Layout], segment: str, experts: int) -> None:
    """Raise for tensors of single experts that would be lost: other projections, scales, numbers that are too
    high.
    """
    claimed = {
        n
        for lay in layouts
        for group in groups_of(list(state), lay, segment).values()
        for n in group.names.values()
    }
    scales = [name for name in state if name.endswith("_scale_inv")]
    if scales:
        raise QuantizationError(
            "values that were dequantised", f"{len(scales)} scales beside them",
            tensor=scales[0], sections=[("scales", map(show, scales))],
            hint="multiply them in before from_hf, or read the checkpoint with restow.load, which decodes it",
        )  # fmt: skip
    stray = [name for name in state if name not in claimed and _expert_number(name, segment) is not None]
    if stray:
        raise UnexpectedTensorError(
            "a row for every tensor of a single expert", f"{len(stray)} without one",
            tensor=stray[0],
            sections=[("tensors", map(show, stray)), ("rows", [str(row) for lay in layouts for row in lay.rows])],
            hint="they would be lost: rename them to the rows' names, or take them out if they are not wanted",
        )  # fmt: skip
    high = [name for name in claimed if (_expert_number(name, segment) or 0) >= experts]
    if high:
        raise UnexpectedTensorError(
            f"expert numbers from 0 to {experts - 1}, as moe_config.n_routed_experts has it",
            f"{len(high)} tensors of others",
            tensor=min(high), sections=[("tensors", map(show, sorted(high)))],
        )  # fmt: skip


def _expert_number(name: str, segment: str) -> int | None:
    """The expert number of a name with a run `.SEGMENT.NUMBER.`, or None."""
    _, found, rest = f".{name}".rpartition(f".{segment}.")
    number = rest.partition(".")[0]
    return int(number) if found and "." in rest and number.isdecimal() and number.isascii() else None


def check_complete(
    paths: Mapping[str, Mapping[str, Group]],
    roles: Sequence[Row],
    sizes: Sizes,
    experts: Mapping[tuple[str, str], Sequence[int]],
    rank: str = "",
) -> None:
    """Raise `MissingExpertsError` unless every module has each of `roles` for the experts needed of it here.

    `experts` gives them by (path, role).
    """
    missing, total = [], 0
    for path, groups in paths.items():
        for row in roles:
            names = groups[row.role].names if row.role in groups else {}
            here = set(experts[path, row.role])
            at = row.name_axes.index("e")
            wanted = [index for index in indices(row, sizes) if index[at] in here]
            total += len(wanted)
            missing += [f"{path}.{name_of(row, index, sizes)}" for index in wanted if index not in names]
    if missing:
        raise MissingExpertsError(
            f"{total} tensors of single experts{rank}",
            f"{len(missing)} of them missing",
            tensor=missing[0],
            sections=[
                ("missing", map(show, missing)),
                ("fact", [f"Expert weights missing from checkpoint{rank}: {len(missing)}/{total} required"]),
            ],
            hint="nothing is filled in their place: get the checkpoint, or the rest of it, again",
        )  # fmt: skip


def merge(
    state: Mapping[str, Any],
    group: Group,
    target: Row,
    sizes: Sizes,
    *,
    dtype: torch.dtype | None,
    mesh: DeviceMesh | None = None,
) -> torch.Tensor:
    """The grouped tensor of `target` that a group of `state` fills, on this rank's part of `mesh`.

    `dtype` None keeps the sources' own. Raises `ExpertShapeError` for shapes that differ from each other or
    from `sizes`, `QuantizationError` for values that are no floats of 16 bits or more, and where the values
    given to this rank do not hold its part.
    """
    values = {index: state[name] for index, name in group.names.items()}
    sizes = sizes_of(group, values, sizes)
    spread = grouped_spread(mesh) if mesh is not None else HERE
    shape = shape_of(target, sizes)
    runs = spread.runs(native_name(group, target), shape)
    here = _experts(target, runs)
    at = group.row.name_axes.index("e")
    held = {}
    for index, value in values.items():
        if index[at] in here:
            slot = slot_of(group.names[index], value, meta=True)
            held[index] = (slot.target.runs, slot.local)
    first = next(iter(values.values()))
    into = torch.empty(held_shape(runs), dtype=dtype or first.dtype, device=_device(first, spread))
    fill(group.row, target, sizes, held, {(): runs}, {(): into})
    return spread.wrapped(into, shape)


def _experts(row: Row, runs: Sequence[Sequence[tuple[int, int]]]) -> set[int]:
    dim = next(i for i, one in enumerate(row.dims) if str(one) == "e")
    return {i for start, length in runs[dim] for i in range(start, start + length)}


def _device(first: torch.Tensor, spread: Spread) -> torch.device:
    device = first.to_local().device if isinstance(first, DTensor) else first.device
    if spread.mesh is None or device.type in ("meta", spread.mesh.device_type):
        return device
    return torch.device(spread.mesh.device_type)


def sizes_of(group: Group, values: Mapping[Index, torch.Tensor], sizes: Sizes) -> dict[str, int]:
    """All sizes of a group, its tensors' shapes and dtypes judged."""
    known = dict(sizes)
    for index, value in values.items():
        name = group.names[index]
        if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise QuantizationError(
                f"{show(name)} as floats of 16 bits or more", f"{value.dtype}", tensor=name,
                hint="multiply its scales in before from_hf, or read the checkpoint with restow.load, which decodes it",
            )  # fmt: skip
        more = solve_sizes(group.row, tuple(value.shape), known)
        if more is None:
            raise _shape_error(name, value, group.row, known)
        known.update(more)
    return known


def _shape_error(name: str, value: torch.Tensor, row: Row, sizes: Sizes) -> RestowError:
    known = ", ".join(
        f"{axis} is {sizes[axis]}"
        for axis in sorted(sizes)
        if axis in row.axes and axis_size(row, axis, sizes)
    )
    return ExpertShapeError(
        f"shape '{' '.join(map(str, row.dims))}' of {show(name)}, where {known}",
        f"{list(value.shape)}",
        tensor=name,
        sections=[("tensor", [show(name)]), ("row", [str(row)])],
        hint="f is moe_config.moe_inter_dim; a plain tensor must be whole, a part must be a DTensor that says so",
    )
