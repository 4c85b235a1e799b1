"""What a config announces about quantised weights, and the rows of the scales that then stand beside them.

Scales are companions of the weights in the layout's own table: a codec turns a spelling into one with rows for them, so
that whoever finds, pairs or moves experts needs no second mechanism. Rejected are methods that this version does not
know (`QuantizationError`, by name) and blocks that are none (`ConfigError`). It knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from restow.errors import ConfigError, QuantizationError, RestowError, show
from restow.family import Spelling
from restow.layout import Layout
from restow.notation import Dim, Row

SECTIONS = ("quantization_config", "compression_config")
SUFFIX = "_scale_inv"
SCALE = ".scale"  # what the role of a companion row ends with
BLOCK_LIMIT = 2**20


class Codec(NamedTuple):
    """How weights are coded: `dtype` of the codes, `block` of rows and columns that share a scale (None: the whole)."""

    method: str
    dtype: str
    block: tuple[int, int] | None
    skipped: tuple[str, ...]

    def skips(self, name: str) -> bool:
        """Whether the config leaves a module as it is: by its name, or a run of whole segments of it."""
        return any(f".{word}." in f".{name}." for word in self.skipped)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a matrix, or of a stack of them."""
        if self.block is None:
            return tuple(shape[:-2])
        return (*shape[:-2], *(-(-n // block) for n, block in zip(shape[-2:], self.block, strict=True)))


def announced(config: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The part of a config that speaks of quantisation, wherever it stands; None where there is none."""
    text = (config or {}).get("text_config")
    for part in (config or {}, text):
        for key in SECTIONS if isinstance(part, Mapping) else ():
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def read_codec(config: Mapping[str, object] | None) -> Codec | None:
    """The codec that a config announces, or None."""
    said = announced(config)
    if said is None:
        return None
    method = said.get("quant_method")
    if method != "fp8":
        raise QuantizationError(
            "quantization_config with a quant_method that this version of restow knows: fp8",
            show(repr(method)),
            path="config.json",
            hint="decode the weights with the tool that wrote them, and restow the result",
        )
    skipped = said.get("modules_to_not_convert")
    words = tuple(word for word in skipped if isinstance(word, str)) if isinstance(skipped, list) else ()
    dtype = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}.get(str(said.get("fmt", "e4m3")).lower())
    if dtype is None:
        raise QuantizationError("fmt e4m3 or e5m2 in quantization_config", show(repr(said["fmt"])), path="config.json")
    return Codec("fp8", dtype, _block(said.get("weight_block_size")), words)


def _block(block: object) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if all(type(n) is int and 0 < n <= BLOCK_LIMIT for n in block):
            return rows, columns
    raise ConfigError(
        f"weight_block_size as two whole numbers from 1 to {BLOCK_LIMIT}", show(repr(block)), path="config.json"
    )


def with_scales(spellings: Sequence[Spelling], codec: Codec | None) -> tuple[Spelling, ...]:
    """The spellings, those of matrices as torch's Linear keeps them also with rows for their scales."""
    coded = [replace(s, layout=_coded(s.layout, codec)) for s in spellings if codec is not None and _linear(s.layout)]
    return (*coded, *spellings)


def _linear(layout: Layout) -> bool:
    ends = {row.role: str(row.dims[-1]) for row in layout.rows if row.role in ("in", "out") and len(row.dims) > 1}
    return ends == {"in": "d", "out": "f"} and not any(row.role.endswith(SCALE) for row in layout.rows)


def _coded(layout: Layout, codec: Codec | None) -> Layout:
    assert codec is not None
    return Layout((*layout.rows, *(_scale_row(row, codec.block) for row in layout.rows if row.role in ("in", "out"))))


def _scale_row(row: Row, block: tuple[int, int] | None) -> Row:
    *name, last = row.name
    stack, matrix = row.dims[:-2], row.dims[-2:]
    dims = tuple(_divided(dim, n) for dim, n in zip(matrix, block, strict=True)) if block is not None else ()
    return Row(row.role + SCALE, (*name, f"{last}{SUFFIX}"), (*stack, *dims))


def _divided(dim: Dim, by: int) -> Dim:
    if len(dim.factors) == 1:
        return Dim((replace(dim.factors[0], divisor=by),))
    return Dim(dim.factors, by)


def lost_scales(names: Sequence[str]) -> RestowError:
    """Scales that are not there, for weights that are; `names` are the scales'."""
    return QuantizationError(
        f"a scale for every quantised weight, such as {show(names[0])} for {show(names[0].removesuffix(SUFFIX))}",
        "none" if len(names) == 1 else f"none for {len(names)}",
        tensor=names[0],
        sections=[("missing", map(show, names))],
        hint="get the checkpoint again: without its scale a weight has no value",
    )


def odd_grids(wrong: Sequence[tuple[str, str, Sequence[int]]], codec: Codec | None) -> RestowError:
    """Scales of another shape than blocks and weights give: (name, expected, found)."""
    name, expected, found = wrong[0]
    block = list(codec.block) if codec is not None and codec.block is not None else None
    lines = [f"{show(n)} {list(f)}, expected {e}" for n, e, f in wrong]
    return QuantizationError(
        f"shape {expected} for {show(name)}, since weight_block_size is {block}",
        f"{list(found)}",
        tensor=name,
        sections=[("tensors", lines)],
        hint="get the config.json that belongs to these files",
    )
