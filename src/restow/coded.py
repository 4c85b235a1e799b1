"""Every coded weight of a checkpoint: which bytes stand for it, and which scale belongs to which of its elements.

Codes and companions are found by names, dtypes and shapes together, under the codecs that the config announces; a weight
is looked at when it is asked for. Rejected by name (`QuantizationError`) are padded rows of packed codes, and packed
codes or scales in several pieces.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

from restow.boxes import strides_of
from restow.checkpoint import Checkpoint
from restow.codecs import (
    CODES,
    COMPANIONS,
    NESTED,
    WEIGHTS,
    WORD_BITS,
    Codec,
    coded_layouts,
    logical,
    spelled,
    weight_of,
)
from restow.coding import Grid, Term
from restow.entries import DTYPE_BITS, Entry
from restow.errors import QuantizationError, show
from restow.files import open_source
from restow.layout import Layout, axis_size, shape_of
from restow.module import Module
from restow.notation import Dim, Factor, Row

NOTE_LIMIT = 4096  # bytes of the JSON beside a weight of bitsandbytes


class Coded(NamedTuple):
    """A coded weight: the raw name of its codes, and (raw name, how it is found) of every scale.

    `packed` is the dim along which elements share a byte, where they do.
    """

    codec: Codec
    name: str
    shape: tuple[int, ...]
    scales: tuple[tuple[str, Grid], ...]
    packed: int = -1


class _Kind(NamedTuple):
    """What the coded weights of a row share: the shape, the columns of the last axis where its dim has several, and of
    every scale its grid (None for a note) and the block that the columns cut, where they do."""

    shape: tuple[int, ...]
    columns: int
    grids: tuple[tuple[Grid | None, int], ...]


def logical_row(codec: Codec, row: Row) -> Row:
    """The row of what a row of codes decodes to."""
    found = logical(row, codec.bits, WORD_BITS[codec.dtypes[0]])
    assert found is not None, f"the table of codecs: {row}"
    return found


def value_dtype(config: Mapping[str, object] | None) -> str:
    """The dtype that the config gives its weights, BF16 where it says none."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    text = (config or {}).get("text_config")
    for part in (config or {}, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if (word := str(part.get(key)).removeprefix("torch.")) in names:
                return names[word]
    return "BF16"


class DecodedTensors(Mapping[str, Entry]):
    """The view's entries, made when they are asked for; `raw` are the files' own."""

    def __init__(self, view: CodedWeights) -> None:
        self._view, self.raw = view, view.raw

    def __getitem__(self, name: str) -> Entry:
        if name not in self._view.weights:
            if name in self._view.gone:
                raise KeyError(name)
            return self._view.raw[name]
        coded = self._view[name]
        raw = self._view.raw[coded.name]
        shape = self._view.matrices.get(name, coded.shape)
        if raw.shape == shape:
            return Entry(self._view.dtype, shape, raw.pieces)
        box = tuple((0, n) for n in shape)  # packed, in one piece
        return Entry(self._view.dtype, shape, (raw.pieces[0]._replace(box=box),))

    def __iter__(self) -> Iterator[str]:
        names = self._view.names
        return (
            names.get(name, name) for name in self._view.raw if name not in self._view.gone or name in names
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def sharded(self) -> frozenset[str]:
        names = self._view.names
        return frozenset(
            names.get(name, name)
            for name in self._view.several
            if name not in self._view.gone or name in names
        )


class CodedWeights(Mapping[str, Coded]):
    """Every coded weight by its name in the view: an expert's raw name, any other's without what the codec adds."""

    def __init__(self, found: Checkpoint, modules: Mapping[str, Module], keep: Container[str]) -> None:
        self.raw, self.several, self.dtype = found.tensors, found.several, value_dtype(found.config)
        self.path = found.path
        self.weights: dict[str, tuple[Module, str] | tuple[Codec, Row, str]] = {}
        self.gone: set[str] = set()  # raw names that the view does not show as they are
        self.names: dict[str, str] = {}  # raw name -> name in the view, where that is another
        self.matrices: dict[str, tuple[int, int]] = {}  # weights outside the experts: rows and columns
        self._known: dict[tuple[Row, Row, tuple[int, ...], tuple[int, ...], str], Grid] = {}
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._last: tuple[str, Coded] | None = None  # a plan asks for a weight's shape, then for its scales
        experts: set[str] = set()
        for path, module in found.modules.items():
            listed = [n for names in module.tensors.values() for n in names if n is not None]
            experts.update(listed)
            if module.codec is None or path in keep:
                continue
            for role, names in module.tensors.items():
                held = [n for n in names if n is not None]
                if role.endswith(COMPANIONS):
                    self.gone.update(held)
                elif role.removesuffix(CODES) in WEIGHTS:
                    self.weights.update((n, (module, role)) for n in held)
        assert found.codec is not None
        for name in found.tensors:
            if name in experts or name in keep or name in self.gone:
                continue
            self._other(name, found.codec.codecs)

    def _other(self, name: str, codecs: tuple[Codec, ...]) -> None:
        """A tensor outside the experts as a coded weight, if its dtype, its shape and its companions say so."""
        entry = self.raw[name]
        for codec in codecs:
            weight = weight_of(codec.codes.name, name)
            if weight is None or entry.dtype not in codec.dtypes or len(entry.shape) != 2:
                continue
            scales = [spelled(scale.name, weight) for scale in codec.scales]
            if not all(scale in self.raw for scale in scales):
                continue
            shape = self._shape(codec, weight, name)
            if shape is None or not self._fits(codec, shape, scales):
                continue
            self.matrices[weight] = shape
            self.weights[weight] = (codec, logical_row(codec, _matrix_layout(codec).rows[0]), name)
            self.gone.update(scales)
            self.gone.update(s for s in (spelled(c.name, weight) for c in codec.spares) if s in self.raw)
            if weight != name:
                self.names[name] = weight
                self.gone.add(name)
            return

    def _fits(self, codec: Codec, shape: tuple[int, int], scales: list[str]) -> bool:
        rows, sizes = _matrix_layout(codec).rows, dict(zip(("x0", "x1"), shape, strict=True))
        for companion, scale in zip(codec.scales, scales, strict=True):
            at = next(r for r in rows if r.role.endswith(companion.role))
            entry = self.raw[scale]
            if entry.dtype not in companion.dtypes:
                return False
            if companion.how == "offset":
                if len(entry.shape) != 1:
                    return False
            elif shape_of(at, sizes) != entry.shape:
                return False
        return True

    @cached_property
    def _places(self) -> dict[tuple[str, str], dict[str, int]]:
        return {}

    def __getitem__(self, name: str) -> Coded:
        last = self._last  # read once: another thread may ask for another weight
        if last is None or last[0] != name:
            last = self._last = name, self._coded(name)
        return last[1]

    def _coded(self, name: str) -> Coded:
        found = self.weights[name]
        if len(found) == 3:
            codec, row, raw = found
            layout = _matrix_layout(codec)
            at = [r for c in codec.scales for r in layout.rows if r.role.endswith(c.role)]
            scales = [spelled(c.name, name) for c in codec.scales]
            kind = self._kind(codec, row, at, dict(zip(("x0", "x1"), self.matrices[name], strict=True)))
        else:
            module, role = found
            assert module.codec is not None
            codec, raw, base = module.codec, name, role.removesuffix(CODES)
            place = self._place(module, role, name)
            scales = []
            for companion in codec.scales:
                scale = module.tensors[base + companion.role][place]
                if scale is None:
                    raise self._error(f"a scale for {show(name)}", "none", name)
                scales.append(scale)
            if (module.path, role) not in self._kinds:
                at = [module.layout.row(base + companion.role) for companion in codec.scales]
                row = logical_row(codec, module.layout.row(role))
                self._kinds[module.path, role] = self._kind(codec, row, at, module.sizes)
            kind = self._kinds[module.path, role]
        entry = self.raw[raw]
        if prod(kind.shape) * codec.bits != prod(entry.shape) * DTYPE_BITS[entry.dtype]:
            raise self._error(
                f"{codec.name} codes of {list(kind.shape)} without padding",
                f"{show(raw)} {list(entry.shape)}",
                raw,
            )
        if codec.bits != 8 and len(entry.pieces) != 1:
            raise self._error(
                f"packed weights in one piece ({codec.name})",
                f"{len(entry.pieces)} pieces of {show(raw)}",
                raw,
            )
        grids = []
        for scale, (grid, block) in zip(scales, kind.grids, strict=True):
            if len(self.raw[scale].pieces) != 1:
                raise self._error(
                    "scales in one piece", f"{len(self.raw[scale].pieces)} pieces of {show(scale)}", scale
                )
            grids.append((scale, grid if grid is not None else self._note(scale)))
            if block:
                raise self._error(
                    f"rows of whole blocks of {block} that share a {codec.name} scale",
                    f"rows of {kind.columns} in {show(raw)}",
                    raw,
                )
        return Coded(codec, raw, kind.shape, tuple(grids), -2 if codec.across else -1)

    def _kind(self, codec: Codec, row: Row, scales: list[Row], sizes: Mapping[str, int]) -> _Kind:
        """What coded weights of one row share; `scales` are the rows of their scales, in the codec's order."""
        shape = shape_of(row, sizes)
        last = row.dims[-1].keys if row.dims else ()
        columns = axis_size(row, last[-1], sizes) if len(last) > 1 else 0
        grids: list[tuple[Grid | None, int]] = []
        for at, companion in zip(scales, codec.scales, strict=True):
            if companion.how == "offset":
                grids.append((None, 0))
                continue
            grid = self._grid(row, at, shape, companion.how, sizes)
            cut = any(term.dim == len(shape) - 1 and columns % term.divisor for term in grid.terms)
            block = max(term.divisor for term in grid.terms) if cut and companion.how not in NESTED else 0
            grids.append((grid, block))
        return _Kind(shape, columns, tuple(grids))

    def codec(self, name: str) -> Codec:
        """What a weight is coded in."""
        found = self.weights[name]
        if len(found) == 3:
            return found[0]
        assert found[0].codec is not None
        return found[0].codec

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        return tuple(dict.fromkeys(map(self.codec, self.weights)))

    def _shape(self, codec: Codec, weight: str, raw: str) -> tuple[int, int] | None:
        """Rows and columns of a weight outside the experts; None where nothing says them."""
        codes, shape = _matrix_layout(codec).rows[0], self.raw[raw].shape
        if len(logical_row(codec, codes).dims) > 1:
            return shape[0], shape[1] * codes.dims[-1].factors[0].divisor
        note = next(
            (
                n
                for c in codec.companions(True)
                if c.dims == ("?",) and (n := spelled(c.name, weight)) in self.raw
            ),
            None,
        )
        if note is None or self.path is None:
            return None
        (piece,) = self.raw[note].pieces
        with open_source(Path(self.path) / piece.file if piece.file else self.path) as file:
            text = file.pread(piece.begin, min(piece.end - piece.begin, NOTE_LIMIT))
        try:
            rows, columns = json.loads(text)["shape"]
        except (ValueError, TypeError, KeyError) as error:
            raise self._error(
                f"the shape of {show(weight)} in JSON", f"{type(error).__name__}", note
            ) from error
        if not all(type(n) is int and 0 < n < 2**31 for n in (rows, columns)):
            raise self._error(f"the shape of {show(weight)} in JSON", show(repr([rows, columns])), note)
        return rows, columns

    def _place(self, module: Module, role: str, name: str) -> int:
        key = (module.path, role)
        if key not in self._places:
            self._places[key] = {n: i for i, n in enumerate(module.tensors[role]) if n is not None}
        return self._places[key][name]

    def _grid(self, row: Row, scale: Row, shape: tuple[int, ...], how: str, sizes: Mapping[str, int]) -> Grid:
        found = shape_of(scale, sizes)
        key = (row, scale, shape, found, how)
        if key not in self._known:
            self._known[key] = Grid(how, found, terms_of(row, scale, sizes))
        return self._known[key]

    def _note(self, name: str) -> Grid:
        """A note with what is added to every scale: read whole."""
        shape = self.raw[name].shape
        if prod(shape) > NOTE_LIMIT:
            raise self._error(f"a note of at most {NOTE_LIMIT} bytes", f"{list(shape)}", name)
        return Grid("offset", shape, ())

    def _error(self, expected: str, found: str, name: str) -> QuantizationError:
        return QuantizationError(expected, found, path=self.path, tensor=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def terms_of(row: Row, scale: Row, sizes: Mapping[str, int]) -> tuple[Term, ...]:
    """How an element's place in a weight of `row` gives its scale's place in a tensor of `scale`."""
    terms = []
    for to, dim in enumerate(scale.dims):
        keys = dim.keys
        lengths = [axis_size(scale, key, sizes) for key in keys]
        for key, step in zip(keys, strides_of(lengths), strict=True):
            at = _axis_in(row, key, dim, sizes)
            if at is not None:
                terms.append(Term(*at, to, step))
    return tuple(terms)


def _axis_in(row: Row, key: str, dim: Dim, sizes: Mapping[str, int]) -> tuple[int, int, int, int] | None:
    """(dim, stride there, size, divisor) of a scale's axis in the weight's row; None for a fixed size and name axes."""
    if dim.divisor != 1:  # over a whole group: (p f)/128
        for i, there in enumerate(row.dims):
            if [f.axis for f in there.factors] == [f.axis for f in dim.factors]:
                return i, 1, shape_of(replace(row, dims=(there,)), sizes)[0], dim.divisor
        raise QuantizationError(f"a dim ({' '.join(map(str, dim.factors))}) in the codes' row", f"'{row}'")
    axis, _, by = key.partition("/")
    if axis.isdecimal():
        return None
    for i, there in enumerate(row.dims):
        keys = there.keys
        if axis in keys:
            lengths = [axis_size(row, k, sizes) for k in keys]
            at = keys.index(axis)
            return i, strides_of(lengths)[at], lengths[at], int(by or 1)
    raise QuantizationError(f"an axis '{axis}' in the codes' row", f"'{row}'")


def _matrix_layout(codec: Codec) -> Layout:
    """The rows of a matrix outside the experts under a codec."""
    weight = Row("weight", ("weight",), (Dim((Factor("x0"),)), Dim((Factor("x1"),))))
    return next(coded_layouts(Layout((weight,)), codec, ("weight",)))
