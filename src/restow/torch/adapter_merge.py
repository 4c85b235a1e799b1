"""`restow.lora.merge`: a base and an adapter into a checkpoint of the base's own files, names, layout and precision.

Files are copied tensor by tensor; where a delta belongs it is added. Every delta is counted and the result is published
only if all were applied. A merge that was killed goes on with the files that it had finished. It rejects what
`adapter_read` rejects, quantised bases, and DoRA.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from restow.adapter_base import BaseLike, base_of
from restow.adapter_formats import Faces
from restow.adapter_orient import Options
from restow.adapter_read import Plain, read_adapter
from restow.adapter_scope import judge_delta
from restow.checkpoint import Checkpoint
from restow.errors import AdapterError, IntegrityError, UsageError, show
from restow.family import Family
from restow.files import SourceFile, names, open_source, read_all
from restow.header import read_header
from restow.opening import open_checkpoint
from restow.outfiles import OutFile, Placed, placed
from restow.prepare import refuse
from restow.publish import Staging
from restow.sidefiles import side_files
from restow.torch.adapter_delta import Book, Deltas, Experts, Goal, Kept, expected, goals, roles_text
from restow.torch.adapter_file import AdapterFile, bytes_of
from restow.torch.dtypes import torch_dtype
from restow.torch.resume import intact

PART = 64 << 20  # bytes read at once
LOW = 0.5  # a share of the delta's norm below which a merge is worth a warning


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. `deltas` counts matrices that were added; `kept` is the share of the deltas' norm that the
    base's precision left, by role and (`kept_all`) in all: 1 minus the norm of what rounding took over the delta's.
    """

    target: str
    deltas: int
    replaced: int
    tensors: int
    kept: Mapping[str, float]
    kept_all: float
    bytes_written: int
    warnings: tuple[str, ...]
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        head = (
            f"merged {self.deltas:,} deltas into {self.tensors:,} tensors at {show(self.target)}: "
            f"{self.bytes_written:,} bytes, {self.kept_all:.1%} of the deltas' norm kept, {self.seconds:.1f} s"
        )
        warned = (f"  warning: {x}" for x in self.warnings)
        return "\n".join([head, *(f"  {x}" for x in (*self.lines, *self.notes)), *warned])


def merge(
    base: BaseLike,
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    family: str | Family | None = None,
    faces: Faces | None = None,
    outer: str = "out",
    expert_major: bool | None = None,
    threshold: float = LOW,
    replace: bool = False,
    strict: bool = False,
) -> MergeReport:
    """Write `base` + scale * B @ A for every module of `adapter` to the folder `target`.

    The files, their headers, the layout and the dtypes are the base's; sums are made in float32 and rounded once.
    `faces`, `outer`, `expert_major`: as for `convert`. Warns where less than `threshold` of the deltas' norm survives
    rounding. Raises `AdapterError` where a delta has no place, `QuantizationError` for a quantised base, and what `open`
    finds fatal in the base, under `strict` all that it finds.
    """
    started = time.perf_counter()
    options = Options(faces, outer, expert_major)
    opened = base if isinstance(base, Checkpoint) else open_checkpoint(base, family=family)
    odd = refuse(opened, strict)
    known = base_of(opened, family)
    if known.checkpoint is None or known.path is None:
        raise UsageError("a base in files to merge into", "one in memory")
    with AdapterFile(adapter) as file:
        read = read_adapter(file.shapes, file.config, known, options)
        judge_delta(file.config, "", "merge it with PEFT")
        todo = goals(read, known)
        job = _Merge(file, Deltas(file.get, file.config, known), todo, Book())
        written = job.write(known.checkpoint, known.path, target, replace, expected(read), options)
        file.check()
    total = Kept()
    for kept in job.book.roles.values():
        total.join(kept)
    low = [role for role, kept in sorted(job.book.roles.items()) if kept.share < threshold]
    warnings = [f"{role}: rounding to the base's precision leaves {job.book.roles[role].share:.0%} of the delta's norm; "
                "merge into a wider base, or serve the adapter by itself" for role in low]  # fmt: skip
    return MergeReport(
        target=os.fspath(target),
        deltas=total.count,
        replaced=sum(isinstance(goal, str) for goal in todo.values()),
        tensors=len(todo),
        kept={role: kept.share for role, kept in sorted(job.book.roles.items())},
        kept_all=total.share,
        bytes_written=written,
        warnings=(*odd, *warnings),
        lines=tuple(roles_text(job.book.roles)),
        notes=job.notes,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Merge:
    """One call's work."""

    file: AdapterFile
    deltas: Deltas
    goals: Mapping[str, Goal]
    book: Book
    digests: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(
        self, base: Checkpoint, root: str, target: str | os.PathLike[str], replace: bool,
        want: set[tuple[str, ...]], options: Options,
    ) -> int:  # fmt: skip
        folder, files = Path(root), sorted(base.stamps)
        small = dict(side_files(root).files)
        for name in names(folder) if folder.is_dir() else ():
            if name.endswith(".index.json"):
                small[name] = read_all(folder / name, 1 << 29, what="an index", refuse=UsageError)
        size = sum((folder / name).stat().st_size for name in files)
        room = size + sum(map(len, small.values()))
        with Staging(target, size=room, count=len(files) + len(small) + 1, sources=[root, self.file.root],
                     replace=replace, work=self._work(base, options)) as staging:  # fmt: skip
            for name in files:
                with open_source(folder / name) as source:
                    self._file(source, staging)
                    if source.changed() or source.stamp != base.stamps[name]:
                        raise IntegrityError("a base that stays as it was", "another file", path=source.path)
            missing = sorted(want - self.book.done)
            if missing:
                raise AdapterError(
                    f"each of {len(want)} deltas applied", f"{len(want) - len(missing)}", tensor=missing[0][0],
                    sections=[("missing", (show(" ".join(key)) for key in missing))],
                    hint="the base holds no tensor for these; nothing was written",
                )  # fmt: skip
            for name, data in small.items():
                staging.add(name, data)
            sizes = {name: stamp[2] for name, stamp in base.stamps.items()}
            staging.finish({"source": sizes, "tensors": self.digests})
            self.notes = staging.notes
        return size

    def _work(self, base: Checkpoint, options: Options) -> str:
        """A digest of everything that the bytes of a merge follow from: the files of both sides, and what was said."""
        facts = [sorted(base.stamps.items()), self.file.stamps, dict(self.file.config.raw), list(options)]
        layouts = {path: str(module.layout) for path, module in base.modules.items()}
        return xxhash.xxh3_128(json.dumps([*facts, layouts], sort_keys=True).encode()).hexdigest()

    def _file(self, source: SourceFile, staging: Staging) -> None:
        """One file of the base with its deltas, unless a run that was killed has finished it."""
        header = read_header(source)
        out = OutFile(source.name, source.pread(0, 8 + header.length), placed(header), source.size)
        note = staging.left.get(out.name)
        if note is not None:
            kept = _known(note, out, staging)
            if kept is not None:
                staging.keep(out.name, out.size)
                self.digests |= kept[0]
                self.book.join(kept[1])
                return
            staging.drop(out.name)
        book, digests = Book(), dict[str, str]()
        staging.create(out.name, out.size)
        at = staging.write(out.name, 0, out.head)
        for tensor in out.tensors:
            self._gap(source, staging, at, tensor.begin)
            digest = xxhash.xxh3_128()
            for begin, data in self._parts(tensor, source, book):
                staging.write(out.name, begin, data)
                digest.update(data)
            digests[tensor.name] = digest.hexdigest()
            at = tensor.end
        self._gap(source, staging, at, out.size)
        staging.finished(out.name, {"tensors": digests, **book.note()})
        self.digests |= digests
        self.book.join(book)

    def _gap(self, source: SourceFile, staging: Staging, begin: int, end: int) -> None:
        """Bytes between tensors go along as they are."""
        for at in range(begin, end, PART):
            staging.write(source.name, at, source.pread(at, min(PART, end - at)))

    def _parts(
        self, tensor: Placed, source: SourceFile, book: Book
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """A tensor of the result in pieces: where each begins, and its bytes."""
        goal = self.goals.get(tensor.name)
        if goal is None:
            for at in range(tensor.begin, tensor.end, PART):
                yield at, source.pread(at, min(PART, tensor.end - at))
        elif isinstance(goal, str):
            yield tensor.begin, self._replaced(goal, tensor, book)
        else:
            yield from self._added(goal, tensor, source, book)

    def _replaced(self, goal: str, tensor: Placed, book: Book) -> memoryview:
        """A whole tensor of the adapter (modules_to_save, a bias) in the base's dtype."""
        value = self.file.get(goal)
        if tuple(value.shape) != tensor.shape:
            raise AdapterError(
                f"shape {list(tensor.shape)} for {show(goal)}", f"{list(value.shape)}", tensor=goal
            )
        book.done.add((goal,))
        return bytes_of(value.to(torch_dtype(tensor.dtype)).contiguous())

    def _added(
        self, goal: Experts | Plain, tensor: Placed, source: SourceFile, book: Book
    ) -> Iterator[tuple[int, memoryview]]:
        dtype = torch_dtype(tensor.dtype)
        count = goal.outer if isinstance(goal, Experts) else 1
        one = (tensor.end - tensor.begin) // count
        step = max(1, PART // max(1, one)) if count > 1 else 1
        for first in range(0, count, step):
            n = min(step, count - first)
            shape = (n, *tensor.shape[1:]) if count > 1 else tensor.shape
            part = torch.empty(shape, dtype=dtype)
            at = tensor.begin + first * one
            source.preadv(at, [bytes_of(part)])
            if isinstance(goal, Experts):
                self.deltas.experts(goal, part, first, book)
            else:
                self.deltas.plain(goal, part, book)
            yield at, bytes_of(part)


def _known(
    note: Mapping[str, object], out: OutFile, staging: Staging
) -> tuple[Mapping[str, str], Book] | None:
    """What a finished file of a killed run tells, if it holds what its note says."""
    digests = note.get("tensors")
    try:
        book = Book.from_note(note)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not isinstance(digests, dict) or not intact(staging.place.staging, out, digests):
        return None
    return digests, book
