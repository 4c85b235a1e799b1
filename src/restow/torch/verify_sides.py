"""Two checkpoints brought together tensor by tensor, in the dtype in which they are compared.

Experts pair by their modules and roles, others by their names. What has no like on the other side, or another shape, is
a `Difference` already and is not compared. It reads headers alone and rejects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from restow.boxes import held
from restow.checkpoint import Checkpoint
from restow.decoded import DecodedTensors
from restow.entries import FLOATS
from restow.errors import show
from restow.landing import Wish, pair_modules
from restow.layout import name_of, shape_of
from restow.module import Module, Owner
from restow.naming import Rename, renamed
from restow.notation import Row
from restow.prepare import Prepared, pair_others
from restow.targets import Target, whole_target
from restow.torch.dtypes import torch_dtype, wider
from restow.torch.leaves import name_index
from restow.torch.verify_report import Difference

NUMBERS = (*FLOATS, "F8_E4M3", "F8_E5M2")  # what is compared in the wider of two


@dataclass(frozen=True)
class Sides:
    """Two checkpoints brought together: targets are `second`'s tensors, in the dtype in which they are compared."""

    prepared: Prepared  # fills the targets from the first
    own: Prepared  # fills them from the second itself
    targets: Mapping[str, Target]
    differences: tuple[Difference, ...]
    cast: Mapping[str, tuple[str, str]]  # of those whose dtypes differ: the first's, the second's

    def nbytes(self, target: Target) -> int:
        """The bytes of a target's held part on both sides."""
        pair = self.cast.get(target.name, (target.dtype, target.dtype))
        return prod(held(target.runs)) * sum(torch_dtype(dtype).itemsize for dtype in pair)


def pair_sides(first: Checkpoint, second: Checkpoint, rename: Rename, experts_only: bool) -> Sides:
    """The two sides of a comparison; `rename` maps names of `first` to names of `second`."""
    wish = Wish(family=first.family or second.family, rename=rename)
    pairs = pair_modules(first, second.modules, wish)
    names = [] if experts_only else list(second.others)
    plain = pair_others(first, names, wish)
    found = _Pairing(first, second)
    for path, module in second.modules.items():
        if path in pairs:
            found.add_module(module, first.modules[pairs[path]])
        else:
            found.differ("extra", path, "experts that the first checkpoint does not have")
    for path in first.modules:
        if path not in pairs.values():
            found.differ("missing", path, "experts that the second checkpoint does not have")
    for name in names:
        found.add_other(name, plain.get(name))
    if not experts_only:
        used = {*plain.values(), *(name for name in first.others if renamed(name, rename) is None)}
        for name in (name for name in first.others if name not in used):
            found.differ("missing", name, "not in the second checkpoint")
    targets = found.targets
    owners = {name: owner for name, owner in found.owners.items() if name in targets}
    plain = {name: source for name, source in plain.items() if name in targets}
    prepared = Prepared(first, targets, wish, second.modules, pairs, owners, plain)
    own = Prepared(second, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    return Sides(prepared, own, targets, tuple(found.differences), found.cast)


class _Pairing:
    """What one call of `pair_sides` gathers."""

    def __init__(self, first: Checkpoint, second: Checkpoint) -> None:
        self.first, self.second = first, second
        self.differences: list[Difference] = []
        self.targets: dict[str, Target] = {}
        self.cast: dict[str, tuple[str, str]] = {}
        self.owners: dict[str, Owner] = {}

    def differ(self, kind: str, name: str, why: str) -> None:
        self.differences.append(Difference(kind, name, why=why))

    def add_module(self, module: Module, other: Module) -> None:
        """An experts module of the second checkpoint, and its like of the first."""
        roles = {row.role for row in module.layout.rows if any(module.tensors.get(row.role, ()))}
        for role in (r for r, names in other.tensors.items() if any(names) and r not in roles):
            self.differ("missing", module.path, f"no role '{role}' in the second checkpoint")
        for row in module.layout.rows:
            if row.role not in roles:
                continue
            theirs = [n for n in other.tensors.get(row.role, ()) if n is not None]
            if self._comparable(row, module, other, theirs):
                for place, name in enumerate(module.tensors[row.role]):
                    assert name is not None
                    self.owners[name] = (module.path, row.role, place)
                    self._add(name, theirs)

    def _comparable(self, row: Row, module: Module, other: Module, theirs: Sequence[str]) -> bool:
        """Whether a role is there in full, and in one size, on both sides; what is not is a difference."""
        if not theirs:
            self.differ("extra", module.path, f"no role '{row.role}' in the first checkpoint")
            return False
        both = sorted(axis for axis in row.axes if axis in module.sizes and axis in other.sizes)
        axis = next((axis for axis in both if module.sizes[axis] != other.sizes[axis]), None)
        if axis is not None:
            why = f"{axis} = {other.sizes[axis]} there, {module.sizes[axis]} here"
            self.differ("shape", module.path, why)
            return False
        odd = [*_gaps(other, row.role, "there"), *_gaps(module, row.role, "here")]
        odd += _misfits(self.first, other, row.role, "there")
        odd += _misfits(self.second, module, row.role, "here")
        self.differences += odd
        return not odd

    def add_other(self, name: str, source: str | None) -> None:
        """A tensor of the second checkpoint outside the experts, and its like of the first."""
        if source is None:
            self.differ("extra", name, "not in the first checkpoint")
            return
        there, here = self.first.tensors[source].shape, self.second.tensors[name].shape
        if there != here:
            self.differ("shape", name, f"{list(there)} there, {list(here)} here")
        else:
            self._add(name, [source])

    def _add(self, name: str, sources: Sequence[str]) -> None:
        """A tensor that is compared with what is filled from `sources`, if there is a dtype for both."""
        entry = self.second.tensors[name]
        coded = _codes(self.first, sources[0]), _codes(self.second, name)
        if any(coded):  # decoded for the other side's dtype; in float32 where both are codes
            dense = self.first.tensors[sources[0]].dtype if coded[1] else entry.dtype
            values = "F32" if all(coded) else dense
            self.cast[name] = coded[0] or values, coded[1] or values
            self.targets[name] = whole_target(name, entry.shape, values)
            return
        kinds = sorted({self.first.tensors[source].dtype for source in sources})
        theirs, ours = wider(kinds) or " and ".join(kinds), entry.dtype
        common = ours if kinds == [ours] else _common(theirs, ours)
        if common is None:
            self.differ("dtype", name, f"{theirs} there, {ours} here")
            return
        if ours != theirs:
            self.cast[name] = theirs, ours
        self.targets[name] = whole_target(name, entry.shape, common)


def _codes(side: Checkpoint, name: str) -> str | None:
    """The dtype of the codes behind a coded weight, None for a plain one."""
    if side.coded is None or name not in side.coded:
        return None
    assert isinstance(side.tensors, DecodedTensors)
    return side.tensors.raw[side.coded[name].name].dtype


def _gaps(module: Module, role: str, where: str) -> list[Difference]:
    """The tensors of a role that are not there, each by its name; the role's others are then not compared."""
    row = module.layout.row(role)
    lost = [place for place, name in enumerate(module.tensors[role]) if name is None]
    why = f"missing {where}; the other tensors of role '{role}' of {show(module.path)} were not compared"
    return [Difference("missing", f"{module.path}.{_spelled(row, place, module)}", why=why) for place in lost]


def _misfits(side: Checkpoint, module: Module, role: str, where: str) -> list[Difference]:
    """The tensors of a role that have another shape than their module's sizes say; one without elements, too."""
    wanted = shape_of(module.layout.row(role), module.sizes)
    shapes = {n: tuple(side.tensors[n].shape) for n in module.tensors[role] if n is not None}
    why = f"{where}, {list(wanted)} by the sizes of {show(module.path)}; its role '{role}' was not compared"
    return [
        Difference("shape", n, why=f"{list(shape)} {why}") for n, shape in shapes.items() if shape != wanted
    ]


def _spelled(row: Row, place: int, module: Module) -> str:
    index = name_index(row, place, module.sizes)
    return name_of(row, tuple(index[axis] for axis in row.name_axes), module.sizes)


def _common(a: str, b: str) -> str | None:
    """The dtype in which two are compared: the one that holds the other, F32 for two floats of which none does."""
    return a if a == b else wider((a, b)) if a in NUMBERS and b in NUMBERS else None
