"""What is to be filled: a tensor by its global shape and the index runs of it that are held here.

One type serves DTensor placements, `Shard`, expert lists, DCP's boxes and the chunks of a stream: the planner sees
nothing else. Runs per dim, not one range, since a mesh can give a rank rows {0, 2}. It rejects shards that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from restow.boxes import Run, held, whole
from restow.errors import UsageError
from restow.layout import Sizes, axis_size
from restow.notation import Row

Runs = tuple[tuple[Run, ...], ...]  # per dim: (start, length), in local order


class Target(NamedTuple):
    """A destination tensor: global `shape`, `dtype` as safetensors spells it, and the runs held here, per dim."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    runs: Runs

    @property
    def local_shape(self) -> tuple[int, ...]:
        return held(self.runs)


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of an axis of the expert weights, cut as `torch.chunk` cuts: ceil(n / of) each, the last ones short.

    Shard(axis="e", rank=3, of=8): for plain tensors that hold a part; DTensors say it themselves.
    Raises `UsageError` for a rank that is not below `of`.
    """

    axis: str
    rank: int
    of: int

    def __post_init__(self) -> None:
        whole_numbers = type(self.rank) is int and type(self.of) is int
        if not whole_numbers or self.of < 1 or not 0 <= self.rank < self.of:
            raise UsageError("a rank from 0 to of - 1", f"rank {self.rank} of {self.of}")

    def run(self, size: int) -> Run:
        """The run of this rank along an axis of `size`: (start, length); length 0 where no part is left."""
        part = -(-size // self.of)
        start = min(self.rank * part, size)
        return start, min(part, size - start)


def whole_target(name: str, shape: Sequence[int], dtype: str) -> Target:
    """A target that is held whole."""
    return Target(name, tuple(shape), dtype, whole(shape))


def axis_runs(row: Row, sizes: Sizes, part: Mapping[str, Run]) -> Runs:
    """Runs per dim of one tensor of `row` whose axes are held in part: a cut `f` inside `(p f)` gives one run a `p`."""
    runs = []
    for dim in row.dims:
        lengths = [axis_size(row, key, sizes) for key in dim.keys]
        cuts = [part.get(key, (0, length)) for key, length in zip(dim.keys, lengths, strict=True)]
        runs.append(_flatten(lengths, cuts))
    return tuple(runs)


def _flatten(lengths: Sequence[int], cuts: Sequence[Run]) -> tuple[Run, ...]:
    """The product of axis runs as runs of the flattened dim, adjacent ones merged."""
    found: list[Run] = [(0, 1)]
    for length, (start, count) in zip(lengths, cuts, strict=True):
        grown: list[Run] = []
        for base, n in found:
            for i in range(base, base + n):
                at = i * length + start
                if grown and sum(grown[-1]) == at:
                    grown[-1] = (grown[-1][0], grown[-1][1] + count)
                else:
                    grown.append((at, count))
        found = grown
    return tuple((at, n) for at, n in found if n)
