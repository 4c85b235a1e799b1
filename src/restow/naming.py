"""Which name here is which name there: the user's renames, a family's hub and runtime paths, patterns over names.

Renames are runs of whole dotted segments, the first that matches, applied once; or a table with `{}` for numbers
(torchtitan's `from_hf_map`). Nothing is a regular expression. It rejects tables that are neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from restow.errors import UsageError
from restow.segments import replace_run

Rename = Sequence[tuple[str, str]] | Mapping[str, str | None]


def renamed(name: str, rename: Rename) -> str | None:
    """`name` as the destination spells it; None where a table says that it has no place there."""
    if isinstance(rename, Mapping):
        return _by_table(name, rename)
    for old, new in rename:
        changed = replace_run(name, old, new)
        if changed != name:
            return changed
    return name


def check_rename(rename: Rename) -> None:
    """Raise `UsageError` for what is neither pairs of runs nor a table."""
    if isinstance(rename, Mapping):
        bad: list[object] = [
            key for key, value in rename.items() if value is not None and not isinstance(value, str)
        ]
    else:
        bad = [rule for rule in rename if not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[0])]
    if bad:
        raise UsageError("rename as pairs (old run, new run), or a dict of names with {}", f"{bad[0]!r}")


def _by_table(name: str, table: Mapping[str, str | None]) -> str | None:
    segments = name.split(".")
    numbers = [s for s in segments if s.isdecimal()]
    key = ".".join("{}" if s.isdecimal() else s for s in segments)
    if name in table:
        return table[name]
    if key not in table:
        return name
    to = table[key]
    if to is None:
        return None
    parts = to.split("{}")
    taken = numbers[: len(parts) - 1]  # the expert's number has no place where experts are stacked
    return "".join(part + number for part, number in zip(parts, [*taken, *[""] * len(parts)], strict=False))


def fits(pattern: str, name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a family's pattern names `name`: `*` is any run of segments, `{l}` a number, `{l+L}` one of at least L."""
    words, segments = pattern.split("."), name.split(".")
    reachable = {0}  # positions in `words`
    for segment in segments:
        following: set[int] = set()
        for at in _skip(words, reachable):
            if at == len(words):
                continue
            if words[at] == "*":
                following.add(at)
            elif _one(words[at], segment, sizes):
                following.add(at + 1)
        reachable = following
        if not reachable:
            return False
    return len(words) in _skip(words, reachable)


def _skip(words: Sequence[str], at: Iterable[int]) -> set[int]:
    """The positions reached by letting stars stand for nothing."""
    out = set()
    for position in at:
        out.add(position)
        while position < len(words) and words[position] == "*":
            position += 1
            out.add(position)
    return out


def _one(word: str, segment: str, sizes: Mapping[str, int]) -> bool:
    if not word.startswith("{"):
        return word == segment
    if not segment.isdecimal():
        return False
    _, _, bank = word.strip("{}").partition("+")
    return not bank or int(segment) >= sizes.get(bank, 1 << 62)
