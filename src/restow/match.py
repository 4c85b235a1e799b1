"""Which row, of which candidate, and which indices is this tensor name: O(1) a name, whatever the catalogue's size.

Names are read from their end, segment by segment, down one trie that holds every candidate's rows, so the prefix
(`model.layers.3`, `base_model.model.model.layers.3`, none) needs no pattern. Numbers are decimal without leading
zeros: `07` matches nothing. There are no regular expressions. It rejects nothing: a name without a hit has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from restow.layout import Sizes
from restow.notation import Labels, Number, Row

ENDLESS = 1 << 62


class Hit(NamedTuple):
    """A name explained: the candidate's tag, the row, the module path before it, and an index per name axis."""

    tag: int
    row: Row
    path: str
    index: tuple[int, ...]  # type: ignore[assignment]  # hides tuple.index, which nobody asks a hit


class _Leaf(NamedTuple):
    tag: int
    row: Row
    order: tuple[
        int, ...
    ]  # which of the collected numbers belongs to each name axis; -1 - i for label index i
    below: int  # segments of the name that belong to the row; the rest is the module path


@dataclass(slots=True)
class _Node:
    words: dict[str, _Node] = field(default_factory=dict)
    numbers: dict[tuple[str, str, int, int], _Node] = field(
        default_factory=dict
    )  # prefix, suffix, from, below
    leaves: list[_Leaf] = field(default_factory=list)


class Matcher:
    """A compiled set of candidates: (container, row) pairs under a tag. Built once, then only read."""

    __slots__ = ("_depth", "_root")

    def __init__(self, candidates: Iterable[tuple[int, str, Row]], sizes: Sizes) -> None:
        """`container` is a dotted run that the module path must end with, or ""; `sizes` says where a second bank begins,
        by a size of its own or by the number of experts before it.

        Where a candidate has a second bank, `{e}` without it counts only up to where that begins; rows of banks that
        begin nobody knows where match nothing.
        """
        self._root, self._depth = _Node(), 0
        known = list(candidates)
        banks = {
            tag: part.plus
            for tag, _, row in known
            for part in row.name
            if isinstance(part, Number) and part.plus
        }
        for tag, container, row in known:
            plus = banks.get(tag)
            begin = sizes.get(plus, sizes.get("e")) if plus is not None else ENDLESS
            if begin is not None:
                self._add(tag, container, row, begin)

    def _add(self, tag: int, container: str, row: Row, bank: int) -> None:
        labelled = [part for part in row.name if isinstance(part, Labels)]
        for choice in product(*(range(len(part.labels)) for part in labelled)):
            chosen = dict(zip((part.axis for part in labelled), choice, strict=True))
            text: list[str] = []
            numbers: list[Number] = []
            for part in row.name:
                if isinstance(part, Number):
                    numbers.append(part)
                    text.append("\0")
                else:
                    text.append(part if isinstance(part, str) else part.labels[chosen[part.axis]])
            segments = "".join(text).split(".")
            node, read = self._root, []
            for segment in reversed(segments):
                if "\0" in segment:
                    before, _, after = segment.partition("\0")
                    number = numbers.pop()
                    read.append(number.axis)
                    span = (bank, ENDLESS) if number.plus else (0, bank)
                    node = node.numbers.setdefault((before, after, *span), _Node())
                else:
                    node = node.words.setdefault(segment, _Node())
            for segment in reversed(container.split(".")) if container else ():
                node = node.words.setdefault(segment, _Node())
            order = tuple(-1 - chosen[a] if a in chosen else read.index(a) for a in row.name_axes)
            node.leaves.append(_Leaf(tag, row, order, len(segments)))
            self._depth = max(self._depth, len(segments) + container.count(".") + 1)

    def match(self, name: str) -> list[Hit]:
        """Every candidate row that the end of `name` spells."""
        segments = name.rsplit(".", self._depth)  # what is above the deepest row stays in one piece
        hits: list[Hit] = []
        self._walk(self._root, segments, len(segments) - 1, (), hits)
        return hits

    def _walk(
        self, node: _Node, segments: list[str], at: int, read: tuple[int, ...], hits: list[Hit]
    ) -> None:
        while True:
            for leaf in node.leaves:
                path = ".".join(segments[: len(segments) - leaf.below])
                index = tuple([read[i] if i >= 0 else -1 - i for i in leaf.order])
                hits.append(Hit(leaf.tag, leaf.row, path, index))
            if at < 0:
                return
            segment = segments[at]
            at -= 1
            for (before, after, start, end), below in node.numbers.items():
                number = _number(segment, before, after)
                if start <= number < end:
                    self._walk(below, segments, at, (*read, number - start), hits)
            following = node.words.get(segment)
            if following is None:
                return
            node = following


def _number(segment: str, before: str, after: str) -> int:
    """The number between `before` and `after`, or -1."""
    digits = segment
    if before or after:
        if not (segment.startswith(before) and segment.endswith(after)):
            return -1
        digits = segment[len(before) : len(segment) - len(after)]
    if not (digits.isdecimal() and digits.isascii()):
        return -1
    if len(digits) > 1 and digits[0] == "0":
        return -1
    return int(digits) if len(digits) < 10 else -1
