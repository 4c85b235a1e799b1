"""`restow.load`: a checkpoint, or tensors in memory, into a model's own storage; and `restow.plan` for such a model.

Everything is judged and planned before the first byte is read. It raises what is missing or has no place, by name;
what it returns is a report of what was really done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist

from restow.checkpoint import Checkpoint, survey
from restow.entries import Entry, Piece
from restow.errors import IntegrityError, UsageError, show
from restow.family import Family
from restow.landing import Experts, Wish
from restow.layout import Layout
from restow.naming import Rename, check_rename, renamed
from restow.opening import family_of, open_checkpoint
from restow.pages import on_network
from restow.planning import make_plan, plan_of
from restow.plans import Plan
from restow.prepare import prepare, refuse
from restow.problems import Problem, merged
from restow.targets import Shard
from restow.torch.allowing import judge_missing, judge_narrowed, judge_unused
from restow.torch.check import check_load
from restow.torch.execute import execute
from restow.torch.load_report import LoadReport
from restow.torch.packed import fill_packed, packed_side
from restow.torch.read import Booked, Progress
from restow.torch.storage import Into, Slots, named_as, slot_of, slots_of
from restow.torch.team import Team
from restow.torch.values import judge_scales
from restow.wanted import default_targets

Source = str | os.PathLike[str] | Checkpoint | Mapping[str, torch.Tensor]


def as_checkpoint(source: Source, family: Family | None, layout: Layout | None = None) -> Checkpoint:
    """Any source as a `Checkpoint`: a path is opened, tensors are surveyed by their names and shapes."""
    if isinstance(source, Checkpoint):
        return source if family is None or source.family is family else replace(source, family=family)
    if isinstance(source, Mapping):
        return survey({name: _entry(name, t) for name, t in source.items()}, family=family, layout=layout)
    return open_checkpoint(source, family=family)


def _entry(name: str, tensor: object) -> Entry:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"a tensor as {show(name)}", type(tensor).__name__, tensor=name)
    slot = slot_of(name, tensor)
    box = tuple((0, n) for n in slot.target.shape)
    return Entry(slot.target.dtype, slot.target.shape, (Piece(box, "", 0, tensor.nbytes),))


def wish_of(
    slots: Slots,
    layout: str | Layout | None,
    family: Family | None,
    rename: Rename,
    shard: Shard | None,
    experts: Experts,
    part: bool,
) -> Wish:
    """The caller's words about a destination, with the names of its plain tensors."""
    plain = frozenset(name for name, slot in slots.slots.items() if slot.plain)
    return Wish(layout, family, rename, shard, experts, part, plain)


def plan(
    source: Source,
    into: Into | None = None,
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    rename: Rename = (),
    shard: Shard | None = None,
    experts: Experts = None,
    part: bool = False,
    strict: bool = False,
) -> Plan:
    """Plan a load without doing it: which bytes of which file go where. Reads headers only.

    `into=None` plans the tensors that the source has in `layout` ("grouped" if None), under renamed names, whole or by
    `shard`. Tensors of `into` may be meta tensors. What nothing fills is in `.missing`, what has no place in `.unused`.
    `strict` refuses whatever `open` finds wrong, also where none of these tensors is concerned.
    """
    known = family_of(family)
    opened = as_checkpoint(source, known)
    if strict:
        refuse(opened, strict)
    if into is None:
        check_rename(rename)
        wish = Wish(layout, known, rename, shard, experts, part)
        named = [(renamed(t.name, rename), t) for t in default_targets(opened, layout, wish)]
        targets = [target._replace(name=name) for name, target in named if name is not None]
        names = frozenset(target.name for target in targets)
        return make_plan(opened, targets, replace(wish, layout=layout or "grouped", plain=names))
    slots = slots_of(into, meta=True)
    wish = wish_of(slots, layout, known, rename, shard, experts, part)
    packed = packed_side(opened, slots.slots, wish)
    if packed is not None:
        return plan_of(packed.prepared, packed.prepared.targets)
    return make_plan(opened, [slot.target for slot in slots.slots.values()], wish)


def load(
    source: Source,
    into: Into,
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    rename: Rename = (),
    shard: Shard | None = None,
    experts: Experts = None,
    part: bool = False,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    allow_narrowed: Sequence[str] = (),
    threads: int | None = None,
    group: dist.ProcessGroup | None = None,
    network: bool | None = None,
    progress: Progress | bool | None = None,
    strict: bool = False,
    check: bool = False,
) -> LoadReport:
    """Fill `into` from `source`, in place. Nothing is replaced, nothing is communicated, nothing is left unsaid.

    `source`: a folder, a file, a `Checkpoint`, or a mapping of names to tensors. `into`: an `nn.Module`, a list of
    them, or a mapping of names to tensors or DTensors; casts to its dtypes, and encodes where it holds codes and their
    scales (FP8 in blocks, MXFP8, MXFP4, NF4). `layout` is the destination's, found from
    names and shapes if None. Raises before the first byte: `MissingTensorError`, `UnexpectedTensorError` (see
    `allow_missing`, `allow_unused`: `fnmatch` patterns over full names), `ShapeMismatchError`, `PrecisionError`
    (a cast that narrows an exact row) and `DtypeMismatchError` (one between integers and floats) unless `allow_narrowed`
    names it, `AmbiguousLayoutError`, and what `open` finds fatal.

    With `group`, all of whose ranks must call, the first rank of a machine reads the headers for it, and what several
    ranks hold alike is read by one of them and handed on; an error of one is raised on all (`PeerFailedError`).
    `check` reads the files once more and proves by fingerprints that memory holds what they hold; `strict` does, too, and
    refuses all that would only be told, oddities of the values included: these are known once the model is written.
    `network` says whether the files lie on a network file system, where reads are few and large; its type does if None.
    """
    words = _Words(layout, family, rename, shard, experts, part, allow_missing, allow_unused,
                   allow_narrowed, threads, network, progress, strict, check)  # fmt: skip
    if group is None:
        return _load(source, into, words, None)
    team = Team(group)
    with team.attempt():
        return _load(source, into, words, team)


class _Words(NamedTuple):
    """The caller's words to `load`."""

    layout: str | Layout | None
    family: str | Family | None
    rename: Rename
    shard: Shard | None
    experts: Experts
    part: bool
    allow_missing: Sequence[str]
    allow_unused: Sequence[str]
    allow_narrowed: Sequence[str]
    threads: int | None
    network: bool | None
    progress: Progress | bool | None
    strict: bool
    check: bool


def _load(source: Source, into: Into, words: _Words, team: Team | None) -> LoadReport:
    started = time.perf_counter()
    known = family_of(words.family)
    check_rename(words.rename)
    if team is not None and isinstance(source, str | os.PathLike):
        opened = team.opened(source, known)
    else:
        opened = as_checkpoint(source, known)
    threads = words.threads if words.threads is not None or team is None else min(8, team.threads)
    slots = named_as(slots_of(into), _known_to(opened, known, words.rename))
    wish = wish_of(slots, words.layout, known, *words[2:6])
    packed = packed_side(opened, slots.slots, wish)
    if packed is not None and words.check:
        raise UsageError("check=True with a destination of values", "one in codes")
    if packed is not None and team is not None:
        raise UsageError("group= with a destination of values", "one in codes")
    if packed is not None:
        made = plan_of(packed.prepared, packed.prepared.targets)
    else:
        made = make_plan(opened, [slot.target for slot in slots.slots.values()], wish)
    missing = judge_missing(made, opened, words.allow_missing)
    unused = judge_unused(made, slots, opened, wish, words.allow_unused)
    narrowed = judge_narrowed(made, opened, words.allow_narrowed)
    if words.strict:
        refuse(opened, True)
    warnings = [
        str(problem.error) for problem in opened.problems
    ]  # fatal ones, too, that concern nothing here
    scales = judge_scales(opened, threads) if opened.codec is not None and opened.path is not None else ()
    if refused := [problem.error for problem in scales if problem.fatal or words.strict]:
        raise merged(refused)
    warnings += [str(problem.error) for problem in scales]
    tied = [name for name in made.unused if name in slots.aliases]
    if tied:
        names = ", ".join(map(show, tied))
        warnings.append(f"tied in the destination, so the source's own values were not read: {names}")
    if slots.buffers:
        warnings.append(
            f"not filled, since no checkpoint holds them: buffers {', '.join(slots.buffers[:20])}"
        )
    memory = source if isinstance(source, Mapping) else None
    targets = {target.name: target for target in made.targets}
    tensors = {name: slot.local for name, slot in slots.slots.items()}
    mine = plan_of(packed.prepared, packed.plain(targets)) if packed is not None else made
    if team is not None:
        mine = team.assigned(made, tensors)
    booked = execute(
        mine,
        tensors,
        root=opened.path,
        memory=memory,
        stamps=opened.stamps,
        threads=threads,
        large=_on_network(opened) if words.network is None else words.network,
        progress=_bar() if words.progress is True else (words.progress or None),
    )
    taken = team.hand_on(made, tensors) if team is not None else 0
    filled = {made.targets[copy.target].name for copy in made.copies}
    staged: dict[str, str] = {}
    if packed is not None:
        read, written = fill_packed(packed, targets, slots.slots, memory=memory, threads=threads)
        booked = Booked(booked.bytes_read + read, booked.bytes_written + written)
        given = _given(made)
        for name, one in packed.weights.items():
            if name in filled:
                staged |= dict.fromkeys((one.codes, one.scale), f"encoded in {one.codec.name}")
                narrowed[one.codes] = f"{given[name]} -> {one.codec.name}"
        staged |= {name: staged[codes] for name, (codes, _) in packed.constants.items() if codes in staged}
        filled -= packed.weights.keys()
    if words.check or (words.strict and packed is None):
        told = _checked(opened, slots, wish, made, memory, threads, words.check)
        if words.strict and told:
            raise merged([problem.error for problem in told])
        warnings += [str(problem.error) for problem in told]
    return LoadReport(
        bytes_read=booked.bytes_read,
        bytes_written=booked.bytes_written + taken,
        in_place=tuple(name for name in slots.slots if name in filled),
        staged=MappingProxyType(staged),
        narrowed=MappingProxyType(narrowed),
        unused=unused,
        missing=missing,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
        modules=made.layouts,
        bytes_taken=taken,
    )


def _on_network(opened: Checkpoint) -> bool:
    return opened.path is not None and on_network(Path(opened.path))


def _given(made: Plan) -> dict[str, str]:
    """What fills each target: its dtype, or its codec."""
    found = {}
    for copy in made.copies:
        part = made.parts[copy.source]
        what = made.codings[part.coding].codec if part.coding >= 0 else part.dtype
        found[made.targets[copy.target].name] = what
    return found


def _known_to(opened: Checkpoint, family: Family | None, rename: Rename) -> Callable[[str], bool]:
    """Whether a source holds a tensor for a name of the destination; for an expert weight, a module of experts."""
    kin = family or opened.family
    places = (
        {kin.place(to) for path in opened.modules if (to := renamed(path, rename)) is not None}
        if kin
        else set()
    )
    names = {to for name in opened.others if (to := renamed(name, rename)) is not None}
    canonical = {kin.canonical(name) for name in names} if kin is not None else set()

    def known(name: str) -> bool:
        if name in names:
            return True
        if kin is None:
            return False
        if kin.canonical(name) in canonical:
            return True
        above = [name[:at] for at, char in enumerate(name) if char == "."]
        return any(kin.place(path) in places for path in above)

    return known


def _checked(
    opened: Checkpoint,
    slots: Slots,
    wish: Wish,
    made: Plan,
    memory: Mapping[str, torch.Tensor] | None,
    threads: int | None,
    proof: bool,
) -> Sequence[Problem]:
    """Prove a load by a second read; what the values show, and, where a `proof` is asked for, what has none."""
    prepared = prepare(opened, [slot.target for slot in slots.slots.values()], wish)
    tensors = {name: slot.local for name, slot in slots.slots.items()}
    skipped, told = check_load(prepared, {t.name: t for t in made.targets}, tensors, memory, threads)
    fatal = [problem.error for problem in told if problem.fatal]
    if fatal:
        raise merged(fatal)
    if skipped and proof:
        found = f"{len(skipped)} that were decoded on the way, such as {show(skipped[0])}"
        told = (*told, Problem(IntegrityError("tensors that can be compared with the files", found), False))
    return told


def _bar() -> Progress:
    from restow.progress import bar

    return bar("loading")
