"""Why leaves differ: looking up where else their values are. Worth more than a count of elements.

The leaves of an experts module with differences are read once more, on both sides, in one order; digests tell which
leaf of one is which leaf of the other. It changes no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.landing import Wish
from restow.layout import Layout
from restow.prepare import Prepared, prepare
from restow.torch.chunks import CHUNK, fill, grouped, slices
from restow.torch.dtypes import torch_dtype
from restow.torch.leaves import Leaf, name_index
from restow.torch.raw import raw
from restow.wanted import default_targets

if TYPE_CHECKING:
    from restow.torch.verify_report import Difference

MODULES = 8  # modules whose differences are explained; the rest is like them, or too much to read
# One tensor a leaf, whatever the layout: `in` and `out` are what experts consist of.
LEAVES = Layout.parse("in leaf.{e}.in.{p:gate|up} f d\nout leaf.{e}.out d f")
UNGATED = Layout.parse("in leaf.{e}.in.{p:up} f d\nout leaf.{e}.out d f")


def explain(
    found: Sequence[Difference],
    first: Checkpoint,
    second: Checkpoint,
    prepared: Prepared,
    threads: int | None,
) -> list[Difference]:
    """The differences again, those that are explained by another place with a `why`."""
    by_module: dict[str, list[int]] = {}
    for i, difference in enumerate(found):
        if difference.leaf is not None and not difference.why and difference.leaf[0] in ("in", "out"):
            by_module.setdefault(prepared.owners[difference.name][0], []).append(i)
    out = list(found)
    for path in list(by_module)[:MODULES]:
        kinds = _kinds(first, prepared.pairs[path], second, path)
        theirs = _digests(first, prepared.pairs[path], kinds, threads)
        ours = _digests(second, path, kinds, threads)
        places: dict[str, Leaf] = {}
        for leaf, (digest, _) in theirs.items():
            places.setdefault(digest, leaf)
        order = text_order(
            {leaf[1]: places[digest][1] for leaf, (digest, _) in ours.items() if digest in places}
        )
        for i in by_module[path]:
            mine = found[i].leaf
            if mine is not None and mine in ours:
                out[i] = replace(found[i], why=why(mine, ours[mine], places, theirs, order))
    return out


def text_order(found: Mapping[int, int]) -> str:
    """What to add where the experts of one side stand in the order of their numbers as text (0, 1, 10, 11, 2 ...)."""
    experts = sorted(found)
    as_text = sorted(experts, key=str)
    if as_text == experts:
        return ""
    here = all(found[e] == as_text[i] for i, e in enumerate(experts))
    there = all(as_text[found[e]] == e for e in experts if found[e] < len(as_text))
    return ": text order" if here or there else ""


def why(
    leaf: Leaf,
    mine: tuple[str, str],
    places: dict[str, Leaf],
    theirs: dict[Leaf, tuple[str, str]],
    order: str,
) -> str:
    role, e, p = leaf
    if mine[0] in places:
        other = places[mine[0]]
        if other[0] == role and other[1] == e and other[2] != p:
            return "gate and up exchanged"
        if other[0] == role and other[2] == p:
            return f"expert {e} here is expert {other[1]} there{order}"
        return f"its values are those of role '{other[0]}', expert {other[1]} there"
    if leaf in theirs and mine[0] == theirs[leaf][1]:
        return "transposed"
    return ""


def _kinds(first: Checkpoint, there: str, second: Checkpoint, here: str) -> dict[str, str]:
    """The dtype in which the leaves of a role are looked up: the narrowest in which either side has them.

    A role of which a tensor is missing is left out: its leaves cannot be read.
    """
    found: dict[str, str] = {}
    for role in ("in", "out"):
        sides = [
            (one, one.modules[path].tensors.get(role, ())) for one, path in ((first, there), (second, here))
        ]
        if all(names and all(names) for _, names in sides):
            dtypes = {one.tensors[name].dtype for one, names in sides for name in names if name is not None}
            found[role] = min(sorted(dtypes), key=lambda dtype: torch_dtype(dtype).itemsize)
    return found


def _digests(
    checkpoint: Checkpoint, path: str, kinds: Mapping[str, str], threads: int | None
) -> dict[Leaf, tuple[str, str]]:
    """Digests of the leaves of one module, of the roles in `kinds`: of its values in order, and transposed ("" where a
    leaf is larger than a chunk)."""
    whole = checkpoint.modules[path]
    module = replace(whole, tensors={role: whole.tensors[role] for role in kinds})
    gated = module.sizes.get("p", len(module.layout.row("in").labels.get("p", ("gate", "up")))) == 2
    layout = LEAVES if gated else UNGATED
    layout = Layout(tuple(row for row in layout.rows if row.role in kinds))
    one = replace(checkpoint, modules={path: module}, problems=(), family=None)
    wish = Wish(layout=layout)
    targets = [t for t in default_targets(one, layout, wish) if ".leaf." in t.name]
    ready = prepare(one, targets, wish)
    ready = replace(
        ready, targets={t.name: t._replace(dtype=kinds[ready.owners[t.name][1]]) for t in targets}
    )
    places = {name: (role, name_index(layout.row(role), place, module.sizes))
              for name, (_, role, place) in ready.owners.items()}  # fmt: skip
    found: dict[Leaf, tuple[str, str]] = {}
    parts: dict[Leaf, xxhash.xxh3_128] = {}
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    cut = (part for target in ready.targets.values() for part in slices(target, CHUNK))
    for group in grouped(cut, CHUNK):
        filled, _ = fill(ready, group, buffer, threads=threads)
        for item in filled:
            role, index = places[item.slice.target.name]
            leaf = (role, index.get("e", 0), index.get("p", 0))
            parts.setdefault(leaf, xxhash.xxh3_128()).update(raw(item.tensor))
            turned = ""
            if item.tensor.shape == item.slice.target.shape:
                turned = xxhash.xxh3_128(raw(item.tensor.t().contiguous())).hexdigest()
            found[leaf] = (parts[leaf].hexdigest(), turned)
    return found
