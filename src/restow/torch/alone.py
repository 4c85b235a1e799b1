"""One checkpoint by itself: against its manifest, and what numbers may be. The half of `verify` that has no other side.

Data is read once, in the order of the files, and hashed and looked at by another thread while the next chunk is read.
Rejected are inputs that cannot be read, and scales without a value; what is only odd is told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash

from restow import manifest
from restow.checkpoint import Checkpoint
from restow.landing import Wish
from restow.located import located
from restow.outfiles import nbytes
from restow.prepare import Prepared
from restow.problems import merged
from restow.targets import whole_target
from restow.torch.chunks import Filled, stream
from restow.torch.digests import leaf_differences
from restow.torch.raw import raw
from restow.torch.read import Progress
from restow.torch.values import Tie, values_of
from restow.torch.verify_report import Difference, VerifyReport, chosen, sampled

PART = 32 << 20  # bytes of one of the two buffers


def judge_alone(
    checkpoint: Checkpoint,
    sample: float | None,
    threads: int | None,
    progress: Progress | None,
    strict: bool,
    started: float,
) -> VerifyReport:
    """One checkpoint against its manifest, its headers and what numbers may be."""
    known = checkpoint.family is not None  # what only a family could settle does not make a file unreadable
    fatal = [p.error for p in checkpoint.problems if p.fatal and known]
    if fatal:
        raise merged(fatal)
    folder = Path(checkpoint.path) if checkpoint.path and Path(checkpoint.path).is_dir() else None
    record = manifest.read(folder) if folder else None
    recorded = record.get("tensors") if record else None
    digests = recorded if isinstance(recorded, dict) and sample is None else None
    found: list[Difference] = []
    if folder and record:
        found += _files(folder, record, threads)
    if digests is not None:
        names = set(digests) ^ set(checkpoint.tensors)
        found += [
            Difference("missing" if n in digests else "extra", n, why="by the manifest")
            for n in sorted(names)
        ]
    targets = {n: whole_target(n, e.shape, e.dtype) for n, e in checkpoint.tensors.items()}
    own = Prepared(checkpoint, targets, Wish(), {}, {}, {}, {name: name for name in targets})
    hashes: dict[str, xxhash.xxh3_128] = {}
    values, tie = values_of(checkpoint), Tie(checkpoint)

    def look(filled: Sequence[Filled]) -> None:
        for one in filled:
            values.look(one)
            tie.look(one)
            if digests is not None:
                hashes.setdefault(one.slice.target.name, xxhash.xxh3_128()).update(raw(one.tensor))

    total = sum(nbytes(target.dtype, target.shape) for target in targets.values())
    show_progress = (lambda done: progress(done, total)) if progress is not None else None
    parts = chosen(checkpoint, own, targets, sample)
    read = stream(own, parts, look, threads=threads, progress=show_progress, chunk=PART)
    if digests is not None:
        wrong = [n for n, h in hashes.items() if digests.get(n, h.hexdigest()) != h.hexdigest()]
        found += [
            _placed(checkpoint, one) for one in leaf_differences(checkpoint, record or {}, wrong, threads)
        ]
    seen = (*values.problems(), *(tie.problems() if sample is None else ()))
    problems = (*(located(p, checkpoint, checkpoint.path or "") for p in seen), *checkpoint.problems)
    refused = [p.error for p in problems if (strict or p.fatal) and p not in checkpoint.problems]
    refused += [p.error for p in checkpoint.problems if strict]
    if refused:
        raise merged(refused)
    checked = (
        "; compared with its manifest"
        if digests is not None
        else "; no manifest: headers, cover and values were checked"
    )
    return VerifyReport(
        equal=not found,
        differences=tuple(found),
        tensors=len(targets),
        bytes_read=read,
        notes=(),
        warnings=tuple(str(p.error) for p in problems),
        sampled=sampled(sample) + checked,
        seconds=time.perf_counter() - started,
        problems=problems,
    )


def _placed(checkpoint: Checkpoint, difference: Difference) -> Difference:
    """A difference with the file that the tensor lies in."""
    files = ", ".join(dict.fromkeys(piece.file for piece in checkpoint.tensors[difference.name].pieces))
    return replace(difference, why=f"{difference.why}; in {files}")


def _files(folder: Path, record: Mapping[str, object], threads: int | None) -> Iterator[Difference]:
    """The files that a manifest lists against those that are there: by size, and by digest where it has one."""
    files = record["files"]
    assert isinstance(files, dict)
    asked: list[tuple[str, str]] = []
    for name, entry in files.items():
        path = folder / name
        facts = entry if isinstance(entry, dict) else {}
        if not path.is_file():
            yield Difference("missing", name, why="by the manifest")
        elif path.stat().st_size != facts.get("size"):
            why = f"{facts.get('size')} bytes by the manifest, {path.stat().st_size} here"
            yield Difference("digest", name, why=why)
        elif "sha256" in facts:
            asked.append((name, facts["sha256"]))
    with ThreadPoolExecutor(threads or 4) as pool:
        for (name, wanted), got in zip(
            asked, pool.map(lambda one: _sha256(folder / one[0]), asked), strict=True
        ):
            if got != wanted:
                yield Difference("digest", name, why="other bytes than its manifest recorded (sha256)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
