"""The grammar of one row: `ROLE NAME DIMS [exact]`, parsed into frozen values that remember their places.

    in    {e}.{p:gate|up}_proj.weight    f d
    out   down_proj                      e d f

A name carries axes exactly as dims do: `{e}` is a number in the name, `{p:gate|up}` a label. Dims are axes, fixed
sizes, groups `(p f)` (left is slowest) and derived axes `f/128` (ceil). It rejects what the page docs/notation.md
does not list, and every rejection shows the row with carets. Nothing here knows sizes, files or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from types import MappingProxyType

from restow.errors import NotationError

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
DIGITS = frozenset("0123456789")
NAME_CHARACTERS = LETTERS | DIGITS | frozenset(".-")


@dataclass(frozen=True, slots=True)
class Number:
    """`{e}`: the axis's index as a decimal number; `{e+E}`: the index plus the size `E` (a second bank)."""

    axis: str
    plus: str | None = None

    def __str__(self) -> str:
        return "{" + self.axis + (f"+{self.plus}" if self.plus else "") + "}"


@dataclass(frozen=True, slots=True)
class Labels:
    """`{p:gate|up}`: the axis's index as one of these words, in their order."""

    axis: str
    labels: tuple[str, ...]

    def __str__(self) -> str:
        return "{" + self.axis + ":" + "|".join(self.labels) + "}"


Part = str | Number | Labels


@dataclass(frozen=True, slots=True)
class Factor:
    """One axis inside a dim: `f`, a derived axis `f/128` of ceil(f/128), or a fixed size `16` (axis "")."""

    axis: str
    divisor: int = 1
    fixed: int = 0

    def __str__(self) -> str:
        if self.fixed:
            return str(self.fixed)
        return self.axis if self.divisor == 1 else f"{self.axis}/{self.divisor}"


@dataclass(frozen=True)
class Dim:
    """One dim of a stored tensor: factors, left slowest; `divisor` over the whole group, as in `(p f)/128`."""

    factors: tuple[Factor, ...]
    divisor: int = 1

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The axes that the dim holds, slowest first: a divided group is one axis of its own."""
        return (str(self),) if self.divisor != 1 else tuple(map(str, self.factors))

    def __str__(self) -> str:
        body = " ".join(map(str, self.factors))
        grouped = len(self.factors) != 1 or self.divisor != 1
        return (f"({body})" if grouped else body) + (f"/{self.divisor}" if self.divisor != 1 else "")


@dataclass(frozen=True)
class Row:
    """One line of a layout. `name` is relative to the experts module; `dims` is empty for a scalar."""

    role: str
    name: tuple[Part, ...]
    dims: tuple[Dim, ...]
    exact: bool = False

    def __getstate__(self) -> dict[str, object]:
        """What a copy or another process gets: the fields alone, since it can work out the rest."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def base(self) -> str:
        """The role whose axes this row has: `in` for `in.scale`."""
        return self.role.split(".", 1)[0]

    @cached_property
    def name_axes(self) -> tuple[str, ...]:
        """The axes that the name carries, left to right."""
        return tuple(part.axis for part in self.name if not isinstance(part, str))

    @cached_property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """The words of each labelled axis."""
        return MappingProxyType({part.axis: part.labels for part in self.name if isinstance(part, Labels)})

    @cached_property
    def axes(self) -> frozenset[str]:
        """Every axis of the row, name and dims together; derived axes count as their own (`f/128`)."""
        return frozenset(self.name_axes) | frozenset(key for dim in self.dims for key in dim.keys)

    def __str__(self) -> str:
        dims = " ".join(map(str, self.dims)) or "-"
        return f"{self.role} {''.join(map(str, self.name))} {dims}" + (" exact" if self.exact else "")


@lru_cache(maxsize=4096)
def parse_row(text: str) -> Row:
    """Parse one row. Raises `NotationError` with the row and carets below the characters at fault."""
    fields = _fields(text)
    if len(fields) == 2 and fields[1][0].count("{") > fields[1][0].count("}"):
        _name(text, *fields[1])  # a brace that nothing closes swallowed the dims: it is the fault
    if len(fields) < 3:
        found = "nothing" if not fields else f"{len(fields)} of 3 columns"
        raise _fault(text, 0, len(text), "ROLE NAME DIMS", found, "write a scalar's dims as -")
    (role, role_at), (name, name_at) = fields[:2]
    if not all(word and set(word) <= LETTERS | DIGITS for word in role.split(".")):
        raise _fault(text, role_at, len(role), "a role of words joined by dots", f"'{role}'")
    exact = len(fields) > 3 and fields[-1][0] == "exact"
    end = fields[-1][1] if exact else len(text)
    row = Row(role, _name(text, name, name_at), _dims(text, fields[2][1], end), exact)
    seen: set[str] = set()
    for axis in [*row.name_axes, *(key for dim in row.dims for key in dim.keys)]:
        if axis in seen and axis != "1":  # two fixed sizes that are equal have no order in another layout
            at = text.rfind(axis.strip("()"), fields[2][1])
            at = at if at >= 0 else name_at
            raise _fault(text, at, len(axis.strip("()")), "each axis once in a row", f"'{axis}' twice")
        seen.add(axis)
    return row


def _fault(text: str, at: int, length: int, expected: str, found: str, hint: str = "") -> NotationError:
    carets = " " * at + "^" * max(1, length)
    row = _ascii(text.rstrip())
    return NotationError(expected, _ascii(found), sections=[("row", [row, carets])], hint=hint)


def _ascii(text: str) -> str:
    """`text` with '?' for what is not ASCII and spaces for tabs, so that carets stay below their characters."""
    return text.replace("\t", " ").encode("ascii", "replace").decode("ascii")


def _fields(text: str) -> list[tuple[str, int]]:
    """The whitespace-separated fields of a row and where each begins; braces and groups hold together."""
    fields, start, depth = [], -1, 0
    for i, char in enumerate(text + " "):
        depth += (char in "{(") - (char in "})")
        if char.isspace() and depth <= 0:
            if start >= 0:
                fields.append((text[start:i], start))
            start = -1
        elif start < 0 and not char.isspace():
            start = i
    if start >= 0:  # an unclosed bracket swallowed the end; the column's own parser says so
        fields.append((text[start:].rstrip(), start))
    return fields


def _name(text: str, name: str, at: int) -> tuple[Part, ...]:
    parts: list[Part] = []
    i = 0
    while i < len(name):
        if name[i] == "{":
            close = name.find("}", i)
            if close < 0:
                raise _fault(text, at + i, len(name) - i, "'}' after '{'", "the end of the name")
            parts.append(_brace(text, name[i + 1 : close], at + i + 1))
            i = close + 1
            continue
        j = i
        while j < len(name) and name[j] != "{":
            if name[j] not in NAME_CHARACTERS:
                raise _fault(
                    text, at + j, 1, "letters, digits, '.', '_', '-' or an axis in braces", f"'{name[j]}'"
                )
            j += 1
        parts.append(name[i:j])
        i = j
    numbers = [part for part in parts if isinstance(part, Number)]
    for segment in "".join("\0" if isinstance(p, Number) else str(p) for p in parts).split("."):
        if not segment:
            raise _fault(text, at, len(name), "a name whose segments are not empty", f"'{name}'")
        if segment.count("\0") > 1:
            raise _fault(text, at, len(name), "at most one number between two dots", f"{len(numbers)}")
    return tuple(parts)


def _brace(text: str, body: str, at: int) -> Number | Labels:
    if ":" in body:
        axis, _, words = body.partition(":")
        labels = tuple(words.split("|"))
        if not _is_axis(axis):
            raise _fault(text, at, len(axis), "an axis before ':'", f"'{axis}'")
        if not all(word and set(word) <= LETTERS | DIGITS for word in labels) or len(set(labels)) != len(
            labels
        ):
            place = at + len(axis) + 1
            raise _fault(text, place, len(words), "different words separated by '|'", f"'{words}'")
        return Labels(axis, labels)
    axis, plus, bank = body.partition("+")
    if not _is_axis(axis) or (plus and not _is_axis(bank)):
        raise _fault(text, at, len(body), "an axis as in {e}, {p:gate|up} or {e+E}", f"'{body}'")
    return Number(axis, bank or None)


def _is_axis(word: str) -> bool:
    return bool(word) and word[0] in LETTERS and set(word) <= LETTERS | DIGITS


def _dims(text: str, at: int, end: int) -> tuple[Dim, ...]:
    dims: list[Dim] = []
    if text[at:end].strip() == "-":
        return ()
    i = at
    while i < end:
        if text[i].isspace():
            i += 1
        elif text[i] == "(":
            close = text.find(")", i, end)
            if close < 0:
                raise _fault(text, i, end - i, "')' after '('", "the end of the row")
            factors, j = [], i + 1
            while j < close:
                if text[j].isspace():
                    j += 1
                    continue
                factor, j = _factor(text, j, close)
                factors.append(factor)
            if not factors:
                raise _fault(text, i, close - i + 1, "axes between '(' and ')'", "none")
            divisor, i = _divisor(text, close + 1, end)
            if i < end and not text[i].isspace():
                raise _fault(text, i, 1, "a space after a group", f"'{text[i]}'")
            dims.append(Dim(tuple(factors), divisor))
        else:
            factor, i = _factor(text, i, end)
            dims.append(Dim((factor,)))
    return tuple(dims)


def _factor(text: str, at: int, end: int) -> tuple[Factor, int]:
    i = at
    while i < end and text[i] in LETTERS | DIGITS:
        i += 1
    word = text[at:i]
    if i < end and not (text[i].isspace() or text[i] in "/)"):
        raise _fault(text, i, 1, "an axis, a fixed size or a group", f"'{text[i]}'")
    if word.isdigit():
        if int(word) == 0:
            raise _fault(text, at, len(word), "a fixed size of at least 1", word)
        return Factor("", 1, int(word)), i
    if word == "exact":
        raise _fault(text, at, len(word), "'exact' once, at the end of the row", "it among the dims")
    if not _is_axis(word):
        raise _fault(text, at, max(1, i - at), "an axis, a fixed size or a group", f"'{word or text[at]}'")
    divisor, i = _divisor(text, i, end)
    return Factor(word, divisor), i


def _divisor(text: str, at: int, end: int) -> tuple[int, int]:
    if at >= end or text[at] != "/":
        return 1, at
    i = at + 1
    while i < end and text[i] in DIGITS:
        i += 1
    digits = text[at + 1 : i]
    if not digits or int(digits) == 0 or (i < end and not (text[i].isspace() or text[i] == ")")):
        raise _fault(text, at, max(1, i - at), "'/' and a whole number of at least 1", f"'{text[at:i]}'")
    return int(digits), i
