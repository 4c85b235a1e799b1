"""What only the values show: NaN and infinity, bytes that are no bool, experts of zeros, scales that are none.

A value is looked at where it lies, on its way to somewhere else: the largest of its elements' bits, once as signed and
once as unsigned numbers, tells whether any is NaN or infinite, and whether all are zero. It changes no value and
rejects nothing: its findings are `Problem`s, of which only scales without a value are fatal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from restow.checkpoint import Checkpoint
from restow.codecs import WEIGHTS
from restow.errors import (
    AmbiguousTensorError,
    NonFiniteError,
    QuantizationError,
    RestowError,
    SuspiciousTensorError,
    TensorValueError,
    show,
)
from restow.landing import Wish, chosen_experts
from restow.layout import axis_size
from restow.located import located
from restow.notation import Row
from restow.prepare import Prepared
from restow.problems import Problem
from restow.quantized import factors_of, scales_of
from restow.required import tied_pair
from restow.targets import whole_target
from restow.torch.chunks import Filled, Slice, stream
from restow.torch.leaves import name_index
from restow.torch.raw import raw
from restow.torch.scale_values import suspects

BLOCK = 1 << 18  # elements that are looked at together: they stay in the cache
AGAIN = "get the file again unless it was trained so: values are kept as they are"
NAMED = 20  # places of one tensor that are told
# The bits of infinity, or of the lowest NaN where a dtype has no infinity.
LIMITS = {
    "F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C,
}  # fmt: skip
UNSIGNED: Mapping[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: Mapping[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

Array = np.ndarray[Any, Any]
Names = Callable[[str, tuple[int, ...]], str]  # how an element of a tensor is named for people


@dataclass
class Values:
    """The findings of one pass; `look` is called by one thread. `rows` are the expert tensors' rows.

    `named` says how a place in a tensor is told; `scales` are names of tensors that scale others.
    """

    rows: Mapping[str, Row]
    named: Names
    scales: Mapping[str, str] = field(default_factory=dict)
    odd: dict[str, list[str]] = field(default_factory=dict)  # tensor -> places, the first of them
    counts: dict[str, int] = field(default_factory=dict)
    bools: dict[str, int] = field(default_factory=dict)
    peaks: dict[tuple[str, int], int] = field(
        default_factory=dict
    )  # expert tensor, number of a part -> largest
    worthless: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)

    def look(self, filled: Filled) -> None:
        """Look at one slice of a tensor."""
        target, tensor = filled.slice.target, filled.tensor
        if target.name in self.scales:
            self._scale(target.name, tensor)
        elif target.dtype in LIMITS or target.dtype == "BOOL":
            flat = tensor.reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[tensor.element_size()])
            for key, first, part in self._parts(filled, flat):
                self._part(target.name, target.dtype, target.shape, key, first, part)

    def take(self, filled: Filled, begin: int, data: memoryview) -> None:
        """Look at some bytes of a slice, from byte `begin` of it, as at a tensor that is neither experts nor scales."""
        target, size = filled.slice.target, filled.tensor.element_size()
        if target.dtype in LIMITS or target.dtype == "BOOL":
            first = (filled.slice.offset + begin) // size
            self._part(
                target.name, target.dtype, target.shape, None, first, np.frombuffer(data, UNSIGNED[size])
            )

    def _parts(self, filled: Filled, flat: Array) -> Iterator[tuple[int | None, int, Array]]:
        """(number of the leaf or 0; first element; elements) for each part of a slice."""
        target, row = filled.slice.target, self.rows.get(filled.slice.target.name)
        first = filled.slice.offset // filled.tensor.element_size()
        if row is None:
            yield None, first, flat
        elif row.dims and str(row.dims[0]) == "e" and len(target.runs[0]) == 1:
            start, count = target.runs[0][0]
            whole = filled.tensor.shape[1:] == target.shape[1:]
            halves = 2 if whole and str(row.dims[1]).startswith("(p ") and target.shape[1] % 2 == 0 else 1
            step = len(flat) // max(1, count * halves)
            for i in range(count * halves):
                yield start * halves + i, first + i * step, flat[i * step : (i + 1) * step]
        else:
            yield 0, first, flat

    def _part(
        self, name: str, dtype: str, shape: tuple[int, ...], key: int | None, first: int, part: Array
    ) -> None:
        limit, peak = LIMITS.get(dtype, 0), 0
        sign = 1 << (8 * part.itemsize - 1)
        for at in range(0, len(part), BLOCK):
            block = part[at : at + BLOCK]
            if dtype == "BOOL":
                if int(block.max()) > 1:
                    self.bools[name] = self.bools.get(name, 0) + int(np.count_nonzero(block > 1))
                continue
            above, below = int(block.view(SIGNED[part.itemsize]).max()), int(block.max()) - sign
            peak = max(peak, above, below)
            if max(above, below) >= limit:
                places = np.flatnonzero(block & np.array(sign - 1, block.dtype) >= limit)
                self.counts[name] = self.counts.get(name, 0) + len(places)
                told = self.odd.setdefault(name, [])
                for place in places[: NAMED - len(told)]:
                    index = tuple(int(i) for i in np.unravel_index(first + at + int(place), shape))
                    if (text := self.named(name, index)) not in told:
                        told.append(text)
        if key is not None:
            self.peaks[name, key] = max(peak, self.peaks.get((name, key), 0))

    def _scale(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype is torch.uint8:  # an exponent
            tensor = tensor.view(torch.float8_e8m0fnu)
        small = tensor.element_size() == 1
        if not tensor.numel() or (_plain_bytes if small else _plain)(tensor):
            return
        values = tensor.to(torch.float32).reshape(-1)
        if bool((values != values).any()):
            self.worthless[name] = "NaN"
        elif bool((values.abs() == float("inf")).any()) or bool((values < 0).any() and not small):
            self.worthless[name] = "infinite or below 0"
        elif bool((values == 0).any()) and not small:  # of 8 bits it may be rounded to 0
            self.zeros[name] = int((values == 0).sum())

    def problems(self) -> tuple[Problem, ...]:
        """What was found."""
        return tuple(_problems(self))


def _problems(seen: Values) -> Iterator[Problem]:
    if seen.worthless:
        yield Problem(
            _error(
                QuantizationError,
                "scales that are finite and not below 0",
                seen.worthless,
                "scales",
                "get the file again: by such a scale a weight has no value",
            ),
            True,
        )
    full = {name for (name, _), peak in seen.peaks.items() if peak}
    zeros = {
        n: f"{count} times 0" for n, count in seen.zeros.items() if seen.scales[n] in full or not seen.peaks
    }
    if zeros:
        yield Problem(
            _error(QuantizationError, "scales above 0 over weights that are not 0", zeros, "scales", AGAIN),
            False,
        )
    if seen.odd:
        lines = {
            name: f"NaN or infinite: {seen.counts[name]} values"
            + ("" if places == [show(name)] else f" ({places[0]})")
            for name, places in seen.odd.items()
        }
        yield Problem(_error(NonFiniteError, "finite values", lines, "tensors", AGAIN), False)
    if seen.bools:
        lines = {name: f"{count} other bytes" for name, count in seen.bools.items()}
        yield Problem(
            _error(TensorValueError, "bytes 0 and 1 in tensors of BOOL", lines, "tensors", AGAIN), False
        )
    empty: dict[str, list[int]] = {}
    for (name, number), peak in seen.peaks.items():
        if not peak:
            empty.setdefault(name, []).append(number)
    if empty:
        yield no_values(
            {n: "only zeros" + ("" if len(at) == 1 else f" in {len(at)} parts") for n, at in empty.items()}
        )


def no_values(names: Mapping[str, str]) -> Problem:
    """Experts that hold nothing but zeros."""
    return Problem(_error(SuspiciousTensorError, "experts with values", names, "tensors", AGAIN), False)


def _error(
    kind: type[RestowError], expected: str, found: Mapping[str, str], label: str, hint: str
) -> RestowError:
    name, what = next(iter(found.items()))
    return kind(
        expected,
        what if len(found) == 1 else f"{len(found)} tensors without, such as {show(name)}: {what}",
        tensor=name,
        sections=[(label, (f"{show(n)}: {text}" for n, text in found.items()))],
        hint=hint,
    )


def _plain(scales: torch.Tensor) -> bool:
    """Whether all are finite and above 0, in one pass."""
    low, high = torch.aminmax(scales)  # both are NaN where one value is
    return float(low) > 0 and float(high) < float("inf")


def _plain_bytes(scales: torch.Tensor) -> bool:
    """The same of scales of 8 bits, 0 included: all below the bytes that are NaN, infinite or have a sign."""
    limit = {torch.float8_e8m0fnu: 0xFF, torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}.get(
        scales.dtype, 0
    )
    return int(scales.reshape(-1).view(torch.uint8).max()) < limit


def plain_name(name: str, index: tuple[int, ...]) -> str:
    """A tensor's own name."""
    return show(name)


def source_names(prepared: Prepared) -> Names:
    """Elements of a destination by the tensor of the source that they come from."""

    def named(name: str, index: tuple[int, ...]) -> str:
        if name not in prepared.owners or prepared.owners[name][0] not in prepared.pairs:
            return show(name)  # codes have no place in a source of values
        path, role, place = prepared.owners[name]
        module = prepared.modules[path]
        source = prepared.source.modules[prepared.pairs[path]]
        row, whence = module.layout.row(role), source.layout.row(role)
        at = name_index(row, place, module.sizes)
        for dim, number in zip(row.dims, index, strict=True):
            for key in reversed(dim.keys):
                number, at[key] = divmod(number, axis_size(row, key, module.sizes))
        chosen = chosen_experts(prepared.wish.experts, source.path, source.sizes.get("e", 0))
        if chosen is not None and "e" in at:
            at["e"] = chosen[at["e"]]
        flat = 0
        for axis in whence.name_axes:
            flat = flat * axis_size(whence, axis, source.sizes) + at[axis]
        return show(source.tensors[role][flat])

    return named


def values_of(found: Checkpoint) -> Values:
    """A pass over a checkpoint's own tensors."""
    rows = {
        name: found.modules[path].layout.row(role)
        for name, (path, role) in found.expert_tensors.items()
        if role in WEIGHTS
    }
    return Values(rows, plain_name, factors_of(found))


def judge_scales(found: Checkpoint, threads: int | None) -> tuple[Problem, ...]:
    """Look at the scales of a checkpoint before anything is decoded by them: few and small ones, a
    float for a block. Those of other codecs are a part of the data, which a load does not judge."""
    scales = {n: w for n, w in scales_of(found).items() if found.tensors[n].dtype in ("F32", "F16", "BF16")}
    odd = suspects(found, list(scales))
    scales = {name: weight for name, weight in scales.items() if name in odd}
    seen = Values({}, plain_name, scales)
    targets = {n: whole_target(n, found.tensors[n].shape, found.tensors[n].dtype) for n in scales}
    own = Prepared(found, targets, Wish(), {}, {}, {}, {name: name for name in targets})

    def look(filled: Sequence[Filled]) -> None:
        for one in filled:
            seen.look(one)

    parts = (Slice(target, 0) for target in targets.values() if all(target.shape))
    if targets:
        stream(own, parts, look, threads=threads, chunk=1 << 20)
    return tuple(located(problem, found, found.path or "") for problem in seen.problems())


class Tie:
    """The bytes of a head and of the embedding that the config ties it to, where both are there and may be equal."""

    def __init__(self, found: Checkpoint) -> None:
        self._hashes = {name: xxhash.xxh3_128() for name in tied_pair(found) or ()}

    def look(self, filled: Filled) -> None:
        """The next bytes of one of the two, or of any other tensor."""
        self.take(filled.slice.target.name, raw(filled.tensor))

    def take(self, name: str, data: memoryview) -> None:
        """The same, by the tensor's name."""
        if (digest := self._hashes.get(name)) is not None:
            digest.update(data)

    def problems(self) -> tuple[Problem, ...]:
        """That they differ, if they do."""
        if len({digest.digest() for digest in self._hashes.values()}) < 2:
            return ()
        head, embedding = self._hashes
        error = AmbiguousTensorError(
            "one tensor for head and embedding, since the config ties them",
            "two whose values differ",
            tensor=head,
            sections=[("tensors", [show(head), show(embedding)])],
            hint="correct tie_word_embeddings in config.json, or drop the head",
        )
        return (Problem(error, False),)
