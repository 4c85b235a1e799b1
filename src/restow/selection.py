"""Which files of a folder are the checkpoint, and which only lie beside it.

An index says it, else model.safetensors is all, else every *.safetensors file together. Rejects folders that
hold two checkpoints, shards that are named or numbered and not there, folders that hold only pickles, and folders
that are not finished.
Nothing is opened here but the index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from restow import files
from restow.destination import PARTIAL
from restow.errors import (
    AmbiguousSourceError,
    CoverageError,
    IndexMismatchError,
    MissingShardError,
    RestowError,
    StrayShardError,
    UnsafePickleError,
    show,
)
from restow.index import SUFFIX, Index, read_index
from restow.journal import JOURNAL
from restow.limits import LIMITS, Limits
from restow.problems import Problem

SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors")
_CONVERT = (
    "convert it where its origin is trusted: torch.load(file, weights_only=True), then "
    "safetensors.torch.save_file; restow never unpickles weights"
)
_ABSENT = "check the path; restow fetches nothing: for a repository of the hub, hf download does, and prints the path"

_ASIDE = "an interrupted replacement set it aside as {}; the next run that writes there gives it back"


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to read, by name in `root`; `errors` are fatal and to be raised with those of the headers."""

    root: str
    files: tuple[str, ...]
    index: Index | None = None
    errors: tuple[RestowError, ...] = ()
    problems: tuple[Problem, ...] = ()


def select(path: str, limits: Limits = LIMITS) -> Selection:
    """Find the checkpoint at `path`: a folder or one file."""
    if not files.is_folder(path):
        return _one_file(path)
    judge_finished(path)
    names = files.names(path)
    found = [name for name in names if name.endswith(SUFFIX)]
    indexes = [name for name in names if name.endswith(_INDEX)]
    if indexes:
        return _indexed(path, found, indexes, limits)
    if not found:
        raise _nothing(path, names)
    if SINGLE in found:
        return _with_single(path, found)
    if ADAPTER in found and "adapter_config.json" in names:
        return Selection(
            path, (ADAPTER,), problems=_strays(path, [name for name in found if name != ADAPTER])
        )
    return Selection(path, tuple(found), errors=tuple(_unnumbered(path, found)))


def _one_file(path: str) -> Selection:
    if path.endswith(_PICKLES):
        raise UnsafePickleError("a safetensors file", "a pickle, which runs code", path=path, hint=_CONVERT)
    try:
        files.open_source(path, what="a folder or a safetensors file").close()
    except MissingShardError as error:
        if error.found == files.ABSENT:  # the caller's own word, not that of an index
            aside = Path(path).parent / f".{Path(path).name}.old"
            error.hint = _ASIDE.format(show(aside.name)) if aside.is_dir() else _ABSENT
        raise
    whole = Path(path)
    judge_finished(str(whole.parent))
    return Selection(str(whole.parent), (whole.name,))


def judge_finished(folder: str) -> None:
    """Raise for a folder that a writer was killed in, or works in: its files have their size, and not their bytes."""
    where = Path(folder)
    if (where / JOURNAL).is_file():
        found = f"one in the making: {JOURNAL} lies in it"
    elif os.path.realpath(folder).endswith(PARTIAL):
        found = f"one in the making: its name ends in {PARTIAL}"
    else:
        return
    hint = "run what wrote it again; if you know that it is whole, "
    hint += f"give it another name{' and remove that file' if JOURNAL in found else ''}"
    raise CoverageError("a finished checkpoint", found, path=folder, hint=hint)


def _indexed(root: str, found: list[str], indexes: list[str], limits: Limits) -> Selection:
    standard = SINGLE + ".index.json"
    if standard not in indexes and len(indexes) > 1:
        raise AmbiguousSourceError(
            "one index",
            f"{len(indexes)}",
            path=root,
            sections=[("indexes", map(show, indexes))],
            hint="move all but one away with their shards, or name one file",
        )
    index = read_index(str(Path(root) / (standard if standard in indexes else indexes[0])), limits)
    named = sorted(set(index.shards.values()))
    errors: list[RestowError] = []
    single = index.name.removesuffix(".index.json")
    if single in found and single not in named:
        raise AmbiguousSourceError(
            "one checkpoint",
            f"two: {single} and {index.name}, which does not name it",
            path=root,
            sections=[("found", [show(single), show(index.name)])],
            hint=f"remove {single}, or the index with its shards",
        )
    lost = [name for name in named if name not in found]
    if lost:
        errors.append(_missing(root, f"{len(named)} shards, as {index.name} says", named, lost, found))
    beside = [name for name in found if name not in named]
    ours = {_set(name) for name in named} - {None}
    misspelled = {name.casefold() for name in lost}  # told already
    unnamed = [name for name in beside if _set(name) in ours and name.casefold() not in misspelled]
    if unnamed:
        errors.append(
            IndexMismatchError(
                f"a line in {index.name} about every shard",
                f"none about {show(unnamed[0])}",
                path=Path(root) / unnamed[0],
                sections=[("unnamed", map(show, unnamed))],
                hint="download the index again, with its shards",
            )
        )
    strays = _strays(root, [name for name in beside if _set(name) not in ours])
    present = tuple(name for name in named if name in found)
    return Selection(root, present, index, tuple(errors), strays)


def _with_single(root: str, found: list[str]) -> Selection:
    others = [name for name in found if name != SINGLE]
    numbered = [name for name in others if (part := _set(name)) is not None and part[0] == "model"]
    if numbered:
        raise AmbiguousSourceError(
            "one checkpoint",
            f"two: {SINGLE} and {len(numbered)} shards",
            path=root,
            sections=[("found", map(show, [SINGLE, *numbered]))],
            hint="name the file that is meant, or remove the others",
        )
    return Selection(root, (SINGLE,), problems=_strays(root, others))


def _unnumbered(root: str, found: list[str]) -> Iterable[RestowError]:
    """What shards without an index miss, by their own numbers."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in found:
        part = _set(name)
        if part is not None and not part[0].startswith("shard-"):  # of a rank: cover tells what is missing
            sets.setdefault(part, []).append(name)
    counts = {stem: [count for other, count in sets if other == stem] for stem, _ in sets}
    for (stem, count), names in sets.items():
        if len(counts[stem]) > 1:
            lines = [f"{show(stem)} of {int(number)}" for number in counts[stem]]
            yield AmbiguousSourceError(
                "one set of shards",
                f"{len(lines)}",
                path=root,
                sections=[("sets", lines)],
                hint="remove the set that is left from an earlier save",
            )
            return
        if int(count) > 100_000 or int(count) == len(names):
            continue
        width = len(count)
        wanted = [f"{stem}-{i:0{width}}-of-{count}{SUFFIX}" for i in range(1, int(count) + 1)]
        lost = [name for name in wanted if name not in names]
        yield _missing(root, f"{int(count)} shards, as their names say", wanted, lost, found)


def _missing(
    root: str, expected: str, wanted: Collection[str], lost: list[str], found: Iterable[str]
) -> MissingShardError:
    cases = {name.casefold(): name for name in found}
    lines = [
        f"{show(name)} (only the case differs: {show(cases[name.casefold()])})"
        if name.casefold() in cases
        else show(name)
        for name in lost
    ]
    spelled = sum(name.casefold() in cases for name in lost)
    return MissingShardError(
        expected,
        f"{len(wanted) - len(lost)} of them",
        path=Path(root) / lost[0],
        sections=[("missing", lines)],
        hint="rename them as the index has them" if spelled == len(lost) else "download these shards",
    )


def _strays(root: str, names: list[str]) -> tuple[Problem, ...]:
    if not names:
        return ()
    error = StrayShardError(
        "only the files of the checkpoint",
        f"{len(names)} beside it",
        path=root,
        sections=[("not read", map(show, names))],
        hint="remove them if they are left from an earlier save",
    )
    return (Problem(error, False),)


def _nothing(root: str, names: list[str]) -> RestowError:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return UnsafePickleError(
            "safetensors files",
            "only pickles, which run code when they are read",
            path=root,
            sections=[("pickles", map(show, pickles))],
            hint=_CONVERT,
        )
    native = [name for name in names if name.endswith(".distcp")]
    if native:
        return UnsafePickleError(
            "safetensors files",
            "a Distributed Checkpoint in its own format, whose metadata is a pickle",
            path=root,
            sections=[("files", map(show, native))],
            hint="load it with torch.distributed.checkpoint where its origin is trusted, and save it with restow.dcp.Writer",
        )
    hint = "check the path; fetch the weights"
    if "snapshots" in names:
        hint = "this is a repository in the hub's cache: open the folder below its snapshots"
    return MissingShardError("safetensors files", "none in this folder", path=root, hint=hint)


def _set(name: str) -> tuple[str, str] | None:
    """The set that a numbered shard belongs to: what stands before its number, and of how many it is."""
    match = _NUMBERED.fullmatch(name)
    return (match[1], match[3]) if match else None
