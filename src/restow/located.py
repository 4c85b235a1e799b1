"""Where a finding lies: the file that holds what it names, else the folder; and where missing experts were looked for.

Findings are made from names, shapes and the config, by modules that know no files. It rejects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

from restow.checkpoint import Checkpoint
from restow.errors import MissingTensorError, RestowError, show
from restow.problems import Problem


def located(problem: Problem, found: Checkpoint, root: str) -> Problem:
    """The finding with a path below `root`; one that has a whole path already is returned as it is."""
    path = problem.error.path
    if path is not None and (path == root or Path(path).name != path):
        return problem
    error = copy(problem.error)
    files = sorted(set(_files(error, found)))
    if path is None:
        path = files[0] if len(files) == 1 else ""
    error.path = str(Path(root) / path) if path else root
    if isinstance(error, MissingTensorError) and (beside := _beside(error, found)):
        error.sections = (*error.sections, ("looked in", tuple(map(show, beside))))
    return Problem(error, problem.fatal)


def _files(error: RestowError, found: Checkpoint) -> Iterator[str]:
    """The files of the tensors that an error names, at the beginning of its lines."""
    for name in (
        error.tensor or "",
        *(line.partition(" ")[0] for _, body in error.sections for line in body),
    ):
        held = name if name in found.tensors else name.removesuffix(":")
        if held in found.tensors:
            yield from (piece.file for piece in found.tensors[held].pieces)


def _beside(error: RestowError, found: Checkpoint) -> list[str]:
    """The files of the experts module that the error's tensor would belong to."""
    for path, module in found.modules.items():
        if error.tensor is not None and error.tensor.startswith(f"{path}."):
            held = [name for names in module.tensors.values() for name in names if name is not None]
            return sorted({piece.file for name in held for piece in found.tensors[name].pieces})
    return []
