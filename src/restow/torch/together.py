"""One save by all ranks: rank 0 makes the files, every rank fills its ranges, rank 0 publishes when all have reported.

What is written is planned alike everywhere and compared by digest before the first byte. Waiting is on a store's keys,
and whoever waits or writes sees within seconds that a rank failed; then nothing is published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from restow.destination import locate
from restow.errors import (
    DurabilityUncertainError,
    IntegrityError,
    PeerFailedError,
    PeerTimeoutError,
    RestowError,
)
from restow.landing import Wish
from restow.naming import Rename
from restow.outfiles import OutFile
from restow.pages import PagedWrites, Range, Write, all_spills, page_of, shared_pages
from restow.planning import plan_of
from restow.plans import Plan
from restow.prepare import Prepared, prepare
from restow.publish import Staging
from restow.sharing import Share, leave_witness, remove_witness, vanished
from restow.targets import Shard, Target, whole_target
from restow.torch.holdings import (
    Holding,
    check_filled,
    check_homes,
    check_words,
    heard,
    narrowed,
    owners,
    tied_anywhere,
    told,
    union_of,
)
from restow.torch.outline import Outline
from restow.torch.peers import Peers, machine
from restow.torch.read import Progress
from restow.torch.storage import Slot
from restow.torch.write import file_bytes, write_plan
from restow.torch.write_coded import check_blocks


@dataclass(frozen=True)
class Union:
    """What all ranks hold together: tensors by name, further names of one memory, the shard whose sizes these are."""

    tensors: Mapping[str, Target]
    tied: Mapping[str, str]
    shard: Shard | None


@dataclass(frozen=True)
class Job:
    """A save as one rank sees it. `lay_out` makes the files from what all hold; `still` raises if the state was written
    to since; the rest is the caller's words.
    """

    slots: Mapping[str, Slot]
    path: str | os.PathLike[str]
    lay_out: Callable[[Union], Outline]
    rename: Rename
    shard: Shard | None
    replace: bool
    page: int | None
    threads: int | None
    progress: Progress | None
    still: Callable[[], None]


@dataclass(frozen=True)
class Saved:
    """What came of it: the files, the bytes that this rank wrote, casts that lost precision, what to tell the user."""

    outline: Outline
    written: int
    narrowed: Mapping[str, str]
    notes: tuple[str, ...]


def save_together(job: Job, holding: Holding, peers: Peers) -> Saved:
    """Plan, agree, write, publish. Called inside `peers.attempt()`."""
    outline, plan, lost = (_agree if peers.rank == 0 else _follow_plan)(job, holding, peers)
    check_blocks(plan)
    written, notes = (_lead if peers.rank == 0 else _follow)(job, outline, plan, peers)
    return Saved(outline, written, lost, notes)


def _agree(job: Job, holding: Holding, peers: Peers) -> tuple[Outline, Plan, Mapping[str, str]]:
    """Rank 0: hear what all hold, lay out, prove that all is filled once, give every rank its share."""
    others = [heard(peers.hear("holds", rank)) for rank in range(1, peers.size)]
    everybody = [holding, *others]
    check_words(everybody)
    union = Union(union_of(everybody), tied_anywhere(everybody), job.shard)
    outline = job.lay_out(union)
    plain = {held.name for one in everybody for held in one.held if held.runs is None}
    prepared = _prepared(job, outline, union.tensors.values(), plain)
    check_homes(prepared, union.tied)
    check_filled(prepared)
    shares = owners(everybody, prepared)
    lost = narrowed(union.tensors.values(), prepared)
    table = [(target.name, target.shape, target.dtype) for target in union.tensors.values()]
    shard = (job.shard.axis, job.shard.rank, job.shard.of) if job.shard else None
    peers.say("union", json.dumps([table, union.tied, shard]))
    for rank in range(1, peers.size):
        peers.say(f"share of {rank}", json.dumps(shares[rank]))
    mine = outline.digest()
    for rank in range(1, peers.size):
        theirs = peers.hear("digest", rank)
        if theirs != mine:
            raise IntegrityError("the same files planned on every rank", f"others on rank {rank}")
    return outline, plan_of(prepared, _chosen(job, shares[0])), lost


def _follow_plan(job: Job, holding: Holding, peers: Peers) -> tuple[Outline, Plan, Mapping[str, str]]:
    """Every other rank: tell what is held here, plan the same files, and the share that rank 0 gives."""
    peers.say("holds", told(holding))
    table, tied, shard = json.loads(peers.hear("union", 0))
    tensors = {name: whole_target(name, shape, dtype) for name, shape, dtype in table}
    outline = job.lay_out(Union(tensors, tied, Shard(*shard) if shard else None))
    peers.say("digest", outline.digest())
    share = json.loads(peers.hear(f"share of {peers.rank}", 0))
    plain = {name for name, slot in job.slots.items() if slot.plain}
    prepared = _prepared(job, outline, [slot.target for slot in job.slots.values()], plain)
    lost = narrowed((slot.target for slot in job.slots.values()), prepared)
    return outline, plan_of(prepared, _chosen(job, share)), lost


def _prepared(job: Job, outline: Outline, targets: Iterable[Target], plain: Set[str]) -> Prepared:
    family = outline.checkpoint.family
    wish = Wish(family=family, rename=job.rename, shard=job.shard, plain=frozenset(plain), part=True)
    return prepare(outline.checkpoint, list(targets), wish)


def _chosen(job: Job, names: Sequence[str]) -> dict[str, Target]:
    return {name: job.slots[name].target for name in names}


def _lead(job: Job, outline: Outline, plan: Plan, peers: Peers) -> tuple[int, tuple[str, ...]]:
    """Rank 0: make the files, write its share, hear the others, publish."""
    sources = [outline.like] if outline.like else []
    with Staging(
        job.path, size=outline.size, count=outline.count, sources=sources, replace=job.replace
    ) as staging:
        folder = staging.place.staging
        for file in outline.files:
            staging.create(file.name, file.size)
        for name, data in outline.side.items():
            staging.add(name, data)
        page = 0
        if peers.size > 1:
            page = page_of(folder) if job.page is None else job.page
            token = sha256(os.urandom(16)).hexdigest()
            leave_witness(folder, token)
            peers.say("begin", json.dumps([token, str(folder), page]))
        written = sum(
            staging.write(file.name, tensor.begin, memoryview(outline.constants[tensor.name]))
            for file in outline.files
            for tensor in file.tensors
            if tensor.name in outline.constants
        )
        written += _fill(job, plan, staging.write, page, folder, peers, heads=outline.files)
        for rank in range(1, peers.size):
            for name, count in json.loads(peers.hear("written", rank)).items():
                staging.book(name, count)
        if peers.size > 1:
            remove_witness(folder)
        # A rank that was given up meanwhile, this one too, must not publish: the others have said that nobody did.
        staging.finish({"source": {"saved_by_ranks": peers.size}}, before=lambda: peers.watch("published"))
    peers.say("published", "yes")
    return written, staging.notes


def _follow(job: Job, outline: Outline, plan: Plan, peers: Peers) -> tuple[int, tuple[str, ...]]:
    """Every other rank: write its share into rank 0's files, sync, report, wait for the publication."""
    token, folder, page = json.loads(peers.hear("begin", 0))
    with Share(Path(folder), token, peers.rank, watch=lambda: peers.watch("begin")) as share:
        try:
            written = _fill(job, plan, share.write, page, Path(folder), peers)
            share.sync(between=lambda: peers.watch("written"))
        except RestowError as error:
            if vanished(error):
                peers.ask_why("written")
            raise
        peers.say("written", json.dumps(share.counts))
        try:
            peers.hear("published", 0)
        except (PeerFailedError, PeerTimeoutError) as error:
            if not share.published_as(locate(job.path).path):
                raise
            raise DurabilityUncertainError(
                "rank 0 to say that it published", "it gone, the new checkpoint complete and in place",
                path=job.path, rank=peers.rank, hint="a power cut may undo it; check the disk",
            ) from error  # fmt: skip
    return written, ()


def _fill(
    job: Job, plan: Plan, write: Write, page: int, folder: Path, peers: Peers, heads: Sequence[OutFile] = ()
) -> int:
    """Write this rank's share and, where pages matter, what other nodes have for its pages; the bytes of the share."""
    with PagedWrites(write, page, folder, peers.rank, machine()) as paged:
        if page:  # the gaps that a read would read through count as touched, too
            ranges = [
                *(Range(file.name, 0, len(file.head)) for file in heads),
                *(Range(*r) for r in plan.reads),
            ]
            paged.learn(peers.pool("pages", paged.told(ranges), shared_pages))
        for file in heads:
            paged.write(file.name, 0, memoryview(file.head))
        tensors = {name: slot.local for name, slot in job.slots.items()}
        written = write_plan(plan, tensors, paged.write, threads=job.threads, done=_watched(job, plan, peers))
        job.still()
        if page:
            paged.collect(peers.pool("edges", paged.spilled(), all_spills))
    return written


def _watched(job: Job, plan: Plan, peers: Peers) -> Callable[[int], None]:
    """Called with the bytes written: the bar moves, and a rank that failed ends the writing."""
    total = file_bytes(plan) if job.progress is not None else 0

    def done(count: int) -> None:
        peers.watch("written")
        if job.progress is not None:
            job.progress(count, total)

    return done
