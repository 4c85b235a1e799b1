"""`restow.verify`: do two checkpoints hold the same weights, whatever their layouts; or is one what it should be.

The second checkpoint's tensors are filled from the first by a plan, chunk by chunk, and compared with its own bytes;
each byte of both is read once. It rejects inputs that cannot be read; everything else that is unlike is a difference,
and where the values are found in another place, the report says where.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from restow import manifest
from restow.boxes import held
from restow.checkpoint import Checkpoint
from restow.errors import RestowError, UsageError, show
from restow.find import Module
from restow.landing import Wish, pair_modules
from restow.layout import name_of
from restow.naming import Rename, check_rename
from restow.notation import Row
from restow.opening import family_of, open_checkpoint
from restow.planning import Prepared, pair_others
from restow.problems import merged
from restow.targets import Target, whole_target
from restow.torch.chunks import CHUNK, Filled, Slice, fill, grouped, room, slices
from restow.torch.dtypes import narrows, torch_dtype
from restow.torch.explain import explain
from restow.torch.leaves import leaves_of, name_index
from restow.torch.read import Progress

SEED = 20261123
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor, or one leaf of the experts, that is not the same on both sides.

    `kind` is "values", "missing", "extra", "shape", "dtype" or "digest"; `name` is the second checkpoint's name (or the
    only one's); `count` of `total` elements differ, the first at `index` with `values`; `why` is what explains it.
    """

    kind: str
    name: str
    leaf: tuple[str, int, int] | None = None  # role, expert, projection
    count: int = 0
    total: int = 0
    index: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    max_abs: float = 0.0
    why: str = ""
    labels: tuple[str, ...] = ("gate", "up")

    def __str__(self) -> str:
        text = f"{self.kind:<8}{show(self.name)}"
        if self.leaf is not None:
            role, e, p = self.leaf
            word = "down" if role.startswith("out") else self.labels[p] if p < len(self.labels) else str(p)
            text += f" (expert {e}, {word})"
        if self.count:
            pair = " and ".join(f"{value:g}" for value in self.values)
            text += f": {self.count:,} of {self.total:,} elements, first at {list(self.index)}: {pair}, "
            text += f"at most {self.max_abs:g} apart"
        return text + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was compared and what differs. `equal` is True only if nothing differs in value, name or shape.

    `notes` are differences that change no value (dtypes that hold the same numbers); `tensors` counts the tensors that
    were compared, `bytes_read` the bytes of both sides.
    """

    equal: bool
    differences: tuple[Difference, ...]
    tensors: int
    bytes_read: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sampled: str
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        verdict = "equal" if self.equal else f"{len(self.differences)} differences"
        head = f"{verdict}: {self.tensors:,} tensors, {self.bytes_read:,} bytes read, {self.seconds:.1f} s"
        lines = [f"{head} ({rate:.1f} GB/s){self.sampled}"]
        lines += [f"  {difference}" for difference in self.differences[:20]]
        if len(self.differences) > 20:
            lines.append(f"  ... {len(self.differences) - 20} more")
        lines += [f"  note: {note}" for note in self.notes[:20]]
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


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
    Raises `UsageError`, and what makes an input unreadable.
    """
    started = time.perf_counter()
    if sample is not None and not 0 < sample <= 1:
        raise UsageError("sample as a part, above 0 and at most 1", f"{sample!r}")
    check_rename(rename)
    first = a if isinstance(a, Checkpoint) else open_checkpoint(a)
    if b is None:
        return _alone(first, sample, threads, progress, strict, started)
    second = b if isinstance(b, Checkpoint) else open_checkpoint(b)
    first, second = _one_family(first, second)
    sides = _pair(first, second, rename, experts_only)
    read, found, notes = _compare(sides, _chosen(second, sides.targets, sample), threads, progress)
    found = [*sides.differences, *explain(found, first, second, sides.prepared, threads)]
    return VerifyReport(
        equal=not found,
        differences=tuple(found),
        tensors=len(sides.targets),
        bytes_read=read,
        notes=tuple(notes),
        warnings=tuple(str(p.error) for side in (first, second) for p in side.problems if not p.fatal),
        sampled=_sampled(sample),
        seconds=time.perf_counter() - started,
    )


def _sampled(sample: float | None) -> str:
    return "" if sample is None else f", a sample of {sample:.1%} (seed {SEED})"


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
    wider: Mapping[str, tuple[str, str]]


def _pair(first: Checkpoint, second: Checkpoint, rename: Rename, experts_only: bool) -> _Sides:
    wish = Wish(family=first.family or second.family, rename=rename)
    pairs = pair_modules(first, second.modules, wish)
    names = [] if experts_only else list(second.others)
    plain = pair_others(first, names, wish)
    found: list[Difference] = []
    targets: dict[str, Target] = {}
    wider: dict[str, tuple[str, str]] = {}
    owners: dict[str, tuple[str, str, int]] = {}

    def add(name: str, source: str) -> None:
        ours, theirs = second.tensors[name].dtype, first.tensors[source].dtype
        common = _common(theirs, ours)
        if common is None:
            found.append(Difference("dtype", name, why=f"{theirs} there, {ours} here"))
            return
        if ours != theirs:
            wider[name] = (theirs, ours)
        targets[name] = whole_target(name, second.tensors[name].shape, common)

    for path, module in second.modules.items():
        if path not in pairs:
            found.append(Difference("extra", path, why="experts that the first checkpoint does not have"))
            continue
        other = first.modules[pairs[path]]
        for row in module.layout.rows:
            theirs = other.tensors.get(row.role, ())
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
            if gaps:
                found += gaps
                continue
            for place, name in enumerate(module.tensors[row.role]):
                assert name is not None
                owners[name] = (path, row.role, place)
                add(name, next(n for n in theirs if n is not None))
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
            add(name, plain[name])
    if not experts_only:
        used = set(plain.values())
        lost = [name for name in first.others if name not in used]
        found += [Difference("missing", name, why="not in the second checkpoint") for name in lost]
    owners = {name: owner for name, owner in owners.items() if name in targets}
    plain = {name: source for name, source in plain.items() if name in targets}
    prepared = Prepared(first, targets, wish, second.modules, pairs, owners, plain)
    own = Prepared(second, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    return _Sides(prepared, own, targets, tuple(found), wider)


def _gaps(module: Module, role: str, where: str) -> list[Difference]:
    """The tensors of a role that are not there, each by its name; the role's others are then not compared."""
    row = module.layout.row(role)
    lost = [place for place, name in enumerate(module.tensors[role]) if name is None]
    why = f"missing {where}; the other tensors of role '{role}' of {show(module.path)} were not compared"
    return [Difference("missing", f"{module.path}.{_spelled(row, place, module)}", why=why) for place in lost]


def _spelled(row: Row, place: int, module: Module) -> str:
    index = name_index(row, place, module.sizes)
    return name_of(row, tuple(index[axis] for axis in row.name_axes), module.sizes)


def _common(a: str, b: str) -> str | None:
    """The dtype in which two are compared: the one that holds the other, F32 for two floats of which none does."""
    if a == b:
        return a
    if a not in FLOATS or b not in FLOATS:
        return None
    if not narrows(a, b):
        return b
    return a if not narrows(b, a) else "F32"


def _chosen(second: Checkpoint, targets: Mapping[str, Target], sample: float | None) -> Iterator[Slice]:
    if sample is None:
        for target in targets.values():
            if all(target.shape):
                yield from slices(target, CHUNK // 2)
        return
    every = [part for target in targets.values() for part in _leaf_slices(second, target)]
    count = max(1, round(sample * len(every)))
    picked = sorted(random.Random(SEED).sample(range(len(every)), min(count, len(every))))
    for i in picked:
        yield from [every[i]] if room(every[i].target) <= CHUNK else slices(every[i].target, CHUNK // 2)


def _leaf_slices(second: Checkpoint, target: Target) -> Iterator[Slice]:
    """One slice an expert where experts are stacked first, else the whole tensor."""
    owner = second.expert_tensors.get(target.name)
    row = second.modules[owner[0]].layout.row(owner[1]) if owner else None
    if row is None or not row.dims or str(row.dims[0]) != "e":
        yield Slice(target, 0)
        return
    rest = tuple(((0, n),) for n in target.shape[1:])
    for e in range(target.shape[0]):
        yield Slice(target._replace(runs=(((e, 1),), *rest)), 0)


def _compare(
    sides: _Sides, parts: Iterator[Slice], threads: int | None, progress: Progress | None
) -> tuple[int, list[Difference], list[str]]:
    found: list[Difference] = []
    unlike: set[str] = set()
    read = 0
    total = 2 * sum(room(target) for target in sides.targets.values())
    buffers = [torch.empty(0, dtype=torch.uint8)] * 2
    for group in grouped(parts, CHUNK):
        need = sum(room(part.target) for part in group)
        buffers = [b if b.numel() >= need else torch.empty(max(need, CHUNK), dtype=torch.uint8) for b in buffers]
        theirs, got = fill(sides.prepared, group, buffers[0], threads=threads)
        ours, more = fill(sides.own, group, buffers[1], threads=threads)
        read += got + more
        for left, right in zip(theirs, ours, strict=True):
            if not _same(left.tensor, right.tensor, right.slice.target.name in sides.wider):
                found += _differences(sides, left, right)
                unlike.add(right.slice.target.name)
        if progress is not None:
            progress(min(read, total), total)
    kinds: dict[tuple[str, str], int] = {}
    for name, pair in sides.wider.items():
        if name not in unlike:
            kinds[pair] = kinds.get(pair, 0) + 1
    notes = [f"{n} tensors are {a} there and {b} here, with equal values" for (a, b), n in kinds.items()]
    return read, found, notes


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _same(left: torch.Tensor, right: torch.Tensor, cast: bool) -> bool:
    if torch.equal(_bits(left), _bits(right)):
        return True
    return cast and not bool(_unlike(left, right, cast).any())


def _unlike(left: torch.Tensor, right: torch.Tensor, cast: bool) -> torch.Tensor:
    """Where two tensors differ: in bits; after a cast, which may renew a NaN's payload, in values."""
    unlike = _bits(left) != _bits(right)
    if cast:
        unlike &= ~((left == right) | (left.isnan() & right.isnan()))
    return unlike


def _differences(sides: _Sides, left: Filled, right: Filled) -> Iterator[Difference]:
    """What differs in one slice, leaf by leaf where it belongs to experts."""
    target = right.slice.target
    unlike = _unlike(left.tensor, right.tensor, target.name in sides.wider)
    first = tuple(runs[0][0] for runs in target.runs)
    for leaf, part in leaves_of(sides.prepared, target, held(target.runs)):
        mask = unlike if part is None else unlike[part]
        count = int(mask.sum())
        if not count:
            continue
        at = tuple(int(i) for i in mask.nonzero()[0])
        pair = [t if part is None else t[part] for t in (left.tensor, right.tensor)]
        values = tuple(float(t[at].to(torch.float64)) for t in pair)
        apart = (pair[0][mask].to(torch.float64) - pair[1][mask].to(torch.float64)).abs()
        offset = tuple(s.start or 0 for s in part) if part is not None else (0,) * len(at)
        index = tuple(i + o + f for i, o, f in zip(at, offset, first, strict=True))
        why = ""
        if target.name in sides.wider:
            narrow = torch_dtype(min(sides.wider[target.name], key=lambda d: torch_dtype(d).itemsize))
            if bool((pair[0].to(narrow) == pair[1].to(narrow)).all()):
                why = f"equal after rounding to {str(narrow).removeprefix('torch.')}"
        biggest = float(apart.nan_to_num(nan=float("inf")).max())
        family = sides.prepared.source.family
        labels = family.labels if family is not None else ("gate", "up")
        yield Difference("values", target.name, leaf, count, mask.numel(), index, values, biggest, why, labels)


def _alone(
    checkpoint: Checkpoint,
    sample: float | None,
    threads: int | None,
    progress: Progress | None,
    strict: bool,
    started: float,
) -> VerifyReport:
    """One checkpoint against its manifest, its headers and what numbers may be."""
    fatal = [p.error for p in checkpoint.problems if p.fatal and checkpoint.config is not None]
    if fatal:
        raise merged(fatal)
    record = manifest.read(Path(checkpoint.path)) if checkpoint.path and Path(checkpoint.path).is_dir() else None
    digests = record.get("tensors") if record and sample is None else None
    found: list[Difference] = []
    if isinstance(digests, dict):
        names = set(digests) ^ set(checkpoint.tensors)
        found += [Difference("missing" if n in digests else "extra", n, why="by the manifest") for n in sorted(names)]
    targets = {n: whole_target(n, e.shape, e.dtype) for n, e in checkpoint.tensors.items()}
    own = Prepared(checkpoint, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    hashes: dict[str, xxhash.xxh3_128] = {}
    odd: dict[str, int] = {}
    read, total = 0, sum(room(target) for target in targets.values())
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    for group in grouped(_chosen(checkpoint, targets, sample), CHUNK):
        need = sum(room(part.target) for part in group)
        buffer = buffer if buffer.numel() >= need else torch.empty(need, dtype=torch.uint8)
        filled, got = fill(own, group, buffer, threads=threads)
        read += got
        for one in filled:
            name = one.slice.target.name
            if one.tensor.is_floating_point() and one.slice.target.dtype in FLOATS[:4]:
                bad = one.tensor.numel() - int(torch.isfinite(one.tensor).sum())
                odd[name] = odd.get(name, 0) + bad
            if isinstance(digests, dict):
                data = memoryview(one.tensor.reshape(-1).view(torch.uint8).numpy())
                hashes.setdefault(name, xxhash.xxh3_128()).update(data)
        if progress is not None:
            progress(min(read, total), total)
    if isinstance(digests, dict):
        wrong = [n for n, h in hashes.items() if digests.get(n, h.hexdigest()) != h.hexdigest()]
        found += [Difference("digest", n, why="other bytes than its manifest recorded") for n in wrong]
    warnings = [f"{show(name)} holds {count} values that are NaN or infinite" for name, count in odd.items() if count]
    warnings += [str(p.error) for p in checkpoint.problems if not p.fatal]
    if strict and warnings:
        raise RestowError("a checkpoint without anything odd", warnings[0], path=checkpoint.path)
    checked = "" if isinstance(digests, dict) else "; no manifest: headers, cover and finiteness were checked"
    return VerifyReport(
        equal=not found,
        differences=tuple(found),
        tensors=len(targets),
        bytes_read=read,
        notes=(),
        warnings=tuple(warnings),
        sampled=_sampled(sample) + checked,
        seconds=time.perf_counter() - started,
    )
