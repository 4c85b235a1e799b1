"""The list of what restow wrote: `checkpoint.manifest.json`, the last file of every folder that it publishes.

Sections of a JSON object, sorted, ASCII, one entry a line: `format`, `tool`, `source` (identity of what it
was made from), `files` (name -> size and digests), and what else the writer records, such as `tensors`. It
holds no time and no path of this machine, so equal work gives equal bytes. Reading rejects what is not such
an object: other JSON, names given twice, a newer format, an entry of `files` that is no plain relative name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from restow.errors import IndexFileError

MANIFEST = "checkpoint.manifest.json"
FORMAT = 1
SIZE_LIMIT = 512 * 2**20


def plain_name(name: str) -> bool:
    """Whether `name` is a relative path below a folder, with `/` between segments and nothing odd in it."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def render(sections: Mapping[str, object]) -> bytes:
    """The text of a manifest; `format` and `tool` are added."""
    whole = {**sections, "format": FORMAT, "tool": f"restow {_tool_version()}"}
    lines = ",\n".join(f"{_line(key)}: {_block(whole[key])}" for key in sorted(whole))
    return f"{{\n{lines}\n}}\n".encode("ascii")


def parse(data: bytes, path: object) -> dict[str, object]:
    """The sections of a manifest. `path` is for the error."""
    try:
        whole = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise IndexFileError("a JSON manifest", str(error), path=path) from error
    if not isinstance(whole, dict):
        raise IndexFileError("a JSON object", type(whole).__name__, path=path)
    if whole.get("format") != FORMAT:
        hint = "read it with the version of restow that wrote it"
        raise IndexFileError(
            f"manifest format {FORMAT}", f"{whole.get('format')!r:.40}", path=path, hint=hint
        )
    files = whole.get("files")
    if not isinstance(files, dict) or not all(plain_name(name) for name in files):
        raise IndexFileError("a section of plain file names", "other `files`", path=path)
    return whole


def read(folder: Path) -> dict[str, object] | None:
    """The manifest of a folder, or None where it has none."""
    path = folder / MANIFEST
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IndexFileError("a readable manifest", str(error.strerror), path=path) from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IndexFileError("a manifest", "no regular file", path=path)
        if status.st_size > SIZE_LIMIT:
            raise IndexFileError(f"a manifest of at most {SIZE_LIMIT} bytes", f"{status.st_size}", path=path)
        return parse(file.read(SIZE_LIMIT + 1), path)


def foreign(folder: Path) -> list[str]:
    """What a folder holds that its manifest does not list, sorted; without a manifest all of it."""
    try:
        record = read(folder)
    except IndexFileError:
        record = None  # who wrote it is unknown, so nothing in the folder is known to be ours
    files = {} if record is None else record["files"]
    assert isinstance(files, dict)
    listed = {*files, MANIFEST} if record is not None else set()
    folders = {
        "/".join(parts[:depth])
        for name in listed
        for parts in [name.split("/")]
        for depth in range(1, len(parts))
    }
    found: list[str] = []
    _walk(folder, "", listed, folders, found)
    return sorted(found)


def _walk(folder: Path, prefix: str, listed: set[str], folders: set[str], found: list[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False) and name in folders:
                _walk(folder / entry.name, name + "/", listed, folders, found)
            elif not (entry.is_file(follow_symlinks=False) and name in listed):
                found.append(name)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        raise ValueError("a name given twice")
    return whole


def _line(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)


def _block(value: object) -> str:
    if not isinstance(value, Mapping) or not value:
        return _line(value)
    return "{\n" + ",\n".join(f"{_line(key)}: {_line(value[key])}" for key in sorted(value)) + "\n}"


def _tool_version() -> str:
    try:
        return version("restow")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
