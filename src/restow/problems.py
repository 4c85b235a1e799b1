"""Findings about a checkpoint: an error that may be fatal or may only be worth telling.

`Problem` is what `open(...).problems` holds. `merged` makes one error of many, so that a pass over a
checkpoint tells everything it found and not only the first thing. It rejects nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from restow.errors import RestowError, show


class Problem(NamedTuple):
    """A finding; a fatal one stops whatever needs the tensors that it names."""

    error: RestowError
    fatal: bool


def merged(errors: Sequence[RestowError]) -> RestowError:
    """The first of `errors`, with a line for every other one; class and fields are the first one's."""
    first = errors[0]
    if len(errors) == 1:
        return first
    sections = list(first.sections)
    if not sections and first.tensor is not None:  # with sections present the field is not printed by itself
        sections.append(("tensor", (show(first.tensor),)))
    sections.append(("also", tuple(_line(error) for error in errors[1:])))
    return type(first)(
        first.expected,
        first.found,
        path=first.path,
        tensor=first.tensor,
        sections=sections,
        hint=first.hint,
        rank=first.rank,
    )


def alike(errors: Sequence[RestowError]) -> RestowError:
    """One error for tensors of which each has something wrong: the first one's words, and every tensor in full."""
    first = errors[0]
    if len(errors) == 1:
        return first
    one = first.tensor or ""
    lines = [f"{show(e.tensor)}: {e.found}" if e.found != first.found else show(e.tensor) for e in errors]
    return type(first)(
        f"{first.expected}, and the like for {len(errors) - 1} more",
        first.found,
        path=first.path,
        tensor=one,
        sections=[
            ("tensors", lines),
            *((label, body) for label, body in first.sections if label != "tensor"),
        ],
        hint=first.hint,
        rank=first.rank,
    )


def _line(error: RestowError) -> str:
    where = [show(part) for part in (error.tensor, error.path) if part is not None]
    return f"{type(error).__name__}: expected {error.expected}, found {error.found} ({', '.join(where)})"
