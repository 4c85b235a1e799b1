"""The index of a sharded checkpoint: which file holds which tensor, and whether the files agree.

An index is untrusted text that names files, so every name in it must be a plain file name that ends in
.safetensors. Rejects whatever is not such an index; `compare` lists where it and the headers differ.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from restow import files
from restow.errors import IndexFileError, IndexMismatchError, RestowError, UnsafePathError, show
from restow.faults import kind, listed
from restow.header import Header
from restow.jsontext import JsonFault, parse
from restow.limits import LIMITS, Limits
from restow.problems import Problem

SUFFIX = ".safetensors"
_HINT = "download the index again, with its shards"


class Index(NamedTuple):
    """`shards` maps tensors to files as the index does; `metadata` is the rest of it, unjudged."""

    path: str
    shards: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        return os.path.basename(self.path)  # noqa: PTH119 - text in, text out


def read_index(path: str, limits: Limits = LIMITS) -> Index:
    """Read an index; raises for anything that is none and for names that lead elsewhere."""
    raw = files.read_all(path, limits.index, what="an index", refuse=IndexFileError)
    try:
        value = parse(raw, limits.depth, fraction=float)
    except JsonFault as fault:
        tensor = fault.names[0] if fault.names else None
        found = fault.found if raw.strip() else f"{len(raw)} bytes"
        raise IndexFileError("an index of strict JSON", found, path=path, tensor=tensor, hint=_HINT) from None
    table = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(table, dict) or not table:
        found = "none" if table is None else "an empty one" if table == {} else kind(table)
        raise IndexFileError("a weight_map that maps tensors to files", found, path=path, hint=_HINT)
    shared: dict[str, str] = {}  # one text per shard, not one per tensor
    try:
        table = {name: shared.setdefault(shard, shard) for name, shard in table.items()}
        texts = all(type(shard) is str for shard in shared)
    except TypeError:  # a list or an object
        texts = False
    if not texts:
        wrong = [(name, kind(shard)) for name, shard in table.items() if type(shard) is not str]
        raise listed(IndexFileError, "the name of a file for every tensor", wrong, path, _HINT)
    unsafe = {shard for shard in shared if not _plain(shard)}
    if unsafe:
        wrong = [(name, f"'{show(shard)}'") for name, shard in table.items() if shard in unsafe]
        raise listed(UnsafePathError, f"plain file names that end in {SUFFIX}", wrong, path, _HINT)
    metadata = value.get("metadata")
    return Index(path, table, metadata if isinstance(metadata, dict) else {})


def _plain(name: str) -> bool:
    bad = any(mark in name for mark in "/\\\0") or not name.isprintable() or name.startswith(".")
    return not bad and name.endswith(SUFFIX) and len(name.encode("utf-8", "replace")) <= 255


def compare(
    index: Index, headers: Sequence[Header], unread: Collection[str], doubled: Collection[str]
) -> tuple[list[RestowError], list[Problem]]:
    """Where the index and the headers differ: fatal errors, and what is only worth telling.

    `unread` are shards whose headers could not be read, `doubled` tensors that several files hold: both have
    their own errors already.
    """
    stray: list[tuple[str, str]] = []  # held, not listed
    empty: list[tuple[str, str]] = []  # the same, without a byte of data
    moved: dict[str, str] = {}  # listed in one file, held by another
    right = 0
    for header in headers:
        for row, name in enumerate(header.names):
            shard = index.shards.get(name)
            if shard is header.file or shard == header.file:
                right += 1
            elif name in doubled:
                continue
            elif shard is None:
                hollow = header.begins[row] == header.ends[row]
                (empty if hollow else stray).append((name, f"held by {header.file}"))
            else:
                moved[name] = header.file
    errors: list[RestowError] = []
    if right != len(index.shards):
        held = {header.file: set(header.names) for header in headers}
        lost = [
            (name, f"not in {shard}" + (f" but in {moved[name]}" if name in moved else ""))
            for name, shard in index.shards.items()
            if shard not in unread and name not in held.get(shard, ())
        ]
        if lost:
            expected = f"every tensor in the file that {index.name} gives"
            errors.append(listed(IndexMismatchError, expected, lost, index.path, _HINT))
    expected = f"a line in {index.name} for every tensor"
    if stray:
        errors.append(listed(IndexMismatchError, expected, stray, index.path, _HINT))
    odd = [Problem(listed(IndexMismatchError, expected, empty, index.path, _HINT), False)] if empty else []
    if not errors and not unread and not doubled:
        odd += _total(index, headers)
    return errors, odd


def _total(index: Index, headers: Sequence[Header]) -> list[Problem]:
    total = sum(header.data_bytes for header in headers)
    said = index.metadata.get("total_size", total)
    if said == total and not isinstance(said, bool):
        return []
    found = f"total_size {show(said)}"
    hint = "nothing depends on it; whoever writes the index should count the bytes of all tensors"
    error = IndexMismatchError(f"total_size {total} in metadata", found, path=index.path, hint=hint)
    return [Problem(error, False)]
