"""Which layout does each experts module have: decided from names and shapes together, never guessed.

A module's layout is the one candidate that uses every tensor below it (router rows and ignorable names apart) and fits
sizes and shapes together. None or two is an `AmbiguousLayoutError` that lists them. The same function serves files,
state dicts and models; it sees names, shapes and dtypes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from operator import ge, mul
from typing import NamedTuple

from restow.boxes import strides_of
from restow.codec import Announced, lost_scales, odd_grids
from restow.codecs import COMPANIONS, Codec, ragged
from restow.errors import (
    LISTED,
    AmbiguousLayoutError,
    AmbiguousTensorError,
    MissingTensorError,
    RestowError,
    ShapeMismatchError,
    SizeError,
    UnexpectedTensorError,
    show,
)
from restow.family import Family, Spelling
from restow.layout import Layout, axis_size, drop_own_count, name_of, rows_text, shape_of, solve_sizes
from restow.match import Matcher
from restow.named import FORMS, GENERAL
from restow.notation import Row

Shapes = Mapping[str, tuple[int, ...]]

NAMING = ("missing", "extra", "tensors")  # sections that list tensors at fault
SECOND = ("in2", "out2")  # the roles of a second bank of experts
HOLES = 1000  # tensors named at most when nearly all of a module is missing


@dataclass(frozen=True, slots=True)
class Module:
    """An experts module as it was found.

    `tensors` gives, per role, the full name of each stored tensor in row-major order of the row's name axes; None
    stands for one that is not there (only where the caller admits parts).
    """

    path: str
    layout: Layout
    names: tuple[str, ...]  # what the layout is called here: ("hf", "split")
    sizes: Mapping[str, int]
    tensors: Mapping[str, tuple[str | None, ...]]
    codec: Codec | None = None  # what its weights are coded in


@dataclass(frozen=True, slots=True)
class Findings:
    """Modules by path, the names that no candidate's row explains, and what is wrong."""

    modules: Mapping[str, Module]
    others: tuple[str, ...]
    errors: tuple[RestowError, ...]


def candidates_of(family: Family | None, layout: Layout | None) -> tuple[Spelling, ...]:
    """The candidates: a layout that was named, a family's own, or every general form."""
    if layout is not None:
        own = [s for s in (family.candidates() if family is not None else ()) if s.layout == layout]
        return tuple(own[:1]) or (Spelling(("given",), "", layout),)
    if family is not None:
        return family.candidates()
    return tuple(Spelling((name,), "", GENERAL[name]) for name in FORMS)


def find_modules(
    shapes: Shapes,
    candidates: Sequence[Spelling],
    sizes: Mapping[str, int],
    *,
    claimed: Callable[[str], bool] = lambda name: False,
    beside: Callable[[str], bool] = lambda name: False,
    local: Mapping[str, int] | None = None,
    partial: bool = False,
    what: str = "the checkpoint",
    codec: Announced | None = None,
) -> Findings:
    """Find every experts module among `shapes` (name -> shape).

    `sizes` come from the config (or from the other side), `local` those of axes whose dims are held in part;
    `claimed` tells names below modules that are no expert weights, and `beside` those that are none even where a row
    spells them; `partial` admits modules of which only some experts
    are there (a rank's own).
    """
    matcher = Matcher(
        ((i, s.container, row) for i, s in enumerate(candidates) for row in s.layout.rows), sizes
    )
    by_path: dict[str, dict[int, dict[tuple[str, tuple[int, ...]], str]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    hit_names: dict[str, set[str]] = defaultdict(set)
    for name in shapes:
        for hit in matcher.match(name) if not beside(name) else ():
            by_path[hit.path][hit.tag][hit.row.role, hit.index] = name
    _drop_bare(by_path)
    for path, tags in by_path.items():
        hit_names[path].update(name for names in tags.values() for name in names.values())
    hit_any = {name for names in hit_names.values() for name in names}
    missed = [name for name in shapes if name not in hit_any]
    strangers = _below(missed, by_path, claimed)
    modules: dict[str, Module] = {}
    errors: list[tuple[str, RestowError]] = []
    known = Known(sizes, local or {}, partial, what, codec)
    for path, matched in _whole_modules(by_path, hit_names, candidates):
        found = _decide(path, matched, hit_names[path], shapes, candidates, known)
        errors += [(path, error) for error in found[1]]
        if found[0] is not None:
            modules[path] = found[0]
        if strangers.get(path):
            errors.append((path, _stranger_error(path, strangers[path], found[0])))
    return Findings(modules, tuple(missed), _folded(errors))


def _drop_bare(by_path: dict[str, dict[int, dict[tuple[str, tuple[int, ...]], str]]]) -> None:
    """Drop readings of companions alone: a linear layer's `down_proj.input_scale` is also what goes with stacked codes."""
    for path, tags in list(by_path.items()):
        for tag in [t for t, found in tags.items() if all(role.endswith(COMPANIONS) for role, _ in found)]:
            del tags[tag]
        if not tags:
            del by_path[path]


def _folded(errors: Sequence[tuple[str, RestowError]]) -> tuple[RestowError, ...]:
    """One error for what many modules have wrong in the same words: the first one, with all tensors and paths."""
    alike: dict[object, list[tuple[str, RestowError]]] = {}
    for path, error in errors:
        words = (text.replace(path, "") for text in (error.expected, error.found))
        alike.setdefault((type(error), *words), []).append((path, error))
    folded = []
    for (_, first), *others in alike.values():
        if others:
            named = [error.sections for _, error in others]
            first.sections = tuple(
                (label, (*lines, *_lines(named, label)) if label in NAMING else lines)
                for label, lines in first.sections
            )
            first.sections = (*first.sections, ("and in", tuple(show(path) for path, _ in others)))
        folded.append(first)
    return tuple(folded)


def _lines(errors: Sequence[Iterable[tuple[str, Sequence[str]]]], label: str) -> list[str]:
    """What the sections of other errors say under a label."""
    return [line for sections in errors for known, lines in sections if known == label for line in lines]


class Known(NamedTuple):
    """What is known before a module is looked at: global sizes, sizes of dims held in part, whether parts are fine."""

    sizes: Mapping[str, int]
    local: Mapping[str, int]
    partial: bool
    what: str
    codec: Announced | None = None


Matched = dict[int, dict[tuple[str, tuple[int, ...]], str]]


def _whole_modules(
    by_path: Mapping[str, Matched], hit_names: Mapping[str, set[str]], candidates: Sequence[Spelling]
) -> list[tuple[str, Matched]]:
    """Paths that hold a weight of the experts, in the order of the file, outer readings of inner names dropped.

    One name can be read at two depths (`moe.gate_proj.weight` with container `moe`, or below a module `moe`): the
    reading that explains more names wins.
    """
    claims: dict[str, str] = {}
    for path in sorted(by_path, key=lambda p: (-len(hit_names[p]), p)):
        for name in hit_names[path]:
            claims.setdefault(name, path)
    kept = []
    for path, matched in by_path.items():
        own = {name for name in hit_names[path] if claims[name] == path}
        if not own:
            continue
        slim = {
            tag: {key: name for key, name in names.items() if name in own}
            for tag, names in matched.items()
            if any(name in own for name in names.values())
        }
        hit_names[path].intersection_update(own)
        kept.append((path, slim))
    return kept


def _below(
    missed: Iterable[str], paths: Mapping[str, object], claimed: Callable[[str], bool]
) -> dict[str, list[str]]:
    """Names that no row explains, by the experts module they lie below."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in missed:
        path = name
        while "." in path:
            path = path.rpartition(".")[0]
            if path in paths:
                if not claimed(name):
                    found[path].append(name)
                break
    return found


def _decide(
    path: str,
    matched: Matched,
    names: set[str],
    shapes: Shapes,
    candidates: Sequence[Spelling],
    known: Known,
) -> tuple[Module | None, list[RestowError]]:
    full = [tag for tag, found in matched.items() if len(found) == len(names)]
    if not full:
        return None, [_mixed_error(path, matched, candidates)]
    # Rows for scales that nobody has met here explain nothing: the same layout without them does.
    full = [
        tag for tag in full if _scaled(candidates[tag].layout) <= {role for role, _ in matched[tag]}
    ] or full
    tried = [(tag, *_fit(path, matched[tag], candidates[tag], shapes, known)) for tag in full]
    fits = [(module, errors) for _, module, errors in tried if not errors]
    if len({module.layout for module, _ in fits}) == 1:
        return fits[0]
    if fits:
        return None, [
            _two_error(path, [candidates[tag] for tag, _, errors in tried if not errors], names, shapes)
        ]
    if len({candidates[tag].layout for tag in full}) == 1 or _same_errors(tried):
        return tried[0][1], tried[0][2]
    return None, [_none_error(path, tried, candidates, shapes)]


def _scaled(layout: Layout) -> set[str]:
    return {row.role for row in layout.rows if row.role.endswith(COMPANIONS)}


def _same_errors(tried: Sequence[tuple[int, Module, list[RestowError]]]) -> bool:
    return len({tuple(map(str, errors)) for *_, errors in tried}) == 1


def _fit(
    path: str,
    matched: Mapping[tuple[str, tuple[int, ...]], str],
    spelling: Spelling,
    shapes: Shapes,
    known: Known,
) -> tuple[Module, list[RestowError]]:
    """One candidate against one module: the module as it would be, and every reason against it."""
    layout = spelling.layout
    errors: list[RestowError] = []
    solved, local = dict(known.sizes), dict(known.local)
    by_row: dict[str, dict[tuple[int, ...], str]] = {row.role: {} for row in layout.rows}
    for (role, index), name in matched.items():
        by_row[role][index] = name
    for row in layout.rows:
        drop_own_count(row, by_row[row.role], shapes, solved)
        _count_name_axes(row, by_row[row.role], solved)
    for row in layout.rows:
        for name in list(by_row[row.role].values())[:1]:
            given = {**solved, **local}
            if row.base in SECOND and "f" not in known.sizes:  # its width is its own
                given.pop("f", None)
            fresh = solve_sizes(row, shapes[name], given) or {}
            if row.base in SECOND and "f" in fresh:
                solved |= {f"f@{base}": fresh["f"] for base in SECOND}
                del fresh["f"]
            solved.update({axis: size for axis, size in fresh.items() if axis not in local})
    tensors: dict[str, tuple[str | None, ...]] = {}
    wrong: list[tuple[str, str]] = []
    missing, lacking = list[str](), 0
    unscaled: list[str] = []
    extra: list[str] = []
    for row in layout.rows:
        found = by_row[row.role]
        lengths = [axis_size(row, axis, solved) for axis in row.name_axes]
        strides = strides_of(lengths)
        slots: list[str | None] = [None] * prod(lengths)
        expected = _expected(row, {**solved, **local})
        loose = ragged(row)
        for index, name in found.items():
            if any(map(ge, index, lengths)):
                extra.append(name)
                continue
            slots[sum(map(mul, index, strides))] = name
            shape = shapes[name]
            if shape != expected and not (loose and len(shape) == 1):
                wrong.append((name, _shape_text(row, {**solved, **local})))
        if row.role.endswith(COMPANIONS):
            names = (name_of(row, _index(i, lengths), solved) for i, name in enumerate(slots) if name is None)
            unscaled += [f"{path}.{name}" for name in names]
        elif not known.partial or not found:
            gaps = (i for i, name in enumerate(slots) if name is None)
            missing += [f"{path}.{name_of(row, _index(i, lengths), solved)}" for i in islice(gaps, HOLES)]
            lacking += slots.count(None)
        tensors[row.role] = tuple(slots)
    module = Module(path, layout, spelling.names, solved, tensors, spelling.codec)
    errors += _count_errors(module, missing, lacking, extra, by_row, known.what)
    scales = {name for role, names in tensors.items() if role.endswith(COMPANIONS) for name in names}
    grids = [(name, want, shapes[name]) for name, want in wrong if name in scales]
    if len(grids) < len(wrong):
        errors.append(_shape_error(module, [(n, want) for n, want in wrong if n not in scales], shapes))
    if not errors and unscaled:  # without its weight a scale is not missing
        errors.append(lost_scales(unscaled))
    if not errors and grids:
        errors.append(odd_grids(grids, known.codec))
    return module, errors


def _expected(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of a row's tensors; None where neither config nor shapes give every size."""
    try:
        return shape_of(row, sizes)
    except SizeError:
        return None


def _shape_text(row: Row, sizes: Mapping[str, int]) -> str:
    """The shape of a row's tensors for people: `[12, (p f), 32]` where f is not known."""
    shapes = (_expected(replace(row, dims=(dim,)), sizes) for dim in row.dims)
    return f"[{', '.join(str(s[0] if s else dim) for s, dim in zip(shapes, row.dims, strict=True))}]"


def _count_name_axes(row: Row, found: Mapping[tuple[int, ...], str], solved: dict[str, int]) -> None:
    """A name axis without a size from the config has one more than the largest number in the names.

    A number out of all proportion to the names is a stray: it must not make the rest a list of holes.
    """
    for position, axis in enumerate(row.name_axes):
        if axis in row.labels or axis in solved or f"{axis}@{row.base}" in solved or not found:
            continue
        numbers = {index[position] for index in found}
        solved[axis] = 1 + max(n for n in numbers if n < HOLES + 4 * len(numbers))


def _index(at: int, lengths: Sequence[int]) -> tuple[int, ...]:
    index = []
    for length in reversed(lengths):
        at, i = divmod(at, length)
        index.append(i)
    return tuple(reversed(index))


def _count_errors(
    module: Module,
    missing: Sequence[str],
    lacking: int,
    extra: Sequence[str],
    by_row: Mapping[str, Mapping[tuple[int, ...], str]],
    what: str,
) -> list[RestowError]:
    """Experts too few or too many, in one error: `missing` are the first names of the `lacking` ones."""
    experts = module.sizes.get("e", 0)
    expected = f"{experts} experts in {show(module.path)}"
    if lacking:
        whole = _whole_experts(module, by_row)
        listed = missing if len(missing) == lacking else missing[:LISTED]
        in_all = [f"{lacking} tensors"] if len(missing) != lacking else []
        return [
            MissingTensorError(
                expected,
                f"{whole}" if whole != experts else f"{lacking} of their tensors missing",
                tensor=missing[0],
                sections=[("missing", map(show, listed)), ("in all", in_all), ("extra", map(show, extra))],
                hint=f"get {what} again, or name the experts it holds: nothing is filled in their place"
                if what == "the checkpoint"
                else f"give {what} all tensors of these experts, or say with experts= or shard= which it holds",
            )
        ]
    if extra:
        return [
            UnexpectedTensorError(
                expected,
                f"{_whole_experts(module, by_row)}",
                tensor=extra[0],
                sections=[("extra", map(show, extra))],
                hint="check the number of experts in config.json against the files",
            )
        ]
    return []


def _whole_experts(module: Module, by_row: Mapping[str, Mapping[tuple[int, ...], str]]) -> int:
    """How many experts have all their tensors: the number that an error prints as found."""
    counts: dict[int, int] = defaultdict(int)
    need = 0
    for row in module.layout.rows:
        if "e" not in row.name_axes:
            continue
        at = row.name_axes.index("e")
        need += prod(len(words) for words in row.labels.values())
        for index in by_row[row.role]:
            counts[index[at]] += 1
    return sum(1 for e, count in counts.items() if count == need) if need else 0


def _shape_error(module: Module, wrong: Sequence[tuple[str, str]], shapes: Shapes) -> ShapeMismatchError:
    """Shapes that are not the layout's; a stacked module's few other tensors are shown beside them."""
    name, expected = wrong[0]
    sizes, layout = module.sizes, module.layout
    used = {a: sizes[a] for row in layout.rows for a in sorted(row.axes) if a in sizes}
    lines = [f"{show(n)} {list(shapes[n])}, expected {want}" for n, want in wrong]
    every = [n for names in module.tensors.values() for n in names if n is not None]
    if len(every) <= LISTED // 2:
        bad = {n for n, _ in wrong}
        lines += [f"{show(n)} {list(shapes[n])}, as expected" for n in every if n not in bad]
    return ShapeMismatchError(
        f"shape {expected} for {show(name)}",
        f"{list(shapes[name])}",
        tensor=name,
        sections=[
            ("tensors", lines),
            ("layout", rows_text(layout)),
            ("sizes", [", ".join(f"{axis} = {size}" for axis, size in used.items())]),
        ],
        hint="check config.json against the files: sizes come from the config first, shapes must agree",
    )


def _mixed_error(path: str, matched: Matched, candidates: Sequence[Spelling]) -> RestowError:
    lines = []
    for tag, found in sorted(matched.items(), key=lambda item: -len(item[1])):
        name = next(iter(found.values()))
        lines.append(f"{'/'.join(candidates[tag].names)}: {len(found)} tensors, such as {show(name)}")
    first = min(next(iter(found.values())) for found in matched.values())
    return AmbiguousTensorError(
        f"the experts of {show(path)} in one layout",
        f"in parts of {len(matched)}",
        tensor=first,
        sections=[("layouts", lines)],
        hint="keep one of them: which values count is not for a reader to decide",
    )


def _two_error(path: str, fits: Sequence[Spelling], names: set[str], shapes: Shapes) -> AmbiguousLayoutError:
    lines = [f"{'/'.join(s.names)}: " + "; ".join(rows_text(s.layout)) for s in fits]
    name = min(names)
    return AmbiguousLayoutError(
        f"one layout for {show(path)}",
        f"{len(fits)} that fit its names and shapes",
        tensor=name,
        sections=[("layouts", lines), ("tensors", (f"{show(n)} {list(shapes[n])}" for n in sorted(names)))],
        hint="say which one with layout=NAME (on the command line --layout NAME)",
    )


def _none_error(
    path: str,
    tried: Sequence[tuple[int, Module, list[RestowError]]],
    candidates: Sequence[Spelling],
    shapes: Shapes,
) -> RestowError:
    """No candidate fits: a shape error if every reason is one, else an error that lists each candidate's reason."""
    first = [errors[0] for *_, errors in tried]
    lines = [f"{'/'.join(candidates[tag].names)}: {errors[0].args[0]}, found {errors[0].args[1]}"
             for tag, _, errors in tried]  # fmt: skip
    kind = type(first[0]) if len({type(error) for error in first}) == 1 else AmbiguousLayoutError
    name = first[0].tensor or ""
    return kind(
        f"the experts of {show(path)} in one of the layouts below",
        f"none that fits; {show(name)} has shape {list(shapes.get(name, ()))}",
        tensor=name,
        sections=[("layouts", lines)],
        hint="check config.json against the files, or say the layout with layout=NAME (--layout NAME)",
    )


def _stranger_error(path: str, names: Sequence[str], module: Module | None) -> RestowError:
    twins = [
        n for n in names if any(s.isdigit() and len(s) > 1 and s[0] == "0" for s in n[len(path) :].split("."))
    ]
    if twins:
        return AmbiguousTensorError(
            f"expert numbers without leading zeros in {show(path)}",
            f"{len(twins)} with",
            tensor=twins[0],
            sections=[("tensors", map(show, twins))],
            hint="rename or drop them: an expert may have one number only",
        )
    rows = rows_text(module.layout) if module else ()
    return UnexpectedTensorError(
        f"only expert weights below {show(path)}",
        f"{len(names)} other tensors",
        tensor=names[0],
        sections=[("extra", map(show, names)), ("layout", rows)],
        hint="if they belong there, the family's table must say so",
    )
