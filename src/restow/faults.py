"""What exactly is wrong with a header: every tensor at fault, by kind of fault.

`header` comes here when a check in bulk has failed. Each function lists the errors of one sort of fact and
rejects nothing itself: the entries one by one, the names, and the places of the tensors in their file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from restow.entries import DTYPE_BITS
from restow.errors import HeaderError, LayoutError, RestowError, TruncatedFileError, show
from restow.limits import Limits

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|(?:^|/)\.\.(?:/|$)")
AGAIN = "fetch the file again; if it comes the same, it was written wrong"
_BITS = 2**63  # more bits than this cannot be in any file


def kind(value: object) -> str:
    """A JSON value in a few words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = show(value)
    return f"the number {text}" if isinstance(value, int) or type(value) is not str else f"the text '{text}'"


def listed(
    error: type[RestowError], expected: str, lines: Sequence[tuple[str, str]], path: str, hint: str = AGAIN
) -> RestowError:
    """One error for many tensors: (name, what was found there), the first in the first line."""
    sections = (
        [("tensors", (f"{show(name) or '(no name)'}: {found}" for name, found in lines))]
        if len(lines) > 1
        else []
    )
    return error(expected, lines[0][1], path=path, tensor=lines[0][0], sections=sections, hint=hint)


def byte_count(dtype: object, shape: object, limits: Limits) -> int | str:
    """The bytes of a tensor, or a text that begins with "dtype" or "shape" and says what is wrong."""
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        return f"dtype {show(dtype) if type(dtype) is str else kind(dtype)}"
    if type(shape) is not list:
        return f"shape {kind(shape)}"
    if len(shape) > limits.rank:
        return f"shape of {len(shape)} dims, more than {limits.rank}"
    total = 1
    for size in shape:
        if type(size) is not int:
            return f"shape with {kind(size)}"
        if size < 0:
            return f"shape {_shape(shape)}: {size} is negative"
        total *= size
        if total * bits >= _BITS:
            return f"shape {_shape(shape)}: more than 2**63 bits"
    if total * bits % 8:
        return f"shape {_shape(shape)}: {total} elements of {bits} bits are not whole bytes"
    return total * bits // 8


def of_tensors(table: dict[str, Any], path: str, limits: Limits) -> list[RestowError]:
    """The errors of the entries: fields, dtypes, shapes, offsets, and whether they agree."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, info in table.items():
        fault = _of_entry(info, limits)
        if fault is not None:
            found.setdefault(fault[0], []).append((name, fault[1]))
    return [listed(_KINDS[key][0], _KINDS[key][1], lines, path) for key, lines in found.items()]


_KINDS: dict[str, tuple[type[RestowError], str]] = {
    "fields": (HeaderError, "an object with dtype, shape and data_offsets for every tensor"),
    "dtype": (HeaderError, "a dtype of the safetensors format"),
    "shape": (
        HeaderError,
        "a shape of non-negative integers with a product below 2**63 bits, in whole bytes",
    ),
    "offsets": (HeaderError, "data_offsets of two integers"),
    "reversed": (LayoutError, "data_offsets that run forward from 0"),
    "bytes": (LayoutError, "as many bytes between the offsets as dtype and shape need"),
}


def _of_entry(info: Any, limits: Limits) -> tuple[str, str] | None:
    if not isinstance(info, dict):
        return "fields", kind(info)
    lost = [field for field in ("dtype", "shape", "data_offsets") if field not in info]
    if lost:
        return "fields", f"no {' and no '.join(lost)}"
    count = byte_count(info["dtype"], info["shape"], limits)
    if isinstance(count, str):
        return count[:5], count[6:]
    offsets = info["data_offsets"]
    if type(offsets) is not list or len(offsets) != 2:
        return "offsets", kind(offsets) if type(offsets) is not list else f"a list of {len(offsets)}"
    wrong = [value for value in offsets if type(value) is not int]
    if wrong:
        return "offsets", kind(wrong[0])
    begin, end = offsets
    if begin < 0 or end < begin:
        return "reversed", f"[{show(begin)}, {show(end)}]"
    if end - begin != count:
        shape = _shape(info["shape"])
        return "bytes", f"{show(end - begin)} bytes where {info['dtype']} of {shape} needs {count}"
    return None


def of_names(names: Sequence[str], path: str, limits: Limits) -> list[RestowError]:
    """The errors of the names: none, too long, or made to harm a terminal or a path."""
    joined = "".join(names)
    short = max(map(len, names), default=0) * 4 <= limits.name
    if short and all(names) and joined.isascii() and joined.isprintable() and ".." not in joined:
        return []
    wrong: list[tuple[str, str]] = []
    for name in names:
        if not name:
            wrong.append((name, "a tensor without a name"))
        elif _CONTROL.search(name):
            wrong.append((name, "control characters or path parts in a name"))
        elif len(name.encode()) > limits.name:
            wrong.append((name, f"a name of {len(name.encode())} bytes"))
    if not wrong:
        return []
    expected = f"names of 1 to {limits.name} bytes without control characters and path parts"
    return [listed(HeaderError, expected, wrong, path)]


def of_places(
    names: Sequence[str], begins: Sequence[int], ends: Sequence[int], data: int, path: str
) -> list[RestowError]:
    """The errors of the places: the tensors must fill the `data` bytes after the header, each byte once."""
    if begins[1:] == ends[:-1] and (begins[0] == 0 and ends[-1] == data if begins else data == 0):
        return []  # they lie in the order in which they are listed
    order = sorted(range(len(names)), key=lambda row: (begins[row], ends[row]))
    overlaps: list[tuple[str, str]] = []
    holes: list[tuple[str, str]] = []
    at, last = 0, -1
    for row in order:
        begin = begins[row]
        if begin < at:
            other = show(names[last])
            overlaps.append((names[row], f"bytes {begin} to {ends[row]}, which begin inside {other}"))
        elif begin > at:
            holes.append((names[row], f"{begin - at} bytes before this one that no tensor claims"))
        if ends[row] >= at:
            at, last = ends[row], row
    errors: list[RestowError] = []
    if overlaps:
        errors.append(listed(LayoutError, "tensors that share no byte", overlaps, path))
    if holes:
        errors.append(listed(LayoutError, "tensors that lie end to end", holes, path))
    if at > data:
        errors.append(_cut(names, ends, at, data, path))
    elif at < data:
        errors.append(
            LayoutError(
                "a file that ends with its last tensor",
                f"{data - at} bytes after it",
                path=path,
                hint="cut them off only if you know who wrote them; else fetch the file again",
            )
        )
    return errors


def _cut(names: Sequence[str], ends: Sequence[int], at: int, data: int, path: str) -> RestowError:
    lost: Iterable[str] = (show(name) for name, end in zip(names, ends, strict=True) if end > data)
    return TruncatedFileError(
        f"{at} bytes of tensors",
        f"{data}: {at - data} bytes are missing",
        path=path,
        tensor=next(name for name, end in zip(names, ends, strict=True) if end > data),
        sections=[("cut off", lost)],
        hint="the disk was full or the copy broke off; fetch or write the file again",
    )


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(show(size) for size in shape)}]"
