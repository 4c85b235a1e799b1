"""A plan's transposes between tensors of one device, in one launch a width; what is left is for `read.run_plan`.

It takes copies without a cast between tensors of one device that the kernel can run on, and rejects nothing: every other
copy stays in the plan that is given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from restow.plans import Plan
from restow.torch.across import COLUMNS, Matrix, launch, launches, matrix_of, usable
from restow.torch.slotwork import WORTH
from restow.torch.strides import dot, real_places


def moved_on_device(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
    worth: int = WORTH,
) -> tuple[Plan, int]:
    """Do what the kernel can of a plan from memory; the plan of the rest, and the bytes that it moved."""
    if not plan.copies or plan.written < worth:
        return plan, 0
    device = tensors[plan.targets[plan.copies[0].target].name].device
    rows: list[tuple[int, ...]] = []
    rest, moved = [], 0
    known: dict[object, Matrix | None] = {}
    for copy in plan.copies:
        source, into = memory.get(plan.parts[copy.source].name), tensors[plan.targets[copy.target].name]
        coded = plan.parts[copy.source].coding >= 0
        if source is None or coded or source.dtype != into.dtype or {source.device, into.device} != {device}:
            rest.append(copy)
            continue
        pattern, width = plan.patterns[copy.pattern], source.element_size()
        offset, steps = real_places(source, copy.at, pattern.source)
        strides = tuple(step * into.stride(dim) for dim, step in pattern.target)
        key = (copy.pattern, steps, strides, width)
        if key not in known:
            known[key] = matrix_of(pattern.sizes, steps, strides) if usable(device, width) else None
        matrix = known[key]
        if matrix is None:
            rest.append(copy)
            continue
        begin = source.untyped_storage().data_ptr() + offset * width
        to = int(into.storage_offset()) + dot(copy.start, into.stride())
        base = into.untyped_storage().data_ptr() + to * width
        moved += len(matrix.places) * matrix.rows * matrix.cols * width
        rows += [(begin + a * width, base + b * width, *matrix[:4], width) for a, b in matrix.places]
    if rows:
        table = np.array(rows, np.int64)
        table = table[np.argsort(table[:, COLUMNS], kind="stable")]
        there = torch.from_numpy(np.ascontiguousarray(table[:, :COLUMNS])).to(device)
        widths = np.ascontiguousarray(table[:, COLUMNS])
        for what in launches(table[:, :COLUMNS], widths, np.zeros_like(widths)):
            launch(there[what.first : what.last], what)
    return replace(plan, copies=tuple(rest)), moved
