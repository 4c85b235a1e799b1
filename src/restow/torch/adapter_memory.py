"""Adapters in memory: from one format into another, into a model's own sharded parameters, and out of them.

A model that trains grouped experts holds `<experts>.lora_gate_and_up_A` and so on, whole, as a rank's part (`shard`) or
as DTensors; `load` fills what each rank holds without communication, `save` gathers and writes one folder. Rejected:
parameters that the adapter does not fill, factors that the model has no place for, ranks that differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from restow.adapter_base import Base, BaseLike, base_of
from restow.adapter_config import AdapterConfig, adapter_config
from restow.adapter_formats import CANON, FORMATS, Faces
from restow.adapter_keys import PREFIX
from restow.adapter_orient import Options
from restow.adapter_read import read_adapter
from restow.adapter_scope import judge_factors
from restow.adapter_stamp import Stamp
from restow.errors import AdapterError, MissingTensorError, ShapeMismatchError, show
from restow.family import Family
from restow.layout import axis_size
from restow.targets import Shard, axis_runs
from restow.torch.adapter_arrange import arrange
from restow.torch.adapter_convert import resolve, version_of, write
from restow.torch.adapter_factors import relay
from restow.torch.adapter_file import AdapterFile
from restow.torch.adapter_job import Job, make_job
from restow.torch.adapter_write import Spelled, spell
from restow.torch.dtypes import dtype_name
from restow.torch.storage import Into, Slot, slots_of, unwrapped


class AdapterState(dict[str, torch.Tensor]):
    """Tensors by name; `config` is the adapter_config that belongs to them, `notes` what should be told."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]
    rounded: tuple[str, ...]


def relayout(
    state: Mapping[str, torch.Tensor],
    *,
    to: str,
    config: Mapping[str, Any] | None = None,
    base: BaseLike | None = None,
    family: str | Family | None = None,
    faces: Faces | None = None,
    outer: str = "out",
    expert_major: bool | None = None,
) -> AdapterState:
    """An adapter's tensors in another format: a dict of new tensors, with `.config`.

    `config` is the adapter_config as a dict; without it ranks are the tensors' and alpha is r, and fused tensors that
    need target_parameters or a version to be understood are refused. Other arguments as for `convert`. Dtypes stay.
    """
    job = _job(dict(state), to, config, base, family, Options(faces, outer, expert_major))
    out = AdapterState(job.tensors())
    out.config, out.notes, out.rounded = job.config, job.notes, job.rounded
    return out


def _job(
    state: dict[str, torch.Tensor], to: str, config: Mapping[str, Any] | None, base: BaseLike | None,
    family: str | Family | None, options: Options,
) -> Job:  # fmt: skip
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            raise AdapterError(
                "whole tensors", f"a DTensor as {show(name)}", tensor=name, hint="save() gathers them"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    known = base_of(base, family, (config or {}).get("base_model_name_or_path"))
    said = adapter_config(config) if config is not None else _guess(shapes, known)
    fmt, _ = resolve(to, known)
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in state.items()}
    judge_factors(dtypes)
    adapter = read_adapter(shapes, said, known, options)
    return make_job(
        adapter, known, fmt, Stamp(), lambda name: state[name].detach(), dtypes, shapes, version_of(to)
    )


def _guess(shapes: Mapping[str, tuple[int, ...]], base: Base) -> AdapterConfig:
    """A config from shapes alone: the rank that a lora_A shows."""
    rank = 8
    for name, shape in shapes.items():
        if name.endswith(("lora_gate_and_up_A", "lora_down_A")) and len(shape) == 3:
            rank = shape[2]
        elif name.endswith("lora_A.weight") and len(shape) == 3:
            rank = shape[1]
        elif name.endswith("experts.lora_A.weight") and "e" in base.sizes:
            rank = max(1, shape[0] // base.sizes["e"])
        elif name.endswith("lora_A.weight") and "experts.lora_A" not in name and "base_layer" not in name:
            rank = shape[0]
        else:
            continue
        break
    return adapter_config({"r": rank, "lora_alpha": rank})


def load(
    adapter: str | os.PathLike[str],
    into: Into,
    *,
    base: BaseLike | None = None,
    family: str | Family | None = None,
    shard: Shard | None = None,
    faces: Faces | None = None,
    outer: str = "out",
    expert_major: bool | None = None,
) -> dict[str, Any]:
    """Fill the grouped LoRA parameters of `into` (a module, a list, or a mapping; DTensors too) from an adapter's folder.

    Names outside `lora_` are left alone. `shard` says which part of an axis (`e`, `f`) plain tensors hold. Returns the
    adapter_config that the model now has (r, lora_alpha and patterns of the grouped form). Raises `AdapterError` for a
    factor without a place, `MissingTensorError` for a parameter that nothing fills, `ShapeMismatchError` for another
    rank; all before the first write.
    """
    slots = {n.removeprefix(PREFIX): s for n, s in slots_of(into).slots.items() if ".lora_" in f".{n}"}
    with AdapterFile(adapter) as file:
        known = base_of(base, family, file.config.raw.get("base_model_name_or_path"))
        read = read_adapter(file.shapes, file.config, known, Options(faces, outer, expert_major))
        job = make_job(read, known, FORMATS["grouped"], file.stamp, file.get, file.dtypes, file.shapes, None,
                       file.original)  # fmt: skip
        places = {_key(known, name): slot for name, slot in slots.items()}
        wrong = [name for name, *_ in job.specs if _key(known, name.removeprefix(PREFIX)) not in places]
        if wrong:
            raise AdapterError("a parameter of the model for every factor", f"{len(wrong)} without one",
                               tensor=wrong[0], sections=[("tensors", map(show, wrong))])  # fmt: skip
        there = {_key(known, name.removeprefix(PREFIX)) for name, *_ in job.specs}
        lost = [slot.target.name for key, slot in places.items() if key not in there]
        if lost:
            raise MissingTensorError("every LoRA parameter of the model in the adapter", f"{len(lost)} that are not",
                                     tensor=lost[0], sections=[("missing", map(show, lost))])  # fmt: skip
        _fill(job, places, shard)
        file.check()
    return dict(job.config)


def _key(base: Base, name: str) -> str:
    """A name whatever the containers and prefixes are called."""
    return base.family.canonical(name)


def _fill(job: Job, places: Mapping[str, Slot], shard: Shard | None) -> None:
    base = job.reading.base
    for name, _, shape in job.specs:
        slot = places[_key(base, name.removeprefix(PREFIX))]
        if slot.target.shape != shape and (shard is None or not slot.plain):
            raise ShapeMismatchError(
                f"shape {list(shape)} for {show(slot.target.name)}, as the adapter has", f"{list(slot.target.shape)}",
                tensor=slot.target.name, hint="make the model's adapter with this rank; say shard= for a part",
            )  # fmt: skip
    for pairs in job.adapter.modules.values():
        for spelled in spell(arrange(pairs, job.fmt, job.reading), job.fmt, base):
            slot = places[_key(base, spelled.names[0].removeprefix(PREFIX))]
            _fill_one(spelled, slot, shard)
    by_name = set(job.passed)
    for name, tensor in job.tensors() if by_name else ():
        if name in by_name:
            slot = places[_key(base, name.removeprefix(PREFIX))]
            part = tensor
            for dim, runs in enumerate(slot.target.runs):
                part = (
                    torch.cat([part.narrow(dim, start, n) for start, n in runs], dim)
                    if runs
                    else part.narrow(dim, 0, 0)
                )
            slot.local.copy_(part)


def _fill_one(spelled: Spelled, slot: Slot, shard: Shard | None) -> None:
    runs = slot.target.runs
    if shard is not None and slot.plain and shard.axis in spelled.row.axes:
        size = axis_size(spelled.row, shard.axis, spelled.sizes)
        runs = axis_runs(spelled.row, spelled.sizes, {shard.axis: shard.run(size)})
    want = tuple(sum(n for _, n in dim) for dim in runs)
    if want != tuple(slot.local.shape):
        raise ShapeMismatchError(f"shape {list(want)} for {show(slot.target.name)}", f"{list(slot.local.shape)}",
                                 tensor=slot.target.name)  # fmt: skip
    if not slot.local.numel():
        return
    block = spelled.block
    tensor = block.a if spelled.factor == "A" else block.b
    relay(CANON[f"{block.role}.{spelled.factor}"], block.sizes, [tensor], spelled.row, spelled.sizes, [slot.local],
          take=spelled.take, runs=runs)  # fmt: skip


def save(
    state: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    to: str = "peft",
    config: Mapping[str, Any],
    base: BaseLike | None = None,
    family: str | Family | None = None,
    replace: bool = False,
) -> None:
    """Write the LoRA parameters of a model, or a mapping of them, as an adapter's folder in the format `to`.

    DTensors are gathered one after the other, which every rank must take part in; rank 0 writes, and its failure is
    raised on all. `config` is the adapter_config (r, lora_alpha, ...).
    """
    named = state.named_parameters() if isinstance(state, nn.Module) else state.items()
    whole: dict[str, torch.Tensor] = {}
    gathered = False
    for name, tensor in sorted((unwrapped(n), t) for n, t in named if "lora_" in n):
        if isinstance(tensor, DTensor):
            gathered = True
            tensor = tensor.full_tensor()
        whole[name] = tensor.detach().cpu()
    first = not gathered or dist.get_rank() == 0
    failure: list[Exception | None] = [None]
    if first:
        try:
            job = _job(whole, to, config, base, family, Options())
            write(job, path, replace=replace)
        except Exception as error:  # the other ranks wait to hear of it, whatever it is
            failure[0] = error
    if gathered:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
