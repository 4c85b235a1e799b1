"""What a checkpoint looks like to people, and the same as plain values for programs.

An `Answer` has aligned ASCII lines and a JSON document with the same facts. Nothing is found out here: that
is for `opening`. It rejects nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from restow.checkpoint import Checkpoint
from restow.errors import ConfigError, show
from restow.layout import rows_text
from restow.module import Module
from restow.problems import Problem
from restow.terminal import BAD_INPUT, DONE, Answer, Line, failure_text, finding
from restow.wording import MARGIN, amount, field, kinds, many, runs_of, table


def inspection(opened: Checkpoint, *, strict: bool = False) -> Answer:
    """What `open` found. The exit code is 1 if a problem is fatal, or if there is one and `strict`.

    That no config.json says the family stops other verbs; to look at the files needs none, so here it is a warning.
    """
    problems = tuple(p._replace(fatal=p.fatal and not _asks_family(p)) for p in opened.problems)
    data = _facts(opened, problems)
    refused = any(problem.fatal or strict for problem in problems)
    return Answer(data, _inspection_lines(opened, data, problems), BAD_INPUT if refused else DONE)


def _asks_family(problem: Problem) -> bool:
    return isinstance(problem.error, ConfigError) and problem.error.found == "none"


def _facts(opened: Checkpoint, problems: Sequence[Problem]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    files: set[str] = set()
    for name, entry in opened.tensors.items():
        dtypes[name] = entry.dtype
        sizes[name] = sum(piece.end - piece.begin for piece in entry.pieces)
        files.update(piece.file for piece in entry.pieces)

    def counted(names: Iterable[str]) -> dict[str, Any]:
        named = list(names)
        kinds = dict(sorted(Counter(dtypes[n] for n in named).items()))
        return {"tensors": len(named), "bytes": sum(sizes[n] for n in named), "dtypes": kinds}

    experts = opened.expert_tensors
    others = [name for name in opened.tensors if name not in experts and name not in opened.routers]
    return {
        "path": opened.path,
        "family": family_name(opened),
        "sizes": {axis: size for axis, size in opened.sizes.items() if axis != "p"},
        "files": len(files),
        **counted(opened.tensors),
        "experts": [_group(group, counted) for group in alike(opened)],
        "routers": [
            {"row": row, "names": names, **counted(names)} for row, names in _routers(opened).items()
        ],
        "ignorable": [name for name in others if opened.ignorable(name)],
        "others": counted(others),
        "problems": [finding(problem) for problem in problems],
    }


def family_name(opened: Checkpoint) -> str | None:
    """The model type that the config gives, or the family's first."""
    if opened.family is None:
        return None
    given = (opened.config or {}).get("model_type")
    return given if given in opened.family.model_types else opened.family.model_types[0]


def alike(opened: Checkpoint) -> list[list[Module]]:
    """Experts modules in groups that differ in their paths only."""
    found: dict[object, list[Module]] = {}
    for module in opened.modules.values():
        key = (module.layout, module.names, tuple(sorted(module.sizes.items())))
        found.setdefault(key, []).append(module)
    return list(found.values())


def _group(modules: Sequence[Module], counted: Any) -> dict[str, Any]:
    first = modules[0]
    rows = []
    for row, text in zip(first.layout.rows, rows_text(first.layout), strict=True):
        names = [name for m in modules for name in m.tensors.get(row.role, ()) if name is not None]
        rows.append({"role": row.role, "row": text, **counted(names)})
    axes = {axis: size for axis, size in first.sizes.items() if axis not in ("p", "L")}
    return {"modules": [m.path for m in modules], "layout": list(first.names), "sizes": axes, "rows": rows}


def _routers(opened: Checkpoint) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, row in opened.routers.items():
        found.setdefault(str(row), []).append(name)
    return found


def _inspection_lines(
    opened: Checkpoint, data: Mapping[str, Any], problems: Sequence[Problem]
) -> Iterator[Line]:
    head = f"{many(data['tensors'], 'tensor')} in {many(data['files'], 'file')}, {amount(data['bytes'])}"
    yield Line(f"{show(opened.path)}: {data['family'] or 'unknown family'}, {head}", "head")
    if data["sizes"]:
        yield field("sizes", "  ".join(f"{axis} = {size}" for axis, size in data["sizes"].items()))
    yield field("dtypes", kinds(data["dtypes"]))
    for group in data["experts"]:
        called = " = ".join(group["layout"])
        where = "; ".join(runs_of(group["modules"]))
        yield field("experts", f"{many(len(group['modules']), 'module')} in {called}: {where}")
        yield from table([_row_cells(row) for row in group["rows"]])
        odd = {axis: size for axis, size in group["sizes"].items() if data["sizes"].get(axis) != size}
        if odd:
            yield Line(MARGIN + "  with " + "  ".join(f"{axis} = {size}" for axis, size in odd.items()))
    if not data["experts"]:
        yield field("experts", "none found")
    for router in data["routers"]:
        yield field("routers", f"{many(router['tensors'], 'tensor')}: {'; '.join(runs_of(router['names']))}")
        yield from table([(router["row"], kinds(router["dtypes"], False), amount(router["bytes"]))])
    others = data["others"]
    yield field(
        "others", f"{many(others['tensors'], 'tensor')}, {amount(others['bytes'])}, {kinds(others['dtypes'])}"
    )
    yield field("ignorable", "; ".join(runs_of(data["ignorable"])) or "none")
    yield from problem_lines(problems)


def _row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["row"], many(row["tensors"], "tensor"), kinds(row["dtypes"], False), amount(row["bytes"])


def problem_lines(problems: Sequence[Problem]) -> Iterator[Line]:
    """Every problem in full, fatal ones first."""
    fatal = sum(problem.fatal for problem in problems)
    if not problems:
        yield Line(field("problems", "none").text, "good")
        return
    yield field("problems", f"{fatal} fatal, {len(problems) - fatal} other")
    for problem in sorted(problems, key=lambda problem: not problem.fatal):
        first, *rest = failure_text(problem.error).splitlines()
        kind = "bad" if problem.fatal else "warn"
        yield Line(field("  fatal" if problem.fatal else "  warning", first).text, kind)
        for line in rest:
            yield Line(MARGIN + line, kind)
