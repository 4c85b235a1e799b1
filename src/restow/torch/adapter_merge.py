"""`restow.lora.merge`: a base and an adapter into a checkpoint of the base's own files, names, layout and precision.

Files are copied tensor by tensor; where a delta belongs it is added. Every delta is counted and the result is published
only if all were applied. It rejects what `adapter_read` rejects, quantised bases, and DoRA.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from restow.adapter_base import BaseLike, base_of
from restow.adapter_formats import Faces
from restow.adapter_orient import Options
from restow.adapter_read import read_adapter
from restow.errors import AdapterError, UsageError, show
from restow.family import Family
from restow.files import SourceFile, names, open_source, read_all
from restow.header import Header, read_header
from restow.outfiles import Placed, placed
from restow.planning import raise_fatal
from restow.publish import Staging
from restow.sidefiles import side_files
from restow.torch.adapter_delta import Book, Deltas, Experts, Goal, Kept, expected, goals, roles_text
from restow.torch.adapter_file import AdapterFile, bytes_of
from restow.torch.dtypes import torch_dtype

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
    seconds: float

    def __str__(self) -> str:
        head = (
            f"merged {self.deltas:,} deltas into {self.tensors:,} tensors at {show(self.target)}: "
            f"{self.bytes_written:,} bytes, {self.kept_all:.1%} of the deltas' norm kept, {self.seconds:.1f} s"
        )
        return "\n".join([head, *(f"  {x}" for x in self.lines), *(f"  warning: {x}" for x in self.warnings)])


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
) -> MergeReport:
    """Write `base` + scale * B @ A for every module of `adapter` to the folder `target`.

    The files, their headers, the layout and the dtypes are the base's; sums are made in float32 and rounded once.
    `faces`, `outer`, `expert_major`: as for `convert`. Warns where less than `threshold` of the deltas' norm survives
    rounding. Raises `AdapterError` where a delta has no place, and `QuantizationError` for a quantised base.
    """
    started = time.perf_counter()
    known = base_of(base, family)
    if known.checkpoint is None or known.path is None:
        raise UsageError("a base with weights to merge into", "a config alone", path=known.path)
    raise_fatal(known.checkpoint)
    with AdapterFile(adapter) as file:
        read = read_adapter(file.shapes, file.config, known, Options(faces, outer, expert_major))
        for word in ("use_dora", "lora_bias"):
            if file.config.raw.get(word):
                raise AdapterError(f"{word} false", "true", path=file.config.path, hint="merge it with PEFT")
        todo = goals(read, known)
        job = _Merge(file, Deltas(file.get, file.config, known), todo, Book())
        written = job.write(known.path, sorted(known.checkpoint.stamps), target, replace, expected(read))
        file.check()
    total = Kept()
    for kept in job.book.roles.values():
        total.delta, total.lost = total.delta + kept.delta, total.lost + kept.lost
    low = [role for role, kept in job.book.roles.items() if kept.share < threshold]
    warnings = [f"{role}: rounding to the base's precision leaves {job.book.roles[role].share:.0%} of the delta's norm; "
                "merge into a wider base, or serve the adapter by itself" for role in low]  # fmt: skip
    return MergeReport(
        target=os.fspath(target),
        deltas=sum(kept.count for kept in job.book.roles.values()),
        replaced=sum(isinstance(goal, str) for goal in todo.values()),
        tensors=len(todo),
        kept={role: kept.share for role, kept in job.book.roles.items()},
        kept_all=total.share,
        bytes_written=written,
        warnings=tuple(warnings),
        lines=tuple(roles_text(job.book.roles)),
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Merge:
    """One call's work."""

    file: AdapterFile
    deltas: Deltas
    goals: Mapping[str, Goal]
    book: Book

    def write(
        self,
        root: str,
        files: list[str],
        target: str | os.PathLike[str],
        replace: bool,
        want: set[tuple[str, ...]],
    ) -> int:
        folder = Path(root)
        small = dict(side_files(root).files)
        for name in names(folder) if folder.is_dir() else ():
            if name.endswith(".index.json"):
                small[name] = read_all(folder / name, 1 << 29, what="an index", refuse=UsageError)
        size = sum((folder / name).stat().st_size for name in files)
        room = size + sum(map(len, small.values()))
        with Staging(target, size=room, count=len(files) + len(small) + 1, sources=[root, self.file.root],
                     replace=replace) as staging:  # fmt: skip
            for name in files:
                with open_source(folder / name) as source:
                    self._copy(source, read_header(source), staging)
            missing = sorted(want - self.book.done)
            if missing:
                raise AdapterError(
                    f"each of {len(want)} deltas applied", f"{len(want) - len(missing)}", tensor=missing[0][0],
                    sections=[("missing", (show(" ".join(key)) for key in missing))],
                    hint="the base holds no tensor for these; nothing was written",
                )  # fmt: skip
            for name, data in small.items():
                staging.add(name, data)
            staging.finish({"source": {name: (folder / name).stat().st_size for name in files}})
        return size

    def _copy(self, source: SourceFile, header: Header, staging: Staging) -> None:
        staging.create(source.name, source.size)
        _through(source, staging, 0, 8 + header.length)
        for tensor in placed(header):
            goal = self.goals.get(tensor.name)
            if goal is None:
                _through(source, staging, tensor.begin, tensor.end)
            elif isinstance(goal, str):
                self._replace(goal, tensor, staging, source.name)
            else:
                self._add(goal, tensor, source, staging)
        staging.seal(source.name)

    def _replace(self, goal: str, tensor: Placed, staging: Staging, file: str) -> None:
        """A whole tensor of the adapter (modules_to_save, a bias) in the base's dtype."""
        value = self.file.get(goal)
        if tuple(value.shape) != tensor.shape:
            raise AdapterError(
                f"shape {list(tensor.shape)} for {show(goal)}", f"{list(value.shape)}", tensor=goal
            )
        staging.write(file, tensor.begin, bytes_of(value.to(torch_dtype(tensor.dtype)).contiguous()))
        self.book.done.add((goal,))

    def _add(self, goal: Goal, tensor: Placed, source: SourceFile, staging: Staging) -> None:
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
                self.deltas.experts(goal, part, first, self.book)
            elif not isinstance(goal, str):
                self.deltas.plain(goal, part, self.book)
            staging.write(source.name, at, bytes_of(part))


def _through(source: SourceFile, staging: Staging, begin: int, end: int) -> None:
    for at in range(begin, end, PART):
        staging.write(source.name, at, source.pread(at, min(PART, end - at)))
