"""The layers of a checkpoint against each other and against the config: their number, routers, and like.

Layers are alike when the config's lists by layer (`layer_types` and others) say the same of them; one that
lacks what others of its kind have, and has nothing else instead, is not whole. Ignorable blocks (prediction
layers past the last) are passed over. It rejects nothing: its findings are `Problem`s.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from restow.checkpoint import Checkpoint
from restow.codec import SUFFIX
from restow.errors import MissingTensorError, RestowError, SizeError, UnexpectedTensorError, show
from restow.family import Family
from restow.layout import shape_of
from restow.module import Module
from restow.naming import fits
from restow.notation import Row
from restow.problems import Problem

AGAIN = "get the checkpoint again: nothing is filled in their place"


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """What is wrong with layers, and router tensors of another shape than (second) the sizes give."""

    problems: tuple[Problem, ...]
    wrong: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """The numbered layers below one path: their names outside the experts, and their experts modules."""

    path: str
    names: Mapping[int, frozenset[str]]
    modules: Mapping[int, Module]

    def layer(self, number: int) -> str:
        return f"{self.path}.{number}"


def judge_layers(found: Checkpoint, family: Family) -> LayerFindings:
    """Findings about every stack of layers that holds experts."""
    errors: list[RestowError] = []
    wrong: list[tuple[str, str]] = []
    count = found.sizes.get("L")
    for stack in _stacks(found, family):
        inside = {n: names for n, names in stack.names.items() if count is None or n < count}
        whole = Stack(stack.path, inside, {n: m for n, m in stack.modules.items() if n in inside})
        if count is not None:
            errors += _counted(found, family, stack, count)
        routers = _Routers(found, family, whole)
        errors += routers.missing()
        errors += _unlike(found, family, whole, routers)
        wrong += routers.wrong()
    return LayerFindings(tuple(Problem(error, True) for error in errors), tuple(wrong))


def _stacks(found: Checkpoint, family: Family) -> list[Stack]:
    """Every path below which numbered layers hold experts that are not ignorable."""
    modules: dict[str, dict[int, Module]] = defaultdict(dict)
    for path, module in found.modules.items():
        above, _, number = family.layer(path).rpartition(".")
        first = next((n for names in module.tensors.values() for n in names if n is not None), path)
        if number.isdecimal() and not found.ignorable(first):
            modules[above][int(number)] = module
    names: dict[str, dict[int, set[str]]] = {path: {n: set() for n in held} for path, held in modules.items()}
    excused: dict[tuple[str, str], bool] = {}
    for name in found.others:
        for path, layers in names.items():
            if not name.startswith(f"{path}.") or name.endswith(SUFFIX):  # scales are `quantized`'s
                continue
            if (
                found.tensors[name].dtype == "BOOL"
            ):  # a flag or a mask is no weight that every layer must have
                continue
            number, _, rest = name[len(path) + 1 :].partition(".")
            if (path, number) not in excused:
                anything = found.ignorable(f"{path}.{number}.*")
                excused[path, number] = anything or not number.isdecimal() or len(number) > 6
            if not excused[path, number]:
                layers.setdefault(int(number), set()).add(rest)
    return [
        Stack(path, {n: frozenset(layers[n]) for n in sorted(layers)}, modules[path])
        for path, layers in names.items()
    ]


def _counted(found: Checkpoint, family: Family, stack: Stack, count: int) -> Iterator[RestowError]:
    """The number of layers against the config's."""
    key = family.key_of("L", found.config or {})
    lost = [n for n in range(count) if n not in stack.names]
    over = [n for n in stack.names if n >= count]
    if lost:
        yield MissingTensorError(
            f"{count} layers below {show(stack.path)}, as {key} says",
            f"{count - len(lost)}",
            path=found.path,
            tensor=f"{stack.layer(lost[0])}.*",
            sections=[("missing", (f"{show(stack.layer(n))}.*" for n in lost))],
            hint="get the checkpoint again, or the config.json that belongs to it",
        )
    if over:
        names = [f"{stack.layer(n)}.{rest}" for n in over for rest in sorted(stack.names[n])]
        names += [
            t for n in over if n in stack.modules for ts in stack.modules[n].tensors.values() for t in ts if t
        ]
        yield UnexpectedTensorError(
            f"{count} layers below {show(stack.path)}, as {key} says",
            f"{len(stack.names)}",
            path=found.path,
            tensor=names[0],
            sections=[("extra", map(show, names))],
            hint=f"correct {key} in config.json, or drop these layers",
        )


class _Routers:
    """The router tensors of a stack, by layer and role, and how this checkpoint spells them."""

    def __init__(self, found: Checkpoint, family: Family, stack: Stack) -> None:
        self.found, self.stack = found, stack
        self.rows: dict[int, dict[str, tuple[str, Row]]] = defaultdict(dict)
        self.spelled: dict[str, str] = {}
        for name, row in found.routers.items():
            number, _, rest = name[len(stack.path) + 1 :].partition(".")
            if name.startswith(f"{stack.path}.") and number.isdecimal() and int(number) in stack.names:
                self.rows[int(number)][row.role] = (name, row)
                self.spelled[row.role] = rest
        for row in family.routers:
            self.spelled.setdefault(row.role, "".join(map(str, row.name)))

    def missing(self) -> Iterator[RestowError]:
        """Experts without a router."""
        lost = [n for n in self.stack.modules if "router" in self.spelled and "router" not in self.rows[n]]
        if lost:
            names = [f"{self.stack.layer(n)}.{self.spelled['router']}" for n in lost]
            yield MissingTensorError(
                f"a router beside {show(self.stack.modules[lost[0]].path)}",
                "none" if len(lost) == 1 else f"none, and none in {len(lost) - 1} more layers",
                path=self.found.path,
                tensor=names[0],
                sections=[("missing", map(show, names))],
                hint=AGAIN,
            )

    def wrong(self) -> Iterator[tuple[str, str]]:
        """Router tensors whose shape is not their row's."""
        for number, module in self.stack.modules.items():
            for name, row in self.rows[number].values():
                try:
                    expected = shape_of(row, {**self.found.sizes, **module.sizes})
                except SizeError:
                    continue
                if self.found.tensors[name].shape != expected:
                    yield name, f"{list(expected)}"


def _unlike(found: Checkpoint, family: Family, stack: Stack, routers: _Routers) -> Iterator[RestowError]:
    """Layers that lack what their like have: experts, or other tensors."""
    if not stack.modules:
        return
    model = next(iter(stack.modules.values()))
    below = model.path.removeprefix(f"{stack.path}.").partition(".")[2]
    inside = {n: any(rest.startswith(f"{below}.") for rest in names) for n, names in stack.names.items()}
    beside = {
        n: frozenset(r for r in names if not r.startswith(f"{below}.")) for n, names in stack.names.items()
    }
    kinds = _kinds(found, stack)
    groups: dict[object, Counter[frozenset[str]]] = defaultdict(Counter)
    for number, names in beside.items():
        groups[kinds[number]][names] += 1
    sparse = {(kinds[n], beside[n]) for n in stack.modules}
    empty: list[int] = []
    router = {routers.spelled.get("router", "")}
    lost: list[str] = []
    like = ""

    def optional(name: str) -> bool:
        return any(fits(pattern, name, found.sizes) for pattern in family.optional)

    for number, names in beside.items():
        group = groups[kinds[number]]
        fuller = [other for other in group if names < other]
        if number not in stack.modules:
            like_sparse = any((kinds[number], other) in sparse for other in fuller)
            if not inside[number] and (like_sparse or "router" in routers.rows[number]):
                empty.append(number)
        elif group[names] == 1 and fuller:
            best = max(fuller, key=lambda other: (group[other], len(other)))
            less = sorted(
                rest for rest in best - names - router if not optional(f"{stack.layer(number)}.{rest}")
            )
            lost += [f"{stack.layer(number)}.{rest}" for rest in less]
            if less and not like:
                like = next(stack.layer(n) for n, other in beside.items() if other == best)
    if empty:
        yield _empty_error(found, stack, model, below, empty)
    if lost:
        yield MissingTensorError(
            f"the tensors that layers like {show(like)} have",
            f"{len(lost)} missing",
            path=found.path,
            tensor=lost[0],
            sections=[("missing", map(show, lost))],
            hint=AGAIN,
        )


def _kinds(found: Checkpoint, stack: Stack) -> dict[int, tuple[str, ...]]:
    """What the config's lists by layer say of each layer."""
    config = found.config or {}
    count = found.sizes.get("L", 0)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    by_layer: list[Sequence[object]] = [
        value
        for part in parts
        for value in part.values()
        if isinstance(value, list | str) and len(value) == count
    ]
    return {n: tuple(repr(value[n]) for value in by_layer if n < count) for n in stack.names}


def _empty_error(
    found: Checkpoint, stack: Stack, model: Module, below: str, empty: Sequence[int]
) -> MissingTensorError:
    """Layers without their experts, which are named as those of `model` are."""
    names = [f"{stack.layer(n)}.{below}.{key}" for n in empty for key in model.layout.keys(model.sizes)]
    return MissingTensorError(
        f"{model.sizes.get('e', 0)} experts in {show(stack.layer(empty[0]))}.{below}",
        "none" if len(empty) == 1 else f"none, and none in {len(empty) - 1} more layers",
        path=found.path,
        tensor=names[0],
        sections=[("missing", map(show, names))],
        hint=AGAIN,
    )
