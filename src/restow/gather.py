"""Tensor names gathered by the experts module that they lie in, each as every candidate reads it.

It sees names only, no shapes, and rejects nothing: a name that no row explains is given back, with the module that it
lies below if there is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from restow.codecs import COMPANIONS
from restow.family import Spelling
from restow.layout import Sizes
from restow.match import Matcher

Matched = dict[int, dict[tuple[str, tuple[int, ...]], str]]  # candidate -> (role, index) -> name


class Gathered(NamedTuple):
    """What belongs to one module path: how each candidate reads its `names`, and the `strangers` below it."""

    path: str
    matched: Matched
    names: frozenset[str]
    strangers: Sequence[str]


def gather(
    names: Iterable[str],
    candidates: Sequence[Spelling],
    sizes: Sizes,
    *,
    claimed: Callable[[str], bool],
    beside: Callable[[str], bool],
) -> tuple[list[Gathered], tuple[str, ...]]:
    """The experts modules among `names`, in their order, and the names that no candidate's row explains.

    `claimed` tells names below modules that are no expert weights, and `beside` those that are none even where a row
    spells them.
    """
    names = list(names)
    matcher = Matcher(
        ((i, s.container, row) for i, s in enumerate(candidates) for row in s.layout.rows), sizes
    )
    by_path: dict[str, Matched] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        for hit in matcher.match(name) if not beside(name) else ():
            by_path[hit.path][hit.tag][hit.row.role, hit.index] = name
    _drop_bare(by_path)
    hits = {path: {n for found in tags.values() for n in found.values()} for path, tags in by_path.items()}
    explained = set().union(*hits.values())
    missed = tuple(name for name in names if name not in explained)
    strangers = _below(missed, by_path, claimed)
    return [
        Gathered(path, matched, own, strangers.get(path, ()))
        for path, matched, own in _whole_modules(by_path, hits)
    ], missed


def _drop_bare(by_path: dict[str, Matched]) -> None:
    """Drop readings of companions alone: a linear layer's `down_proj.input_scale` is also what goes with stacked codes."""
    for path, tags in list(by_path.items()):
        for tag in [t for t, found in tags.items() if all(role.endswith(COMPANIONS) for role, _ in found)]:
            del tags[tag]
        if not tags:
            del by_path[path]


def _whole_modules(
    by_path: Mapping[str, Matched], hits: Mapping[str, set[str]]
) -> Iterator[tuple[str, Matched, frozenset[str]]]:
    """Paths that hold a weight of the experts, in the order of the file, outer readings of inner names dropped.

    One name can be read at two depths (`moe.gate_proj.weight` with container `moe`, or below a module `moe`): the
    reading that explains more names wins.
    """
    claims: dict[str, str] = {}
    for path in sorted(by_path, key=lambda p: (-len(hits[p]), p)):
        for name in hits[path]:
            claims.setdefault(name, path)
    for path, matched in by_path.items():
        own = frozenset(name for name in hits[path] if claims[name] == path)
        if own:
            slim = {
                tag: {key: name for key, name in names.items() if name in own}
                for tag, names in matched.items()
                if any(name in own for name in names.values())
            }
            yield path, slim, own


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
