"""Grouped experts on a device mesh: which experts a rank holds, and on what mesh one expert of them still
lies.

Every range is DTensor's own (`storage.runs_at`), so uneven numbers of experts agree with what DTensor holds:
10 on 4 ranks are 3, 3, 3, 1. Nothing communicates. Rejected by name: placements that one expert's tensor
cannot have, and meshes with dims other than ep, ep_shard and ep_replicate where a tensor is to be placed on
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from restow.boxes import strides_of
from restow.errors import UsageError, show
from restow.layout import Sizes, axis_size
from restow.notation import Row
from restow.targets import Runs
from restow.torch.storage import runs_at

# Which axis each mesh dim of an experts mesh cuts, by its dim of the grouped tensor; None: a copy on every rank.
MESH_DIMS = {"ep": 0, "ep_shard": 1, "ep_replicate": None}


class Spread(NamedTuple):
    """Where a tensor lies: a mesh (None: nowhere but here) and its placements."""

    mesh: DeviceMesh | None
    placements: tuple[Placement, ...] = ()

    def runs(self, name: str, shape: Sequence[int]) -> Runs:
        """What this rank holds of a tensor of this global shape, per dim."""
        if self.mesh is None:
            return tuple(((0, length),) for length in shape)
        at = self.mesh.get_coordinate()
        if at is None:
            return tuple(() for _ in shape)
        return runs_at(name, self.placements, tuple(self.mesh.shape), tuple(at), shape)

    def wrapped(self, local: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """`local` as this rank's part of a tensor of this global shape: a DTensor, or itself where there is
        no mesh.
        """
        if self.mesh is None:
            return local
        stride = strides_of(tuple(shape))
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


HERE = Spread(None)


def grouped_spread(mesh: DeviceMesh | None) -> Spread:
    """Where grouped experts lie on a mesh of ep, ep_shard, ep_replicate: experts over ep, dim 1 over
    ep_shard.

    As NeMo places them: without ep_shard and ep_replicate where both have one rank. Raises `UsageError` for
    other dims.
    """
    if mesh is None:
        return HERE
    names = tuple(mesh.mesh_dim_names or ())
    strange = [name for name in names if name not in MESH_DIMS]
    if strange or not names:
        raise UsageError(
            f"a mesh with dims named {', '.join(MESH_DIMS)}",
            f"{', '.join(map(show, names)) or 'no names'}",
            hint="give the part of the mesh that the experts lie on, e.g. mesh['ep_replicate', 'ep_shard', 'ep']",
        )
    several = any(name != "ep" and mesh[name].size() > 1 for name in names)
    kept = tuple(name for name in names if name == "ep" or several)
    if not kept:
        return HERE
    dims = (MESH_DIMS[name] for name in kept)
    return Spread(mesh[kept], tuple(Replicate() if dim is None else Shard(dim) for dim in dims))


def expert_ids(mesh: DeviceMesh | None, count: int) -> tuple[int, ...]:
    """The experts, of `count`, that this rank holds on a mesh; all of them where the mesh has no ep dim."""
    if mesh is None or "ep" not in (mesh.mesh_dim_names or ()):
        return tuple(range(count))
    ep = mesh["ep"]
    (runs,) = Spread(ep, (Shard(0),)).runs("experts", (count,))
    return numbers(runs)


def numbers(runs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The indices that runs hold, in local order."""
    return tuple(i for start, length in runs for i in range(start, start + length))


def one_expert(name: str, tensor: torch.Tensor, dim: int = 0) -> Spread:
    """Where one expert of a grouped tensor lies: the mesh without the dims that cut `dim`, placements as they
    were.

    `HERE` where that leaves one rank: then every expert of the local tensor is a plain tensor, the plain
    local split. Raises `UsageError` for a mesh without names that it would have to cut.
    """
    if not isinstance(tensor, DTensor):
        return HERE
    mesh = tensor.device_mesh
    kept = [
        (i, placement) for i, placement in enumerate(tensor.placements)
        if not (isinstance(placement, Shard) and placement.dim % tensor.ndim == dim)
        and not (mesh.mesh_dim_names and mesh.mesh_dim_names[i] == "ep" and isinstance(placement, Replicate))
    ]  # fmt: skip
    if all(mesh.size(i) == 1 for i, _ in kept):
        return HERE
    if len(kept) == mesh.ndim:
        return Spread(mesh, tuple(tensor.placements))
    if mesh.mesh_dim_names is None:
        raise UsageError(
            f"a mesh with names below {show(name)}", "none",
            tensor=name, hint="init_device_mesh(..., mesh_dim_names=(...)): its dims are taken apart by name",
        )  # fmt: skip
    return Spread(mesh[tuple(mesh.mesh_dim_names[i] for i, _ in kept)], tuple(p for _, p in kept))


def moved(name: str, spread: Spread, source: Row, target: Row, sizes: Sizes) -> Spread:
    """`spread` for a tensor of `target` in place of one of `source`: each cut dim where the other row has its
    axis.

    Raises `UsageError` where one has no such dim of its own (a cut through `(p f)` leaves no whole
    projection).
    """
    places: list[Placement] = []
    for placement in spread.placements:
        if isinstance(placement, Replicate):
            places.append(placement)
            continue
        dim = _same_dim(source, placement.dim, target, sizes) if type(placement) is Shard else None
        if dim is None:
            raise UsageError(
                f"whole dims, or dims that '{target}' has too, of {show(name)} on each rank",
                f"{placement} of '{source}'",
                tensor=name,
                hint="shard other dims of the grouped tensor, or load and save it with restow.load and restow.save",
            )
        places.append(Shard(dim))
    return spread._replace(placements=tuple(places))


def _same_dim(source: Row, dim: int, target: Row, sizes: Sizes) -> int | None:
    """The dim of `target` that holds the same axes as a dim of `source`, those of one element apart."""

    def axes(row: Row, i: int) -> list[str]:
        return [key for key in row.dims[i].keys if axis_size(row, key, sizes) != 1]

    wanted = axes(source, dim)
    return next((i for i in range(len(target.dims)) if axes(target, i) == wanted), None)
