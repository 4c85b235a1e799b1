"""LoRA of routed experts: the grouped form that NeMo trains, one PEFT adapter per expert, and PEFT's
ParamWrapper.

All three are rows (`mixin_rows`); the two places where they say different things are here. Grouped experts
share one A between gate and up: going out it is written for both, coming in both must be equal. And PEFT
changed which matrix of a wrapped parameter is called A in 0.19.1: a stamp or the shapes decide, never a
guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from restow.boxes import whole
from restow.errors import AdapterError, MissingTensorError, ShapeMismatchError, show
from restow.layout import Layout, Sizes, name_of, shape_of, solve_sizes
from restow.notation import Row
from restow.torch.mixin_host import Facts
from restow.torch.mixin_merge import Group, check_complete, groups_of, merge, native_name
from restow.torch.mixin_moves import fill
from restow.torch.mixin_rows import LORA, LORA_SPLIT, LORA_WRAPPED, one_label, row_named, with_labels
from restow.torch.mixin_split import grouped, split
from restow.torch.storage import slot_of


def to_experts(name: str, tensor: torch.Tensor, row: Row, facts: Facts) -> dict[str, torch.Tensor]:
    """A grouped LoRA tensor as PEFT's, one or two per expert, below the module's path; contiguous, expert by
    expert.

    The one A of gate and up is written for both. Raises `ExpertShapeError`.
    """
    source = grouped(name, tensor, row, facts.sizes)
    target = with_labels(LORA_SPLIT, facts.gated).row(row.role)
    labels = target.labels.get("p", ())
    if "p" in row.axes or not labels:
        return split(source, target, alias=False)
    parts = [split(source, one_label(target, label), alias=False) for label in labels]
    return {name: one for group in zip(*(part.items() for part in parts), strict=True) for name, one in group}


def recombined(state: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """`state` with every per-expert LoRA set as grouped tensors below the same prefix; all else as it is.

    Raises `MissingExpertsError` for sets that lack tensors, by name, and `AdapterError` where gate and up
    have A's of their own, which one grouped A cannot hold.
    """
    rows = with_labels(LORA_SPLIT, facts.gated)
    found = groups_of(list(state), rows, facts.segment)
    if not found:
        return dict(state)
    paths: dict[str, dict[str, Group]] = {}
    for (path, role), group in found.items():
        paths.setdefault(path, {})[role] = group
    every = range(facts.experts)
    for path, groups in paths.items():
        started = [row for row in rows.rows if {f"{_side(row)}_A", f"{_side(row)}_B"} & set(groups)]
        try:
            check_complete({path: groups}, started, facts.sizes, {(path, row.role): every for row in started})
        except MissingTensorError as error:
            error.hint = (
                "an adapter of some experts or projections: fill it up, or convert it with restow.lora first"
            )
            raise
    gone = {name for group in found.values() for name in group.names.values()}
    out = {name: value for name, value in state.items() if name not in gone}
    for (_, role), group in found.items():
        target = LORA.row(role)
        if "p" in group.row.axes and "p" not in target.axes:
            group = _shared(group, state)
        out[native_name(group, target)] = merge(state, group, target, facts.sizes, dtype=None)
    return out


def _side(row: Row) -> str:
    return row.role.partition("_")[0]


def _shared(group: Group, state: Mapping[str, Any]) -> Group:
    """A group of A's that are equal over `p`, as that of the first projection. Raises `AdapterError`
    otherwise.
    """
    at = group.row.name_axes.index("p")
    labels = group.row.labels["p"]
    first = {index: name for index, name in group.names.items() if index[at] == 0}
    unlike = [
        name for index, name in group.names.items()
        if index[at] and not _same(state[first[(*index[:at], 0, *index[at + 1 :])]], state[name])
    ]  # fmt: skip
    if unlike:
        raise AdapterError(
            f"one A for {' and '.join(labels)} of each expert, as grouped experts have it",
            f"{len(unlike)} experts in {show(group.path)} with two",
            tensor=unlike[0],
            sections=[("differ", map(show, unlike))],
            hint="restow.lora.convert(adapter, target, to='grouped') holds both exactly, at twice the rank",
        )
    return Group(group.path, one_label(group.row, labels[0]), first)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if isinstance(a, DTensor) or isinstance(b, DTensor):
        a, b = slot_of("lora_A", a).local, slot_of("lora_A", b).local
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def wrapped(name: str, tensor: torch.Tensor, row: Row, facts: Facts, form: str) -> tuple[str, torch.Tensor]:
    """A grouped LoRA tensor as PEFT's ParamWrapper holds it: (name below the experts module, tensor of two
    dims).

    `form` is a key of `LORA_WRAPPED`. Raises `AdapterError` for a DTensor of which this rank holds a part.
    """
    source = grouped(name, tensor, row, facts.sizes)
    runs = slot_of(name, tensor, meta=True).target.runs
    if runs != whole(tuple(tensor.shape)):
        raise AdapterError(
            f"all of {show(name)} on this rank, since experts and ranks share a dim in PEFT's form",
            "a part of it",
            tensor=name,
            hint="gather the adapter first (full_tensor), or ask for per-expert tensors (v4_compatible=True)",
        )
    target = LORA_WRAPPED[form].row(row.role)
    return name_of(target, (), {}), _converted(source.row, target, source.sizes, source.local)


def unwrapped_native(
    state: Mapping[str, Any], facts: Facts, segment: str, hint: str | None, d: int | None
) -> dict[str, Any]:
    """`state` with PEFT's ParamWrapper tensors below `segment` as grouped LoRA tensors; all else as it is.

    `hint` is a stamp, a key of `LORA_WRAPPED`; without it the shapes must admit exactly one form, for all
    tensors together. `d` is the model's hidden size where it is known. Raises `AdapterError` where stamp and
    shapes disagree, or neither settles it.
    """
    found: dict[str, tuple[str, str]] = {}  # name -> (path above the segment, name below it)
    for name in state:
        above, _, below = f".{name}".rpartition(f".{segment}.")
        if any(row_named(layout, below) for layout in LORA_WRAPPED.values()) and f".{segment}." in f".{name}":
            found[name] = (above[1:], below)
    if not found:
        return dict(state)
    sizes = {**facts.sizes, **({"d": d} if d is not None else {})}
    fits = {form: all_sizes for form, layout in LORA_WRAPPED.items()
            if (all_sizes := _fit(state, found, layout, sizes)) is not None}  # fmt: skip
    if hint is not None:
        fits = {form: all_sizes for form, all_sizes in fits.items() if form == hint}
    if len(fits) != 1:
        shapes = [f"{show(name)} {list(state[name].shape)}" for name in found]
        raise AdapterError(
            f"tensors of one PEFT form ({' or '.join(LORA_WRAPPED)})"
            + (f", {show(hint)} as stamped" if hint else ""),
            "tensors of neither" if not fits else "tensors that both admit",
            tensor=next(iter(found)),
            sections=[("tensors", shapes)],
            hint="PEFT 0.19.1 exchanged A and B: convert the adapter with restow.lora, naming its form",
        )
    ((form, solved),) = fits.items()
    out = {name: value for name, value in state.items() if name not in found}
    for name, (above, below) in found.items():
        source = row_named(LORA_WRAPPED[form], below)
        assert source is not None
        target = LORA.row(source.role)
        path = f"{above}.{facts.segment}" if above else facts.segment
        out[f"{path}.{name_of(target, (), {})}"] = _converted(source, target, solved[name], state[name])
    return out


def _fit(
    state: Mapping[str, Any], found: Mapping[str, tuple[str, str]], layout: Layout, sizes: Sizes
) -> dict[str, dict[str, int]] | None:
    """The sizes of every tensor as `layout` has it, agreeing on `d` over all, and on `r` over A and B; or
    None.
    """
    shared: dict[tuple[str, str], dict[str, int]] = {}
    common = dict(sizes)
    out = {}
    for name, (above, below) in found.items():
        row = row_named(layout, below)
        if row is None:
            return None
        pair = shared.setdefault((above, _side(row)), {})
        more = solve_sizes(row, tuple(state[name].shape), {**common, **pair})
        if more is None:
            return None
        common.update({axis: size for axis, size in more.items() if axis != "r"})
        pair.update({axis: size for axis, size in more.items() if axis == "r"})
        out[name] = {**common, **pair}
    return out


def _converted(source: Row, target: Row, sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    slot = slot_of(source.role, tensor, meta=True)
    if slot.target.runs != whole(tuple(tensor.shape)):
        raise ShapeMismatchError(f"all of '{source}' on this rank", "a part of it")
    shape = shape_of(target, sizes)
    into = torch.empty(shape, dtype=slot.local.dtype, device=slot.local.device)
    fill(source, target, sizes, {(): (slot.target.runs, slot.local)}, {(): whole(shape)}, {(): into})
    return into


__all__ = ["recombined", "to_experts", "unwrapped_native", "wrapped"]
