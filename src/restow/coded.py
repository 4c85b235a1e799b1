"""Every coded weight of a checkpoint: which bytes stand for it, and which scale belongs to which of its elements.

Experts' weights are found by their rows, others by `coded_matrix`; a weight is looked at when it is asked for. Rejected
by name (`QuantizationError`) are padded rows of packed codes, and packed codes or scales in several pieces.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from restow.checkpoint import Checkpoint
from restow.codecs import CODES, COMPANIONS, NESTED, WEIGHTS, Codec
from restow.coded_matrix import NOTE_LIMIT, Matrix, find_matrix
from restow.coded_rows import logical_row
from restow.coding import Grid
from restow.entries import DTYPE_BITS, Entry
from restow.errors import QuantizationError, show
from restow.layout import axis_size, shape_of
from restow.module import Module
from restow.notation import Row
from restow.scale_terms import terms_of


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
        found = self._view.weights[name]
        shape = found.shape if isinstance(found, Matrix) else coded.shape
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
        """The names of those whose tensors lie in several pieces."""
        names = self._view.names
        return frozenset(
            names.get(name, name)
            for name in self._view.several
            if name not in self._view.gone or name in names
        )


class CodedWeights(Mapping[str, Coded]):
    """Every coded weight by its name in the view: an expert's raw name, any other's without what the codec adds."""

    def __init__(self, found: Checkpoint, modules: Mapping[str, Module], keep: Container[str]) -> None:
        """`modules` are the experts modules of `found` as the view has them; `keep`: what stays in codes."""
        self.raw, self.several, self.dtype = found.tensors, found.several, value_dtype(found.config)
        self.path = found.path
        self.weights: dict[str, tuple[Module, str] | Matrix] = {}
        self.gone: set[str] = set()  # raw names that the view does not show as they are
        self.names: dict[str, str] = {}  # raw name -> name in the view, where that is another
        self._known: dict[tuple[Row, Row, tuple[int, ...], tuple[int, ...], str], Grid] = {}
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._places: dict[tuple[str, str], dict[str, int]] = {}
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
            matrix = find_matrix(name, self.raw, found.codec.codecs, self.path)
            if matrix is not None:
                self._add(matrix)

    def _add(self, matrix: Matrix) -> None:
        self.weights[matrix.name] = matrix
        self.gone.update(matrix.scales, matrix.spares)
        if matrix.name != matrix.raw:
            self.names[matrix.raw] = matrix.name
            self.gone.add(matrix.raw)

    def __getitem__(self, name: str) -> Coded:
        last = self._last  # read once: another thread may ask for another weight
        if last is None or last[0] != name:
            last = self._last = name, self._coded(name)
        return last[1]

    def _coded(self, name: str) -> Coded:
        found = self.weights[name]
        if isinstance(found, Matrix):
            kind = self._kind(found.codec, found.row, found.scale_rows, found.sizes)
            return self._judged(found.codec, found.raw, kind, found.scales)
        module, role = found
        assert module.codec is not None
        codec, base = module.codec, role.removesuffix(CODES)
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
        return self._judged(codec, name, self._kinds[module.path, role], scales)

    def _judged(self, codec: Codec, raw: str, kind: _Kind, scales: Sequence[str]) -> Coded:
        """The weight whose codes are `raw`. Raises `QuantizationError` for codes or scales that nobody can decode."""
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

    def _kind(self, codec: Codec, row: Row, scales: Sequence[Row], sizes: Mapping[str, int]) -> _Kind:
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
        if isinstance(found, Matrix):
            return found.codec
        assert found[0].codec is not None
        return found[0].codec

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        """Every codec that a weight is coded in."""
        return tuple(dict.fromkeys(map(self.codec, self.weights)))

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
