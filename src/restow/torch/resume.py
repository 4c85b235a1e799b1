"""Going on with a conversion or a merge that was killed: which of its finished files are what this run would write.

A file counts by its size, its header and the digest of every tensor in it, read from the disk once more; then it is
looked at as if it had been written now, so that manifest and warnings are those of an undisturbed run. Anything else
is written again. It rejects nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.errors import RestowError
from restow.files import open_source
from restow.outfiles import OutFile
from restow.prepare import Prepared
from restow.torch.chunks import CHUNK, Filled, slices
from restow.torch.digesting import Digests
from restow.torch.dtypes import torch_dtype
from restow.torch.raw import raw

PART = CHUNK // 2


def work_of(opened: Checkpoint, prepared: Prepared, files: Sequence[OutFile], *more: object) -> str:
    """A digest of everything that the bytes of a conversion follow from: the source's files, and what is asked."""
    digest = xxhash.xxh3_128()
    layouts = {path: str(module.layout) for path, module in prepared.modules.items()}
    facts = [
        sorted(opened.stamps.items()),
        layouts,
        sorted(prepared.plain.items()),
        sorted(prepared.pairs.items()),
    ]
    digest.update(json.dumps([*facts, *(repr(one) for one in more)]).encode())
    for file in files:
        digest.update(f"\n{file.name} {file.size}\n".encode() + file.head)
    return digest.hexdigest()


def note_of(file: OutFile, digests: Digests) -> dict[str, object]:
    """What a finished file is recognised by."""
    return {"tensors": {t.name: digests.tensors[t.name] for t in file.tensors}}


def recognised(
    folder: Path, file: OutFile, note: Mapping[str, object], prepared: Prepared, digests: Digests
) -> bool:
    """Whether a staged file holds what its note says and what this run would write; then `digests` has seen it."""
    if not intact(folder, file, note.get("tensors")):
        return False
    try:
        for one in _filled(folder, file, prepared):
            digests.look([one])
    except (RestowError, OSError):
        return False
    return True


def intact(folder: Path, file: OutFile, wanted: object) -> bool:
    """Whether a staged file has the size, the header and, tensor by tensor, the digests in `wanted`."""
    if not isinstance(wanted, dict) or wanted.keys() != {tensor.name for tensor in file.tensors}:
        return False
    try:
        with open_source(folder / file.name) as source:
            if source.size != file.size or source.pread(0, len(file.head)) != file.head:
                return False
            for tensor in file.tensors:
                digest = xxhash.xxh3_128()
                for at in range(tensor.begin, tensor.end, PART):
                    digest.update(source.pread(at, min(PART, tensor.end - at)))
                if digest.hexdigest() != wanted[tensor.name]:
                    return False
    except (RestowError, OSError):
        return False
    return True


def _filled(folder: Path, file: OutFile, prepared: Prepared) -> Iterator[Filled]:
    """A staged file's tensors as a conversion hands them on. Raises where size or header are others."""
    with open_source(folder / file.name) as source:
        if source.size != file.size or source.pread(0, len(file.head)) != file.head:
            raise RestowError("the file that was begun", "another", path=source.path)
        buffer = torch.empty(0, dtype=torch.uint8)
        for tensor in file.tensors:
            if tensor.end == tensor.begin:
                continue
            for part in slices(prepared.targets[tensor.name], PART):
                shape = part.target.local_shape
                dtype = torch_dtype(part.target.dtype)
                size = torch.Size(shape).numel() * dtype.itemsize
                if buffer.numel() < size:
                    buffer = torch.empty(size, dtype=torch.uint8)
                source.preadv(tensor.begin + part.offset, [raw(buffer[:size])])
                yield Filled(part, buffer[:size].view(dtype).view(shape))
