"""`restow.verify`: do two checkpoints hold the same weights, whatever their layouts; or is one what it should be.

The second checkpoint's tensors are filled from the first by a plan, chunk by chunk, and compared with its own bytes;
each byte of both is read once. It rejects inputs that cannot be read; everything else that is unlike is a difference,
and where the values are found in another place, the report says where.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from restow.checkpoint import Checkpoint
from restow.decoded import decoded
from restow.errors import UsageError
from restow.joining import joined
from restow.judge import undecodable
from restow.naming import Rename, check_rename
from restow.opening import family_of, open_checkpoint
from restow.problems import merged
from restow.torch.alone import judge_alone
from restow.torch.chunks import CHUNK, Slice, fill, grouped, room
from restow.torch.explain import explain
from restow.torch.read import Progress
from restow.torch.verify_report import Difference, VerifyReport, chosen, sampled
from restow.torch.verify_sides import Sides, pair_sides
from restow.torch.verify_values import differences_of, same


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
    sides = pair_sides(first, second, rename, experts_only)
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


def _compare(
    sides: Sides, parts: Iterator[Slice], threads: int | None, progress: Progress | None
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
            if not same(left.tensor, right.tensor, right.slice.target.name in sides.cast):
                found += differences_of(sides, left, right)
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
