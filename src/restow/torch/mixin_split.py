"""From native to Hugging Face: one grouped tensor of the experts as one tensor per expert and projection.

Which element goes where is the rows' to say. Where a DTensor leaves plain experts on this rank, they are
views of its own memory, into which a loader can read; where a mesh cuts one expert too, or the tensor is a
plain one, they are contiguous. Rejected: global shapes that the model's sizes do not give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from restow.errors import ExpertShapeError, show
from restow.layout import Sizes, axis_size, name_of, shape_of, solve_sizes
from restow.notation import Row, parse_row
from restow.torch.mixin_mesh import Spread, moved, numbers, one_expert
from restow.torch.mixin_moves import Held, Index, fill, indices, views
from restow.torch.storage import slot_of


class Grouped(NamedTuple):
    """A grouped tensor, its row, all sizes, the experts that are here, and where each of them lies."""

    name: str
    tensor: torch.Tensor
    row: Row
    sizes: Sizes
    experts: tuple[int, ...]
    spread: Spread

    @property
    def local(self) -> torch.Tensor:
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor

    @property
    def plain_split(self) -> bool:
        """Whether this is a DTensor every local expert of which is a plain tensor."""
        return isinstance(self.tensor, DTensor) and self.spread.mesh is None


def grouped(name: str, tensor: torch.Tensor, row: Row, sizes: Sizes) -> Grouped:
    """A grouped tensor of `row`. Raises `ExpertShapeError` where its global shape is not what `sizes` and row
    give.
    """
    shape = tuple(tensor.shape)
    more = solve_sizes(row, shape, sizes)
    dim = next(i for i, one in enumerate(row.dims) if "e" in one.keys)
    if more is None:
        known = {axis: size for axis, size in sizes.items() if axis in row.axes}
        raise ExpertShapeError(
            f"shape '{' '.join(map(str, row.dims))}' of {show(name)}, where "
            + ", ".join(f"{axis} is {size}" for axis, size in sorted(known.items())),
            f"{list(shape)}",
            tensor=name,
            sections=[("tensor", [show(name)]), ("row", [str(row)])],
            hint="sizes are moe_config.n_routed_experts and moe_config.moe_inter_dim; p is 2 where _is_gated_moe",
        )
    slot = slot_of(name, tensor, meta=True)
    return Grouped(
        name,
        tensor.detach(),
        row,
        {**sizes, **more},
        numbers(slot.target.runs[dim]),
        one_expert(name, tensor, dim),
    )


def split(source: Grouped, target: Row, *, alias: bool) -> dict[str, torch.Tensor]:
    """The local experts of `source` by the names of `target`, expert by expert: views where `alias`, else
    contiguous.

    On a mesh that cuts one expert they are DTensors of the whole expert's shape on that part of the mesh.
    """
    sizes, shape = source.sizes, shape_of(target, source.sizes)
    spread = moved(source.name, source.spread, source.row, target, sizes)
    runs = spread.runs(source.name, shape)
    wanted = dict.fromkeys(_local(target, sizes, source.experts), runs)
    held: Held = {(): (slot_of(source.name, source.tensor, meta=True).target.runs, source.local)}
    if alias:
        made = views(source.row, target, sizes, held, wanted)
    else:
        size = [sum(length for _, length in dim) for dim in runs]
        made = {
            index: torch.empty(size, dtype=source.tensor.dtype, device=source.local.device)
            for index in wanted
        }
        fill(source.row, target, sizes, held, wanted, made)
    return {name_of(target, index, sizes): spread.wrapped(tensor, shape) for index, tensor in made.items()}


def _local(row: Row, sizes: Sizes, experts: Iterable[int]) -> list[Index]:
    """The indices of a row's tensors of these experts, expert by expert, in the order of the experts."""
    at = row.name_axes.index("e")
    by_expert: dict[int, list[Index]] = {}
    for index in indices(row, sizes):
        by_expert.setdefault(index[at], []).append(index)
    assert axis_size(row, "e", sizes) == len(by_expert)
    return [index for expert in experts for index in by_expert[expert]]


def split_any(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The local experts of any tensor whose first dim is `count` experts, as views, in order; DTensors stay
    DTensors.
    """
    axes = [f"x{i}" for i in range(1, weight.ndim)]
    layout = [
        parse_row(f"any {name} {' '.join(dims) or '-'}")
        for name, dims in (("all", ["e", *axes]), ("{e}", axes))
    ]
    sizes = dict(zip(("e", *axes), weight.shape, strict=True))
    return list(split(grouped("weight", weight, layout[0], sizes), layout[1], alias=True).values())
