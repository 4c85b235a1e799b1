"""The catalogue for people: families and layouts as answers of the command line, and as the page docs/families.md.

Everything is read from the records; nothing about a family is said here. A model type that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from restow.codecs import CODECS, Codec
from restow.encodings import ENCODINGS
from restow.errors import UsageError, show
from restow.family import Family
from restow.known import FAMILIES
from restow.layout import Layout, rows_text
from restow.named import FORMS, GENERAL, NAMED
from restow.notation import Row
from restow.terminal import Answer, Line

BAR = "\\|"  # inside a table's cell


def families_answer(model_type: str | None = None) -> Answer:
    """Every family, a line each; or one family, with every spelling and row."""
    if model_type is None:
        cells = [["model type", "experts below a layer", "hf is", "router"]]
        cells += [
            [name, "  ".join(_places(family)), _called(family), _router(family)] for name, family in _sorted()
        ]
        head, *rest = _columns(cells)
        return Answer(
            {"families": [_facts(n, f) for n, f in _sorted()]}, [Line(head, "head"), *map(Line, rest)]
        )
    family = known_family(model_type)
    return Answer(_facts(model_type, family), [Line(model_type, "head"), *map(Line, _lines(family))])


def known_family(model_type: str) -> Family:
    """A family of the catalogue. Raises `UsageError` for another, with names that are near."""
    if model_type not in FAMILIES:
        near = [name for name in FAMILIES if model_type.split("_")[0] in name]
        raise UsageError(
            "a model type of the catalogue",
            f"{show(repr(model_type))}",
            sections=[("near", near[:8])] if near else (),
            hint="restow families lists them; docs/adding-a-family.md says how to add one",
        )
    return FAMILIES[model_type]


def layouts_answer(model_type: str | None = None) -> Answer:
    """Every named layout, or what each name means in one family."""
    family = known_family(model_type) if model_type is not None else None
    names = family.form_names() if family is not None else tuple(NAMED)
    layouts = {name: family.form(name) if family is not None else GENERAL[name] for name in names}
    lines = [line for name, layout in layouts.items() for line in _layout_lines(name, layout)]
    return Answer({"layouts": {name: _rows(layout) for name, layout in layouts.items()}}, lines)


def families_page() -> str:
    """docs/families.md: a table of all families, then each layout; `python tests/test_docs.py` writes it."""
    text = [
        "# Families",
        "",
        f"The {len(FAMILIES)} model types that restow knows, written from its catalogue (`src/restow/catalog`).",
        "`restow families MODEL_TYPE` shows one with all its rows, `restow layouts --family MODEL_TYPE` what each layout",
        "is called there; [adding-a-family.md](adding-a-family.md) says how to add one.",
        "",
        "| model type | experts, below a layer | `hf`, the vendor's layout | routers and biases | other spellings |",
        "|---|---|---|---|---|",
    ]
    for name, family in _sorted():
        hub = "<br>".join(
            f"`{''.join(map(str, row.name))}` {_dims(row)}" for row in family.spellings[0].layout.rows
        )
        rows = "<br>".join(f"`{''.join(map(str, row.name))}`" for row in family.routers)
        others = ", ".join("/".join(s.names) for s in family.spellings[1:]) or "-"
        places = "<br>".join(f"`{place}`" for place in _places(family))
        cells = (name, places, hub, rows, others)
        text.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    text += [
        "",
        "## Layouts",
        "",
        f"Every family has the first {len(FORMS)} in its own order and labels.",
        "",
        "```text",
    ]
    text += [line.text for name, layout in GENERAL.items() for line in _layout_lines(name, layout)]
    text += [
        "```",
        "",
        "## Quantised weights",
        "",
        "How a weight of rows `r` and columns `c` is stored under each codec; `{}` is its name, `{-}` the same without",
        "`.weight`, `{_}` without `_proj`, `R C` the block that the config announces, `rc` both dims in one. What has a",
        "`quantize=` is written, too; [quantized.md](quantized.md) says how.",
        "",
        "```text",
    ]
    text += [line for codec in CODECS.values() for line in _codec_lines(codec)]
    return "\n".join([*text, "```", ""])


def _codec_lines(codec: Codec) -> list[str]:
    written = [name for name, one in ENCODINGS.items() if codec.name in (one.codec, one.stacked)]
    asked = f', quantize="{written[0]}"' if written else ""
    rows = [("codes", codec.codes.name, " ".join(codec.codes.dims), "", " ".join(codec.dtypes))]
    rows += [
        (one.role[1:], one.name, " ".join(one.dims) or "-", one.how, " ".join(one.dtypes))
        for one in codec.companions(True)
    ]
    return [
        f"{codec.name}: {codec.element}, {codec.bits} bits{asked}",
        *(f"  {row}" for row in _columns(rows)),
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text in columns, all to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _sorted() -> list[tuple[str, Family]]:
    return sorted(FAMILIES.items())


def _places(family: Family) -> list[str]:
    return list(dict.fromkeys(container for line in family.containers for container in line))


def _called(family: Family) -> str:
    names = [name for name in family.spellings[0].names if name != "hf"]
    return (
        names[0] if names else "; ".join(f"{''.join(map(str, r.name))} {_dims(r)}" for r in _weights(family))
    )


def _weights(family: Family) -> Iterator[Row]:
    return (row for row in family.spellings[0].layout.rows if "." not in row.role)


def _dims(row: Row) -> str:
    return " ".join(map(str, row.dims))


def _router(family: Family) -> str:
    return "".join(map(str, family.routers[0].name))


def _rows(layout: Layout) -> list[str]:
    return list(map(str, layout.rows))


def _facts(name: str, family: Family) -> dict[str, Any]:
    return {
        "model_type": name,
        "experts": _places(family),
        "sizes": list(map(str, family.sizes)),
        "spellings": [
            {"names": s.names, "below": s.container, "rows": _rows(s.layout)} for s in family.spellings
        ],
        "routers": list(map(str, family.routers)),
        "renames": list(family.renames),
        "aliases": list(family.aliases),
        "ignorable": list(family.ignorable),
        "required": list(family.required),
    }


def _lines(family: Family) -> Iterator[str]:
    yield f"  sizes      {'; '.join(map(str, family.sizes))}"
    for spelling in family.spellings:
        yield f"  spelling   {' = '.join(spelling.names)}, below {spelling.container}"
        yield from (f"               {row}" for row in rows_text(spelling.layout))
    for row in family.routers:
        yield f"  router     {row}"
    for hub, runtime in family.renames:
        yield f"  rename     {hub}  ->  {runtime}"
    for met, hub in family.aliases:
        yield f"  alias      {met}  ->  {hub}"
    for word, names in (("ignorable", family.ignorable), ("required", family.required)):
        yield f"  {word:<10} {' '.join(names) or 'none'}"


def _layout_lines(name: str, layout: Layout) -> list[Line]:
    return [Line(name, "head"), *(Line(f"  {row}") for row in rows_text(layout))]
