"""Scales that are codes themselves: a byte's value in a table, times a scale of its own, plus an offset from a note.

In float32, each step rounded, as bitsandbytes' double quantisation computes them. Rejected are notes that are no JSON, or
say no offset or other blocks than the table of codecs has (`QuantizationError`, by name).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

from restow.coding import Coding
from restow.errors import QuantizationError, show


def unnested(
    coding: Coding, grids: Sequence[torch.Tensor], boxes: Sequence[Sequence[tuple[int, int]]], note: str
) -> torch.Tensor:
    """The scales of a box, from bytes, their table, their own scales and the note's text."""
    codes, table, nested, text = grids
    ((first, count),), ((begin, _),) = boxes[0], boxes[2]
    ((term,), (outer,)) = coding.grids[0].terms, coding.grids[2].terms
    per = outer.divisor // term.divisor
    places = torch.arange(first, first + count) // per - begin
    return table[codes.long()].mul_(nested[places]).add_(_offset(bytes(text.tolist()), note, per))


def _offset(text: bytes, name: str, block: int) -> float:
    """What a note says is added to every scale."""
    try:
        note = json.loads(text)
        offset, said = float(note["nested_offset"]), note.get("nested_blocksize", block)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise QuantizationError(
            f"JSON with nested_offset in {show(name)}",
            type(error).__name__,
            tensor=name,
            hint="get the checkpoint again: without its offset a scale has no value",
        ) from error
    if said != block or not math.isfinite(offset):
        raise QuantizationError(
            f"a finite nested_offset and nested_blocksize {block} in {show(name)}",
            f"{show(repr(offset))} and {show(repr(said))}",
            tensor=name,
        )
    return offset
