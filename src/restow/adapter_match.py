"""Pattern keys of an adapter's config, matched as PEFT matches them and never run as regular expressions.

PEFT 0.19.1 (`utils/other.py`, `get_pattern_key`) asks `re.match(rf"(.*\\.)?({key})$", name)` and takes the first key that
answers. Here a key is literal text in which `.` is any one character, `\\.` a dot, `.*` any run, a letter before `*`
any number of that letter, and a `*` with nothing to repeat any run. Time is linear in the name for a given key.
Rejected, by the key: every other character, and more than 256 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from restow.errors import AdapterError, show

LIMIT = 256  # characters of one key
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_ANY = ""


class _Step(NamedTuple):
    """One character, or any (`_ANY`); `many`: as often as it comes, not at all included."""

    char: str
    many: bool


def check_key(key: str, field: str, path: object = None) -> None:
    """Raise `AdapterError` for a key that is more than literal text and wildcards; `field` is where it stands."""
    fault = _fault(key)
    if fault:
        raise AdapterError(
            f"keys of {field} made of names, '.', '*' and '.*'",
            f"{fault} in the key {show(key)}",
            path=path,
            hint="write the module's name or its end; regular expressions of an adapter are never run",
        )


def matches(key: str, name: str) -> bool:
    """Whether `key` spells `name`, or its end from a dot on."""
    steps, free = _compiled(key)
    reached: set[int] = set()
    for i, char in enumerate(name):
        if i == 0 or name[i - 1] == ".":
            reached |= free[0]
        following: set[int] = set()
        for at in reached:
            if at < len(steps) and steps[at].char in (_ANY, char):
                following |= free[at if steps[at].many else at + 1]
        reached = following
    return len(steps) in reached


def first(keys: Iterable[str], name: str) -> str | None:
    """The first key that matches, as PEFT takes it; None where none does."""
    return next((key for key in keys if matches(key, name)), None)


def _free(steps: tuple[_Step, ...], at: int) -> set[int]:
    """`at`, and what is reached from there without a character."""
    found = {at}
    while at < len(steps) and steps[at].many:
        at += 1
        found.add(at)
    return found


def _fault(key: str) -> str:
    if not key:
        return "nothing"
    if len(key) > LIMIT:
        return f"{len(key)} characters"
    i = 0
    while i < len(key):
        char = key[i]
        if char == "\\" and key[i + 1 : i + 2] == ".":
            i += 1
        elif char not in _PLAIN and char not in ".*":
            return f"'{show(char)}'"
        i += 1
    return ""


@lru_cache(maxsize=4096)
def _compiled(key: str) -> tuple[tuple[_Step, ...], tuple[frozenset[int], ...]]:
    """The steps of a key, and what is reached from each without a character; runs of any run are one."""
    steps: list[_Step] = []
    for step in _steps(key):
        if step != _Step(_ANY, True) or steps[-1:] != [step]:
            steps.append(step)
    return tuple(steps), tuple(frozenset(_free(tuple(steps), at)) for at in range(len(steps) + 1))


def _steps(key: str) -> tuple[_Step, ...]:
    steps: list[_Step] = []
    i = 0
    while i < len(key):
        char = key[i]
        i += 1
        if char == "\\":
            char, i = key[i], i + 1
        elif char == ".":
            char = _ANY
        elif char == "*":  # nothing before it that it could repeat
            steps.append(_Step(_ANY, True))
            continue
        many = key[i : i + 1] == "*"
        i += many
        steps.append(_Step(char, many))
    return tuple(steps)
