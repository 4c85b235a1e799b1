"""The files that a save will write, as a checkpoint without data: the plan that would load from them is the save's plan.

Made alike on every rank from what all ranks hold, or from a checkpoint to be like. It rejects states whose family and
layout nobody said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from restow.checkpoint import Checkpoint, RouterRows, survey
from restow.entries import Entry, Piece
from restow.errors import UnsupportedFamilyError, UsageError, show
from restow.family import Family
from restow.files import open_source, read_all
from restow.find import Module, candidates_of, find_modules
from restow.landing import layout_of
from restow.layout import Layout, axis_size, name_of, shape_of
from restow.naming import Rename, renamed
from restow.outfiles import INDEX, OutFile, index_text, new_files, recorded_files
from restow.planning import Prepared, raise_fatal
from restow.problems import merged
from restow.sidefiles import side_files
from restow.targets import Target

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Outline:
    """`files` and `side` are what will be written; `checkpoint` is what `restow.open` will see in them."""

    files: tuple[OutFile, ...]
    side: Mapping[str, bytes]
    checkpoint: Checkpoint
    like: str | None = None

    def digest(self) -> str:
        """One text for all that is written but the values: ranks compare it."""
        state = sha256()
        for file in self.files:
            state.update(file.name.encode() + file.head)
        for name, data in sorted(self.side.items()):
            state.update(name.encode() + data)
        return state.hexdigest()

    def filled(self, names: set[str], prepared: Prepared) -> set[str]:
        """The files' tensors that a state with these names fills."""
        source = self.checkpoint
        found = set(prepared.plain.values())
        roles = set(prepared.roles)
        found |= {name for name, owner in source.expert_tensors.items() if owner in roles}
        # Other ranks hold tensors that this one does not: the same names lead to the same places.
        for name in source.tensors:
            if name in found:
                continue
            to = renamed(name, prepared.wish.rename)
            family = source.family
            if to in names or (family is not None and to is not None and _same(family, to, names)):
                found.add(name)
        for path, module in source.modules.items():
            for role, tensors in module.tensors.items():
                if (path, role) not in roles and _elsewhere(source, path, names, prepared):
                    found |= {name for name in tensors if name is not None}
        return found


def _same(family: Family, name: str, names: set[str]) -> bool:
    return family.canonical(name) in {family.canonical(other) for other in names}


def _elsewhere(source: Checkpoint, path: str, names: set[str], prepared: Prepared) -> bool:
    """Whether a rank of another pipeline stage holds an experts module: some name lies below its place."""
    to = renamed(path, prepared.wish.rename)
    if to is None:
        return False
    family = source.family
    for name in names:
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent == to or (family is not None and family.place(parent) == family.place(to)):
                return True
    return False


def entries_of(files: Sequence[OutFile]) -> dict[str, Entry]:
    """The tensors of files as entries, in the order of their bytes."""
    return {
        t.name: Entry(t.dtype, t.shape, (Piece(tuple((0, n) for n in t.shape), file.name, t.begin, t.end),))
        for file in files
        for t in file.tensors
    }


def like_outline(like: Checkpoint) -> Outline:
    """The very files of another checkpoint: heads, index, side files. Raises what is fatal about it."""
    raise_fatal(like)
    fatal = [problem.error for problem in like.problems if problem.fatal]
    if fatal:
        raise merged(fatal)
    assert like.path is not None
    heads = {}
    for name in like.stamps:
        with open_source(Path(like.path) / name) as file:
            length = file.pread(0, 8)
            heads[name] = length + file.pread(8, int.from_bytes(length, "little"))
    side = dict(side_files(like.path).files)
    for index in sorted(Path(like.path).glob("*.safetensors.index.json")):
        side[index.name] = read_all(index, 1 << 29, what="an index", refuse=UsageError)
    return Outline(recorded_files(heads, like.path), side, like, like.path)


def new_outline(
    union: Mapping[str, Target],
    layout: str | Layout | None,
    family: Family | None,
    rename: Rename,
    parts: Sequence[tuple[str, int, int]],
    dtype: str | None,
    limit: int,
    config: bytes | None,
) -> Outline:
    """Files for the tensors that all ranks hold together (`union`: global shapes), experts in `layout`.

    `parts` are the (axis, rank, of) of plain parts; `config` the bytes of a config.json. Raises
    `UnsupportedFamilyError` where neither family nor config says how the vendor ships experts.
    """
    import json

    table = json.loads(config) if config is not None else None
    if family is None and table is not None:
        from restow.opening import by_config

        family = by_config(table, "the state")[0]
    if family is None and layout is None:
        raise UnsupportedFamilyError(
            "a family, which says how its vendor ships experts", "none",
            hint="say family=, layout= or like=",
        )  # fmt: skip
    if parts:
        raise UsageError("like= with shard=, which says the whole sizes", "none")
    sizes = {"p": len(family.labels) if family else 2}
    if family is not None and table is not None:
        sizes.update(family.read_sizes(table))
    shapes = {name: target.shape for name, target in union.items()}
    found = find_modules(
        shapes, candidates_of(family, None), sizes, claimed=lambda name: True, what="the state"
    )
    if found.errors:
        raise merged(found.errors)
    to = layout_of(layout or "hf", family)
    assert to is not None
    back = _backwards(rename)
    routers = RouterRows(family)
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    owner = {
        name: path for path, m in found.modules.items() for names in m.tensors.values() for name in names
    }
    done: set[str] = set()
    for name, target in union.items():
        path = owner.get(name)
        if path is None:
            row = routers.row(name)
            exact = row is not None and row.exact
            specs.append((_outer_name(name, family, back), _dtype(target.dtype, dtype, exact), target.shape))
        elif path not in done:
            done.add(path)
            specs += _expert_specs(found.modules[path], union, to, layout, family, back, dtype)
    files = new_files(specs, limit, {"format": "pt"})
    side = {INDEX: index_text(files)} if len(files) > 1 else {}
    if config is not None:
        side["config.json"] = config
    checkpoint = survey(
        entries_of(files), family=family, layout=None if family else to, config=table, path="."
    )
    raise_fatal(checkpoint)
    return Outline(files, side, checkpoint)


def _expert_specs(
    module: Module,
    union: Mapping[str, Target],
    to: Layout,
    layout: str | Layout | None,
    family: Family | None,
    back: Rename,
    dtype: str | None,
) -> list[tuple[str, str, tuple[int, ...]]]:
    from itertools import product

    path = _outer_name(module.path, None, back)
    if family is not None and layout is None:
        spelling = next(s for s in family.spellings if "hf" in s.names)
        layer = family.on_hub(family.layer(path))
        path = f"{layer}.{spelling.container}".strip(".")
    specs = []
    for row in to.rows:
        if row.role not in module.tensors:
            continue
        given = union[next(n for n in module.tensors[row.role] if n is not None)].dtype
        shape = shape_of(row, module.sizes)
        for index in product(*(range(axis_size(row, axis, module.sizes)) for axis in row.name_axes)):
            name = f"{path}.{name_of(row, index, module.sizes)}"
            specs.append((name, _dtype(given, dtype, row.exact), shape))
    return specs


def _dtype(given: str, wanted: str | None, exact: bool) -> str:
    return wanted if wanted is not None and given in FLOATS and not exact else given


def _backwards(rename: Rename) -> Rename:
    if isinstance(rename, Mapping):
        turned: dict[str, str | None] = {}
        for old, new in rename.items():
            if new is None:
                continue
            if new in turned:
                continue  # several names of one destination: experts, whose names the layout spells
            turned[new] = old
        return turned
    return tuple((new, old) for old, new in rename)


def _outer_name(name: str, family: Family | None, back: Rename) -> str:
    outer = renamed(name, back)
    if outer is None:
        raise UsageError(f"a name in the files for {show(name)}", "none in rename=")
    return family.on_hub(outer) if family is not None else outer
