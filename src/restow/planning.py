"""Making a plan: layouts x headers x targets -> reads and copies, proved before the first byte is touched.

Work that does not depend on a tensor's place (which element goes where) is done once per kind of module and shared by
all layers; a rank's own share is what remains. It raises what concerns the tensors it plans for: shapes that differ,
weights that are lost, casts that codes forbid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from restow.checkpoint import Checkpoint
from restow.draft import Draft
from restow.errors import RestowError, ShapeMismatchError
from restow.landing import Wish
from restow.lost import lost_error
from restow.module import Module
from restow.plans import Plan
from restow.prepare import Prepared, prepare
from restow.problems import merged
from restow.targets import Target


def make_plan(source: Checkpoint, targets: Sequence[Target], wish: Wish) -> Plan:
    """Plan how `targets` are filled from `source`. Raises the source's fatal problems, and what contradicts it."""
    prepared = prepare(source, targets, wish)
    return plan_of(prepared, prepared.targets)


def plan_of(prepared: Prepared, chosen: Mapping[str, Target]) -> Plan:
    """The plan that fills `chosen`: targets of the destination, whole or (by their runs) in part."""
    draft = Draft(prepared.source, prepared.wish, chosen, prepared.known)
    asked: dict[tuple[str, str], None] = {}
    unlike: list[RestowError] = []
    for name in chosen:
        if name in prepared.owners:
            asked[prepared.owners[name][:2]] = None
        elif name in prepared.plain:
            try:
                draft.add_plain(prepared.plain[name], name)
            except ShapeMismatchError as error:
                unlike.append(error)
    if unlike:
        raise merged(unlike)
    layouts: dict[str, tuple[str, str, str]] = {}
    for path, role in asked:
        if path not in prepared.pairs or (prepared.pairs[path], role) not in prepared.roles:
            continue
        module, from_module = prepared.modules[path], prepared.source.modules[prepared.pairs[path]]
        layouts[path] = (from_module.path, _called(from_module), _called(module))
        draft.add_role(from_module, module, role)
    if draft.lost:
        raise lost_error(prepared.source, draft.lost)
    nowhere = frozenset(prepared.missing)
    missing = tuple(name for name in chosen if name in nowhere)
    return draft.plan(tuple(layouts.values()), missing, *prepared.left)


def _called(module: Module) -> str:
    return "/".join(module.names)
