"""`restow.relayout`: tensors in memory from one layout to another; views wherever a view can say it.

The plan is the one that a load of these tensors would have. A destination tensor whose elements all lie in one source
tensor, along strides, is a view of it; any other is allocated and filled. Nothing is written through: the source stays
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from restow.boxes import strides_of
from restow.errors import AmbiguousLayoutError, UnexpectedTensorError, show
from restow.family import Family
from restow.landing import Wish, layout_of
from restow.layout import Layout, rows_text
from restow.opening import family_of
from restow.planning import make_plan
from restow.plans import Copy, Plan
from restow.torch.dtypes import torch_dtype
from restow.torch.execute import execute
from restow.torch.load import as_checkpoint
from restow.torch.strides import real_places
from restow.wanted import default_targets

Known = dict[object, tuple[tuple[int, ...], int] | None]  # how views of like copies lie


def relayout(
    state: Mapping[str, torch.Tensor],
    *,
    src: str | Layout | None = None,
    dst: str | Layout,
    family: str | Family | None = None,
) -> dict[str, torch.Tensor]:
    """The experts of `state` in layout `dst`: [names of `dst` below each module's path], every other tensor as it is.

    `src` is the layout of `state`, found if None. Dtypes stay. Raises `AmbiguousLayoutError` where `src` is None and
    names and shapes do not decide, `UsageError` for unknown names, `RolesError` for layouts of other roles, and what
    makes the state no whole set of experts.
    """
    known = family_of(family)
    given = layout_of(src, known)
    source = as_checkpoint(state, known, given)
    source = replace(source, given=True)
    if not source.modules and not source.problems:
        raise _no_experts(state, given)
    wish = Wish(layout=dst, family=known)
    targets = default_targets(source, dst, wish)
    made = make_plan(source, targets, wish)
    lost = [*made.unused, *made.passed]
    if lost:
        raise UnexpectedTensorError(
            "a row of the destination's layout for every tensor of the experts",
            f"{len(lost)} without one",
            tensor=lost[0],
            sections=[("unused", map(show, lost))],
            hint="only layouts of the same roles convert",
        )
    by_target: dict[int, list[Copy]] = {}
    for copy in made.copies:
        by_target.setdefault(copy.target, []).append(copy)
    out: dict[str, torch.Tensor] = {}
    rest: set[int] = set()
    alike: Known = {}
    for i, target in enumerate(made.targets):
        view = as_view(made, i, by_target.get(i, []), state, alike)
        if view is None:
            rest.add(i)
            device = state[made.parts[by_target[i][0].source].name].device if i in by_target else None
            view = torch.empty(target.shape, dtype=torch_dtype(target.dtype), device=device)
        out[target.name] = view
    left = replace(made, copies=tuple(copy for copy in made.copies if copy.target in rest))
    into = {made.targets[i].name: out[made.targets[i].name] for i in rest}
    execute(left, into, memory=state)
    return out


def _no_experts(state: Mapping[str, torch.Tensor], given: Layout | None) -> AmbiguousLayoutError:
    return AmbiguousLayoutError(
        "experts in the layout that src says" if given else "experts in a layout that restow knows",
        f"none among {len(state)} tensors",
        sections=[("layout", rows_text(given) if given else ()), ("there are", map(show, list(state)[:3]))],
        hint="say what they are in with src=",
    )


def as_view(
    plan: Plan, target: int, copies: list[Copy], state: Mapping[str, torch.Tensor], known: Known
) -> torch.Tensor | None:
    """The target as a view of the one source tensor that all its copies come from, or None where strides cannot say it.

    `known` keeps, for the calls of one plan, how views of like copies lie.
    """
    shape = plan.targets[target].shape
    if not copies or not prod(shape) or len({copy.source for copy in copies}) != 1:
        return None
    source, copy = state[plan.parts[copies[0].source].name], copies[0]
    if len(copies) > 1:
        view = _view(plan, shape, copies, source)
    else:  # experts of one tensor lie alike, each at an element of its own
        key = copy.pattern, copy.start, shape, source.shape, source.stride()
        if key not in known:
            known[key] = _view(plan, shape, copies, source)
        view = known[key]
    if view is None:
        return None
    strides, ahead = view
    return source.as_strided(shape, strides, real_places(source, copy.at, ())[0] - ahead)


def _view(
    plan: Plan, shape: tuple[int, ...], copies: Sequence[Copy], source: torch.Tensor
) -> tuple[tuple[int, ...], int] | None:
    """Strides of a view of `source` with these copies, and how far behind its first element the first copy begins.

    Every copy gives a source place and stride for the destination's lattice; a view exists if one stride per dim
    reproduces all of them.
    """
    strides: list[int | None] = [None] * len(shape)
    placed = []
    for copy in copies:
        pattern = plan.patterns[copy.pattern]
        offset, steps = real_places(source, copy.at, pattern.source)
        placed.append((offset, copy.start))
        for stride, (dim, step), count in zip(steps, pattern.target, pattern.sizes, strict=True):
            if count == 1:
                continue
            if stride % step or strides[dim] not in (None, stride // step):
                return None
            strides[dim] = stride // step
    if not _solve(strides, placed, shape):
        return None
    final = [stride or 0 for stride in strides]
    offset, start = placed[0]
    origin = offset - sum(i * stride for i, stride in zip(start, final, strict=True))
    if any(o != origin + sum(i * s for i, s in zip(at, final, strict=True)) for o, at in placed):
        return None
    packed = strides_of(shape)
    final = [packed[i] if shape[i] <= 1 else final[i] for i in range(len(shape))]
    return tuple(final), offset - origin


def _solve(
    strides: list[int | None], placed: list[tuple[int, tuple[int, ...]]], shape: tuple[int, ...]
) -> bool:
    """Strides of dims that no single copy runs along, from pairs of copies that differ in that dim alone."""
    for dim, stride in enumerate(strides):
        if stride is not None or shape[dim] <= 1:
            continue
        first_offset, first = placed[0]
        for offset, start in placed[1:]:
            moved = [i for i in range(len(shape)) if start[i] != first[i]]
            if moved == [dim]:
                apart = start[dim] - first[dim]
                if (offset - first_offset) % apart:
                    return False
                strides[dim] = (offset - first_offset) // apart
                break
        else:
            return False
    return all(stride is None or stride >= 0 for stride in strides)
