"""A plan: which bytes of which file go to which place of which tensor. A value: comparable, printable, JSON both ways.

It holds integers and names only; making one is `planning`, running one is `torch.read`. `Plan.from_json` rejects text
that is no plan of this version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from restow.entries import DTYPE_BITS
from restow.errors import UsageError
from restow.moves import Pattern
from restow.reads import merged, read_bytes, read_runs
from restow.targets import Target

VERSION = 1


class Part(NamedTuple):
    """A piece of a source tensor: its name and dtype, and its bytes `file[begin:end]` ("" for a tensor in memory)."""

    name: str
    dtype: str
    file: str
    begin: int
    end: int


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

    def batches(self) -> Iterator[tuple[Copy, ...]]:
        """Copies that share one read (an expert that is wanted twice), in order."""
        group: list[Copy] = []
        for copy in self.copies:
            if group and not self._same_read(group[0], copy):
                yield tuple(group)
                group = []
            group.append(copy)
        if group:
            yield tuple(group)

    def _same_read(self, a: Copy, b: Copy) -> bool:
        if a.source != b.source or a.at != b.at:
            return False
        p, q = self.patterns[a.pattern], self.patterns[b.pattern]
        return p.sizes == q.sizes and p.source == q.source

    def itemsize(self, copy: Copy) -> int:
        """Bytes of one source element."""
        return DTYPE_BITS[self.parts[copy.source].dtype] // 8

    @cached_property
    def bytes(self) -> int:
        """Bytes of the files' data sections that this plan reads, gaps that are read through included."""
        return sum(
            read_bytes(*self.patterns[batch[0].pattern][:2], self.itemsize(batch[0]))
            for batch in self.batches()
        )

    @cached_property
    def written(self) -> int:
        """Bytes that this plan writes, in the destination's dtypes."""
        from math import prod

        return sum(
            prod(self.patterns[copy.pattern].sizes) * DTYPE_BITS[self.targets[copy.target].dtype] // 8
            for copy in self.copies
        )

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Every read, sorted, adjacent ones merged."""
        runs = []
        for batch in self.batches():
            copy = batch[0]
            part, itemsize = self.parts[copy.source], self.itemsize(copy)
            base = part.begin + copy.at * itemsize
            for offset, length in read_runs(*self.patterns[copy.pattern][:2], itemsize):
                runs.append((part.file, base + offset, base + offset + length))
        return tuple(Read(*run) for run in merged(sorted(runs)))

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` gives an equal plan back."""
        names = ("parts", "targets", "patterns", "copies", "missing", "unused", "passed", "layouts")
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
                parts=tuple(Part(*part) for part in body["parts"]),
                targets=tuple(Target(name, tuple(shape), dtype, _deep(runs))
                              for name, shape, dtype, runs in body["targets"]),
                patterns=tuple(Pattern(*map(_deep, pattern)) for pattern in body["patterns"]),
                copies=tuple(Copy(s, at, t, tuple(start), p) for s, at, t, start, p in body["copies"]),
                missing=tuple(body["missing"]),
                unused=tuple(body["unused"]),
                passed=tuple(body["passed"]),
                layouts=_deep(body["layouts"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
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


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value
