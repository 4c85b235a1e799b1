"""Targets that differ in `p` alone (gate, up) as one target with `p` as its slowest dim, where the source's rows hold both.

Short rows are read with what lies between them; two targets that each want a half of every row would read all of them
twice. Joined, they are one copy whose rows are whole. The joined tensor's memory is that of its parts, one after another.
It rejects nothing: what cannot be joined stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from restow.layout import axis_size
from restow.notation import Dim, Factor, Labels, Row
from restow.prepare import Prepared
from restow.targets import Target


@dataclass(frozen=True)
class Joined:
    """`prepared` with joined rows; `parts` gives every part's joined name and the part's index along `p`."""

    prepared: Prepared
    parts: Mapping[str, tuple[str, int]]

    def one(self, bundle: Sequence[Target]) -> Target | None:
        """The target that these are the parts of, in order and held alike; None where they are not all of one."""
        first, _ = self.parts.get(bundle[0].name, ("", 0))
        if [self.parts.get(part.name) for part in bundle] != [(first, i) for i in range(len(bundle))]:
            return None
        if len(bundle) != self.prepared.targets[first].shape[0] or {p.runs for p in bundle} != {
            bundle[0].runs
        }:
            return None
        return _stacked(bundle[0], len(bundle))


def joined(prepared: Prepared) -> Joined:
    """Join every role of the destination whose names carry `p` where the source's dims do."""
    parts: dict[str, tuple[str, int]] = {}
    modules = dict(prepared.modules)
    owners, targets = dict(prepared.owners), dict(prepared.targets)
    for path, module in prepared.modules.items():
        source = prepared.source.modules.get(prepared.pairs.get(path, ""))
        rows, tensors = [], dict(module.tensors)
        for row in module.layout.rows:
            there = [r for r in source.layout.rows if r.role == row.role] if source is not None else []
            if not _apart(row) or not there or "p" in there[0].name_axes or prepared.source.coded is not None:
                rows.append(row)
                continue
            names = module.tensors.get(row.role, ())
            count = axis_size(row, "p", module.sizes)
            below = row.name_axes[row.name_axes.index("p") + 1 :]
            inner = prod(axis_size(row, axis, module.sizes) for axis in below)
            together: list[tuple[str | None, ...]] = [
                names[at + i : at + i + count * inner : inner]
                for at in range(0, len(names), count * inner)
                for i in range(inner)
            ]
            if any(not _alike(bundle, prepared.targets) for bundle in together):
                rows.append(row)
                continue
            rows.append(_with_dim(row))
            tensors[row.role] = tuple(bundle[0] for bundle in together)
            for place, bundle in enumerate(together):
                first = bundle[0] or ""
                parts.update({name or "": (first, i) for i, name in enumerate(bundle)})
                for name in bundle:
                    del owners[name or ""], targets[name or ""]
                owners[first] = (path, row.role, place)
                targets[first] = _stacked(prepared.targets[first], count)
        layout = type(module.layout)(tuple(rows))
        modules[path] = replace(module, layout=layout, tensors=tensors, sizes={"p": 1, **module.sizes})
    whole = Prepared(prepared.source, targets, prepared.wish, modules, prepared.pairs, owners, prepared.plain)
    return Joined(whole, parts)


def _stacked(first: Target, count: int) -> Target:
    return Target(first.name, (count, *first.shape), first.dtype, (((0, count),), *first.runs))


def _apart(row: Row) -> bool:
    return any(isinstance(part, Labels) and part.axis == "p" and len(part.labels) > 1 for part in row.name)


def _alike(bundle: tuple[str | None, ...], targets: Mapping[str, Target]) -> bool:
    """Whether all parts are there, in one shape and dtype."""
    found = [targets.get(name) if name is not None else None for name in bundle]
    kinds = {(t.shape, t.dtype, t.runs) for t in found if t is not None}
    return None not in found and len(kinds) == 1


def _with_dim(row: Row) -> Row:
    """The row with `p` in its dims instead of its name; the name is only shown."""
    name = tuple("p" if isinstance(part, Labels) and part.axis == "p" else part for part in row.name)
    return replace(row, name=name, dims=(Dim((Factor("p"),)), *row.dims))
