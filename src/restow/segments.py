"""Runs of whole dotted segments in names, found and replaced: what renames and a family's hub and runtime paths are made of.

`^run` counts only where a name begins, `run$` only where it ends. `{l}` in a run stands for a number and `{l+1}`
for one more than it, so that a rename can move a layer's number (`attn_queries.{l}`, `layers.{l+1}.query`) and the
way back follows. Nothing is a regular expression, and nothing is rejected: a name without the run stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence


def ends(name: str, end: str) -> bool:
    """Whether a name ends with these whole segments; none are no end."""
    return bool(end) and f".{name}".endswith(f".{end}")


def replace_run(name: str, old: str, new: str) -> str:
    """`name` with its first run of whole dotted segments `old` replaced by `new`; `^old` only at the beginning."""
    anchored = old.startswith("^")
    run = old.lstrip("^")
    if run.endswith("$"):
        run = run.rstrip("$")
        if not ends(name, run) or (anchored and name != run):
            return name
        return (name[: len(name) - len(run)] + new).strip(".")
    if "{" in run:
        return _numbered(name.split("."), run.split("."), new.split("."), anchored)
    padded, needle = f".{name}.", f".{run}."
    at = padded.find(needle)
    if at < 0 or (anchored and at != 0):
        return name
    return (padded[:at] + (f".{new}." if new else ".") + padded[at + len(needle) :]).strip(".")


def _numbered(segments: Sequence[str], run: Sequence[str], new: Sequence[str], anchored: bool) -> str:
    last = 0 if anchored else len(segments) - len(run)
    for at in range(last + 1):
        numbers = _read(segments[at : at + len(run)], run)
        if numbers is not None:
            made = [_written(word, numbers) for word in new]
            return ".".join([*segments[:at], *made, *segments[at + len(run) :]])
    return ".".join(segments)


def _read(segments: Sequence[str], run: Sequence[str]) -> dict[str, int] | None:
    """The number of each letter where the segments are the run's, else None."""
    if len(segments) != len(run):
        return None
    numbers: dict[str, int] = {}
    for word, segment in zip(run, segments, strict=True):
        if not word.startswith("{"):
            if word != segment:
                return None
            continue
        letter, more = _letter(word)
        if not (segment.isascii() and segment.isdecimal() and len(segment) < 10 and int(segment) >= more):
            return None
        numbers[letter] = int(segment) - more
    return numbers


def _written(word: str, numbers: dict[str, int]) -> str:
    if not word.startswith("{"):
        return word
    letter, more = _letter(word)
    return str(numbers[letter] + more)


def _letter(word: str) -> tuple[str, int]:
    letter, _, more = word.strip("{}").partition("+")
    return letter, int(more or 0)
