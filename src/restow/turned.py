"""Experts modules of one checkpoint that spell the same names and are read in another order of dims than the others.

Each fits its shapes, and together they cannot be meant: where one tensor was transposed and another is square, the two
fit a layout that no file of this checkpoint was written in. Found among modules of whatever side; named, not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from restow.errors import AmbiguousLayoutError, show
from restow.layout import rows_text
from restow.module import Module, Shapes


def turned_errors(
    modules: Mapping[str, Module], shapes: Shapes
) -> Iterable[tuple[str, AmbiguousLayoutError]]:
    """(path, error) for modules that are read otherwise than most that have their names."""
    alike: dict[tuple[object, ...], dict[tuple[object, ...], list[Module]]] = {}
    for module in modules.values():
        rows = sorted((row for row in module.layout.rows if "." not in row.role), key=lambda row: row.role)
        names = tuple((row.role, row.name) for row in rows)
        alike.setdefault(names, {}).setdefault(tuple(row.dims for row in rows), []).append(module)
    for groups in alike.values():
        usual, *others = sorted(groups.values(), key=len, reverse=True)
        for odd in others:
            yield odd[0].path, _error(odd, usual[0], shapes)


def _error(odd: list[Module], usual: Module, shapes: Shapes) -> AmbiguousLayoutError:
    names = [name for module in odd for ours in module.tensors.values() for name in ours if name is not None]
    return AmbiguousLayoutError(
        f"experts of one order of dims, as {show(usual.path)} has",
        f"another in {show(odd[0].path)}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else ""),
        tensor=names[0],
        sections=[
            ("tensors", (f"{show(name)} {list(shapes[name])}" for name in names)),
            ("fit", rows_text(odd[0].layout)),
            ("usual", rows_text(usual.layout)),
        ],
        hint="one of them was transposed: get the file again; layout=NAME (--layout NAME) says how all are read",
    )
