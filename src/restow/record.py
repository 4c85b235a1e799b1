"""What a conversion writes down so that it can be undone to the byte: the source's heads, index and layouts.

Kept in the manifest, compressed. `read_record` rejects folders that no conversion made, and those whose values cannot
come back: decoded, cast, or with experts chosen; and records that are none, or unpack to more than a limit.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from restow import manifest
from restow.checkpoint import Checkpoint
from restow.errors import IndexFileError, NotationError, UsageError
from restow.files import SourceFile, open_source, read_all
from restow.layout import Layout
from restow.limits import LIMITS

SECTION = "undo"


class Record(NamedTuple):
    """`heads` by file name, the index (`listing`: name, bytes) if there was one, and each experts module's layout."""

    heads: Mapping[str, bytes]
    listing: tuple[str, bytes] | None
    layouts: Mapping[str, Layout]


def make_record(source: Checkpoint, why_not: str) -> dict[str, str]:
    """The manifest's section for a source; `why_not` says why it cannot come back, or is empty."""
    if why_not or source.path is None:
        return {"refused": why_not or "the source was no folder"}
    section = {}
    for name in source.stamps:
        with open_source(Path(source.path) / name) as file:
            section[f"head {name}"] = _pack(_head(file))
    index = sorted(Path(source.path).glob("*.safetensors.index.json"))
    if index and len(source.stamps) > 0:
        section[f"index {index[0].name}"] = _pack(
            read_all(index[0], 1 << 29, what="an index", refuse=UsageError)
        )
    for path, module in source.modules.items():
        section[f"layout {path}"] = "\n".join(map(str, module.layout.rows))
    return section


def _head(file: SourceFile) -> bytes:
    length = file.pread(0, 8)
    return length + file.pread(8, int.from_bytes(length, "little"))


def read_record(source: Checkpoint) -> Record:
    """The record of the conversion that made a folder. Raises `UsageError` where there is none to go back by."""
    found = manifest.read(Path(source.path)) if source.path and Path(source.path).is_dir() else None
    section = found.get(SECTION) if found else None
    if not isinstance(section, dict):
        raise UsageError(
            "a folder that a conversion made, which knows its source",
            "one without such a record",
            path=source.path,
            hint='say the layout by name; "hf" is what the vendor ships',
        )
    if "refused" in section:
        raise UsageError("a conversion that can be undone", str(section["refused"]), path=source.path)
    try:
        heads = _texts(section, "head ", LIMITS.header + 8)
        index = _texts(section, "index ", LIMITS.index)
        layouts = {
            k.removeprefix("layout "): Layout.parse(v) for k, v in section.items() if k.startswith("layout ")
        }
    except (ValueError, TypeError, AttributeError, zlib.error, NotationError) as error:
        raise IndexFileError("a record that can be read", f"{error}", path=source.path) from error
    return Record(heads, next(iter(index.items()), None), layouts)


def _texts(section: Mapping[str, str], word: str, limit: int) -> dict[str, bytes]:
    return {k.removeprefix(word): _unpack(v, limit) for k, v in section.items() if k.startswith(word)}


def _pack(data: bytes) -> str:
    return base64.b85encode(zlib.compress(data, 6)).decode("ascii")


def _unpack(text: str, limit: int) -> bytes:
    engine = zlib.decompressobj()
    data = engine.decompress(base64.b85decode(text), limit)
    if not engine.eof:
        raise ValueError(f"more than {limit} bytes in one entry, or an end that is missing")
    return data
