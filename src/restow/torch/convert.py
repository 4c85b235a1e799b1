"""`restow.convert`: a checkpoint on disk into another layout on disk, exactly, in bounded memory, published at once.

The destination's tensors are what `wanted.default_targets` says, or the very files that a record holds; they are
filled chunk by chunk by the same plans and the same executor as a load, and written through `publish`. It rejects
unknown layouts, sources with fatal problems, and destinations that `publish` rejects, before anything is written.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from restow.checkpoint import Checkpoint
from restow.encodings import encoding_of
from restow.landing import Experts
from restow.layout import Layout
from restow.located import located
from restow.opening import open_checkpoint
from restow.outfiles import nbytes
from restow.prepare import refuse
from restow.problems import Problem, merged
from restow.publish import Staging
from restow.record import SECTION
from restow.torch.chunks import CHUNK, Filled, Slice, side_by_side, slices, stream
from restow.torch.convert_job import Job, job_of, narrowed
from restow.torch.convert_report import ConvertReport
from restow.torch.digesting import Digests
from restow.torch.encoded import (
    coded_chunks,
    encoded_slices,
    encoders,
)
from restow.torch.passing import Passing
from restow.torch.raw import raw
from restow.torch.read import Progress
from restow.torch.resume import note_of, recognised, work_of
from restow.torch.values import judge_scales


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    target: str | os.PathLike[str],
    *,
    to: str | Layout,
    experts: Experts = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    keep_quantized: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    threads: int | None = None,
    replace: bool = False,
    sha256: bool = False,
    progress: Progress | bool | None = None,
    strict: bool = False,
) -> ConvertReport:
    """Write the checkpoint `source` to the folder `target` with its experts in layout `to`.

    `to`: a layout's name (the family's meaning first), a `Layout`, "hf" (what the vendor ships) or "source" (what was
    recorded by the conversion that made `source`: file map, headers and all). `experts` keeps these experts, in this
    order, with their router rows, and mends the config. `dtype` casts floating tensors, but for rows that must stay
    exact, and the config says so wherever it names the weights' dtype. Quantised weights are decoded, to the config's
    dtype without `dtype`; `keep_quantized` takes codes and scales along, where `to` has a place for them. `quantize`
    ("fp8", "mxfp4", "mxfp8", "nf4") encodes the experts' weights, and the config says so; "hf" is then what vendors ship
    in that format. All other tensors, the config and tokenizer files come along unchanged. At most 1 GiB of memory,
    whatever the size. The manifest records a digest per tensor and per leaf, with `sha256` one per file; odd values (NaN,
    experts of zeros) are warnings. Raises the source's fatal problems, `UsageError` for an unknown `to`, and
    `DestinationError`s; then nothing is written.
    """
    started = time.perf_counter()
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    warnings = refuse(opened, strict)
    scales = judge_scales(opened, threads)
    if refused := [p.error for p in scales if p.fatal or strict]:
        raise merged(refused)
    encoding = encoding_of(quantize) if quantize is not None else None
    job = job_of(opened, to, experts, dtype, max_shard_bytes, keep_quantized, encoding)
    size = (
        sum(file.size for file in job.files)
        + sum(map(len, job.side.values()))
        + (len(job.index[1]) if job.index else 0)
    )
    count = len(job.files) + len(job.side) + (job.index is not None) + 1
    assert opened.path is not None
    asked = (experts, max_shard_bytes, keep_quantized, *([quantize] if quantize else ()))
    work = work_of(opened, job.prepared, job.files, job.layout, *asked)
    with Staging(
        target, size=size, count=count, sources=[opened.path], replace=replace, work=work
    ) as staging:
        done = _write(job, opened, staging, threads, sha256, progress)
        seen = [located(problem, opened, opened.path) for problem in done.problems]
        odd = (*scales, *seen)
        if refused := [p.error for p in seen if p.fatal or strict]:
            raise merged(refused)
        for name, data in job.side.items():
            staging.add(name, data)
        if job.index is not None:
            staging.add(*job.index)
        small = {**job.side, **dict([job.index] if job.index is not None else ())}
        known = {name: {"sha256": hashlib.sha256(data).hexdigest()} for name, data in small.items()}
        known |= {name: {"sha256": digest} for name, digest in done.files.items()}
        sections = {"tensors": done.tensors, "leaves": done.leaves, "source": _identity(opened)}
        staging.finish({SECTION: job.undo, **sections}, digests=known)
        notes = staging.notes
    return ConvertReport(
        target=os.fspath(target),
        layout=job.layout,
        files=len(job.files),
        tensors=sum(len(file.tensors) for file in job.files),
        bytes_read=done.read,
        bytes_written=sum(file.size for file in job.files),
        narrowed=narrowed(job),
        left_behind=job.left,
        warnings=(*warnings, *(str(problem.error) for problem in odd)),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


class _Written(NamedTuple):
    """The bytes read; an xxh3-128 digest per tensor and per leaf, sha256 per file if asked; what the values show."""

    read: int
    tensors: Mapping[str, str]
    leaves: Mapping[str, str]
    files: Mapping[str, str]
    problems: tuple[Problem, ...]


def _write(
    job: Job,
    opened: Checkpoint,
    staging: Staging,
    threads: int | None,
    sha256: bool,
    progress: Progress | bool | None,
) -> _Written:
    """Fill and write every file, and digest it on the way."""
    left = {file.name: file.size for file in job.files}
    sealed: list[Future[None]] = []
    by_name = {file.name: file for file in job.files}
    total = sum(nbytes(target.dtype, target.shape) for target in job.prepared.targets.values())
    passing = Passing(job.prepared) if job.packing is None else None
    known = passing.digest if passing is not None else None
    watch = passing.look if passing is not None else None
    digests = Digests(job.written, job.files, sha256=sha256 and job.packing is None, known=known)
    kept = _kept(job, staging, digests)
    there = {tensor.name for name in kept for tensor in by_name[name].tensors}
    with (
        ThreadPoolExecutor(1) as syncing,
        encoders(threads) as pool,
    ):  # a disk that is slow to sync must not stop the reading

        def account(file: str, written: int) -> None:
            left[file] -= written
            if left[file] == 0:
                while sealed and sealed[0].done():  # a disk that fails is told of now, not at the end
                    sealed.pop(0).result()
                sealed.append(syncing.submit(staging.finished, file, note_of(by_name[file], digests)))

        def hand_on(filled: Sequence[Filled]) -> None:
            written = []
            if job.packing is not None:
                filled = coded_chunks(job.packing, filled, there, pool)
            with digests.beside(filled):
                for one in filled:
                    file, begin = digests.places[one.slice.target.name]
                    written.append((file, staging.write(file, begin + one.slice.offset, raw(one.tensor))))
            for file, count in written:  # only now are the digests there that a finished file is noted with
                account(file, count)

        for file in (file for file in job.files if file.name not in kept):
            staging.create(file.name, file.size)
            account(file.name, staging.write(file.name, 0, file.head))
        shown = _progress(progress, total)
        parts = _slices(job, kept, sha256)
        read = stream(job.prepared, parts, hand_on, threads=threads, progress=shown, chunk=CHUNK, watch=watch)
        for future in sealed:
            future.result()
    problems = digests.problems()
    sums = digests.sums()
    if sha256 and job.packing is not None:  # scales and codes do not come in the order of a file
        sums = {name: _sha256(staging.place.staging / name) for name in by_name}
    return _Written(read, digests.tensors, digests.leaves.found, sums, problems)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(job: Job, staging: Staging, digests: Digests) -> set[str]:
    """The files that a killed run has finished and that are what this one would write; the others are removed."""
    kept = set()
    for file in job.files:
        if file.name in staging.left:
            if recognised(staging.place.staging, file, staging.left[file.name], job.written, digests):
                staging.keep(file.name, file.size)
                kept.add(file.name)
            else:
                staging.drop(file.name)
    return kept


def _slices(job: Job, kept: Container[str], in_order: bool) -> Iterator[Slice]:
    """What is to be filled: file by file where files are summed `in_order`, else with gate beside up."""
    if job.packing is not None:
        return encoded_slices(job.packing, job.prepared, job.files, kept, CHUNK // 2)
    placed = (tensor for file in job.files if file.name not in kept for tensor in file.tensors)
    targets = [job.prepared.targets[tensor.name] for tensor in placed if tensor.end > tensor.begin]
    if in_order:
        return (part for target in targets for part in slices(target, CHUNK // 2))
    return side_by_side(job.prepared, targets, CHUNK // 2)


def _progress(progress: Progress | bool | None, total: int) -> Any:
    if not progress:
        return None
    if progress is True:
        from restow.progress import bar

        progress = bar("converting")
    call = progress
    return lambda done: call(done, total)


def _identity(opened: Checkpoint) -> dict[str, int]:
    """The source's files and their sizes: what the result was made from."""
    return {name: stamp[2] for name, stamp in opened.stamps.items()}


__all__ = ["ConvertReport", "convert"]
