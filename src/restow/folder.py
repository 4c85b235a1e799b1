"""A checkpoint as it lies on disk: its headers, index and config read and judged, no data touched.

`open_folder` reads everything in one pass and tells everything that it found: fatal findings in one error,
the others in `problems`. It rejects what `selection`, `index`, `header` and `shards` reject, and a tensor
that lies in two files, and a folder that is replaced again and again while it is read.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from restow.configfile import read_config
from restow.errors import AmbiguousTensorError, CoverageError, IntegrityError, RestowError
from restow.faults import listed
from restow.files import open_source
from restow.header import Header, read_header
from restow.index import compare
from restow.limits import LIMITS, Limits
from restow.problems import Problem, merged
from restow.selection import Selection, select
from restow.shards import Offsets, saved_offsets, whole
from restow.tensors import Sharded, Tensors


@dataclass(frozen=True, slots=True)
class Folder:
    """What a checkpoint holds; `headers` by the files' names, `tensors` in the order of the headers."""

    root: str
    headers: tuple[Header, ...]
    tensors: Tensors
    problems: tuple[Problem, ...]
    index: str | None  # file name of the index
    index_metadata: Mapping[str, Any]
    _config: Mapping[str, Any] | RestowError | None = field(repr=False)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The parsed config.json, None if there is none; raises `ConfigError` if it cannot be read."""
        if isinstance(self._config, RestowError):
            raise self._config
        return self._config

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """The metadata of every file."""
        return {header.file: header.metadata for header in self.headers}

    def path(self, file: str) -> str:
        """The path of a file that a `Piece` names."""
        return str(Path(self.root) / file)


def open_folder(
    path: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    limits: Limits = LIMITS,
) -> Folder:
    """Read the headers of the checkpoint at `path` and check that they are one checkpoint.

    `shapes` gives whole shapes of sharded tensors where they are known: files written rank by rank do not say
    that the last rank is missing. Where another folder takes the name meanwhile, it starts over, once.
    """
    for _ in range(2):
        before = _identity(path)
        try:
            found = _read(path, shapes, limits)
        except RestowError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found
    raise IntegrityError(
        "a folder that keeps its name while its headers are read",
        "another one there, twice",
        path=path,
        hint="run again once nobody replaces the checkpoint",
    )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return None
    return status.st_dev, status.st_ino


def _read(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]], limits: Limits) -> Folder:
    """One pass over index, headers and config."""
    chosen = select(os.fspath(path), limits)
    errors = list(chosen.errors)
    problems = list(chosen.problems)
    headers: list[Header] = []
    unread = set(chosen.index.shards.values()) - set(chosen.files) if chosen.index else set()
    for name in chosen.files:
        try:
            with open_source(Path(chosen.root) / name) as source:
                header = read_header(source, limits)
        except RestowError as error:
            errors.append(error)
            unread.add(name)
        else:
            headers.append(header)
            problems += header.problems
    rows, several = _rows(headers)
    doubled, sharded = _sharded(headers, several, shapes, chosen.root, limits, errors)
    if chosen.index is not None:
        fatal, odd = compare(chosen.index, headers, unread, doubled)
        errors += fatal
        problems += odd
    if errors:
        raise merged(errors)
    return Folder(
        chosen.root,
        tuple(headers),
        Tensors(headers, rows, sharded),
        tuple(problems),
        chosen.index.name if chosen.index else None,
        MappingProxyType(dict(chosen.index.metadata) if chosen.index else {}),
        _config(chosen, limits),
    )


_Place = tuple[int, int]  # number of a header, row in it


def _rows(headers: Sequence[Header]) -> tuple[dict[str, int], dict[str, list[_Place]]]:
    """Every name's first row among all rows, and all places of the names that stand in more than one file."""
    rows: dict[str, int] = {}
    several: dict[str, list[_Place]] = {}
    starts = [0]
    for i, header in enumerate(headers):
        start = starts[-1]
        if rows.keys().isdisjoint(header.names):
            rows.update(zip(header.names, range(start, start + len(header.names)), strict=True))
        else:
            for row, name in enumerate(header.names):
                first = rows.setdefault(name, start + row)
                if first != start + row:
                    at = bisect_right(starts, first) - 1
                    several.setdefault(name, [(at, first - starts[at])]).append((i, row))
        starts.append(start + len(header.names))
    return rows, several


def _sharded(
    headers: Sequence[Header],
    several: Mapping[str, list[_Place]],
    shapes: Mapping[str, Sequence[int]],
    root: str,
    limits: Limits,
    errors: list[RestowError],
) -> tuple[set[str], dict[str, Sharded]]:
    """The names that lie in two files, and the tensors in parts; mistakes among them go to `errors`."""
    offsets: dict[int, tuple[Offsets, ...] | None] = {}
    for i, header in enumerate(headers):
        try:
            offsets[i] = saved_offsets(header, limits)
        except RestowError as error:
            errors.append(error)
    unread = len(errors) > 0
    doubled = {
        name: places for name, places in several.items() if any(offsets.get(i, ()) is None for i, _ in places)
    }
    if doubled:
        lines = [(name, f"in {' and '.join(headers[i].file for i, _ in at)}") for name, at in doubled.items()]
        hint = "remove the file that is left from another save"
        errors.append(listed(AmbiguousTensorError, "every tensor in one file", lines, root, hint))
    parts: dict[str, list[_Place]] = {}
    for i, header in enumerate(headers):
        for row, offset in enumerate(offsets.get(i) or ()):
            name = header.names[row]
            if name in several or any(offset) or name in shapes:
                parts.setdefault(name, []).append((i, row))
    sharded: dict[str, Sharded] = {}
    for name, places in parts.items():
        if unread or name in doubled:  # a file that could not be read would look like a hole
            continue
        pieces = [(i, row, (offsets[i] or ())[row]) for i, row in places]
        known = tuple(shapes[name]) if name in shapes else None
        result = whole(name, headers, pieces, known, root)
        if isinstance(result, CoverageError):
            errors.append(result)
        else:
            sharded[name] = Sharded(result, tuple(pieces))
    return set(several), sharded


def _config(chosen: Selection, limits: Limits) -> Mapping[str, Any] | RestowError | None:
    try:
        return read_config(chosen.root, limits=limits)
    except RestowError as error:  # a checkpoint without a config can still be looked at
        return error
