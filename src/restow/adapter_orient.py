"""Which parameter a wrapper's tensors are for, and which side its `lora_A` faces: from shapes, siblings, then versions.

PEFT's fused files turned round between 0.19.0 and 0.19.1 under the same names, and `experts.lora_A` is the outermost
wrapper, whatever it wraps: the parameter registered last among those targeted (PEFT 0.18.1 to 0.21.2, measured). Gate and
up may be one parameter or two; `target_parameters` say it. Shapes
of all tensors of a module are judged together; what they leave open is decided by another module of the file, then by
`peft_version`, then not at all: the error names the option that decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

from restow.adapter_config import AdapterConfig
from restow.adapter_formats import Faces, Kind, era_of, faces_of, leaf, parameter, rows
from restow.adapter_keys import Found, half, module_of
from restow.errors import AdapterError, UsageError, show
from restow.family import Family
from restow.layout import solve_sizes
from restow.notation import Row
from restow.problems import merged
from restow.segments import ends

Shapes = Mapping[str, tuple[int, ...]]
Unit = tuple[str, int | None]  # what one wrapper is around: a role, or one projection of it


class Options(NamedTuple):
    """What the caller may say where files do not: the side that lora_A faces, the outermost wrapper's role, and
    whether lora_B is folded expert-major (Unsloth before its marker)."""

    faces: Faces | None = None
    outer: str = "out"
    expert_major: bool | None = None

    def judge(self) -> None:
        """Raise `UsageError` for values that mean nothing."""
        for field, value, known in (
            ("faces", self.faces, (None, *get_args(Faces))),
            ("outer", self.outer, ("out", "in")),
        ):
            if value not in known:
                words = ", ".join(f"'{word}'" for word in known if word)
                raise UsageError(f"{field} as one of {words}", f"'{show(str(value))}'")


class Wrappers(NamedTuple):
    """The wrappers of one experts module: by what is wrapped, (name of lora_A, name of lora_B), the depth, and the
    parameter's full name."""

    path: str
    kind: Kind
    names: Mapping[Unit, tuple[str, str]]
    depth: Mapping[Unit, int]
    parameters: Mapping[Unit, str]


def wrapped_roles(
    path: str, found: Sequence[Found], config: AdapterConfig, family: Family, shapes: Shapes,
    sizes: Mapping[str, int], options: Options,
) -> Wrappers:  # fmt: skip
    """Which role each depth of a module's wrappers is for. Raises `AdapterError` where nothing says it."""
    for f in found:
        if len(f.names) != len(f.rows):
            name = next(name for names in f.names.values() for name in names.values())
            word = "lora_A" if "lora_A" in name else "lora_B"
            raise merged(half(module_of(name), {word: name}, config.path))
    by_depth = {f.spelled.depth: (f.names["out.A"][()], f.names["out.B"][()]) for f in found}
    kind: Kind = "wrapper" if len(shapes[by_depth[min(by_depth)][0]]) == 2 else "wrapper3"
    most = len(family.labels) + 1
    if sorted(by_depth) != list(range(len(by_depth))) or len(by_depth) > most:
        raise AdapterError(
            f"one wrapper for each parameter of {show(path)}, at most {most}",
            f"wrappers at depths {sorted(by_depth)}",
            tensor=by_depth[max(by_depth)][0],
        )
    fused, apart = registered(path, family)
    if options.outer != "out":  # registered the other way round: the last one is outermost
        fused, apart = (dict(reversed(one.items())) for one in (fused, apart))
    targets = config.names("target_parameters")
    asked = [
        {unit: name for unit, name in one.items() if any(ends(name, t) for t in targets)}
        for one in (fused, apart)
    ]
    units: Mapping[Unit, str] = {}
    if any(asked) or len(by_depth) > 1:
        known = asked if any(asked) else [fused, apart]
        units = next((one for one in known if len(one) == len(by_depth)), {})
    else:  # shapes may say it: one parameter that fits, and no other
        tries = [_wrappers(path, kind, {unit: name}, by_depth) for unit, name in fused.items()]
        could = [one for one in tries if possible_faces(one, config, family, shapes, sizes)]
        units = could[0].parameters if len(could) == 1 else {}
    if not units:
        count = max(map(len, asked))
        raise AdapterError(
            f"target_parameters that say which parameter {show(by_depth[0][0])} is for",
            f"{count} that match below {show(path)}" if count else "none, and shapes that leave it open",
            path=config.path,
            tensor=by_depth[0][0],
            hint="write target_parameters into the config as the adapter was trained",
        )
    return _wrappers(path, "apart" if units.keys() & apart.keys() - fused.keys() else kind, units, by_depth)


def registered(path: str, family: Family) -> tuple[dict[Unit, str], dict[Unit, str]]:
    """The parameters of an experts module in the order in which they are registered: gate and up as one, and as two."""
    out: dict[Unit, str] = {("out", None): f"{path}.{parameter(family, 'out')}"}
    fused: dict[Unit, str] = {("in", None): f"{path}.{parameter(family, 'in')}"}
    labels = range(len(family.labels)) if len(family.labels) > 1 else ()
    apart: dict[Unit, str] = {("in", label): f"{path}.{leaf(family, 'in', label)}" for label in labels}
    down: dict[Unit, str] = {("out", None): f"{path}.{leaf(family, 'out', 0)}"}
    return {**fused, **out}, {**apart, **down} if apart else {}


def _wrappers(
    path: str, kind: Kind, units: Mapping[Unit, str], by_depth: Mapping[int, tuple[str, str]]
) -> Wrappers:
    depth = {unit: len(units) - 1 - i for i, unit in enumerate(units)}
    return Wrappers(path, kind, {unit: by_depth[n] for unit, n in depth.items()}, depth, units)


def possible_faces(
    module: Wrappers, config: AdapterConfig, family: Family, shapes: Shapes, sizes: Mapping[str, int]
) -> list[Faces]:
    """The sides that lora_A of a module may face by its tensors' shapes."""
    return [faces for faces in get_args(Faces) if _fits(module, faces, config, family, shapes, sizes)]


def _fits(
    module: Wrappers,
    faces: Faces,
    config: AdapterConfig,
    family: Family,
    shapes: Shapes,
    sizes: Mapping[str, int],
) -> bool:
    """Whether all tensors of a module agree with each other, and with the sizes known, if lora_A faces this side."""
    known = dict(sizes)
    for unit, pair in module.names.items():
        of = {**known, "p": 1} if unit[1] is not None else dict(known)
        if "e" not in of:  # (e r) is one dim: without the number of experts the config's rank parts it
            of["r"] = config.of(module.parameters[unit])[0]
        table = wrapper_rows(module, unit, faces, family)
        for factor, row in ((f, table[f"{unit[0]}.{f}"]) for f in "AB"):
            fresh = solve_sizes(row, shapes[stored(pair, factor, faces)], of)
            if fresh is None:
                return False
            of.update(fresh)
        known.update({axis: n for axis, n in of.items() if axis not in ("r", "p")})
    return True


def stored(pair: tuple[str, str], factor: str, faces: Faces) -> str:
    """The name under which the factor A (input) or B (output) lies."""
    return pair[(factor == "B") ^ (faces == "output")]


def wrapper_rows(
    module: Wrappers, unit: Unit, faces: Faces, family: Family, expert_major: bool = False
) -> dict[str, Row]:
    """The rows of one wrapper, by role."""
    depth = {unit[0]: module.depth[unit]}
    return rows(module.kind, family, faces=faces, depth=depth, expert_major=expert_major)


def decide_faces(
    modules: Sequence[Wrappers], config: AdapterConfig, family: Family, shapes: Shapes,
    sizes: Mapping[str, Mapping[str, int]], options: Options,
) -> dict[str, tuple[Faces, str]]:  # fmt: skip
    """By module path: the side that lora_A faces, and what decided it. Raises `AdapterError` where nothing does."""
    possible = {m.path: possible_faces(m, config, family, shapes, sizes[m.path]) for m in modules}
    for m in modules:
        if not possible[m.path]:
            raise _no_fit(m, config, family, shapes, sizes[m.path])
    decided = {path: (found[0], "shapes") for path, found in possible.items() if len(found) == 1}
    open_ = [m for m in modules if m.path not in decided]
    siblings = {faces for faces, _ in decided.values()}
    era = era_of(config.version) if config.version else None
    for m in open_:
        if options.faces is not None:
            decided[m.path] = (options.faces, "the option faces")
        elif len(siblings) == 1:
            decided[m.path] = (next(iter(siblings)), "other modules of the file")
        elif m.kind == "wrapper3":
            decided[m.path] = ("input", "its 3-D tensors")
        elif era is not None:
            decided[m.path] = (faces_of(era, family), f"peft_version {config.version}")
        else:
            raise _undecided(m, config, shapes)
    wrong = [(p, f) for p, (f, _) in decided.items() if options.faces not in (None, f)]
    if wrong:
        raise AdapterError(
            f"lora_A that faces the {options.faces}, as the option faces says",
            f"shapes of {show(wrong[0][0])} in which it faces the {wrong[0][1]}",
            path=config.path,
            hint="leave the option out: shapes decide here",
        )
    return decided


def _undecided(module: Wrappers, config: AdapterConfig, shapes: Shapes) -> AdapterError:
    names = [name for pair in module.names.values() for name in pair]
    return AdapterError(
        f"shapes or a released peft_version that say which side lora_A of {show(module.path)} faces",
        f"shapes that fit both, and peft_version {show(repr(config.raw.get('peft_version')))}",
        path=config.path,
        tensor=names[0],
        sections=[("tensors", (f"{show(n)} {list(shapes[n])}" for n in names))],
        hint='say faces="input" (PEFT 0.19.1 and later) or faces="output" (PEFT 0.18 and 0.19.0); --faces',
    )


def _no_fit(
    module: Wrappers, config: AdapterConfig, family: Family, shapes: Shapes, sizes: Mapping[str, int]
) -> AdapterError:
    names = [name for pair in module.names.values() for name in pair]
    known = ", ".join(f"{axis} = {n}" for axis, n in sizes.items() if axis in "edfp")
    ranks = {config.of(name)[0] for name in module.parameters.values()}
    return AdapterError(
        f"tensors of {show(module.path)} that fit the base ({known}; rank {', '.join(map(str, sorted(ranks)))})",
        f"shape {list(shapes[names[0]])}",
        path=config.path,
        tensor=names[0],
        sections=[("tensors", (f"{show(n)} {list(shapes[n])}" for n in names))],
        hint="this adapter was trained on a base of other sizes, or its tensors are exchanged",
    )
