"""One safetensors header, read and judged by ourselves (safetensors format, README).

A `Header` holds a file's tensors as columns: 70,000 of them are a few MiB. Its offsets are absolute, counted
from the file's start. It rejects whatever breaks the format's structure; what is odd is in `problems`.
The usual header passes a few checks made in bulk; only one that fails them is looked at tensor by tensor
(`faults`).
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from restow import faults
from restow.errors import (
    AmbiguousTensorError,
    HeaderError,
    NotSafetensorsError,
    TruncatedFileError,
    UnexpectedTensorError,
    show,
)
from restow.files import SourceFile
from restow.jsontext import JsonFault, parse
from restow.limits import LIMITS, Limits
from restow.problems import Problem, merged

_LENGTH = 8  # bytes of the length word
_FIELDS = ("dtype", "shape", "data_offsets")
_JSON = "JSON text"  # unless the byte is that of a small length word, which has NUL bytes behind it
_OTHERS = (  # what people find under a shard's name, by its first bytes
    (b"version https://git-lfs", "a git LFS pointer", "git lfs pull"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes (pickle)", ""),
    (b"\x80\x02", "a pickle, as torch.save writes", ""),
    (b"GGUF", "a GGUF file", ""),
    (b"<!doctype", "an HTML page", "download the file again: a web page was saved under its name"),
    (b"<html", "an HTML page", "download the file again: a web page was saved under its name"),
    (b"<?xml", "an XML page", "download the file again: a web page was saved under its name"),
    (b"{", _JSON, "open the folder, or the file that ends in .safetensors"),
    (b"[", _JSON, "open the folder, or the file that ends in .safetensors"),
)
_BIG = "the file is damaged, or no safetensors file; Limits(header=...) raises the limit"
_CONVERT = "convert it with safetensors.torch.save_file where its origin is trusted"


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, in the header's order: row i is `names[i]`, `dtypes[i]`, ..., `ends[i]`."""

    file: str  # name inside the checkpoint's folder
    path: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    begins: array[int]
    ends: array[int]
    metadata: Mapping[str, str]
    length: int  # bytes of the header's text; the data begin at 8 + length
    size: int  # bytes of the whole file
    stamp: tuple[int, ...] = ()  # of the file that was read, see `files.SourceFile`
    problems: tuple[Problem, ...] = ()

    @property
    def data_bytes(self) -> int:
        return self.size - _LENGTH - self.length


def read_header(source: SourceFile, limits: Limits = LIMITS) -> Header:
    """Read and judge the header of an open file; raises the first fatal finding, which tells all of them."""
    raw = _frame(source, limits)
    return parse_header(raw, source.size, source.path, source.name, source.stamp, limits)


def parse_header(
    raw: bytes, size: int, path: str, file: str, stamp: tuple[int, ...] = (), limits: Limits = LIMITS
) -> Header:
    """Judge the text of a header, for a file of `size` bytes."""
    try:
        table = parse(raw, limits.depth)
    except JsonFault as fault:
        name = fault.names[0] if fault.outer else None
        raise HeaderError(
            "a header of strict JSON",
            fault.found,
            path=path,
            tensor=name,
            sections=[("twice", map(show, fault.names))] if len(fault.names) > 1 else (),
            hint=faults.AGAIN,
        ) from None
    metadata = _metadata(table, path)
    if len(table) > limits.tensors:
        raise HeaderError(f"at most {limits.tensors} tensors in one file", str(len(table)), path=path)
    columns = (
        None if b"true" in raw or b"false" in raw else _columns(table, limits)
    )  # True == 1, in a shape too
    if columns is None:
        errors = faults.of_tensors(table, path, limits)
        if errors:
            raise merged(errors)
        columns = _columns(table, limits)
    data = size - _LENGTH - len(raw)
    if columns is None:
        raise HeaderError("entries as the format has them", "others", path=path)
    names, dtypes, shapes, begins, ends, extra = columns
    errors = [*faults.of_names(names, path, limits), *faults.of_places(names, begins, ends, data, path)]
    if errors:
        raise merged(errors)
    odd = tuple(_odd(table, names, shapes, extra, path, limits))
    start = _LENGTH + len(raw)
    return Header(
        file,
        path,
        names,
        dtypes,
        shapes,
        array("q", [start + begin for begin in begins]),
        array("q", [start + end for end in ends]),
        MappingProxyType(metadata),
        len(raw),
        size,
        stamp,
        odd,
    )


def _frame(source: SourceFile, limits: Limits) -> bytes:
    size, path = source.size, source.path
    if size < _LENGTH:
        raise TruncatedFileError(
            f"a safetensors file of at least {_LENGTH} bytes",
            f"{size} bytes",
            path=path,
            hint="download or write it again",
        )
    head = source.pread(0, min(size, 64))
    length = int.from_bytes(head[:_LENGTH], "little")
    fits = length <= limits.header and length <= size - _LENGTH
    if fits and head[_LENGTH : _LENGTH + 1] == b"{" and length:
        return source.pread(_LENGTH, length)
    text = head.lstrip().lower()
    for magic, what, hint in _OTHERS:
        if (head.startswith(magic) or text.startswith(magic)) and (what != _JSON or 0 not in head[:_LENGTH]):
            raise NotSafetensorsError("a safetensors file", what, path=path, hint=hint or _CONVERT)
    if length > limits.header:
        raise HeaderError(
            f"a header of at most {limits.header} bytes", f"{length} bytes", path=path, hint=_BIG
        )
    if length > size - _LENGTH:
        raise TruncatedFileError(
            f"a header of {length} bytes, as the first {_LENGTH} bytes say",
            f"{size - _LENGTH} bytes in the rest of the file",
            path=path,
            hint="download or write it again",
        )
    found = show(head[_LENGTH : _LENGTH + min(length, 8)].decode("latin-1"))
    raise HeaderError(
        "a header that begins with {",
        f"'{found}'" if length else "an empty header",
        path=path,
        hint=faults.AGAIN,
    )


def _metadata(table: Any, path: str) -> dict[str, str]:
    value = table.pop("__metadata__", None)
    if value is None:  # null too, as safetensors does
        return {}
    if not isinstance(value, dict):
        raise HeaderError(
            "__metadata__ that maps text to text", faults.kind(value), path=path, hint=faults.AGAIN
        )
    for name, text in value.items():
        if type(text) is not str:
            raise HeaderError(
                "__metadata__ that maps text to text",
                f"{faults.kind(text)} under {show(name)}",
                path=path,
                hint=faults.AGAIN,
            )
    return value


_Columns = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...], list[int], list[int], bool]


def _columns(table: dict[str, Any], limits: Limits) -> _Columns | None:
    """The columns of a header in which every entry is right by itself; None if one is not."""
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    begins: list[int] = []
    ends: list[int] = []
    known: dict[tuple[Any, ...], tuple[int, str, tuple[int, ...]]] = {}  # a file has few distinct shapes
    fields = 0
    try:
        for info in table.values():
            dtype = info["dtype"]
            shape = info["shape"]
            begin, end = info["data_offsets"]
            key = (dtype, *shape)
            hit = known.get(key)
            if hit is None:
                count = faults.byte_count(dtype, shape, limits)
                if isinstance(count, str):
                    return None
                hit = known[key] = (count, dtype, key[1:])
            if end - begin != hit[0]:
                return None
            dtypes.append(hit[1])
            shapes.append(hit[2])
            begins.append(begin)
            ends.append(end)
            fields += len(info)
    except (TypeError, ValueError, KeyError):
        return None
    return tuple(table), tuple(dtypes), tuple(shapes), begins, ends, fields != 3 * len(begins)


def _odd(
    table: dict[str, Any],
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    extra: bool,
    path: str,
    limits: Limits,
) -> Iterable[Problem]:
    if extra:
        lines = [
            (name, show(field)) for name, info in table.items() for field in info if field not in _FIELDS
        ]
        error = faults.listed(
            HeaderError,
            "the fields dtype, shape and data_offsets alone",
            [(n, f"the field {f}") for n, f in lines],
            path,
        )
        yield Problem(error, False)
    empty = {shape for shape in set(shapes) if 0 in shape}
    if empty:
        hollow = [name for name, shape in zip(names, shapes, strict=True) if shape in empty]
        if len(hollow) > limits.empty:
            yield Problem(
                UnexpectedTensorError(
                    "tensors that hold elements",
                    f"{len(hollow)} without any",
                    path=path,
                    tensor=hollow[0],
                    sections=[("empty", map(show, hollow))],
                    hint="nothing asks for them; write the file again without them",
                ),
                False,
            )
    if not "".join(names).isascii():
        yield from _twins(names, path)


def _twins(names: tuple[str, ...], path: str) -> Iterable[Problem]:
    first: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name), name)
        if other is not name:
            pairs.append((other, name))
    if pairs:
        error = AmbiguousTensorError(
            "names that differ in Unicode's normal form",
            f"{len(pairs)} that are equal in it",
            path=path,
            tensor=pairs[0][0],
            sections=[("equal", (f"{show(a)} and {show(b)}" for a, b in pairs))],
            hint="a reader that normalises names would mix them up; rename one",
        )
        yield Problem(error, False)
