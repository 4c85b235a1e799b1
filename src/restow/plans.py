"""A plan: which bytes of which file go to which place of which tensor. A value: comparable, printable, JSON both ways.

It holds integers and names only; making one is `planning`, running one is `torch.read`. `Plan.from_json` rejects text
that is no plan of this version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from restow.boxes import strides_of
from restow.coding import Coding, Grid, Term, byte_box, coded_bytes, jobs, scale_box
from restow.entries import DTYPE_BITS
from restow.errors import UsageError
from restow.proof import Pattern
from restow.reads import merged, read_bytes, read_runs
from restow.targets import Target

VERSION = 3


class Part(NamedTuple):
    """A piece of a source tensor: its name and dtype, and its bytes `file[begin:end]` ("" for a tensor in memory).

    Codes count their `coding` in `Plan.codings`, and their `scales` in `Plan.parts`, one for each of the coding's grids;
    copies from them are in elements of what they decode to.
    """

    name: str
    dtype: str
    file: str
    begin: int
    end: int
    coding: int = -1
    scales: tuple[int, ...] = ()


class Copy(NamedTuple):
    """One strided copy: from element `at` of part `source` to place `start` of `target`, along a shared pattern.

    Indices count `Plan.parts`, `Plan.targets` and `Plan.patterns`. `start` is in the target's local places, per dim.
    """

    source: int
    at: int
    target: int
    start: tuple[int, ...]
    pattern: int


class Read(NamedTuple):
    """Bytes that are read in one piece: `file[begin:end]`."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Reads and copies for one rank.

    Copies are in the order of the source's bytes. `unused` names source tensors that have no place in the destination;
    `passed` those of them that the family's rows excuse; `missing` destinations that nothing fills. `layouts` gives
    (experts module of the source, layout there, layout here).
    """

    parts: tuple[Part, ...]
    targets: tuple[Target, ...]
    patterns: tuple[Pattern, ...]
    copies: tuple[Copy, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str, str], ...] = ()
    codings: tuple[Coding, ...] = ()

    def batches(self) -> Iterator[tuple[Copy, ...]]:
        """Copies that share one read (an expert that is wanted twice), in order."""
        group: list[Copy] = []
        for copy in self.copies:
            if group:
                first = group[0]
                if copy.source != first.source or copy.at != first.at or not self._alike(first, copy):
                    yield tuple(group)
                    group = []
            group.append(copy)
        if group:
            yield tuple(group)

    def _alike(self, a: Copy, b: Copy) -> bool:
        p, q = self.patterns[a.pattern], self.patterns[b.pattern]
        return p.sizes == q.sizes and p.source == q.source

    def itemsize(self, copy: Copy) -> int:
        """Bytes of one source element; of packed codes, the byte that several share."""
        part = self.parts[copy.source]
        return DTYPE_BITS[part.dtype] // 8 if part.coding < 0 else 1

    def read_bytes(self, copy: Copy) -> int:
        """The bytes that one copy reads, gaps that are read through and scales included."""
        part, pattern = self.parts[copy.source], self.patterns[copy.pattern]
        if part.coding < 0:
            return read_bytes(pattern.sizes, pattern.source, self.itemsize(copy))
        widths = [DTYPE_BITS[self.parts[i].dtype] // 8 for i in part.scales]
        return coded_bytes(self.codings[part.coding], widths, copy.at, pattern.sizes, pattern.source)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the files' data sections that this plan reads, gaps that are read through included."""
        return sum(self.read_bytes(batch[0]) for batch in self.batches())

    @cached_property
    def written(self) -> int:
        """Bytes that this plan writes, in the destination's dtypes."""
        elements = [prod(pattern.sizes) for pattern in self.patterns]
        bits = [DTYPE_BITS[target.dtype] for target in self.targets]
        return sum(elements[copy.pattern] * bits[copy.target] // 8 for copy in self.copies)

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Every read, sorted, adjacent ones merged."""
        runs: list[tuple[str, int, int]] = []
        for batch in self.batches():
            copy = batch[0]
            part, itemsize = self.parts[copy.source], self.itemsize(copy)
            if part.coding >= 0:
                runs += self._coded_runs(copy)
                continue
            base = part.begin + copy.at * itemsize
            for offset, length in read_runs(*self.patterns[copy.pattern][:2], itemsize):
                runs.append((part.file, base + offset, base + offset + length))
        return tuple(Read(*run) for run in merged(sorted(runs)))

    def _coded_runs(self, copy: Copy) -> Iterator[tuple[str, int, int]]:
        part, (sizes, steps, _) = self.parts[copy.source], self.patterns[copy.pattern]
        coding = self.codings[part.coding]
        for first, count in jobs(coding, copy.at, sizes, steps):
            at, some = copy.at + (first * steps[0] if sizes else 0), (count, *sizes[1:]) if sizes else ()
            codes = byte_box(coding, at, some, steps)
            for offset, length in read_runs(codes.sizes, codes.steps, 1):
                yield part.file, part.begin + codes.at + offset, part.begin + codes.at + offset + length
            for number, scale in enumerate(self.parts[i] for i in part.scales):
                width, strides = DTYPE_BITS[scale.dtype] // 8, strides_of(coding.grids[number].shape)
                box = scale_box(coding, number, at, some, steps)
                base = scale.begin + width * sum(
                    low * step for (low, _), step in zip(box, strides, strict=True)
                )
                for offset, length in read_runs(tuple(n for _, n in box), strides, width):
                    yield scale.file, base + offset, base + offset + length

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` gives an equal plan back."""
        names = (
            "parts",
            "targets",
            "patterns",
            "copies",
            "missing",
            "unused",
            "passed",
            "layouts",
            "codings",
        )
        body = {name: getattr(self, name) for name in names}
        return json.dumps({"restow_plan": VERSION, **body}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote. Raises `UsageError` for other text."""
        try:
            body = json.loads(text)
            if body["restow_plan"] != VERSION:
                raise UsageError(f"a plan of version {VERSION}", f"version {body['restow_plan']!r}")
            return Plan(
                parts=tuple(_part(*part) for part in body["parts"]),
                targets=tuple(Target(name, tuple(shape), dtype, _deep(runs))
                              for name, shape, dtype, runs in body["targets"]),
                patterns=tuple(Pattern(*map(_deep, pattern)) for pattern in body["patterns"]),
                copies=tuple(Copy(s, at, t, tuple(start), p) for s, at, t, start, p in body["copies"]),
                missing=tuple(body["missing"]),
                unused=tuple(body["unused"]),
                passed=tuple(body["passed"]),
                layouts=_deep(body["layouts"]),
                codings=tuple(_coding(coding) for coding in body["codings"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError("the JSON text of a plan", f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        files = len({part.file for part in self.parts})
        lines = [
            f"{len(self.copies):,} copies from {len(self.parts):,} tensors in {files:,} files "
            f"into {len(self.targets):,} tensors: {self.bytes:,} bytes to read, {self.written:,} to write"
        ]
        lines += [f"  {path}: {src} -> {dst}" for path, src, dst in self.layouts[:3]]
        if len(self.layouts) > 3:
            lines.append(f"  ... {len(self.layouts) - 3} more experts modules")
        for label, names in (("missing", self.missing), ("unused", self.unused), ("passed", self.passed)):
            if names:
                lines.append(
                    f"  {label}: {', '.join(names[:3])}"
                    + (f" and {len(names) - 3} more" if names[3:] else "")
                )
        return "\n".join(lines)


def _part(name: str, dtype: str, file: str, begin: int, end: int, coding: int, scales: list[int]) -> Part:
    return Part(name, dtype, file, begin, end, coding, tuple(scales))


def _coding(value: Any) -> Coding:
    codec, element, bits, shape, start, grids, apart = _deep(value)
    made = tuple(Grid(how, shape, tuple(Term(*term) for term in terms)) for how, shape, terms in grids)
    return Coding(codec, element, bits, shape, start, made, apart)


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value
