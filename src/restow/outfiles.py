"""Which files a checkpoint is written to: names, headers and every tensor's place, before a byte is written.

Either new ones, filled up to a limit in the order given, or the very files that a record holds. Pure arithmetic and no
I/O: it rejects recorded heads that are none. Headers are written by ourselves, so that equal input gives equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from restow.entries import DTYPE_BITS
from restow.errors import HeaderError
from restow.header import Header, parse_header

INDEX = "model.safetensors.index.json"


class Placed(NamedTuple):
    """A tensor in an output file: bytes `begin` to `end`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class OutFile(NamedTuple):
    """A file to write: its name, the bytes before the data, its tensors in the order of their bytes, its size."""

    name: str
    head: bytes
    tensors: tuple[Placed, ...]
    size: int


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * DTYPE_BITS[dtype] // 8


def new_files(
    specs: Iterable[tuple[str, str, tuple[int, ...]]], limit: int, metadata: Mapping[str, str]
) -> tuple[OutFile, ...]:
    """Files for (name, dtype, shape) in this order, each of at most `limit` data bytes unless one tensor is larger."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for spec in specs:
        more = nbytes(spec[1], spec[2])
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += more
    count = len(groups)
    names = ["model.safetensors"] if count == 1 else [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]  # fmt: skip
    return tuple(_new_file(name, group, metadata) for name, group in zip(names, groups, strict=True))


def _new_file(
    name: str, specs: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> OutFile:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, []
    # Widest elements first, as safetensors itself writes: every tensor then begins at a multiple of its element.
    for tensor, dtype, shape in sorted(specs, key=lambda spec: -DTYPE_BITS[spec[1]]):
        end = at + nbytes(dtype, shape)
        table[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        places.append((tensor, dtype, shape, at, end))
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    tensors = tuple(Placed(n, d, s, len(head) + a, len(head) + b) for n, d, s, a, b in places)
    return OutFile(name, head, tensors, len(head) + at)


def recorded_files(heads: Mapping[str, bytes], path: str) -> tuple[OutFile, ...]:
    """The files that these heads (length word and header, by file name) belong to; judged as any header is."""
    files = []
    for name, head in heads.items():
        text = head[8:]
        header = parse_header(text, len(head) + _data_bytes(text, path, name), path, name)
        files.append(OutFile(name, head, placed(header), header.size))
    return tuple(files)


def placed(header: Header) -> tuple[Placed, ...]:
    """A header's tensors in the order of their bytes."""
    rows = zip(header.names, header.dtypes, header.shapes, header.begins, header.ends, strict=True)
    return tuple(sorted((Placed(*row) for row in rows), key=lambda tensor: (tensor.begin, tensor.end)))


def _data_bytes(text: bytes, path: str, name: str) -> int:
    """Where the last tensor of a head ends: no file is there yet to say it."""
    try:
        rows = [row for key, row in json.loads(text).items() if key != "__metadata__"]
        return max((int(row["data_offsets"][1]) for row in rows), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise HeaderError(
            "the head of a safetensors file", f"{type(error).__name__}: {error}", path=f"{path}/{name}"
        ) from error


def index_text(files: Sequence[OutFile]) -> bytes:
    """The index of new files: every tensor's file, and the bytes of all tensors."""
    weights = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.end - tensor.begin for file in files for tensor in file.tensors)
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
