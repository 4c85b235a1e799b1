"""One `from_hf`: which groups of a state dict came through views, which are to be filled, and that none is
lost.

A group came in place where its name was registered and its values are still views of the memory that was lent
for it; names registered by hand are believed once. Judged first, then done: an error leaves the dict as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from restow.torch.mixin_host import Facts
from restow.torch.mixin_merge import (
    Group,
    check_complete,
    check_names,
    groups_of,
    merge,
    native_name,
    sizes_of,
)
from restow.torch.mixin_mesh import expert_ids
from restow.torch.mixin_record import Lent, Record
from restow.torch.mixin_rows import GROUPED


class Load:
    """The experts' groups of one state dict, and how each of them comes in."""

    def __init__(
        self,
        facts: Facts,
        state: Mapping[str, Any],
        mesh: DeviceMesh | None,
        record: Record,
        registered: set[str],
    ) -> None:
        self.facts, self.state, self.mesh = facts, state, mesh
        self.record, self.registered = record, registered
        self.weights, self.lora = (per_expert for _, per_expert in facts.pairs)
        self.groups = groups_of(list(state), self.weights, facts.segment)
        self.names = {
            key: native_name(group, GROUPED.row(group.row.role)) for key, group in self.groups.items()
        }
        self.lent = {key: self._lent(self.names[key], group) for key, group in self.groups.items()}

    def _lent(self, name: str, group: Group) -> Lent | None:
        if name not in self.registered:
            return None
        values = (self.state[one] for one in group.names.values())
        plain = [
            value for value in values if isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        ]
        return self.record.holder(name, plain) if len(plain) == len(group.names) else None

    def in_place(self, key: tuple[str, str]) -> bool:
        """Whether a group's data is in the model already."""
        name = self.names[key]
        return self.lent[key] is not None or (name in self.registered and not self.record.knows(name))

    def check_complete(self) -> None:
        """Raise `MissingExpertsError` where a module lacks tensors of experts that this rank needs."""
        paths: dict[str, dict[str, Group]] = {}
        for (path, role), group in self.groups.items():
            paths.setdefault(path, {})[role] = group
        here = expert_ids(self.mesh, self.facts.experts) if paths else ()
        roles = {role for _, role in self.groups}
        rows = [row for row in self.weights.rows if row.role == row.base or row.role in roles]
        experts = {(path, row.role): here for path in paths for row in rows}
        experts.update({key: lent.experts for key, lent in self.lent.items() if lent is not None})
        rank = f" (rank {torch.distributed.get_rank()})" if self.mesh is not None else ""
        check_complete(paths, rows, self.facts.sizes, experts, rank)

    def run(
        self, state: dict[str, Any], dtype: torch.dtype, *, other: bool
    ) -> tuple[dict[str, Any], set[str]]:
        """Empty `state` into a native state dict; the names that were loaded in place, which it lacks, beside
        it.

        `other` is whether this is a further namespace of one load.
        """
        check_names(state, (self.weights, self.lora), self.facts.segment, self.facts.experts)
        filled = {key: group for key, group in self.groups.items() if not self.in_place(key)}
        for group in filled.values():
            sizes_of(group, {index: state[name] for index, name in group.names.items()}, self.facts.sizes)
        key_of = {name: key for key, group in self.groups.items() for name in group.names.values()}
        out: dict[str, Any] = {}
        done: set[tuple[str, str]] = set()
        for name in list(state):
            key = key_of.get(name)
            if key is None:
                out[name] = state.pop(name)
            elif key not in done:
                done.add(key)
                group = self.groups[key]
                if key in filled:
                    target = GROUPED.row(group.row.role)
                    out[self.names[key]] = merge(
                        state, group, target, self.facts.sizes, dtype=dtype, mesh=self.mesh
                    )
                for one in group.names.values():
                    del state[one]
        return out, self._settle(set(out), other)

    def _settle(self, made: set[str], other: bool) -> set[str]:
        """Bring the record up to date; the names that were loaded in place."""
        loaded = {self.names[key] for key in self.groups if self.in_place(key)}
        finished = [(self.names[key], lent) for key, lent in self.lent.items()]
        for name, lent in self.record.empty(other):
            if name in self.registered and name not in made:
                loaded.add(name)
                finished.append((name, lent))
        for name, one in finished:
            if self.record.done(name, one):
                self.registered.discard(name)
        return loaded
