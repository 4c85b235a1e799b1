"""`restow.save`: a sharded model to files that anyone can load; every rank writes its own bytes, nothing is gathered.

What the files will hold is laid out first, on every rank alike; the plan that would load this model from them is then run
the other way. Rank 0 makes the files and publishes; ranks agree on a store before the first byte and report after the
last. It rejects state that has no place in the files, files that no rank fills, and what `publish` rejects.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from restow import writing
from restow.boxes import overlap
from restow.errors import (
    CoverageError,
    IntegrityError,
    MissingTensorError,
    PrecisionError,
    RestowError,
    UnexpectedTensorError,
    UsageError,
    show,
)
from restow.family import Family
from restow.landing import Wish
from restow.layout import Layout
from restow.naming import Rename
from restow.opening import family_of, open_checkpoint
from restow.pages import PagedWrites, page_of
from restow.planning import Prepared, plan_of, prepare
from restow.publish import Staging
from restow.targets import Shard, Target
from restow.torch.dtypes import dtype_name, narrows
from restow.torch.outline import Outline, like_outline, new_outline
from restow.torch.peers import Peers
from restow.torch.read import Progress
from restow.torch.storage import Into, Slot, slot_of, tensors_of
from restow.torch.write import write_plan


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did. Sizes are in bytes; `bytes_written` is this rank's own, `bytes_total` all ranks'.

    `narrowed` maps a tensor of the state to the cast that lost precision in the files.
    """

    path: str
    files: int
    tensors: int
    bytes_written: int
    bytes_total: int
    narrowed: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes_total / self.seconds / 1e9 if self.seconds else 0.0
        text = (
            f"saved {self.tensors:,} tensors in {self.files} files at {show(self.path)}: {self.bytes_total:,} bytes, "
            f"{self.bytes_written:,} of them from here, {self.seconds:.2f} s ({rate:.2f} GB/s)"
        )
        if self.narrowed:
            name, cast = next(iter(self.narrowed.items()))
            text += f"\n  narrowed {len(self.narrowed)} tensors, such as {show(name)}: {cast}"
        return "\n".join([text, *(f"  {note}" for note in self.notes)])


class SaveHandle:
    """A save that goes on while its caller trains: the state was copied before `save` returned."""

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self.buffers = buffers  # give the handle to the next save (reuse=) and it copies into these again
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def staged(self) -> bool:
        """Whether the state was copied, so that it may be changed; true once `save` has returned."""
        return True

    def result(self, timeout: float | None = None) -> SaveReport:
        """The report, once published; raises what the save raised, `TimeoutError` after `timeout` seconds."""
        assert self._thread is not None
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the save was not done after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report


def save(
    state: Into,
    path: str | os.PathLike[str],
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    like: str | os.PathLike[str] | None = None,
    rename: Rename = (),
    shard: Shard | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    replace: bool = False,
    group: dist.ProcessGroup | None = None,
    wait: bool = True,
    reuse: SaveHandle | None = None,
    page_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SaveReport | SaveHandle:
    """Write `state` (a module, a list of them, or names to tensors and DTensors) to a Hugging Face folder.

    `like` is a checkpoint whose layout, names, file map, headers, dtypes and side files are reproduced; without it the
    layout is `layout`, else what the family's vendor ships. `rename` is what a load from these files takes, applied
    backwards. `dtype` is that of the files' floating tensors, rows that must stay exact apart; without `like` and
    `dtype` it is the state's. Ranks that hold the same part write it once. `wait=False` copies the state to host memory
    and returns a `SaveHandle`; `reuse` is an earlier handle whose buffers are taken again. `page_bytes` is the unit of a
    file that only one node may write, by the file system's type if None (0: none).

    Raises on every rank if any rank fails (`PeerFailedError` there); then the old checkpoint is as it was.
    """
    if like is not None and (layout is not None or dtype is not None):
        raise UsageError("like= alone", "layout= or dtype= with it")
    slots = _slots(state)
    sharded = shard is not None or any(not slot.plain for slot in slots.values())
    peers = Peers(group, alone=not sharded and group is None)
    words = _Words(layout, family_of(family), like, rename, shard, dtype, max_shard_bytes, state, page_bytes)
    if wait:
        return _save(slots, path, words, peers, replace, threads, progress)
    buffers = _copied(slots, reuse.buffers if reuse is not None else {})
    handle = SaveHandle(buffers)
    own = {name: slot._replace(local=buffers[name]) for name, slot in slots.items()}

    def run() -> None:
        try:
            handle._report = _save(own, path, words, peers, replace, threads, progress)
        except BaseException as error:
            handle._error = error

    handle._thread = threading.Thread(target=run, daemon=False)
    handle._thread.start()
    return handle


@dataclass(frozen=True)
class _Words:
    """What the caller said."""

    layout: str | Layout | None
    family: Family | None
    like: str | os.PathLike[str] | None
    rename: Rename
    shard: Shard | None
    dtype: torch.dtype | None
    limit: int
    state: Into
    page: int | None


def _slots(state: Into) -> dict[str, Slot]:
    """Every tensor that is saved, further names of the same memory included."""
    return {name: slot_of(name, tensor) for name, tensor, kept in tensors_of(state) if kept}


def _copied(slots: Mapping[str, Slot], old: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The local parts in host memory, in the buffers of an earlier save where they fit."""
    out = {}
    for name, slot in slots.items():
        kept = old.get(name)
        if kept is None or kept.shape != slot.local.shape or kept.dtype != slot.local.dtype:
            kept = torch.empty(slot.local.shape, dtype=slot.local.dtype, pin_memory=slot.local.is_cuda)
        out[name] = kept.copy_(slot.local)
    return out


def _save(
    slots: Mapping[str, Slot],
    path: str | os.PathLike[str],
    words: _Words,
    peers: Peers,
    replace: bool,
    threads: int | None,
    progress: Progress | None,
) -> SaveReport:
    started = time.perf_counter()
    with peers.attempt():
        mine = _describe(slots, words.shard, path)
        everybody = [json.loads(text) for text in peers.hear_all("holds", mine)]
        outline = _outline(slots, everybody, words)
        prepared = _prepare(outline, slots, words)
        owned = _owned(everybody, peers.rank)
        _cover(outline, everybody, prepared)
        plan = plan_of(prepared, {n: t for n, t in prepared.targets.items() if n in owned})
        digests = peers.hear_all("agrees", outline.digest())
        if len(set(digests)) != 1:
            odd = next(rank for rank, text in enumerate(digests) if text != digests[0])
            raise IntegrityError(
                "the same files planned on every rank", f"others on rank {odd}", rank=peers.rank
            )
        if peers.rank == 0:
            return _lead(outline, plan, slots, peers, path, replace, words.page, threads, progress, started)
        return _follow(outline, plan, slots, peers, path, threads, started)


def _tied(slots: Mapping[str, Slot]) -> dict[str, str]:
    """Further names of one memory -> its first name."""
    first: dict[object, str] = {}
    found = {}
    for name, slot in slots.items():
        if not slot.local.numel():
            continue
        memory = slot.local.data_ptr(), tuple(slot.local.shape), slot.local.stride()
        if first.setdefault(memory, name) != name:
            found[name] = first[memory]
    return found


def _describe(slots: Mapping[str, Slot], shard: Shard | None, path: object) -> str:
    held = [(name, slot.target.shape, slot.target.dtype, slot.target.runs) for name, slot in slots.items()]
    tied = list(_tied(slots))
    cut = [shard.axis, shard.rank, shard.of] if shard is not None else None
    return json.dumps({"held": held, "tied": tied, "shard": cut, "path": os.fspath(path)})  # type: ignore[call-overload]


def _outline(slots: Mapping[str, Slot], everybody: Sequence[Any], words: _Words) -> Outline:
    if words.like is not None:
        return like_outline(open_checkpoint(words.like, family=words.family))
    union: dict[str, Target] = {}
    for rank in everybody:
        tied = set(rank["tied"])
        for name, shape, dtype, _ in rank["held"]:
            if name in tied:
                continue  # written once, under its first name: readers tie it as the model does
            union.setdefault(name, Target(name, tuple(shape), dtype, tuple(((0, n),) for n in shape)))
    parts = [tuple(rank["shard"]) for rank in everybody if rank["shard"]]
    name = dtype_name(words.dtype) if words.dtype is not None else None
    return new_outline(
        union, words.layout, words.family, words.rename, parts, name, words.limit, _config(words.state)
    )


def _config(state: Into) -> bytes | None:
    """The config of a transformers model, as it would write it itself."""
    config = getattr(state, "config", None)
    text = getattr(config, "to_json_string", None)
    return text().encode() if callable(text) else None


def _prepare(outline: Outline, slots: Mapping[str, Slot], words: _Words) -> Prepared:
    plain = frozenset(name for name, slot in slots.items() if slot.plain)
    wish = Wish(family=outline.checkpoint.family, rename=words.rename, shard=words.shard, plain=plain)
    prepared = prepare(outline.checkpoint, [slot.target for slot in slots.values()], wish)
    tied = _tied(slots)
    homeless = [name for name in prepared.missing if tied.get(name, name) in prepared.missing]
    if homeless:
        raise UnexpectedTensorError(
            "a place in the files for every tensor of the state",
            f"{len(homeless)} without one",
            tensor=homeless[0],
            sections=[("no place", map(show, homeless))],
            hint="rename= says how names differ; leave out of the state what is not to be saved",
        )
    return prepared


def _owned(everybody: Sequence[Any], rank: int) -> set[str]:
    """The tensors whose part on this rank is written by it: of ranks that hold the same part, one, taken in turn."""
    holders: dict[str, dict[str, list[int]]] = {}
    for number, one in enumerate(everybody):
        for name, _, _, runs in one["held"]:
            cut = f"{runs}{one['shard']}"
            holders.setdefault(name, {}).setdefault(cut, []).append(number)
    owned = set()
    for turn, (name, cuts) in enumerate(holders.items()):
        for ranks in cuts.values():
            if ranks[turn % len(ranks)] == rank:
                owned.add(name)
    return owned


def _cover(outline: Outline, everybody: Sequence[Any], prepared: Prepared) -> None:
    """Every tensor of the files is filled by somebody, whole, and no element by two."""
    held: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {}
    for one in everybody:
        for name, shape, _, runs in one["held"]:
            held.setdefault(name, {})[f"{runs}{one['shard']}"] = (tuple(shape), runs)
    for name, cuts in held.items():
        if any(one["shard"] for one in everybody):
            continue  # plain parts: their runs follow from the layout, and are proved where they are planned
        shape = next(iter(cuts.values()))[0]
        boxes = [box for _, runs in cuts.values() for box in _boxes(runs)]
        volume = sum(prod(length for _, length in box) for box in boxes)
        if volume != prod(shape) or overlap(boxes) is not None:
            raise CoverageError(
                f"every element of {show(name)} on some rank, once",
                f"{volume} of {prod(shape)} held"
                if volume != prod(shape)
                else "two ranks with overlapping parts",
                tensor=name,
                sections=[("tensor", [show(name)])],
                hint="ranks that hold the same part must hold exactly the same",
            )
    names = {name for one in everybody for name, *_ in one["held"]}
    filled = outline.filled(names, prepared)
    lost = [name for name in outline.checkpoint.tensors if name not in filled]
    if lost:
        raise MissingTensorError(
            "a tensor of the state for every tensor of the files",
            f"{len(lost)} that no rank holds",
            tensor=lost[0],
            sections=[("missing", map(show, lost))],
            hint="rename= says how names differ; like= must be a checkpoint of this very model",
        )


def _boxes(runs: Any) -> list[tuple[tuple[int, int], ...]]:
    from itertools import product

    return [tuple((start, length) for start, length in choice) for choice in product(*runs)]


def _narrowed(outline: Outline, plan: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for copy in plan.copies:
        part, target = plan.parts[copy.source], plan.targets[copy.target]
        if target.name in found or not narrows(target.dtype, part.dtype):
            continue
        row = outline.checkpoint.routers.get(part.name)
        if row is not None and row.exact:
            raise PrecisionError(
                f"{show(part.name)} in {target.dtype}, as the state has it", part.dtype, tensor=part.name,
                sections=[("tensor", [show(part.name)]), ("row", [str(row)])],
                hint="keep it in its precision in the files: its family selects experts by it",
            )  # fmt: skip
        found[target.name] = f"{target.dtype} -> {part.dtype}"
    return found


def _lead(
    outline: Outline,
    plan: Any,
    slots: Mapping[str, Slot],
    peers: Peers,
    path: str | os.PathLike[str],
    replace: bool,
    page: int | None,
    threads: int | None,
    progress: Progress | None,
    started: float,
) -> SaveReport:
    """Rank 0: make the files, write its share, hear the others, publish."""
    narrowed = _narrowed(outline, plan)
    size = sum(file.size for file in outline.files) + sum(map(len, outline.side.values()))
    sources = [outline.like] if outline.like else []
    count = len(outline.files) + len(outline.side) + 1
    with Staging(path, size=size, count=count, sources=sources, replace=replace) as staging:
        token = sha256(os.urandom(16)).hexdigest()
        if page is None:
            page = page_of(staging.place.staging) if peers.size > 1 else 0
        paged = PagedWrites(staging.write, page)
        for file in outline.files:
            staging.create(file.name, file.size)
            paged.write(file.name, 0, memoryview(file.head))
        for name, data in outline.side.items():
            staging.add(name, data)
        witness = staging.place.staging / ".witness"
        fd = writing.create(witness)
        writing.pwrite_all(fd, memoryview(token.encode()), 0)
        writing.close(fd)
        peers.say("begin", json.dumps({"token": token, "staging": str(staging.place.staging), "page": page}))
        total = sum(file.size - len(file.head) for file in outline.files)
        written = write_plan(
            plan,
            {name: slots[name].local for name in slots},
            paged.write,
            threads=threads,
            done=(lambda n: progress(n, total)) if progress else None,
        )
        paged.settle(peers.rank, socket.gethostname(), peers.hear_all)
        reports = [json.loads(peers.hear("written", rank)) for rank in range(1, peers.size)]
        for report in reports:
            for name, n in report.items():
                staging.book(name, n)
        writing.unlink(witness)
        staging.finish({"source": {"saved_by_ranks": peers.size}})
        notes = staging.notes
    peers.say("published", "yes")
    return SaveReport(
        path=os.fspath(path),
        files=len(outline.files),
        tensors=len(outline.checkpoint.tensors),
        bytes_written=written,
        bytes_total=total,
        narrowed=narrowed,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _follow(
    outline: Outline,
    plan: Any,
    slots: Mapping[str, Slot],
    peers: Peers,
    path: str | os.PathLike[str],
    threads: int | None,
    started: float,
) -> SaveReport:
    """Every other rank: write its share into rank 0's files, sync, report, wait for the publication."""
    narrowed = _narrowed(outline, plan)
    begin = json.loads(peers.hear("begin", 0))
    staging = Path(begin["staging"])
    _same_disk(staging / ".witness", begin["token"], peers.rank)
    files: dict[str, int] = {}
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def write(name: str, offset: int, data: memoryview) -> int:
        with lock:
            if name not in files:
                with writing.failures("open", staging / name):
                    files[name] = writing.reopen(staging / name)
            fd = files[name]
            counts[name] = counts.get(name, 0) + len(data)
        with writing.failures("write", staging / name, len(data)):
            writing.pwrite_all(fd, data, offset)
        return len(data)

    try:
        paged = PagedWrites(write, begin["page"])
        written = write_plan(plan, {name: slots[name].local for name in slots}, paged.write, threads=threads)
        paged.settle(peers.rank, socket.gethostname(), peers.hear_all)
        for name, fd in files.items():
            with writing.failures("sync", staging / name):
                writing.fsync(fd)
    finally:
        for fd in files.values():
            writing.close(fd)
    peers.say("written", json.dumps(counts))
    peers.hear("published", 0)
    return SaveReport(
        path=os.fspath(path),
        files=len(outline.files),
        tensors=len(outline.checkpoint.tensors),
        bytes_written=written,
        bytes_total=sum(file.size - len(file.head) for file in outline.files),
        narrowed=narrowed,
        notes=(),
        seconds=time.perf_counter() - started,
    )


def _same_disk(witness: Path, token: str, rank: int) -> None:
    """Every rank must see what rank 0 wrote; network file systems may take a moment to show it."""
    until = time.monotonic() + 10
    while True:
        try:
            if witness.read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise RestowError(
                "the staging folder of rank 0 on every rank", "another disk", path=witness.parent, rank=rank,
                hint="save to a file system that all ranks share",
            )  # fmt: skip
        time.sleep(0.05)
