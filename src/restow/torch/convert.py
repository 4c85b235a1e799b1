"""`restow.convert`: a checkpoint on disk into another layout on disk, exactly, in bounded memory, published at once.

The destination's tensors are what `wanted.default_targets` says, or the very files that a record holds; they are
filled chunk by chunk by the same plans and the same executor as a load, and written through `publish`. It rejects
unknown layouts, sources with fatal problems, and destinations that `publish` rejects, before anything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from restow.checkpoint import Checkpoint
from restow.codec import without_quantization
from restow.codecs import rounds
from restow.coded import value_dtype
from restow.decoded import CodedWeights
from restow.encodings import Encoding, encoding_of, plain_form
from restow.errors import MissingTensorError, UnexpectedTensorError, UsageError, show
from restow.landing import Experts, Wish, check_modules, chosen_rows, layout_of
from restow.layout import Layout
from restow.located import located
from restow.mending import FLOATS as CASTS
from restow.mending import with_dtype, with_experts
from restow.opening import open_checkpoint
from restow.outfiles import INDEX, OutFile, index_text, nbytes, new_files, recorded_files
from restow.prepare import Prepared, prepare, refuse
from restow.problems import Problem, merged
from restow.publish import Staging
from restow.quantized import refuse_cast
from restow.record import SECTION, make_record, read_record
from restow.sidefiles import side_files
from restow.stated import statement
from restow.targets import Target, whole_target
from restow.torch.chunks import CHUNK, Filled, Slice, side_by_side, slices, stream
from restow.torch.convert_report import ConvertReport
from restow.torch.digesting import Digests
from restow.torch.dtypes import dtype_name, narrows, wider
from restow.torch.encoded import (
    Packing,
    coded_chunks,
    encoded_config,
    encoded_slices,
    encoded_targets,
    encoders,
    packing_of,
)
from restow.torch.passing import Passing
from restow.torch.raw import raw
from restow.torch.read import Progress
from restow.torch.resume import note_of, recognised, work_of
from restow.torch.values import judge_scales
from restow.wanted import default_targets, home_of

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _Job:
    """Everything a conversion will write, decided before it begins."""

    prepared: Prepared
    files: tuple[OutFile, ...]
    index: tuple[str, bytes] | None
    layout: str
    undo: Mapping[str, str]
    side: Mapping[str, bytes]
    left: tuple[str, ...]
    packing: Packing | None = None

    @property
    def written(self) -> Prepared:
        """The tensors of the files as they are."""
        return self.packing.written if self.packing is not None else self.prepared


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
    job = _prepare(opened, to, experts, dtype, max_shard_bytes, keep_quantized, encoding)
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
        narrowed=_narrowed(job),
        left_behind=job.left,
        warnings=(*warnings, *(str(problem.error) for problem in odd)),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _prepare(
    opened: Checkpoint,
    to: str | Layout,
    experts: Experts,
    dtype: torch.dtype | None,
    max_bytes: int,
    keep: bool,
    encoding: Encoding | None,
) -> _Job:
    if opened.path is None or not opened.modules:
        raise UsageError("a checkpoint with experts", "none", path=opened.path)
    if not isinstance(to, str | Layout):
        raise UsageError("a layout's name, or a restow.Layout, as to=", type(to).__name__)
    if keep and dtype is not None:
        raise UsageError("keep_quantized=True alone", "dtype= with it: codes cannot be cast")
    if dtype is not None and str(dtype).removeprefix("torch.") not in CASTS:
        raise UsageError(
            f"dtype= as one of {', '.join(CASTS)}",
            str(dtype).removeprefix("torch."),
            hint="codes of fewer bits need scales: a cast gives none",
        )
    if keep and encoding is not None:
        raise UsageError("keep_quantized=True alone", "quantize= with it")
    if max_bytes < 1:
        raise UsageError("max_shard_bytes of at least 1", f"{max_bytes}")
    side = side_files(opened.path, opened.stamps)
    sides = dict(side.files)
    if to == "source":
        if experts is not None or dtype is not None or encoding is not None:
            raise UsageError('to="source" alone', "experts=, dtype= or quantize= with it")
        return _undo(opened, sides, side.left)
    layout = layout_of(to, opened.family) if encoding is None else plain_form(to, opened.family, encoding)
    assert layout is not None
    _judge_experts(opened, experts)
    wish = Wish(
        layout=layout,
        family=opened.family,
        experts=experts,
        routers=experts is not None,
        places=frozenset(home_of(path, layout, opened.family) for path in opened.modules),
    )
    targets = list(_with_routers(opened, default_targets(opened, layout, wish, keep_quantized=keep), wish))
    _judge_names(targets)
    prepared = prepare(opened, targets, wish)
    prepared = dataclasses.replace(prepared, targets={t.name: _cast(prepared, t, dtype) for t in targets})
    _judge_cover(prepared)
    weights = prepared.source.coded
    decoded_from = sorted({c.name for c in weights.codecs}) if isinstance(weights, CodedWeights) else []
    if decoded_from and "config.json" in sides:
        for name in prepared.source.others:  # codes would lose their meaning: the new config announces none
            refuse_cast(prepared.source, name, value_dtype(opened.config))
        sides["config.json"] = without_quantization(sides["config.json"])
    if dtype is not None and "config.json" in sides:
        sides["config.json"] = with_dtype(sides["config.json"], str(dtype).removeprefix("torch."))
    if experts is not None:
        sides["config.json"] = with_experts(opened, wish, sides.get("config.json"))
    specs = list(prepared.targets.values())
    if encoding is not None:
        sides["config.json"] = encoded_config(opened, sides.get("config.json"), encoding)
        specs = encoded_targets(opened, specs, layout, encoding, wish)
    metadata = {"format": "pt", **(statement(layout, opened.family) if encoding is None else {})}
    files = new_files(((t.name, t.dtype, t.shape) for t in specs), max_bytes, metadata)
    packing = None
    if encoding is not None:
        prepared, packing = packing_of(opened, files, sides["config.json"], layout, wish)
    why_not = (
        "experts were chosen" if experts is not None else "values were cast" if dtype is not None else ""
    )
    if decoded_from:
        why_not = f"values were decoded from {', '.join(decoded_from)}"
    if encoding is not None:
        why_not = f"values were encoded in {encoding.codec}"
    return _Job(
        prepared=prepared,
        files=files,
        index=(INDEX, index_text(files)) if len(files) > 1 else None,
        layout=to if isinstance(to, str) else "the layout given",
        undo=make_record(opened, why_not),
        side=sides,
        left=side.left,
        packing=packing,
    )


def _undo(opened: Checkpoint, sides: Mapping[str, bytes], left: tuple[str, ...]) -> _Job:
    record = read_record(opened)
    assert opened.path is not None
    files = recorded_files(record.heads, opened.path)
    targets = [whole_target(t.name, t.shape, t.dtype) for file in files for t in file.tensors]
    layouts = set(record.layouts.values())
    wish = Wish(
        layout=next(iter(layouts)) if len(layouts) == 1 else None,
        family=opened.family,
        places=frozenset(record.layouts),
    )
    prepared = prepare(opened, targets, wish)
    _judge_cover(prepared)
    return _Job(prepared, files, record.listing, "its source's layout", make_record(opened, ""), sides, left)


def _judge_experts(opened: Checkpoint, experts: Experts) -> None:
    check_modules(opened, experts)
    for numbers in experts.values() if isinstance(experts, Mapping) else [] if experts is None else [experts]:
        if isinstance(numbers, str) or not len(numbers):
            raise UsageError("the numbers of the experts to keep, at least one", f"{numbers!r}")


def _judge_names(targets: Iterable[Target]) -> None:
    """Raise where the layout gives a tensor a name that another one has."""
    twice = [name for name, count in Counter(target.name for target in targets).items() if count > 1]
    if twice:
        raise UsageError("a layout whose names are free", f"{show(twice[0])} twice", tensor=twice[0])


def _judge_cover(prepared: Prepared) -> None:
    """Every tensor of the destination is filled, and every one of the source has a place; raises for the first."""
    if prepared.missing:
        raise MissingTensorError(
            "every tensor of the destination in the source",
            f"{len(prepared.missing)} that it does not hold",
            path=prepared.source.path,
            tensor=prepared.missing[0],
            sections=[("missing", map(show, prepared.missing))],
            hint="nothing is filled in their place",
        )
    unused = (*prepared.left[0], *prepared.left[1])
    if unused:
        raise UnexpectedTensorError(
            "a place for every tensor of the source",
            f"{len(unused)} without one",
            path=prepared.source.path,
            tensor=unused[0],
            sections=[("unused", map(show, unused))],
            hint="a layout needs a row for every role of the experts: their biases, their scales",
        )


def _with_routers(opened: Checkpoint, targets: Sequence[Target], wish: Wish) -> Iterator[Target]:
    """Targets with the router tensors' `e` dims as long as the experts that were chosen."""
    for target in targets:
        row = opened.routers.get(target.name)
        if row is None or wish.experts is None:
            yield target
            continue
        at = next(i for i, dim in enumerate(row.dims) if str(dim) == "e")
        path = max(opened.modules, key=partial(_shared, target.name))
        size = opened.modules[path].sizes.get("e", target.shape[at])
        chosen = chosen_rows(wish.experts, path, size, target.shape[at])
        n = target.shape[at] if chosen is None else len(chosen)
        yield whole_target(target.name, (*target.shape[:at], n, *target.shape[at + 1 :]), target.dtype)


def _shared(name: str, path: str) -> int:
    """How many segments two names have in common from the left."""
    pairs = zip(name.split("."), path.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _dtypes(prepared: Prepared, name: str) -> tuple[str, ...]:
    """The dtypes of what fills a target: of one tensor, or of all of a role."""
    source = prepared.source
    if name in prepared.plain:
        return (source.tensors[prepared.plain[name]].dtype,)
    path, role, _ = prepared.owners[name]
    names = source.modules[prepared.pairs[path]].tensors[role]
    return tuple(dict.fromkeys(source.tensors[n].dtype for n in names if n is not None))


def _cast(prepared: Prepared, target: Target, dtype: torch.dtype | None) -> Target:
    """A target in `dtype`, unless it must stay exact; without one in the dtype that holds all that fills it."""
    if target.name not in prepared.plain and target.name not in prepared.owners:
        return target
    row = prepared.source.routers.get(prepared.plain.get(target.name, ""))
    held = wider(_dtypes(prepared, target.name))
    if dtype is None or held not in FLOATS or (row is not None and row.exact):
        return target._replace(dtype=held or target.dtype)
    return target._replace(dtype=dtype_name(dtype))


class _Written(NamedTuple):
    """The bytes read; an xxh3-128 digest per tensor and per leaf, sha256 per file if asked; what the values show."""

    read: int
    tensors: Mapping[str, str]
    leaves: Mapping[str, str]
    files: Mapping[str, str]
    problems: tuple[Problem, ...]


def _write(
    job: _Job,
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


def _kept(job: _Job, staging: Staging, digests: Digests) -> set[str]:
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


def _slices(job: _Job, kept: Container[str], in_order: bool) -> Iterator[Slice]:
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


def _narrowed(job: _Job) -> dict[str, str]:
    """The tensors whose values a cast may have changed."""
    found = {}
    for name, target in job.prepared.targets.items():
        lossy = [dtype for dtype in _dtypes(job.prepared, name) if narrows(dtype, target.dtype)]
        lossy = lossy or _decoded_lossy(job.prepared, name, target.dtype)
        if lossy:
            found[name] = f"{lossy[0]} -> {target.dtype}"
    for name, packed in (job.packing.weights if job.packing is not None else {}).items():
        found[packed.codes] = f"{_dtypes(job.prepared, name)[0]} -> {packed.codec.name}"
    return found


def _decoded_lossy(prepared: Prepared, name: str, dtype: str) -> list[str]:
    """The codecs of what fills a target, whose values may have more digits than its dtype holds."""
    source = prepared.source
    if not isinstance(source.coded, CodedWeights) or name not in prepared.targets:
        return []
    names = [prepared.plain[name]] if name in prepared.plain else []
    if name in prepared.owners:
        path, role, _ = prepared.owners[name]
        names = [n for n in source.modules[prepared.pairs[path]].tensors[role] if n is not None]
    return sorted(
        {
            codec.name
            for codec in (source.coded.codec(n) for n in names if n in source.coded)
            if rounds(codec, dtype)
        }
    )


def _identity(opened: Checkpoint) -> dict[str, int]:
    """The source's files and their sizes: what the result was made from."""
    return {name: stamp[2] for name, stamp in opened.stamps.items()}


__all__ = ["ConvertReport", "convert"]
