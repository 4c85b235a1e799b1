"""The error for tensors of experts that a plan needs and a source does not have: every one by its name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from restow.checkpoint import Checkpoint
from restow.errors import MissingTensorError, show
from restow.layout import axis_size, name_of
from restow.module import Module

Lost = tuple[
    Module, str, Sequence[int]
]  # an experts module, a role, the places of tensors that are not there


def lost_error(source: Checkpoint, lost: Sequence[Lost]) -> MissingTensorError:
    """Every tensor that is needed and not there, of every module; the counts are the first module's."""
    names: list[str] = []
    experts: set[int] = set()
    first = lost[0][0]
    for module, role, places in lost:
        row = module.layout.row(role)
        lengths = [axis_size(row, axis, module.sizes) for axis in row.name_axes]
        index = list(product(*map(range, lengths)))
        names += [f"{module.path}.{name_of(row, index[i], module.sizes)}" for i in places]
        if module is first and "e" in row.name_axes:
            at = row.name_axes.index("e")
            experts |= {index[i][at] for i in places}
    count = first.sizes.get("e", 0)
    held = [n for tensors in first.tensors.values() for n in tensors if n is not None]
    files = sorted({source.tensors[name].pieces[0].file for name in held} - {""})
    return MissingTensorError(
        f"{count} experts in {show(first.path)}",
        f"{count - len(experts) if experts else 0}",
        path=source.path,
        tensor=names[0],
        sections=[("missing", map(show, names)), ("looked in", map(show, files))],
        hint="get the checkpoint again: nothing is filled in their place",
    )
