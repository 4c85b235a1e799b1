"""Numbers, names and tables as short ASCII text for people. Rejects nothing, knows no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from restow.errors import show
from restow.terminal import Line

MARGIN = " " * 13


def amount(count: int) -> str:
    """A number of bytes for people: three digits and a decimal unit."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"


def many(count: int, word: str) -> str:
    """A count of things: `1 file`, `16 files`."""
    return f"{count:,} {word}" + ("s" if count != 1 else "")


def runs_of(names: Sequence[str]) -> list[str]:
    """Names that differ in their numbers, in short: `model.layers.[0-47].mlp.experts`."""
    found: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        words = name.split(".")
        number = [w.isdecimal() and w.isascii() and str(int(w)) == w for w in words]
        key = tuple("\0" if n else show(w) for n, w in zip(number, words, strict=True))
        found.setdefault(key, []).append(tuple(int(w) for n, w in zip(number, words, strict=True) if n))
    return [_run_text(key, numbers) for key, numbers in found.items()]


def _run_text(key: Sequence[str], numbers: Sequence[tuple[int, ...]]) -> str:
    texts = iter([_ranges(sorted(set(column))) for column in zip(*numbers, strict=True)])
    text = ".".join(next(texts) if word == "\0" else word for word in key)
    full = prod(len(set(column)) for column in zip(*numbers, strict=True)) == len(numbers)
    return text if full else f"{text} ({len(numbers):,} of these)"


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "]"


def kinds(dtypes: Mapping[str, int], counts: bool = True) -> str:
    """Dtypes, with how many tensors have each where there are several."""
    return ", ".join(
        f"{dtype} {count:,}" if counts and len(dtypes) > 1 else dtype for dtype, count in dtypes.items()
    )


def field(label: str, text: str) -> Line:
    """A labelled line."""
    return Line(f"  {label:<10} {text}")


def table(rows: Sequence[Sequence[str]]) -> Iterator[Line]:
    """Rows below a field: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield Line((MARGIN + "  " + "   ".join([first, *rest])).rstrip())


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[Line]:
    """A table of numbers with a head; the first two columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield Line("  " + "   ".join(cells).rstrip())
