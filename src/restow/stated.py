"""The layout that a file's own header states, where its family's spellings do not tell it.

A conversion may write any layout; one that no candidate of the family has, or that could be taken for another since
names and shapes are the same, is written into the metadata of every file. `open` then reads what was written instead of
looking for it. Rejected: files that state two layouts, and text that is none.
"""

from __future__ import annotations

from collections.abc import Mapping

from restow.errors import HeaderError, RestowError, show
from restow.family import Family, Spelling
from restow.find import candidates_of
from restow.layout import Layout

KEY = "restow.layout"
LIMIT = 1 << 14  # characters of a layout's text


def statement(layout: Layout, family: Family | None) -> dict[str, str]:
    """The metadata that says this layout; none where it is found by itself."""
    if any(spelling.layout == layout for spelling in candidates_of(family, None)):
        return {}
    return {KEY: "\n".join(map(str, layout.rows))}


def stated_layout(metadata: Mapping[str, Mapping[str, str]]) -> Layout | None:
    """The layout that the files (metadata by file name) state. Raises `HeaderError` for two, or for none of text."""
    texts = {held[KEY]: file for file, held in metadata.items() if KEY in held}
    if not texts:
        return None
    (text, file), *others = texts.items()
    if others:
        raise HeaderError(
            f"one layout in the metadata ({KEY}) of all files",
            f"{1 + len(others)}",
            sections=[("files", map(show, texts.values()))],
            hint="keep the files of one conversion in a folder, or say layout= (--layout)",
        )
    try:
        return Layout.parse(text if len(text) <= LIMIT else "")
    except RestowError as error:
        raise HeaderError(
            f"rows of a layout in the metadata ({KEY}), at most {LIMIT} characters",
            f"{len(text)} characters" if len(text) > LIMIT else f"text that is none: {show(error.found)}",
            path=file,
            hint="say layout= (--layout) to pass it over",
        ) from error


def stated_candidates(layout: Layout, family: Family | None) -> tuple[Spelling, ...]:
    """The candidates for a stated layout: below the family's containers, since its names may be common elsewhere."""
    if family is None:
        return (Spelling(("stated",), "", layout),)
    names = tuple(name for name in family.form_names() if family.form(name) == layout) or ("stated",)
    containers = dict.fromkeys(container for place in family.containers for container in place)
    return tuple(Spelling(names, container, layout) for container in containers)
