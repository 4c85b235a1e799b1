"""What a verification says: differences, one by one, and the report of them; and which part of the tensors is compared.

Values with a readable text, and slices in an order that a seed fixes. It reads nothing and rejects nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from restow.checkpoint import Checkpoint
from restow.errors import show
from restow.prepare import Prepared
from restow.problems import Problem
from restow.targets import Target
from restow.torch.chunks import CHUNK, Slice, room, side_by_side, slices

SEED = 20261123


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor, or one leaf of the experts, that is not the same on both sides.

    `kind` is "values", "missing", "extra", "shape", "dtype" or "digest"; `name` is the second checkpoint's name (or the
    only one's); `count` of `total` elements differ, the first at `index` with `values`; `why` is what explains it.
    """

    kind: str
    name: str
    leaf: tuple[str, int, int] | None = None  # role, expert, projection
    count: int = 0
    total: int = 0
    index: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    max_abs: float = 0.0
    why: str = ""
    labels: tuple[str, ...] = ("gate", "up")

    def __str__(self) -> str:
        text = f"{self.kind:<8}{show(self.name)}"
        if self.leaf is not None:
            role, e, p = self.leaf
            word = "down" if role.startswith("out") else self.labels[p] if p < len(self.labels) else str(p)
            text += f" (expert {e}, {word})"
        if self.count:
            pair = " and ".join(f"{value:g}" for value in self.values)
            text += f": {self.count:,} of {self.total:,} elements, first at {list(self.index)}: {pair}, "
            text += f"at most {self.max_abs:g} apart"
        return text + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was compared and what differs. `equal` is True only if nothing differs in value, name or shape.

    `notes` are differences that change no value (dtypes that hold the same numbers); `tensors` counts the tensors that
    were compared, `bytes_read` the bytes of both sides.
    """

    equal: bool
    differences: tuple[Difference, ...]
    tensors: int
    bytes_read: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sampled: str
    seconds: float
    problems: tuple[Problem, ...] = field(default=(), repr=False)  # what the warnings are made of

    def __str__(self) -> str:
        rate = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        count = len(self.differences)
        verdict = "equal" if self.equal else f"{count} difference{'s' if count != 1 else ''}"
        head = f"{verdict}: {self.tensors:,} tensors, {self.bytes_read:,} bytes read, {self.seconds:.1f} s"
        lines = [f"{head} ({rate:.1f} GB/s){self.sampled}"]
        lines += [f"  {difference}" for difference in self.differences[:20]]
        if len(self.differences) > 20:
            lines.append(f"  ... {len(self.differences) - 20} more")
        lines += [f"  note: {note}" for note in self.notes[:20]]
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def sampled(sample: float | None) -> str:
    """What a report's first line says of a sample."""
    return "" if sample is None else f", a sample of {sample:.1%} (seed {SEED})"


def chosen(
    second: Checkpoint, prepared: Prepared, targets: Mapping[str, Target], sample: float | None
) -> Iterator[Slice]:
    """The slices of all targets, or of a seeded part of their leaves."""
    if sample is None:
        yield from side_by_side(prepared, (t for t in targets.values() if all(t.shape)), CHUNK // 2)
        return
    every = [
        part for target in targets.values() if all(target.shape) for part in _leaf_slices(second, target)
    ]
    count = max(1, round(sample * len(every)))
    picked = sorted(random.Random(SEED).sample(range(len(every)), min(count, len(every))))
    for i in picked:
        yield from [every[i]] if room(every[i].target) <= CHUNK else slices(every[i].target, CHUNK // 2)


def _leaf_slices(second: Checkpoint, target: Target) -> Iterator[Slice]:
    """One slice an expert where experts are stacked first, else the whole tensor."""
    owner = second.expert_tensors.get(target.name)
    row = second.modules[owner[0]].layout.row(owner[1]) if owner else None
    if row is None or not row.dims or str(row.dims[0]) != "e":
        yield Slice(target, 0)
        return
    rest = tuple(((0, n),) for n in target.shape[1:])
    for e in range(target.shape[0]):
        yield Slice(target._replace(runs=(((e, 1),), *rest)), 0)
