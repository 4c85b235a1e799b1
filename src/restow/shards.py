"""Tensors that ranks saved in parts: where each part belongs, and whether together they are whole.

torch.distributed.checkpoint's Hugging Face writer puts the place of every part in the file's metadata, under
DCP_SHARDING_INFO: `{"name": {"saved_offsets": [8, 0]}}`, as text. It does not say how large the whole is:
that is where the last part ends, unless the caller knows better. Rejects places that cannot be read, and
parts that leave a hole or overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from restow.boxes import overlap
from restow.errors import CoverageError, HeaderError, show
from restow.faults import kind
from restow.header import Header
from restow.jsontext import JsonFault, parse
from restow.limits import LIMITS, Limits

KEY = "DCP_SHARDING_INFO"
Offsets = tuple[int, ...]


def saved_offsets(header: Header, limits: Limits = LIMITS) -> tuple[Offsets, ...] | None:
    """Where each tensor of a file begins in the whole one, row by row; None without that metadata."""
    text = header.metadata.get(KEY)
    if text is None:
        return None
    try:
        table = parse(text.encode("utf-8", "surrogatepass"), limits.depth)
    except JsonFault as fault:
        raise _unreadable(header, fault.found) from None
    if not isinstance(table, dict):
        raise _unreadable(header, kind(table))
    found = []
    known: dict[Offsets, Offsets] = {}
    for name, shape in zip(header.names, header.shapes, strict=True):
        info = table.get(name)
        offsets = info.get("saved_offsets") if isinstance(info, dict) else None
        if type(offsets) is not list or any(type(value) is not int for value in offsets):
            raise _unreadable(header, "no list of integers", name)
        if len(offsets) != len(shape):
            raise _unreadable(header, f"{len(offsets)} offsets for {len(shape)} dims", name)
        found.append(known.setdefault(tuple(offsets), tuple(offsets)))
    return tuple(found)


def whole(
    name: str,
    headers: Sequence[Header],
    pieces: Sequence[tuple[int, int, Offsets]],
    shape: tuple[int, ...] | None,
    path: str,
) -> tuple[int, ...] | CoverageError:
    """The whole tensor's shape, or why its `pieces` (header, row, offset) do not make one.

    Without a `shape` it is the smallest that has room for all pieces.
    """
    shapes = [headers[i].shapes[row] for i, row, _ in pieces]
    offsets = [offset for _, _, offset in pieces]
    files = [headers[i].file for i, _, _ in pieces]
    dtypes = sorted({headers[i].dtypes[row] for i, row, _ in pieces})
    ranks = sorted({len(part) for part in shapes})
    found = f"parts of {' and '.join(map(str, ranks))} dims" if len(ranks) > 1 else ""
    if len(dtypes) > 1:
        found = f"parts in {' and '.join(dtypes)}"
    if found or (shape is not None and len(shape) != ranks[0]):
        return _error(name, shape or (), found or f"parts of {ranks[0]} dims", files, path)
    ends = [tuple(map(sum, zip(*part, strict=True))) for part in zip(offsets, shapes, strict=True)]
    result = shape or tuple(map(max, zip(*ends, strict=True)))
    return _uncovered(name, result, shapes, offsets, files, path) or result


def _uncovered(
    name: str,
    shape: Sequence[int],
    shapes: Sequence[Offsets],
    offsets: Sequence[Offsets],
    files: Sequence[str],
    path: str,
) -> CoverageError | None:
    """The proof that the parts fill `shape` exactly once: in bounds, no overlap, volumes that add up."""
    boxes = [tuple(zip(*part, strict=True)) for part in zip(offsets, shapes, strict=True)]
    for box, file in zip(boxes, files, strict=True):
        if any(at < 0 or at + size > whole for (at, size), whole in zip(box, shape, strict=True)):
            return _error(name, shape, f"a part at {_text(box)}, out of bounds", [file], path)
    kept = [i for i, part in enumerate(shapes) if prod(part)]
    pair = overlap([boxes[i] for i in kept])
    if pair is not None:
        one, two = (kept[i] for i in pair)
        found = f"{_text(boxes[one])} and {_text(boxes[two])}, which overlap"
        return _error(name, shape, found, [files[one], files[two]], path)
    held = sum(prod(shapes[i]) for i in kept)
    if held == prod(shape):
        return None
    gap = next(
        (text for dim in range(len(shape)) if (text := _gap(dim, shape, [boxes[i] for i in kept]))), ""
    )
    return _error(name, shape, gap or f"parts with {held} of {prod(shape)} elements", files, path)


def _gap(dim: int, shape: Sequence[int], boxes: Sequence[tuple[tuple[int, int], ...]]) -> str:
    at = 0
    for start, length in sorted({box[dim] for box in boxes}):
        if start > at:
            return f"no part for {at}:{start} of dim {dim}"
        at = max(at, start + length)
    return f"no part for {at}:{shape[dim]} of dim {dim}" if at < shape[dim] else ""


def _error(name: str, shape: Sequence[int], found: str, files: Sequence[str], path: str) -> CoverageError:
    return CoverageError(
        f"parts that fill {show(name)} {list(shape)}, each element once",
        found,
        path=path,
        tensor=name,
        sections=[("tensor", [show(name)]), ("looked in", map(show, files))],
        hint="the files are not all of one save: fetch all of it, into an empty folder",
    )


def _unreadable(header: Header, found: str, tensor: str | None = None) -> HeaderError:
    return HeaderError(
        f"the place of every tensor in the metadata's {KEY}",
        found,
        path=header.path,
        tensor=tensor,
        hint="only a new save can tell where this file's parts belong",
    )


def _text(box: Sequence[tuple[int, int]]) -> str:
    return f"[{', '.join(f'{at}:{at + size}' for at, size in box)}]"
