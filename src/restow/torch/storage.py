"""Tensors as targets: names, held runs and the plain local storage behind them, by DTensor's own arithmetic.

Nothing is gathered, redistributed or replaced: a slot's `local` is the very memory the model reads. Rejected
by name: meta tensors, tensor subclasses other than DTensor, `Partial` placements, tensors without strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from restow.boxes import Run, held, whole
from restow.errors import DtypeMismatchError, RestowError, ShapeMismatchError, UsageError, show
from restow.problems import alike
from restow.targets import Runs, Target
from restow.torch.dtypes import NAME

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing

Into = nn.Module | Sequence[nn.Module] | Mapping[str, torch.Tensor]


class Slot(NamedTuple):
    """A destination or in-memory source: its target, its local memory, and whether it is a plain tensor."""

    target: Target
    local: torch.Tensor
    plain: bool


class Slots(NamedTuple):
    """All slots by name; `aliases` are further names of the same memory; `buffers` non-persistent buffers."""

    slots: Mapping[str, Slot]
    aliases: Mapping[str, str]
    buffers: tuple[str, ...]


@torch.no_grad()  # a local tensor is asked of each DTensor, and autograd would take most of the time that it takes
def slots_of(into: Into, *, meta: bool = False) -> Slots:
    """The slots of a module, of a list of them, or of a mapping. `meta=True` admits meta tensors."""
    slots: dict[str, Slot] = {}
    aliases: dict[str, str] = {}
    buffers: list[str] = []
    seen: dict[object, str] = {}
    refused: list[RestowError] = []
    for name, tensor, persistent in tensors_of(into):
        if not persistent:
            buffers.append(name)
            continue
        if name in slots or name in aliases:
            raise UsageError(f"one tensor by the name {show(name)}", "two in the modules given")
        try:
            slot = slot_of(name, tensor, meta=meta)
            if 0 in (step for n, step in zip(slot.local.shape, slot.local.stride(), strict=True) if n > 1):
                raise UsageError(
                    f"memory of its own for every element of {show(name)}", "an expanded tensor", tensor=name
                )
        except RestowError as error:
            refused.append(error)
            continue
        key = memory_of(slot.local)
        if key is not None and key in seen:
            aliases[name] = seen[key]
            continue
        if key is not None:
            seen[key] = name
        slots[name] = slot
    if refused:
        raise alike(refused)
    return Slots(slots, aliases, tuple(buffers))


def named_as(slots: Slots, known: Callable[[str], bool]) -> Slots:
    """The slots, tied ones under the name that is `known`, where their first name is not."""
    swaps = {first: name for name, first in slots.aliases.items() if known(name) and not known(first)}
    if not swaps:
        return slots
    renamed = {
        swaps.get(name, name): slot._replace(target=slot.target._replace(name=swaps.get(name, name)))
        for name, slot in slots.slots.items()
    }
    aliases = {name: swaps.get(first, first) for name, first in slots.aliases.items()}
    aliases |= swaps
    return slots._replace(slots=renamed, aliases={n: f for n, f in aliases.items() if n != f})


def slot_of(name: str, tensor: torch.Tensor, *, meta: bool = False) -> Slot:
    """One tensor as a slot. Raises `UsageError`, `ShapeMismatchError` for what cannot be written in place."""
    if isinstance(tensor, DTensor):
        local = tensor.to_local().detach()
        runs = placed_runs(name, tensor, tuple(local.shape))
    else:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise UsageError(
                f"a plain tensor or a DTensor as {show(name)}",
                type(tensor).__name__,
                tensor=name,
                hint="tensor subclasses hide their storage: load before wrapping, or unwrap first",
            )
        local = tensor.detach()
        runs = whole(tensor.shape)
    if local.device.type == "meta" and not meta:
        raise UsageError(
            f"memory behind {show(name)}",
            "a meta tensor",
            tensor=name,
            hint="materialise the model first, e.g. model.to_empty(device=...)",
        )
    if local.layout != torch.strided:
        raise UsageError(f"a strided tensor as {show(name)}", str(local.layout), tensor=name)
    if tensor.dtype not in NAME:
        raise DtypeMismatchError(
            f"a dtype that safetensors can hold as {show(name)}", str(tensor.dtype), tensor=name
        )
    target = Target(name, tuple(tensor.shape), NAME[tensor.dtype], runs)
    if target.local_shape != tuple(local.shape) and (local.numel() or all(target.local_shape)):
        raise ShapeMismatchError(
            f"local shape {list(target.local_shape)} for {show(name)}, as its placements give",
            f"{list(local.shape)}",
            tensor=name,
        )
    return Slot(target, local, not isinstance(tensor, DTensor))


def placed_runs(name: str, tensor: DTensor, local: tuple[int, ...]) -> Runs:
    """The index runs per dim that this rank holds, by the placements' own splitting of the dim's indices;
    `local` is the shape of what it holds.

    Where sizes are uneven, what `fully_shard` holds of a tensor that was sharded before is not always what
    the same placements give when DTensor applies them: the local tensor's shape says which of them made it.
    Where both have one length but other rows (27 rows on 3 x 4 ranks, one of them), `fully_shard` counts.
    """
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return tuple(() for _ in shape)
    where = (tuple(mesh.shape), tuple(coordinate), shape)
    runs = runs_at(name, tensor.placements, *where)
    if held(runs) != local:
        return runs_at(name, tensor.placements, *where, as_listed=True)
    return runs


def runs_at(
    name: str,
    placements: Sequence[object],
    mesh: Sequence[int],
    coordinate: Sequence[int],
    shape: Sequence[int],
    *,
    as_listed: bool = False,
) -> Runs:
    """What the rank at `coordinate` of a mesh of these sizes holds. Raises `UsageError` for `Partial`.

    Shards of one dim are cut in the order in which they came to be, or `as_listed`, as DTensor does.
    """
    cuts: dict[int, list[_Cut]] = {}
    for placement, ranks, rank in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise UsageError(
                f"Shard or Replicate placements for {show(name)}",
                f"{placement}",
                tensor=name,
                hint="a partial tensor holds a pending sum, no weights: reduce it first",
            )
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 0
        cuts.setdefault(placement.dim % len(shape), []).append(_Cut(factor, ranks, rank))
    runs: list[tuple[Run, ...]] = [((0, length),) for length in shape]
    for dim, listed in cuts.items():
        if sum(cut.factor > 0 for cut in listed) > 1:
            raise UsageError(
                f"at most one strided shard of a dim of {show(name)}",
                f"{[str(cut.placement()) for cut in listed]}",
                tensor=name,
                hint="which rows such a tensor holds does not follow from its placements alone",
            )
        runs[dim] = _runs_of(tuple(listed if as_listed else _as_cut(listed)), shape[dim])
    return tuple(runs)


class _Cut(NamedTuple):
    """One mesh dim's share in cutting a tensor's dim: how, into how many, and which of them is held here."""

    factor: int  # of a strided shard; 0 for a plain one
    ranks: int
    rank: int

    def placement(self) -> Shard | _StridedShard:
        """As a placement of the indices of one dim."""
        return _StridedShard(0, split_factor=self.factor) if self.factor else Shard(0)


@lru_cache(1024)  # a model has few kinds of placements, and many tensors of each
def _runs_of(cuts: tuple[_Cut, ...], length: int) -> tuple[Run, ...]:
    """What is left of a dim's indices after cuts, by the placements' own splitting."""
    mine = torch.arange(length)
    for cut in cuts:
        parts, _ = cut.placement()._split_tensor(mine, cut.ranks, with_padding=False, contiguous=False)
        mine = parts[cut.rank] if cut.rank < len(parts) else mine[:0]
    return _as_runs(mine)


def _as_cut(listed: Sequence[_Cut]) -> list[_Cut]:
    """The cuts in the order in which they were made.

    `fully_shard` puts its mesh dim left of those by which a tensor was sharded before, and counts their
    shards in the split factor: such a cut was the last, and is a plain one of what the others left.
    """
    if not listed:
        return []
    (first, *rest), ranks = listed, prod(cut.ranks for cut in listed[1:])
    if first.factor and first.factor == ranks:
        return [*_as_cut(rest), first._replace(factor=0)]
    return [first, *_as_cut(rest)]


def _as_runs(indices: torch.Tensor) -> tuple[Run, ...]:
    if indices.numel() == 0:
        return ()
    breaks = (torch.diff(indices) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), indices.numel()]
    return tuple((int(indices[a]), b - a) for a, b in zip(starts, ends, strict=True))


def tensors_of(into: Into) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, persistent) of every tensor, wrappers' segments dropped from the names."""
    if isinstance(into, Mapping):
        for name, tensor in into.items():
            if not isinstance(tensor, torch.Tensor):
                raise UsageError(f"a tensor as {show(name)}", type(tensor).__name__, tensor=str(name))
            yield unwrapped(name), tensor, True
        return
    modules = [into] if isinstance(into, nn.Module) else into
    for module in modules if isinstance(modules, Iterable) else [modules]:
        if not isinstance(module, nn.Module):
            raise UsageError("an nn.Module, a list of them, or a mapping of tensors", type(module).__name__)
        for path, child in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    yield unwrapped(prefix + name), parameter, True
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    yield unwrapped(prefix + name), buffer, name not in child._non_persistent_buffers_set


def unwrapped(name: str) -> str:
    """A name without the segments that wrappers put into it."""
    if not any(word in name for word in WRAPPERS):
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def memory_of(tensor: torch.Tensor) -> object:
    """What tells whether two tensors are one memory seen in one way; None for those that have none."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
