"""JSON as a checkpoint may hold it: UTF-8, no name twice in one object, bounded nesting.

The depth is measured on the raw bytes, before the parser that would recurse into them. Fractions come out as
`Fraction`, which keeps their spelling and is no number, unless the caller takes floats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from restow.errors import show

_OTHER = bytes(set(range(256)) - set(b'[]{}"'))
_SQUARE = bytes.maketrans(b"{}", b"[]")


class JsonFault(ValueError):
    """What stands where JSON was expected; `names` were met twice, in the outermost object if `outer`."""

    def __init__(self, found: str, names: tuple[str, ...] = (), outer: bool = False) -> None:
        super().__init__(found)
        self.found = found
        self.names = names
        self.outer = outer


class Fraction(str):
    """A number with a point or an exponent, as the file spells it."""

    __slots__ = ()


def _integer(text: str) -> int | Fraction:
    return Fraction(text) if text == "-0" else int(text)


def _constant(text: str) -> Any:
    raise JsonFault(f"the number {text}, which JSON does not have")


def parse(
    raw: bytes,
    depth: int,
    *,
    fraction: Callable[[str], object] = Fraction,
    constant: Callable[[str], object] = _constant,
) -> Any:
    """The value of `raw`, nested at most `depth` deep; `JsonFault` for everything else.

    `constant` makes something of NaN and Infinity, which are no JSON and are refused by default.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonFault(f"bytes that are not UTF-8: 0x{raw[error.start]:02x} at byte {error.start}") from None
    if too_deep(raw, depth):
        raise JsonFault(f"JSON nested deeper than the limit: its depth is more than {depth}")
    twice: list[tuple[dict[str, Any], tuple[str, ...]]] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            twice.append((table, repeated([name for name, _ in items])))
        return table

    # A zero with a sign is a fraction to other readers; the hook is slow, so it is there only when needed.
    integer = _integer if fraction is Fraction and b"-0" in raw else None
    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_float=fraction, parse_int=integer, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = (
            "JSON that stops before its end"
            if cut
            else f"no JSON: '{show(text[error.pos : error.pos + 20])}'"
        )
        raise JsonFault(f"{what} at character {error.pos}") from None
    except JsonFault:
        raise
    except ValueError:  # the interpreter's own limit on digits
        raise JsonFault("a number of more than 4300 digits") from None
    if twice:
        outermost = [names for table, names in twice if table is value]
        found = (outermost or [twice[0][1]])[0]
        raise JsonFault(f"the name {show(found[0])} twice in one object", found, bool(outermost))
    return value


def repeated(items: list[str]) -> tuple[str, ...]:
    """Those that stand in `items` more than once, in order, each once."""
    seen: set[str] = set()
    again: dict[str, None] = {}
    for item in items:
        if item in seen:
            again[item] = None
        seen.add(item)
    return tuple(again)


def too_deep(raw: bytes, depth: int) -> bool:
    """Whether lists and objects nest deeper than `depth`, in time linear in `raw` and without recursion."""
    if b"\\" in raw:  # first the escaped backslashes, so that what is left before a quote escapes it
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = raw.translate(_SQUARE, _OTHER).replace(b'""', b"")
    if b'"' in marks:  # brackets inside strings
        marks = b"".join(marks.split(b'"')[::2])
    removed = 0
    while removed < 8 and b"[]" in marks:  # each round takes one level away, from the inside
        marks = marks.replace(b"[]", b"")
        removed += 1
    level = 0
    for mark in marks:
        level += 1 if mark == 91 else -1  # 91 is the opening bracket
        if level + removed > depth:
            return True
    return removed > depth
