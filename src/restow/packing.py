"""Destinations in codes: which blocks of a weight share a scale, and where the codes and scales of a part of it lie.

A destination is seen as the quantised checkpoint that it will be: `decoded` gives its plain weights, which any plan can
fill, and says which scale belongs to which element; that is all that an encoder needs. Rejected by name are codecs
with more than one scale, and dtypes that a scale cannot be made in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from restow.boxes import Run, strides_of
from restow.checkpoint import Checkpoint
from restow.codecs import Codec
from restow.coded import Coded, CodedWeights
from restow.coding import Grid
from restow.errors import QuantizationError, show
from restow.targets import Runs

SCALES = ("F32", "F8_E8M0", "U8")


class Packed(NamedTuple):
    """A weight in codes: the raw names of its codes and its scale, the shapes of both, and what they decode to.

    `blocks` has one number per dim of `shape`: how many places there share a scale.
    """

    codec: Codec
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    codes: str
    codes_shape: tuple[int, ...]
    codes_dtype: str
    scale: str
    scale_dtype: str
    grid: Grid

    @property
    def per(self) -> int:
        """Elements of the last dim that one place of the codes' dim of that number stands for."""
        at = len(self.shape) - 1
        return -(-self.shape[at] // self.codes_shape[at]) if self.shape[at] else 1

    def codes_runs(self, runs: Runs) -> Runs:
        """The places of the codes of a part."""
        *outer, last = runs
        inner = tuple((start // self.per, -(-n // self.per)) for start, n in last)
        more = (((0, n),) for n in self.codes_shape[len(self.shape) :])
        return (*outer, inner, *more)

    def scale_runs(self, runs: Runs) -> Runs:
        """The places of the scales of a part that consists of whole blocks."""
        found: list[tuple[Run, ...]] = [((0, n),) for n in self.grid.shape]
        for term in self.grid.terms:
            block = self.blocks[term.dim]
            found[term.to] = tuple(
                (start // block, -(-(start + n) // block) - start // block) for start, n in runs[term.dim]
            )
        return tuple(found)

    def needs(self, codes: Runs, scales: Runs) -> Runs:
        """The part of the weight, in whole blocks, that these places of codes and scales follow from."""
        found = [list(dim) for dim in codes[: len(self.shape)]]
        found[-1] = [(start * self.per, n * self.per) for start, n in found[-1]]
        for term in self.grid.terms:
            block = self.blocks[term.dim]
            found[term.dim] += [(start * block, n * block) for start, n in scales[term.to]]
        return whole_blocks([tuple(dim) for dim in found], self.shape, self.blocks)


def packed_weights(view: Checkpoint) -> dict[str, Packed]:
    """The coded weights of a destination (`decoded(...)` of it), by their names in the view."""
    weights = view.coded
    assert isinstance(weights, CodedWeights)
    return {name: _packed(weights[name], weights) for name in weights}


def _packed(coded: Coded, weights: CodedWeights) -> Packed:
    raw = weights.raw[coded.name]
    if len(coded.scales) != 1 or coded.scales[0][1].how not in ("multiply", "exponent"):
        found = f"{len(coded.scales)} ({coded.codec.name})"
        raise _refused(coded.name, "codes with one scale, which encoding makes", found)
    ((scale, grid),) = coded.scales
    dtype = weights.raw[scale].dtype
    if dtype not in SCALES:
        expected = f"scales in {', '.join(SCALES)} to encode with"
        raise _refused(coded.name, expected, f"{dtype} of {show(scale)}")
    blocks = blocks_along(coded.shape, grid, coded.name)
    return Packed(coded.codec, coded.shape, blocks, coded.name, raw.shape, raw.dtype, scale, dtype, grid)


def blocks_along(shape: Sequence[int], grid: Grid, name: str) -> tuple[int, ...]:
    """Per dim of a weight, how many places share a scale: all of them where the scale has no such axis."""
    found = []
    for dim, size in enumerate(shape):
        terms = [term for term in grid.terms if term.dim == dim]
        dividing = any(term.divisor > 1 for term in terms)
        whole = prod(term.size for term in terms) == size and len({term.to for term in terms}) == 1
        if terms and (not whole or (dividing and len(terms) > 1)):
            raise _refused(name, "scales along whole dims, to encode with", f"some along parts of dim {dim}")
        found.append(terms[0].divisor if terms else max(size, 1))
    return tuple(found)


def _refused(name: str, expected: str, found: str) -> QuantizationError:
    return QuantizationError(
        expected, found, tensor=name, sections=[("tensor", [show(name)])],
        hint="encode with the tool that reads this format, or into one of fp8, mxfp4, mxfp8, nf4",
    )  # fmt: skip


def pieces(runs: Runs, blocks: Sequence[int], limit: int) -> Iterator[Runs]:
    """A part cut into smaller ones of whole blocks, of about `limit` elements at most, in row-major order."""
    sizes = [sum(n for _, n in dim) for dim in runs]
    at = next((i for i in range(len(sizes)) if prod(sizes[i + 1 :]) * blocks[i] <= limit), len(sizes) - 1)
    while any(block > 1 for block in blocks[:at]):
        at -= 1  # what shares a scale stays together
    step = max(1, limit // (max(1, prod(sizes[at + 1 :])) * blocks[at])) * blocks[at]
    for outer in product(*(_singles(dim) for dim in runs[:at])):
        for some in _chunks(runs[at], step, blocks[at]):
            yield (*outer, some, *runs[at + 1 :])


def _singles(dim: tuple[Run, ...]) -> Iterator[tuple[Run, ...]]:
    return (((i, 1),) for start, n in dim for i in range(start, start + n))


def _chunks(dim: tuple[Run, ...], step: int, block: int) -> Iterator[tuple[Run, ...]]:
    """Runs of at most `step` places in all, cut where blocks begin."""
    group: list[Run] = []
    room = step
    for start, n in dim:
        while n:
            count = min(n, room)
            group.append((start, count))
            start, n = start + count, n - count
            room -= -(-count // block) * block
            if room <= 0:
                yield tuple(group)
                group, room = [], step
    if group:
        yield tuple(group)


def first_element(runs: Runs, shape: Sequence[int]) -> int:
    """The row-major number of the first place of a part."""
    return sum(dim[0][0] * step for dim, step in zip(runs, strides_of(shape), strict=True))


def whole_blocks(runs: Sequence[Sequence[Run]], shape: Sequence[int], blocks: Sequence[int]) -> Runs:
    """A part grown to whole blocks."""
    found = []
    for dim, size, block in zip(runs, shape, blocks, strict=True):
        grown: list[Run] = []
        for start, n in sorted(dim):
            low, high = start // block * block, min(size, -(-(start + n) // block) * block)
            if grown and low <= sum(grown[-1]):
                low = grown[-1][0]
                high = max(high, sum(grown.pop()))
            grown.append((low, high - low))
        found.append(tuple(grown))
    return tuple(found)
