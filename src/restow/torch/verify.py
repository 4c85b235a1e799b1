"""`restow.verify`: do two checkpoints hold the same weights, whatever their layouts; or is one what it should be.

The second checkpoint's tensors are filled from the first by a plan, chunk by chunk, and compared with its own bytes;
each byte of both is read once. It rejects inputs that cannot be read; everything else that is unlike is a difference,
and where the values are found in another place, the report says where.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from restow.boxes import held
from restow.checkpoint import Checkpoint
from restow.decoded import DecodedTensors, decoded
from restow.errors import UsageError, show
from restow.joining import joined
from restow.judge import undecodable
from restow.landing import Wish, pair_modules
from restow.layout import name_of, shape_of
from restow.module import Module
from restow.naming import Rename, check_rename, renamed
from restow.notation import Row
from restow.opening import family_of, open_checkpoint
from restow.prepare import Prepared, pair_others
from restow.problems import merged
from restow.targets import Target, whole_target
from restow.torch.alone import judge_alone
from restow.torch.chunks import CHUNK, Filled, Slice, fill, grouped, room
from restow.torch.dtypes import torch_dtype, wider
from restow.torch.explain import explain
from restow.torch.leaves import leaves_of, name_index
from restow.torch.read import Progress
from restow.torch.verify_report import Difference, VerifyReport, chosen, sampled

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def verify(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    experts_only: bool = False,
    rename: Rename = (),
    sample: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    strict: bool = False,
) -> VerifyReport:
    """Compare checkpoint `b` with `a`, bit by bit, expert by expert, across layouts, dtypes and containers.

    Without `b`: check `a` against its manifest if it has one, and that its values are finite. `rename` maps names of `a`
    to names of `b`; `sample` (0 to 1) compares a seeded part of the leaves. Two float dtypes are compared in the wider.
    Raises `UsageError`, and what makes an input unreadable: a side whose codes nobody can decode, too.
    """
    started = time.perf_counter()
    if sample is not None and not 0 < sample <= 1:
        raise UsageError("sample as a part, above 0 and at most 1", f"{sample!r}")
    check_rename(rename)
    first = a if isinstance(a, Checkpoint) else open_checkpoint(a)
    if b is None:
        return judge_alone(first, sample, threads, progress, strict, started)
    second = b if isinstance(b, Checkpoint) else open_checkpoint(b)
    first, second = _one_family(first, second)
    warnings = [str(problem.error) for side in (first, second) for problem in side.problems]
    if strict and warnings:
        raise merged([problem.error for side in (first, second) for problem in side.problems])
    for side in (first, second):
        if errors := undecodable(side):
            raise merged(errors)
    first, second = decoded(first), decoded(second)
    sides = _pair(first, second, rename, experts_only)
    read, compared, found, notes = _compare(
        sides, chosen(second, sides.prepared, sides.targets, sample), threads, progress
    )
    found = [*sides.differences, *explain(found, first, second, sides.prepared, threads)]
    return VerifyReport(
        equal=not found,
        differences=tuple(found),
        tensors=compared,
        bytes_read=read,
        notes=tuple(notes),
        warnings=tuple(warnings),
        sampled=sampled(sample),
        seconds=time.perf_counter() - started,
    )


def _one_family(first: Checkpoint, second: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Where only one side knows its family, the other is read as the same one."""
    if first.family is not None and second.family is None and second.path is not None:
        return first, open_checkpoint(second.path, family=family_of(first.family))
    if second.family is not None and first.family is None and first.path is not None:
        return open_checkpoint(first.path, family=family_of(second.family)), second
    return first, second


@dataclass(frozen=True)
class _Sides:
    """Two checkpoints brought together: targets are `second`'s tensors, in the dtype in which they are compared."""

    prepared: Prepared  # fills the targets from the first
    own: Prepared  # fills them from the second itself
    targets: Mapping[str, Target]
    differences: tuple[Difference, ...]
    cast: Mapping[str, tuple[str, str]]

    def nbytes(self, target: Target) -> int:
        """The bytes of a target's held part on both sides."""
        pair = self.cast.get(target.name, (target.dtype, target.dtype))
        return prod(held(target.runs)) * sum(torch_dtype(dtype).itemsize for dtype in pair)


def _pair(first: Checkpoint, second: Checkpoint, rename: Rename, experts_only: bool) -> _Sides:
    wish = Wish(family=first.family or second.family, rename=rename)
    pairs = pair_modules(first, second.modules, wish)
    names = [] if experts_only else list(second.others)
    plain = pair_others(first, names, wish)
    found: list[Difference] = []
    targets: dict[str, Target] = {}
    cast: dict[str, tuple[str, str]] = {}
    owners: dict[str, tuple[str, str, int]] = {}

    def add(name: str, sources: Sequence[str]) -> None:
        kinds = {first.tensors[source].dtype for source in sources}
        coded = [_codes(first, sources[0]), _codes(second, name)]
        if any(
            coded
        ):  # values as they are decoded for the other side's dtype; in float32 where both are codes
            dense = first.tensors[sources[0]].dtype if coded[1] else second.tensors[name].dtype
            values = "F32" if all(coded) else dense
            cast[name] = (coded[0] or values, coded[1] or values)
            targets[name] = whole_target(name, second.tensors[name].shape, values)
            return
        ours, theirs = second.tensors[name].dtype, wider(sorted(kinds)) or " and ".join(sorted(kinds))
        common = ours if kinds == {ours} else _common(theirs, ours)
        if common is None:
            found.append(Difference("dtype", name, why=f"{theirs} there, {ours} here"))
            return
        if ours != theirs:
            cast[name] = (theirs, ours)
        targets[name] = whole_target(name, second.tensors[name].shape, common)

    for path, module in second.modules.items():
        if path not in pairs:
            found.append(Difference("extra", path, why="experts that the first checkpoint does not have"))
            continue
        other = first.modules[pairs[path]]
        roles = {row.role for row in module.layout.rows if any(module.tensors.get(row.role, ()))}
        for role in (r for r, names in other.tensors.items() if any(names) and r not in roles):
            found.append(Difference("missing", path, why=f"no role '{role}' in the second checkpoint"))
        for row in module.layout.rows:
            theirs = other.tensors.get(row.role, ())
            if row.role not in roles:
                continue
            if not any(theirs):
                found.append(Difference("extra", path, why=f"no role '{row.role}' in the first checkpoint"))
                continue
            unlike = sorted(a for a in row.axes if a in module.sizes and a in other.sizes
                            and module.sizes[a] != other.sizes[a])  # fmt: skip
            if unlike:
                axis = unlike[0]
                why = f"{axis} = {other.sizes[axis]} there, {module.sizes[axis]} here"
                found.append(Difference("shape", path, why=why))
                continue
            gaps = [*_gaps(other, row.role, "there"), *_gaps(module, row.role, "here")]
            gaps += [*_misfits(first, other, row.role, "there"), *_misfits(second, module, row.role, "here")]
            if gaps:
                found += gaps
                continue
            for place, name in enumerate(module.tensors[row.role]):
                assert name is not None
                owners[name] = (path, row.role, place)
                add(name, [n for n in theirs if n is not None])
    for path in first.modules:
        if path not in pairs.values():
            found.append(Difference("missing", path, why="experts that the second checkpoint does not have"))
    for name in names:
        if name not in plain:
            found.append(Difference("extra", name, why="not in the first checkpoint"))
        elif first.tensors[plain[name]].shape != second.tensors[name].shape:
            shapes = [list(first.tensors[plain[name]].shape), list(second.tensors[name].shape)]
            found.append(Difference("shape", name, why=f"{shapes[0]} there, {shapes[1]} here"))
        else:
            add(name, [plain[name]])
    if not experts_only:
        used = {*plain.values(), *(name for name in first.others if renamed(name, rename) is None)}
        lost = [name for name in first.others if name not in used]
        found += [Difference("missing", name, why="not in the second checkpoint") for name in lost]
    owners = {name: owner for name, owner in owners.items() if name in targets}
    plain = {name: source for name, source in plain.items() if name in targets}
    prepared = Prepared(first, targets, wish, second.modules, pairs, owners, plain)
    own = Prepared(second, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    return _Sides(prepared, own, targets, tuple(found), cast)


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
    return a if a == b else wider((a, b)) if a in FLOATS and b in FLOATS else None


def _compare(
    sides: _Sides, parts: Iterator[Slice], threads: int | None, progress: Progress | None
) -> tuple[int, int, list[Difference], list[str]]:
    """Bytes read, tensors compared, differences, and notes."""
    found: list[Difference] = []
    unlike: set[str] = set()
    compared = {name for name, target in sides.targets.items() if not all(target.shape)}
    chosen = list(parts)
    total = sum(sides.nbytes(part.target) for part in chosen)
    read = done = 0
    buffers = [torch.empty(0, dtype=torch.uint8)] * 2
    joint = joined(sides.prepared)
    for group in grouped(iter(chosen), CHUNK):
        need = sum(room(part.target) for part in group)
        buffers = [
            b if b.numel() >= need else torch.empty(max(need, CHUNK), dtype=torch.uint8) for b in buffers
        ]
        theirs, got = fill(sides.prepared, group, buffers[0], joint=joint, threads=threads)
        ours, more = fill(sides.own, group, buffers[1], threads=threads)
        read += got + more
        for left, right in zip(theirs, ours, strict=True):
            if not _same(left.tensor, right.tensor, right.slice.target.name in sides.cast):
                found += _differences(sides, left, right)
                unlike.add(right.slice.target.name)
        compared.update(part.target.name for part in group)
        done += sum(sides.nbytes(part.target) for part in group)
        if progress is not None:
            progress(done, total)
    kinds: dict[tuple[str, str], int] = {}
    for name, pair in sides.cast.items():
        if name in compared and name not in unlike:
            kinds[pair] = kinds.get(pair, 0) + 1
    notes = [f"{n} tensors are {a} there and {b} here, with equal values" for (a, b), n in kinds.items()]
    return read, len(compared), found, notes


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def _same(left: torch.Tensor, right: torch.Tensor, cast: bool) -> bool:
    if torch.equal(_bits(left), _bits(right)):
        return True
    return cast and not bool(_unlike(left, right, cast).any())


def _unlike(left: torch.Tensor, right: torch.Tensor, cast: bool) -> torch.Tensor:
    """Where two tensors differ in bits; after a cast, which may renew a NaN's payload, any two NaN are alike."""
    unlike = _bits(left) != _bits(right)
    if cast:
        unlike &= ~(left.isnan() & right.isnan())
    return unlike


def _differences(sides: _Sides, left: Filled, right: Filled) -> Iterator[Difference]:
    """What differs in one slice, leaf by leaf where it belongs to experts."""
    target = right.slice.target
    unlike = _unlike(left.tensor, right.tensor, target.name in sides.cast)
    first = tuple(runs[0][0] for runs in target.runs)
    for leaf, part in leaves_of(sides.prepared, target, held(target.runs)):
        mask = unlike if part is None else unlike[part]
        count = int(mask.sum())
        if not count:
            continue
        one, other = (t if part is None else t[part] for t in (left.tensor, right.tensor))
        flat = int(mask.reshape(-1).to(torch.uint8).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape))
        values = tuple(float(t[at].to(torch.float64)) for t in (one, other))
        cuts = part if part is not None else (slice(None),) * len(at)
        index = tuple(
            (cut.start or 0) + i * (cut.step or 1) + begin
            for i, cut, begin in zip(at, cuts, first, strict=True)
        )
        family = sides.prepared.source.family
        labels = family.labels if family is not None else ("gate", "up")
        why = _rounded(one, other, sides.cast.get(target.name, (target.dtype,)))
        biggest = _apart(one, other)
        yield Difference(
            "values", target.name, leaf, count, mask.numel(), index, values, biggest, why, labels
        )


def _rounded(left: torch.Tensor, right: torch.Tensor, dtypes: Sequence[str]) -> str:
    """Whether the two are equal in a narrower dtype: one of theirs, or bfloat16, which cuts float32 short."""
    if not left.is_floating_point():
        return ""
    for narrow in dict.fromkeys((*dtypes, *(("BF16",) if left.element_size() > 2 else ()))):
        name = torch_dtype(narrow)
        if name.itemsize < left.element_size() and torch.equal(_bits(left.to(name)), _bits(right.to(name))):
            return f"equal after rounding to {str(name).removeprefix('torch.')}"
    return ""


def _apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest distance between two elements; infinite where NaN or infinity stands against something else."""
    biggest = 0.0
    step = 1 << 20
    for at in range(0, left.numel(), step):
        one, other = (t.reshape(-1)[at : at + step].to(torch.float64) for t in (left, right))
        apart = (one - other).abs().masked_fill_(_bits(one) == _bits(other), 0.0)
        biggest = max(biggest, float(apart.nan_to_num_(nan=float("inf"), posinf=float("inf")).max()))
    return biggest
