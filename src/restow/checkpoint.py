"""A checkpoint as restow sees it: tensors by name, their family, and the layout of every experts module. No data.

`survey` makes one from names, shapes and dtypes, whoever holds them; `opening` makes one from a path. Findings that do
not prevent that are in `problems`; whoever needs what they concern raises them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from restow.codec import SUFFIX, Announced, with_scales
from restow.entries import Entry
from restow.errors import show
from restow.family import Family
from restow.find import candidates_of, find_modules
from restow.layout import Layout
from restow.match import Matcher
from restow.module import Module
from restow.naming import fits
from restow.notation import Part, Row
from restow.problems import Problem
from restow.stated import stated_candidates
from restow.tensors import Tensors


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and what they mean.

    `tensors` maps a name to its `Entry`; `modules` an experts module's path to how it was found; `routers` a tensor
    outside the experts that has an `e` axis to its row; `sizes` are those of the config. `path` is None for tensors in
    memory.
    """

    tensors: Mapping[str, Entry]
    family: Family | None
    modules: Mapping[str, Module]
    routers: Mapping[str, Row]
    sizes: Mapping[str, int]
    problems: tuple[Problem, ...] = ()
    path: str | None = None
    config: Mapping[str, Any] | None = None
    given: bool = False  # the caller said the family or the layout
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    codec: Announced | None = None  # what the config announces about quantised weights
    coded: Mapping[str, Any] | None = field(
        default=None, compare=False, repr=False
    )  # as `decoded` sees it: by name

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout of every experts module, by the module's path."""
        return MappingProxyType({path: module.layout for path, module in self.modules.items()})

    @cached_property
    def expert_tensors(self) -> Mapping[str, tuple[str, str]]:
        """Every stored tensor of the experts: name -> (module path, role)."""
        return {
            name: (path, role)
            for path, module in self.modules.items()
            for role, names in module.tensors.items()
            for name in names
            if name is not None
        }

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Every tensor that is no expert weight, in the order of the files."""
        experts = self.expert_tensors
        return tuple(name for name in self.tensors if name not in experts)

    @cached_property
    def several(self) -> frozenset[str]:
        """The tensors whose bytes lie in more than one piece."""
        known = getattr(self.tensors, "sharded", None)
        if known is not None:
            return frozenset(known)
        return frozenset(name for name, entry in self.tensors.items() if len(entry.pieces) != 1)

    def ignorable(self, name: str) -> bool:
        """Whether the family's rows excuse a destination that has no place for this tensor."""
        return self.family is not None and any(fits(p, name, self.sizes) for p in self.family.ignorable)

    def __str__(self) -> str:
        kinds: dict[Layout, list[str]] = {}
        for path, module in self.modules.items():
            kinds.setdefault(module.layout, []).append(path)
        family = self.family.model_types[0] if self.family else "unknown family"
        lines = [f"{show(self.path or 'tensors in memory')}: {len(self.tensors):,} tensors, {family}"]
        lines += [f"  {len(paths)} experts modules such as {show(paths[0])}" for paths in kinds.values()]
        return "\n".join(lines)


def survey(
    tensors: Mapping[str, Entry],
    *,
    family: Family | None = None,
    layout: Layout | None = None,
    config: Mapping[str, Any] | None = None,
    path: str | None = None,
    problems: tuple[Problem, ...] = (),
    given: bool = False,
    stamps: Mapping[str, tuple[int, ...]] | None = None,
    codec: Announced | None = None,
    stated: Layout | None = None,
) -> Checkpoint:
    """Find the experts modules and router tensors among `tensors`; `stated` is what their own files say of their layout.

    Raises `ConfigError` for impossible sizes.
    """
    sizes = dict(family.read_sizes(config)) if family is not None and config is not None else {}
    sizes.setdefault("p", len(family.labels) if family else 2)
    routers = RouterRows(family)
    told = stated if layout is None else None
    candidates = candidates_of(family, layout) if told is None else stated_candidates(told, family)
    if "e" not in sizes and any(_flat(row) for s in candidates for row in s.layout.rows):
        sizes.update(_counted(tensors, routers))
    found = find_modules(
        _Shapes(tensors),
        with_scales(candidates, codec),
        sizes,
        family=family,
        claimed=lambda name: (
            layout is not None
            or routers.row(name) is not None
            or _excused(name, family, sizes)
            or (codec is None and name.endswith(SUFFIX))
        ),
        beside=family.passes_over if family is not None and family.beside else _nobody,
        codec=codec,
    )
    return Checkpoint(
        tensors=tensors,
        family=family,
        modules=found.modules,
        routers={name: row for name in found.others if (row := routers.row(name)) is not None},
        sizes=sizes,
        problems=(*problems, *(Problem(error, True) for error in found.errors)),
        path=path,
        config=config,
        given=given,
        stamps=stamps or {},
        codec=codec,
    )


def _flat(row: Row) -> bool:
    """Whether a dim holds the experts and something else: its length alone does not say how many they are."""
    return any(len(dim.factors) > 1 and any(f.axis == "e" for f in dim.factors) for dim in row.dims)


def _counted(tensors: Mapping[str, Entry], routers: RouterRows) -> dict[str, int]:
    """The number of experts by the router tensors' shapes, where all of them agree."""
    counts = set()
    for name, entry in tensors.items():
        row = routers.row(name)
        dims = list(map(str, row.dims)) if row is not None else []
        if "e" in dims and len(dims) == len(entry.shape):
            counts.add(entry.shape[dims.index("e")])
    return {"e": counts.pop()} if len(counts) == 1 else {}


class _Shapes(Mapping[str, tuple[int, ...]]):
    """Names and shapes of a mapping of entries, without a second table."""

    def __init__(self, tensors: Mapping[str, Entry]) -> None:
        self._tensors = tensors
        self._of = tensors.shape if isinstance(tensors, Tensors) else None

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._of(name) if self._of is not None else self._tensors[name].shape

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class RouterRows:
    """A family's router rows, asked by name: hub and runtime names alike."""

    def __init__(self, family: Family | None) -> None:
        self._family = family
        rows = family.routers if family is not None else ()
        runtime = [replace(row, name=tuple(_runtime(part, family) for part in row.name)) for row in rows]
        self._matcher = Matcher(((i, "", row) for i, row in enumerate([*rows, *runtime])), {})

    def row(self, name: str) -> Row | None:
        """The router row that the end of `name` spells, on the hub or in the runtime; None for all else.

        What the family passes over has no rows: another model's router in the same files has another model's sizes.
        """
        hits = self._matcher.match(name)
        if not hits or (self._family is not None and self._family.passes_over(name)):
            return None
        return hits[0].row


def _runtime(part: Part, family: Family | None) -> Part:
    return family.canonical(part) if isinstance(part, str) and family is not None else part


def _excused(name: str, family: Family | None, sizes: Mapping[str, int]) -> bool:
    return family is not None and any(
        fits(pattern, name, sizes) for pattern in (*family.ignorable, *family.beside)
    )


def _nobody(name: str) -> bool:
    return False
