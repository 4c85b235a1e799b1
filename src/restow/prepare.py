"""A source and a destination brought together: which module and which tensor there is filled from which one here.

No moves yet, and no data: names, modules and headers only. It raises the source's fatal problems and names that two
tensors claim, and leaves what is missing or unused to the caller, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from restow.checkpoint import Checkpoint
from restow.decoded import decoded, kept_coded
from restow.draft import Known
from restow.errors import AmbiguousTensorError, MissingTensorError, RestowError, show
from restow.landing import Wish, check_modules, find_landing, pair_modules
from restow.module import Module, Owner, owners_of
from restow.naming import check_rename, renamed
from restow.problems import merged
from restow.targets import Target


@dataclass(frozen=True)
class Prepared:
    """A source and a destination brought together: who fills whom, before any move is made.

    `owners` maps a target of the experts to (path of its module there, role, place among the role's tensors);
    `pairs` a module's path there to the one in the source; `plain` any other target to its source tensor. `known` keeps
    moves that several plans of one destination share (chunks of a stream, layers of one kind).
    """

    source: Checkpoint
    targets: Mapping[str, Target]
    wish: Wish
    modules: Mapping[str, Module]
    pairs: Mapping[str, str]
    owners: Mapping[str, Owner]
    plain: Mapping[str, str]
    known: Known = field(default_factory=dict, repr=False)

    @cached_property
    def roles(self) -> Mapping[tuple[str, str], str]:
        """(module path, role) of the source that the destination has a place for -> the module's path there."""
        return {
            (self.pairs[path], row.role): path
            for path, module in self.modules.items()
            if path in self.pairs
            for row in module.layout.rows
            if any(self.source.modules[self.pairs[path]].tensors.get(row.role, ()))
        }

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Targets that nothing fills, those of which nothing is held here apart."""
        there = {(path, role) for (_, role), path in self.roles.items()}
        return tuple(
            name
            for name, target in self.targets.items()
            if all(target.local_shape)
            and name not in self.plain
            and (name not in self.owners or self.owners[name][:2] not in there)
        )

    @cached_property
    def left(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Source tensors without a place: those that the family does not excuse, and those that it does."""
        experts = self.source.expert_tensors
        gone = {name for name in self.source.others if renamed(name, self.wish.rename) is None}
        used = {*self.plain.values(), *gone}
        names = [name for name in self.source.others if name not in used]
        roles = {(path, role) for path, m in self.source.modules.items() for role in m.tensors} - set(
            self.roles
        )
        if roles:
            names += [name for name, owner in experts.items() if owner in roles]
        passed = {name for name in names if self.source.ignorable(name)}
        return tuple(n for n in names if n not in passed), tuple(n for n in names if n in passed)


def prepare(
    source: Checkpoint,
    targets: Sequence[Target],
    wish: Wish,
    modules: Mapping[str, Module] | None = None,
) -> Prepared:
    """Find the destination's modules, unless they are given, and bring both sides together; no moves yet."""
    check_rename(wish.rename)
    raise_fatal(source)
    check_modules(source, wish.experts)
    by_name = {target.name: target for target in targets}
    if modules is None:
        try:
            modules = find_landing(source, by_name, wish).modules
        except RestowError as error:  # what the source itself lacks may be why
            raise merged([error, *(p.error for p in source.problems if p.fatal)]) from None
    kept = kept_coded(source, by_name, modules, pair_modules(source, modules, wish))
    source = decoded(source, kept)
    owners = owners_of(modules)
    plain = pair_others(source, [name for name in by_name if name not in owners], wish)
    pairs = pair_modules(source, modules, wish)
    return Prepared(source, by_name, wish, modules, pairs, owners, plain)


def pair_others(source: Checkpoint, names: Sequence[str], wish: Wish) -> dict[str, str]:
    """Targets outside the experts -> source tensors: by the renamed name, else by the family's hub and runtime names.

    Raises `AmbiguousTensorError` where two tensors of the source have one name there.
    """
    family = wish.family or source.family
    by_name: dict[str, str] = {}
    by_canonical: dict[str, list[str]] = {}
    for name in source.others:
        to = renamed(name, wish.rename)
        if to is None:
            continue
        by_name[to] = name
        if family is not None:
            by_canonical.setdefault(family.canonical(to), []).append(name)
    pairs: dict[str, str] = {}
    for name in names:
        near = [by_name[name]] if name in by_name else []
        if not near and family is not None:
            near = by_canonical.get(family.canonical(name), [])
        if len(near) > 1:
            raise AmbiguousTensorError(
                f"one tensor of the source for {show(name)}",
                f"{len(near)}",
                tensor=name,
                sections=[("tensors", map(show, near))],
                hint="say which with rename=",
            )
        if near:
            pairs[name] = near[0]
    return pairs


def raise_fatal(source: Checkpoint) -> None:
    """Raise the source's first fatal problem, listing all; what only some tensors lack is raised by who needs them."""
    fatal = [p.error for p in source.problems if p.fatal and not isinstance(p.error, MissingTensorError)]
    if fatal:
        raise merged(fatal)


def refuse(source: Checkpoint, strict: bool) -> tuple[str, ...]:
    """Raise every fatal problem of a source that is needed whole, under `strict` every other too; else their texts."""
    raise_fatal(source)
    fatal = [problem.error for problem in source.problems if problem.fatal]
    odd = [problem.error for problem in source.problems if not problem.fatal]
    if fatal or (strict and odd):
        raise merged(fatal or odd)
    return tuple(map(str, odd))
