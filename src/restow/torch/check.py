"""Proof of a load: what lies in memory against what the files hold, by fingerprints of an independent read.

The files are read again, each tensor as it is stored and by none of the load's own moves; both sides are summed leaf by
leaf over exactly the parts that are held here, so that shards are proved without a byte of communication. On the way
the values are looked at. It rejects leaves whose sums differ, and scales without a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from restow.boxes import Run
from restow.checkpoint import Checkpoint
from restow.errors import IntegrityError, show
from restow.landing import Wish, chosen_experts, chosen_rows
from restow.prepare import Prepared
from restow.problems import Problem
from restow.targets import Runs, Target, whole_target
from restow.torch.chunks import CHUNK, Filled, Slice, fill, grouped, room, slices
from restow.torch.dtypes import torch_dtype
from restow.torch.leafviews import leaf_views
from restow.torch.leaves import name_index
from restow.torch.sums import MASK, bilinear, plain_sum
from restow.torch.values import Tie, Values, source_names, values_of

SourceLeaf = tuple[str, str, int, int]  # module path in the source, role, expert, projection
LIMIT = CHUNK // 4


@dataclass
class _Held:
    """A leaf, or a part of one, or a tensor outside the experts, as it lies here."""

    name: str
    text: str
    dtype: torch.dtype
    rows: Run
    cols: Run
    here: int
    there: int = 0


@dataclass
class _Plain:
    """A tensor outside the experts: its target, and the experts that were chosen along one of its dims."""

    target: Target
    dtype: torch.dtype
    chosen: tuple[int, tuple[int, ...]] | None
    here: int
    there: int = 0


def check_load(
    prepared: Prepared,
    targets: Mapping[str, Target],
    locals_: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor] | None,
    threads: int | None,
) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """Compare every tensor that was filled with its source; the names that could not be, and what the values show.

    Raises `IntegrityError`, naming every leaf at fault.
    """
    source = prepared.source
    skipped: list[str] = []
    leaves: dict[SourceLeaf, list[_Held]] = {}
    for name, owner in prepared.owners.items():
        path, role, _ = owner
        if path not in prepared.pairs or (prepared.pairs[path], role) not in prepared.roles:
            continue
        there = source.modules[prepared.pairs[path]]
        companions = [r for r in there.tensors if r.startswith(f"{role}.") and not r.endswith(".bias")]
        if companions or role not in there.tensors:
            skipped.append(
                name
            )  # decoded on the way: there is nothing of this form in the files to compare with
            continue
        experts = chosen_experts(prepared.wish.experts, there.path, there.sizes.get("e", 0))
        local = locals_[name]
        for view in leaf_views(owner, prepared.modules[path], targets[name].runs, local, source.family):
            _, e, p = view.leaf
            rows, cols = (range(start, start + count) for start, count in (view.rows, view.cols))
            one = _Held(name, view.key, local.dtype, view.rows, view.cols, bilinear(view.matrix, rows, cols))
            leaves.setdefault((there.path, role, experts[e] if experts is not None else e, p), []).append(one)
    plain: dict[str, list[_Plain]] = {}
    for name, from_name in prepared.plain.items():
        target, local = targets[name], locals_[name]
        if not local.numel():
            continue
        here = plain_sum(target.shape, target.runs, local)
        chosen = _chosen(prepared, from_name, target)
        plain.setdefault(from_name, []).append(_Plain(target, local.dtype, chosen, here))
    problems = (
        *_sum_sources(source, leaves, plain, memory, threads),
        *_decoded(prepared, targets, locals_, skipped),
    )
    wrong = [h for held in leaves.values() for h in held if h.here != h.there & MASK]
    odd = [p for held in plain.values() for p in held if p.here != p.there & MASK]
    if wrong or odd:
        lines = [f"{show(h.name)}: {show(h.text)}" for h in wrong] + [show(p.target.name) for p in odd]
        raise IntegrityError(
            "in memory what the files hold",
            f"{len(lines)} leaves with other values",
            path=source.path,
            tensor=wrong[0].name if wrong else odd[0].target.name,
            sections=[("leaves", dict.fromkeys(lines))],
            hint="load again; if it comes back, test the memory and the disk of this machine",
        )
    return tuple(skipped), problems


def _decoded(
    prepared: Prepared,
    targets: Mapping[str, Target],
    locals_: Mapping[str, torch.Tensor],
    names: Sequence[str],
) -> tuple[Problem, ...]:
    """What the values show that were decoded on the way: NaN among the codes."""
    seen = Values({}, source_names(prepared))
    for name in names:
        target, local = targets[name], locals_[name]
        if local.device.type == "cpu" and local.numel() and all(len(runs) == 1 for runs in target.runs):
            seen.look(Filled(Slice(whole_target(name, local.shape, target.dtype), 0), local.contiguous()))
    return seen.problems()


def _chosen(prepared: Prepared, name: str, target: Target) -> tuple[int, tuple[int, ...]] | None:
    """Which dim of a router tensor was taken expert by expert, and the numbers."""
    row, wish, shape = prepared.source.routers.get(name), prepared.wish, prepared.source.tensors[name].shape
    if row is None or wish.experts is None or not (wish.routers or target.shape != shape):
        return None
    at = next(i for i, dim in enumerate(row.dims) if str(dim) == "e")
    words = name.split(".")
    path = max(
        prepared.source.modules, key=lambda p: sum(a == b for a, b in zip(p.split("."), words, strict=False))
    )
    size = prepared.source.modules[path].sizes.get("e", shape[at])
    experts = chosen_rows(wish.experts, path, size, shape[at])
    return None if experts is None else (at, experts)


def _sum_sources(
    source: Checkpoint,
    leaves: Mapping[SourceLeaf, list[_Held]],
    plain: Mapping[str, list[_Plain]],
    memory: Mapping[str, torch.Tensor] | None,
    threads: int | None,
) -> tuple[Problem, ...]:
    owners = {
        name: (path, role, place)
        for path, module in source.modules.items()
        for role, names in module.tensors.items()
        for place, name in enumerate(names)
        if name is not None
    }
    values, tie = values_of(source), Tie(source)
    for one in _read(source, list(_wanted(source, owners, leaves, plain)), memory, threads):
        name, runs = one.slice.target.name, one.slice.target.runs
        if one.tensor.device.type == "cpu":
            values.look(one)
            tie.look(one)
        for held in plain.get(name, ()):
            held.there += _part(one, held)
        if name not in owners:
            continue
        path, role, _ = owners[name]
        for view in leaf_views(owners[name], source.modules[path], runs, one.tensor, source.family):
            for part in leaves.get((path, role, view.leaf[1], view.leaf[2]), ()):
                rows, cols = _both(view.rows, part.rows), _both(view.cols, part.cols)
                if rows[1] <= 0 or cols[1] <= 0:
                    continue
                r, c = rows[0] - view.rows[0], cols[0] - view.cols[0]
                matrix = view.matrix[r : r + rows[1], c : c + cols[1]].to(part.dtype)
                part.there += bilinear(matrix, range(rows[0], sum(rows)), range(cols[0], sum(cols)))
    return (*values.problems(), *(tie.problems() if source.path is not None else ()))


def _both(one: Run, other: Run) -> Run:
    """The places that two runs share."""
    start = max(one[0], other[0])
    return start, min(sum(one), sum(other)) - start


def _wanted(
    source: Checkpoint,
    owners: Mapping[str, tuple[str, str, int]],
    leaves: Mapping[SourceLeaf, list[_Held]],
    plain: Mapping[str, list[_Plain]],
) -> Iterator[Slice]:
    """The slices of the source's tensors, as they are stored, of which something is held here."""
    experts = {(path, role, e) for path, role, e, _ in leaves}
    for name, entry in source.tensors.items():
        target = whole_target(name, entry.shape, entry.dtype)
        if not all(entry.shape):
            continue
        if name in plain:
            whole = any(held.chosen is not None for held in plain[name])
            yield from [Slice(target, 0)] if whole else slices(target, LIMIT)
        elif name in owners:
            path, role, place = owners[name]
            module = source.modules[path]
            row = module.layout.row(role)
            e = name_index(row, place, module.sizes).get("e")
            if e is not None or not row.dims or str(row.dims[0]) != "e":
                if e is None or (path, role, e) in experts:
                    yield from slices(target, LIMIT)
                continue
            for i in range(entry.shape[0]):
                if (path, role, i) in experts:
                    one: Runs = (((i, 1),), *target.runs[1:])
                    alone = whole_target(name, (1, *entry.shape[1:]), entry.dtype)
                    yield from _offset(slices(alone, LIMIT), target, one)


def _offset(parts: Iterator[Slice], whole: Target, runs: Runs) -> Iterator[Slice]:
    """Slices of one expert as slices of the stack: the first dim's run is the expert's."""
    stride = prod(whole.shape[1:]) * torch_dtype(whole.dtype).itemsize
    for part in parts:
        yield Slice(
            whole._replace(runs=(runs[0], *part.target.runs[1:])), runs[0][0][0] * stride + part.offset
        )


def _read(
    source: Checkpoint, parts: Sequence[Slice], memory: Mapping[str, torch.Tensor] | None, threads: int | None
) -> Iterator[Filled]:
    if memory is not None:
        for part in parts:
            tensor = memory[part.target.name]
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            cuts = tuple(slice(runs[0][0], sum(runs[0])) for runs in part.target.runs)
            yield Filled(part, local.detach()[cuts].contiguous())
        return
    targets = {part.target.name: part.target for part in parts}
    own = Prepared(source, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    buffer = torch.empty(LIMIT, dtype=torch.uint8)
    for group in grouped(iter(parts), LIMIT):
        need = sum(room(part.target) for part in group)
        buffer = buffer if buffer.numel() >= need else torch.empty(need, dtype=torch.uint8)
        yield from fill(own, group, buffer, threads=threads)[0]


def _part(one: Filled, held: _Plain) -> int:
    """The sum over what a slice of a source tensor and the held part of its destination share."""
    tensor, runs = one.tensor, one.slice.target.runs
    if held.chosen is not None:
        dim, experts = held.chosen
        tensor = tensor.index_select(dim, torch.tensor(experts, device=tensor.device))
        runs = tuple(((0, n),) for n in tensor.shape)
    shared: list[tuple[Run, ...]] = []
    for dim, (mine, theirs) in enumerate(zip(held.target.runs, runs, strict=True)):
        start, length = theirs[0]
        parts = tuple(both for run in mine if (both := _both(run, (start, length)))[1] > 0)
        if not parts:
            return 0
        if parts != ((start, length),):
            places = [torch.arange(a - start, a - start + n, device=tensor.device) for a, n in parts]
            tensor = tensor.index_select(dim, torch.cat(places))
        shared.append(parts)
    return plain_sum(held.target.shape, tuple(shared), tensor.to(held.dtype))
