"""`restow.empty_like_disk`: expert parameters in any layout over memory that lies as the source's files do.

A grouped `[e, d, 2f]` may be a view of `[e, 2f, d]` storage: grouped GEMM takes it as it takes a packed one,
and a load into it is nothing but reads. Which dim is slow and which is fast is the source's row to say: the
dims of the wanted row are put in the order in which the source runs through their axes. Rejected is a layout
in which the axis that the source runs through fastest cannot be the fastest in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from restow.boxes import strides_of
from restow.checkpoint import Checkpoint
from restow.errors import AmbiguousLayoutError, RestowError, UsageError, show
from restow.family import Family
from restow.landing import Experts, Wish
from restow.layout import Layout, Sizes, axis_size
from restow.notation import Row
from restow.opening import family_of
from restow.prepare import prepare
from restow.problems import merged
from restow.targets import Shard
from restow.torch.dtypes import torch_dtype
from restow.torch.load import Source, as_checkpoint
from restow.wanted import default_targets


def empty_like_disk(
    source: Source,
    *,
    layout: str | Layout = "grouped",
    family: str | Family | None = None,
    shard: Shard | None = None,
    experts: Experts = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """The source's experts as uninitialised tensors of `layout`, by name, their memory in the files' order.

    `shard` and `experts` give a rank's part, as in `restow.load`, which takes the tensors by their names;
    make them a model's parameters before it is loaded, since `load` replaces nothing. `dtype` is the source's
    if None; with another one values are cast on the way, in order. `fully_shard` refuses parameters that are
    not contiguous: for FSDP2 take a layout that is the files' order as it stands: `fused`, `stacked`, `epfd`.

    >>> restow.empty_like_disk(folder)["model.layers.0.mlp.experts.down_projs"].stride()   # [e, f, d]
    (7680, 1, 96)

    Raises `UsageError` where no strides do it, `AmbiguousLayoutError` where the source has no experts, and
    what `restow.plan` raises.
    """
    known = family_of(family)
    opened = as_checkpoint(source, known)
    if not opened.modules:
        raise _no_experts(opened)
    wish = Wish(layout, known, shard=shard, experts=experts)
    targets = default_targets(opened, layout, wish)
    ready = prepare(opened, targets, replace(wish, plain=frozenset(target.name for target in targets)))
    out = {}
    for name, (path, role, _) in ready.owners.items():
        there, here = opened.modules[ready.pairs[path]], ready.modules[path]
        order = disk_order(here.layout.row(role), there.layout.row(role), there.sizes)
        target = ready.targets[name]
        packed = strides_of([target.shape[dim] for dim in order])
        strides = [packed[order.index(dim)] for dim in range(len(order))]
        kind = torch_dtype(target.dtype) if dtype is None else dtype
        out[name] = torch.empty_strided(target.shape, strides, dtype=kind, device=device)
    return out


def disk_order(row: Row, source: Row, sizes: Sizes) -> tuple[int, ...]:
    """The dims of `row`, slowest first, in the order in which `source` runs through their axes.

    >>> sizes = {"e": 8, "f": 6, "d": 10}
    >>> disk_order(parse_row("in w e d (p f)"), parse_row("in {e}.{p:gate|up} f d"), {**sizes, "p": 2})
    (0, 2, 1)

    A dim goes where its fastest axis is: what the source's names carry may lie anywhere, since names have no
    order in a file. Raises `UsageError` where the source's fastest axis cannot be the fastest in memory.
    """
    dims = [_long(row, dim.keys, sizes) for dim in row.dims]
    places = {axis: i for i, axis in enumerate(source.name_axes)}
    inner = _long(source, [key for dim in source.dims for key in dim.keys], sizes)
    places |= {axis: len(places) + i for i, axis in enumerate(inner)}
    if any(key not in places for keys in dims for key in keys):
        return tuple(range(len(dims)))  # a grid over other blocks: no order of the source's
    if inner and not any(keys[-1:] == inner[-1:] for keys in dims):
        raise UsageError(
            f"a layout of role '{row.role}' whose memory can be in the order of the files",
            f"one in which '{inner[-1]}', the fastest axis there, is not the last of its dim",
            sections=[("source", [show(str(source))]), ("target", [show(str(row))])],
            hint="take packed tensors of this layout: their values are put in order on the way",
        )
    last = [max((places[key] for key in keys), default=-1) for keys in dims]
    return tuple(sorted(range(len(dims)), key=last.__getitem__))


def _no_experts(opened: Checkpoint) -> RestowError:
    fatal = [problem.error for problem in opened.problems if problem.fatal]
    if fatal:
        return merged(fatal)
    found = f"none among {len(opened.tensors)} tensors"
    hint = "restow.open(path, layout=...) says what they are in"
    return AmbiguousLayoutError("experts in a layout that restow knows", found, path=opened.path, hint=hint)


def _long(row: Row, keys: Sequence[str], sizes: Sizes) -> list[str]:
    """The axes of more than one index: the others have no order."""
    return [key for key in keys if axis_size(row, key, sizes) > 1]
