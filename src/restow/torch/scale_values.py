"""Which scales are worth a closer look: those that lie in a run of a file where not all are finite and above 0.

A checkpoint has a scale for every weight, small ones that mostly adjoin: a run is read and judged at once. Nothing is
rejected here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from restow.checkpoint import Checkpoint
from restow.torch.dtypes import torch_dtype
from restow.torch.raw import raw
from restow.torch.sources import Files

RUN = 4 << 20  # bytes that are read and judged at once

Piece = tuple[str, int, int, str, str]  # file, begin, end, dtype, name


def suspects(found: Checkpoint, names: Sequence[str]) -> set[str]:
    """The names of scales, all of them floats, that cannot be passed at a glance."""
    pieces = sorted(
        (piece.file, piece.begin, piece.end, found.tensors[name].dtype, name)
        for name in names
        for piece in found.tensors[name].pieces
        if piece.end > piece.begin
    )
    odd: set[str] = set()
    room = torch.empty(0, dtype=torch.uint8)
    with ExitStack() as stack:
        files = Files(stack, found.path, found.stamps)
        for run in _runs(pieces):
            (file, begin, _, dtype, _), size = run[0], run[-1][2] - run[0][1]
            if room.numel() < size:
                room = torch.empty(max(size, RUN), dtype=torch.uint8)
            files.get(file).preadv(begin, [raw(room)[:size]])
            values = room[:size].view(torch_dtype(dtype))
            low, high = torch.aminmax(values)  # both are NaN where one value is
            if not (float(low) > 0 and float(high) < float("inf")):
                odd.update(name for *_, name in run)
        files.check()
    return odd


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours in a file, of one dtype, that are no longer than `RUN` together, or one alone."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (
            piece[0] != run[-1][0]
            or piece[1] != run[-1][2]
            or piece[3] != run[-1][3]
            or piece[2] - run[0][1] > RUN
        ):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
