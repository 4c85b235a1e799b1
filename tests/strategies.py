"""Random layouts, sizes, cuts and held parts for property tests, and the brute-force meaning of a row.

A role here has the axes of a gated weight or of a bias. A row puts them in any order, any of them in the
name, the others in any groups. What such a row stores is told by einops alone: `stored` never asks restow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import einops
import numpy as np
from hypothesis import strategies as st

from restow.boxes import Run
from restow.notation import Number, Row, parse_row

AXES = ("e", "p", "f", "d")
LENGTHS = (1, 2, 2, 3, 3, 4, 5, 7)  # primes, and few enough that sizes coincide
Box = tuple[Run, ...]


class Role(NamedTuple):
    """A role's axes with their sizes, and its values: every element is its own number."""

    sizes: dict[str, int]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def values(self) -> np.ndarray:
        return np.arange(prod(self.sizes.values()), dtype=np.int64).reshape(tuple(self.sizes.values()))


@st.composite
def roles(draw: st.DrawFn, fixed: bool = True) -> Role:
    """A role with the axes of a weight or a bias; sometimes a derived axis or a fixed size stands for one."""
    axes = list(draw(st.sampled_from([AXES, AXES, ("e", "f", "d"), ("e", "p", "f"), ("e", "d"), ("f",)])))
    sizes = {axis: draw(st.sampled_from(LENGTHS)) for axis in axes}
    if "p" in sizes:
        sizes["p"] = draw(st.sampled_from([1, 2, 2, 2, 3]))
    if fixed and draw(st.booleans()):
        sizes[draw(st.sampled_from(["3", "16"]))] = 0
    for axis in [axis for axis in sizes if axis.isdigit()]:
        sizes[axis] = int(axis)
    return Role(sizes)


@st.composite
def rows(draw: st.DrawFn, role: Role, words: Sequence[str] = ("gate", "up", "third")) -> Row:
    """A row for a role: axes in any order, some in the name, the others grouped at will."""
    order = list(draw(st.permutations(role.axes)))
    named = [a for a in order if not a.isdigit() and draw(st.integers(0, 3 if a in "fd" else 1)) == 0]
    dims = [axis for axis in order if axis not in named]
    parts = ["x"]
    for axis in named:
        labels = "|".join(words[: role.sizes[axis]]) if axis == "p" else ""
        parts.append(
            "{p:" + labels + "}_proj" if labels else draw(st.sampled_from(["{%s}", "ex_{%s}"])) % axis
        )
    groups: list[list[str]] = []
    for axis in dims:
        if groups and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    spelled = [group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups]
    name = ".".join(parts if draw(st.booleans()) else [*reversed(parts)])
    return parse_row(f"in {name} {' '.join(spelled) or '-'}")


def legal(axis: str) -> str:
    """An axis as an einops identifier."""
    return re.sub(r"\W", "_", f"x{axis}")


def stored(row: Row, role: Role) -> list[np.ndarray]:
    """The arrays that a row stores of a role, in the order of the name's indices, told by einops."""
    left = " ".join(map(legal, role.axes))
    dims = " ".join(
        f"({' '.join(legal(str(f)) for f in dim.factors)})" if dim.factors else "1" for dim in row.dims
    )
    whole = einops.rearrange(role.values, f"{left} -> {' '.join(map(legal, row.name_axes))} {dims}")
    lengths = [role.sizes[axis] for axis in row.name_axes]
    return [np.asarray(whole[index]) for index in product(*map(range, lengths))]


@st.composite
def held_runs(draw: st.DrawFn, length: int) -> tuple[Run, ...]:
    """Runs of a dim that are held, in any local order: all, none, one or several with or without gaps."""
    kind = draw(st.sampled_from(["all", "all", "one", "several", "shuffled", "empty"]))
    if kind == "all":
        return ((0, length),)
    if kind == "empty":
        return draw(st.sampled_from([(), ((0, 0),)]))
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=2 if kind == "one" else 6)))
    runs = [(a, b - a) for a, b in pairwise(cuts)]
    if kind != "one":
        runs = [run for run in runs if draw(st.booleans())] or runs[:1]
    return tuple(draw(st.permutations(runs)) if kind == "shuffled" else runs)


@st.composite
def pieces(draw: st.DrawFn, shape: Sequence[int]) -> tuple[Box, ...]:
    """A tensor cut into boxes that cover it: halved at random places, so that boxes need not form a grid."""
    boxes: list[Box] = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 4)) if prod(shape) > 1 else 0):
        at = draw(st.integers(0, len(boxes) - 1))
        wide = [dim for dim, (_, n) in enumerate(boxes[at]) if n > 1]
        if not wide:
            continue
        dim = draw(st.sampled_from(wide))
        start, length = boxes[at][dim]
        cut = draw(st.integers(1, length - 1))
        box = boxes.pop(at)
        boxes += [
            (*box[:dim], (start, cut), *box[dim + 1 :]),
            (*box[:dim], (start + cut, length - cut), *box[dim + 1 :]),
        ]
    return tuple(draw(st.permutations(boxes)))


def part_of(array: np.ndarray, runs: Sequence[Sequence[Run]]) -> np.ndarray:
    """What of `array` is held by runs per dim, one run after another."""
    if not array.ndim:
        return array
    indices = [np.concatenate([np.arange(s, s + n) for s, n in dim] or [np.arange(0)]) for dim in runs]
    return array[np.ix_(*(index.astype(np.int64) for index in indices))]


def sizes_of(role: Role) -> Mapping[str, int]:
    """The sizes that restow is told: fixed sizes stand in the row itself."""
    return {axis: n for axis, n in role.sizes.items() if not axis.isdigit()}


def numbers_in(row: Row) -> int:
    """How many numbers the row's name carries."""
    return sum(isinstance(part, Number) for part in row.name)
