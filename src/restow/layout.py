"""A layout: rows of (role, name, dims), and what follows from them for given sizes.

`Layout.parse(text)` and `str(layout)` are inverse. A layout gives its names and shapes for sizes, and sizes for
shapes; where storage order is concerned it is the only thing that anybody asks. It rejects a role in two rows, and
sizes that are missing or contradict each other. Sizes are mappings from an axis ("e"), or an axis of one role
("e@in"), to a global length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod

from restow.errors import NotationError, SizeError, section, show
from restow.notation import Dim, Factor, Labels, Number, Row, parse_row

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SizeLine:
    """`e = config.num_experts`, `e@in = n_routed_experts + zero_expert_num`: an axis's size as a sum of terms.

    A term is a number or alternatives `a.b|c`: dotted paths into the config, the first that exists counts; `#a.b`
    is the length of the list or text there.
    """

    axis: str
    role: str | None
    terms: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.axis if self.role is None else f"{self.axis}@{self.role}"

    def __str__(self) -> str:
        return f"{self.key} = {' + '.join(self.terms)}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows, and size lines where the layout brings its own. Equal rows are equal layouts, whatever their spacing."""

    rows: tuple[Row, ...]
    sizes: tuple[SizeLine, ...] = ()
    text: str = field(default="", compare=False, repr=False)

    @staticmethod
    def parse(text: str) -> Layout:
        """Parse rows, one a line; blank lines are passed over. Raises `NotationError`."""
        rows: list[Row] = []
        sizes: list[SizeLine] = []
        for line in text.splitlines():
            if not line.strip():
                continue
            if "=" in line:
                sizes.append(parse_size(line))
                continue
            row = parse_row(line)
            if any(row.role == other.role for other in rows):
                raise NotationError(
                    "each role in one row",
                    f"'{row.role}' in two",
                    sections=[("row", [line.rstrip(), "^" * len(row.role)])],
                )
            rows.append(row)
        if not rows and not sizes:
            raise NotationError("at least one row", "none", sections=[("row", [text.strip() or "(empty)"])])
        return Layout(tuple(rows), tuple(sizes), text)

    def __str__(self) -> str:
        return self.text or "\n".join([*map(str, self.rows), *map(str, self.sizes)])

    def row(self, role: str) -> Row:
        """The row of a role. Raises `KeyError` where there is none."""
        for row in self.rows:
            if row.role == role:
                return row
        raise KeyError(role)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(row.role for row in self.rows)

    def keys(self, sizes: Sizes) -> Iterator[str]:
        """Every tensor name of the layout, relative to its module, in the order of rows and indices."""
        for row in self.rows:
            for index in product(*(range(axis_size(row, axis, sizes)) for axis in row.name_axes)):
                yield name_of(row, index, sizes)

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, relative to the module."""
        found = {}
        for row in self.rows:
            shape = shape_of(row, sizes)
            for index in product(*(range(axis_size(row, axis, sizes)) for axis in row.name_axes)):
                found[name_of(row, index, sizes)] = shape
        return found


def parse_size(line: str) -> SizeLine:
    """Parse `AXIS[@ROLE] = TERM [+ TERM]...`. Raises `NotationError`."""
    left, _, right = line.partition("=")
    axis, at, role = left.strip().partition("@")
    terms = tuple(term.strip().removeprefix("config.") for term in right.split("+"))
    bad = [term for term in terms if not term or not all(c.isalnum() or c in "_.|#" for c in term)]
    if not axis.isidentifier() or (at and not role.isidentifier()) or bad:
        raise NotationError(
            "AXIS = PATH [+ PATH], or AXIS@ROLE = ...",
            f"'{line.strip()}'",
            sections=[("row", [line.rstrip(), "^" * len(line.rstrip())])],
        )
    return SizeLine(axis, role or None, terms)


def axis_size(row: Row, axis: str, sizes: Sizes) -> int:
    """The size of an axis of a row: its labels, else `sizes["axis@role"]`, else `sizes["axis"]`."""
    for part in row.name:
        if isinstance(part, Labels) and part.axis == axis:
            return len(part.labels)
    if axis.isdigit():
        return int(axis)
    found = sizes.get(f"{axis}@{row.base}", sizes.get(axis))
    if found is not None:
        return found
    if "/" in axis:
        return _derived(row, axis, sizes)
    raise SizeError(f"a size for axis '{axis}' of role '{row.role}'", "none", sections=[("row", [str(row)])])


def _derived(row: Row, axis: str, sizes: Sizes) -> int:
    body, _, divisor = axis.rpartition("/")
    inner = [dim for dim in row.dims if str(dim) == axis and dim.divisor != 1]
    whole = (
        prod(axis_size(row, str(f), sizes) for f in inner[0].factors)
        if inner
        else axis_size(row, body, sizes)
    )
    return -(-whole // int(divisor))


def shape_of(row: Row, sizes: Sizes) -> tuple[int, ...]:
    """The shape of one stored tensor of the row."""
    return tuple(prod(axis_size(row, key, sizes) for key in dim.keys) for dim in row.dims)


def name_of(row: Row, index: tuple[int, ...], sizes: Sizes) -> str:
    """The name of one tensor, relative to its module; `index` follows `row.name_axes`."""
    out, numbers = [], iter(index)
    for part in row.name:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, Labels):
            out.append(part.labels[next(numbers)])
        else:
            before = sizes.get(part.plus, sizes.get("e", 0)) if part.plus else 0  # the first bank's experts
            out.append(str(next(numbers) + before))
    return "".join(out)


def drop_own_count(
    row: Row,
    found: Mapping[tuple[int, ...], str],
    shapes: Mapping[str, tuple[int, ...]],
    solved: dict[str, int],
) -> None:
    """Let a role have as many experts as the others where it holds no more: those that do nothing may be left out."""
    own = f"e@{row.base}"
    if own not in solved or not found or "e" not in solved:
        return
    if "e" in row.name_axes:
        at = row.name_axes.index("e")
        held = 1 + max(index[at] for index in found)
    else:
        shape, dims = shapes[next(iter(found.values()))], list(map(str, row.dims))
        held = shape[dims.index("e")] if "e" in dims and len(shape) == len(dims) else solved[own]
    if held <= solved["e"]:
        del solved[own]


def solve_sizes(row: Row, shape: tuple[int, ...], sizes: Sizes) -> dict[str, int] | None:
    """The sizes that make `shape_of(row)` this shape: new ones by axis, or None where no sizes do.

    Known sizes are kept; a dim with one unknown axis gives it by division. Derived axes are never solved for (ceil has
    no inverse): they only confirm. Two unknown axes in one dim stay unknown, which is not a contradiction.
    """
    if len(shape) != len(row.dims):
        return None
    known = dict(sizes)
    fresh: dict[str, int] = {}
    for dim, length in zip(row.dims, shape, strict=True):
        if not _solve_dim(row, dim, length, known, fresh):
            return None
    return fresh


def _solve_dim(row: Row, dim: Dim, length: int, known: dict[str, int], fresh: dict[str, int]) -> bool:
    rest, unknown = length, []
    for key in dim.keys:
        try:
            size = axis_size(row, key, known)
        except SizeError:
            unknown.append(key)
            continue
        if size == 0 or rest % size:
            return False
        rest //= size
    if not unknown:
        return rest == 1
    if len(unknown) == 1 and "/" not in unknown[0]:
        known[unknown[0]] = fresh[unknown[0]] = rest
        return rest > 0
    return True


def rows_text(layout: Layout) -> tuple[str, ...]:
    """The rows aligned in columns, for people."""
    cells = [(row.role, "".join(map(str, row.name)), str(row).split(" ", 2)[2]) for row in layout.rows]
    wide = [max(len(cell[i]) for cell in cells) for i in range(2)]
    return tuple(f"{role:<{wide[0]}}  {name:<{wide[1]}}  {dims}" for role, name, dims in cells)


__all__ = [
    "Dim", "Factor", "Layout", "Number", "Row", "SizeLine", "Sizes", "axis_size", "name_of", "parse_size",
    "rows_text", "section", "shape_of", "show", "solve_sizes",
]  # fmt: skip
