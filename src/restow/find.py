"""Which layout does each experts module have: decided from names and shapes together, never guessed.

A module's layout is the one candidate that uses every tensor below it (router rows and ignorable names apart) and fits
sizes and shapes together. None or two is an `AmbiguousLayoutError` that lists them. The same function serves files,
state dicts and models; it sees names, shapes and dtypes only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from restow.codec import Announced
from restow.codecs import COMPANIONS
from restow.errors import RestowError
from restow.family import Family, Spelling
from restow.fit import Known, fit
from restow.gather import Gathered, gather
from restow.layout import Layout
from restow.misfits import folded, mixed_error, none_error, stranger_error, two_error
from restow.module import Module, Shapes
from restow.named import FORMS, GENERAL
from restow.turned import turned_errors


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
    family: Family | None,
    claimed: Callable[[str], bool] = lambda name: False,
    beside: Callable[[str], bool] = lambda name: False,
    local: Mapping[str, int] | None = None,
    partial: bool = False,
    what: str = "the checkpoint",
    codec: Announced | None = None,
) -> Findings:
    """Find every experts module among `shapes` (name -> shape).

    `sizes` come from the config (or from the other side), `local` those of axes whose dims are held in part; the
    `family` tells which sizes a role has of its own; `claimed` tells names below modules that are no expert weights,
    and `beside` those that are none even where a row spells them; `partial` admits modules of which only some experts
    are there (a rank's own).
    """
    gathered, missed = gather(shapes, candidates, sizes, claimed=claimed, beside=beside)
    known = Known(sizes, family.sizes if family is not None else (), local or {}, partial, what, codec)
    modules: dict[str, Module] = {}
    errors: list[tuple[str, RestowError]] = []
    for one in gathered:
        module, wrong = _decide(one, shapes, candidates, known)
        errors += [(one.path, error) for error in wrong]
        if module is not None:
            modules[one.path] = module
        if one.strangers:
            errors.append((one.path, stranger_error(one.path, one.strangers, module)))
    errors += turned_errors(modules, shapes)
    return Findings(modules, missed, folded(errors))


def _decide(
    one: Gathered, shapes: Shapes, candidates: Sequence[Spelling], known: Known
) -> tuple[Module | None, list[RestowError]]:
    """The one candidate that uses every name of a module and fits; else why there is none, or why there are two."""
    full = [tag for tag, found in one.matched.items() if len(found) == len(one.names)]
    if not full:
        return None, [mixed_error(one.path, one.matched, candidates)]
    # Rows for scales that nobody has met here explain nothing: the same layout without them does.
    full = [
        tag for tag in full if _scaled(candidates[tag].layout) <= {role for role, _ in one.matched[tag]}
    ] or full
    tried = [(tag, *fit(one.path, one.matched[tag], candidates[tag], shapes, known)) for tag in full]
    fits = [(module, errors) for _, module, errors in tried if not errors]
    if len({module.layout for module, _ in fits}) == 1:
        return fits[0]
    if fits:
        return None, [
            two_error(
                one.path, [candidates[tag] for tag, _, errors in tried if not errors], one.names, shapes
            )
        ]
    if len({candidates[tag].layout for tag in full}) == 1 or _same_errors(tried):
        return tried[0][1], tried[0][2]
    return None, [none_error(one.path, tried, candidates, shapes)]


def _scaled(layout: Layout) -> set[str]:
    return {row.role for row in layout.rows if row.role.endswith(COMPANIONS)}


def _same_errors(tried: Sequence[tuple[int, Module, list[RestowError]]]) -> bool:
    return len({tuple(map(str, errors)) for *_, errors in tried}) == 1
