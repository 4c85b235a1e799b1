"""The files that a save will write, as a checkpoint without data: the plan that would load from them is its plan.

Made alike on every rank from what all ranks hold, or from a checkpoint to be like. It rejects states whose family and
layout nobody said.
"""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product
from pathlib import Path

from restow.checkpoint import Checkpoint, RouterRows, survey
from restow.codec import read_codec
from restow.codecs import CODES, Codec
from restow.coded import CodedWeights, value_dtype
from restow.constants import constants_of, note_sizes
from restow.decoded import decoded
from restow.encodings import (
    Encoding,
    codec_for,
    coded_dtype,
    encoded_form,
    plain_form,
    skipped_modules,
    with_quantization,
)
from restow.entries import Entry, Piece
from restow.errors import (
    ConfigError,
    QuantizationError,
    UnexpectedTensorError,
    UnsupportedFamilyError,
    UsageError,
    show,
)
from restow.family import Family
from restow.files import open_source, read_all
from restow.find import candidates_of, find_modules
from restow.landing import layout_of
from restow.layout import Layout, axis_size, name_of, shape_of
from restow.module import Module
from restow.naming import Rename, fits, renamed
from restow.opening import by_config
from restow.outfiles import INDEX, OutFile, index_text, new_files, recorded_files
from restow.packing import packed_weights
from restow.prepare import raise_fatal
from restow.problems import merged
from restow.sidefiles import side_files
from restow.stated import statement
from restow.targets import Shard, Target

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Outline:
    """`files` and `side` are what will be written; `checkpoint` is what `restow.open` will see in them."""

    files: tuple[OutFile, ...]
    side: Mapping[str, bytes]
    checkpoint: Checkpoint
    like: str | None = None
    constants: Mapping[str, bytes] = field(default_factory=dict)  # tensors that follow from a codec alone

    def digest(self) -> str:
        """One text for all that is written but the values: ranks compare it."""
        state = sha256()
        for file in self.files:
            state.update(file.name.encode() + file.head)
        for name, data in sorted(self.side.items()):
            state.update(name.encode() + data)
        return state.hexdigest()

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(file.size for file in self.files) + sum(map(len, self.side.values()))

    @property
    def count(self) -> int:
        """Files that will be written, with room for one to tell ranks by."""
        return len(self.files) + len(self.side) + 1


def entries_of(files: Sequence[OutFile]) -> dict[str, Entry]:
    """The tensors of files as entries, in the order of their bytes."""
    return {
        t.name: Entry(t.dtype, t.shape, (Piece(tuple((0, n) for n in t.shape), file.name, t.begin, t.end),))
        for file in files
        for t in file.tensors
    }


def like_outline(like: Checkpoint) -> Outline:
    """The very files of another checkpoint: heads, index, side files; in its codes. Raises what is fatal about it."""
    raise_fatal(like)
    fatal = [problem.error for problem in like.problems if problem.fatal]
    if fatal:
        raise merged(fatal)
    assert like.path is not None
    same = _constants(like)
    heads = {}
    for name in like.stamps:
        with open_source(Path(like.path) / name) as file:
            length = file.pread(0, 8)
            heads[name] = length + file.pread(8, int.from_bytes(length, "little"))
    side = dict(side_files(like.path).files)
    for index in sorted(Path(like.path).glob("*.safetensors.index.json")):
        side[index.name] = read_all(index, 1 << 29, what="an index", refuse=UsageError)
    return Outline(recorded_files(heads, like.path), side, like, like.path, same)


def _constants(like: Checkpoint) -> dict[str, bytes]:
    """The tensors of a checkpoint in codes that always hold the same. Raises for codes that encoding does not make."""
    view = decoded(like)
    if not isinstance(view.coded, CodedWeights):
        return {}
    weights = packed_weights(view).values()
    same = constants_of(like.modules, value_dtype(like.config))
    made = {name for one in weights for name in (one.codes, one.scale)} | same.keys()
    other = [name for name in view.coded.gone if name not in made]
    if other:
        raise QuantizationError(
            "a checkpoint of weights, codes and scales as like=",
            f"{len(other)} other tensors beside them",
            path=like.path,
            tensor=other[0],
            sections=[("tensors", map(show, sorted(other)))],
            hint="save without like=, or like a checkpoint that was decoded (restow.convert)",
        )
    return {name: one.data for name, one in same.items()}


def config_bytes(config: object) -> bytes | None:
    """The text of a config.json: of a config of transformers as it would write it, of a dict, or at a path."""
    text = getattr(config, "to_json_string", None)
    if callable(text):
        return str(text()).encode()
    if isinstance(config, Mapping):
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if isinstance(config, str | os.PathLike):
        return read_all(config, 1 << 24, what="a config.json", refuse=ConfigError)
    if config is not None:
        raise UsageError("config= as a config of transformers, a dict or a path", type(config).__name__)
    return None


def new_outline(
    union: Mapping[str, Target],
    tied: Mapping[str, str],
    shard: Shard | None,
    layout: str | Layout | None,
    family: Family | None,
    rename: Rename,
    dtype: str | None,
    limit: int,
    config: bytes | None,
    encoding: Encoding | None = None,
) -> Outline:
    """Files for the tensors that all ranks hold together (`union`: global shapes), experts in `layout`, by `encoding`.

    `tied` are further names of one memory, `shard` is the part that plain expert tensors of `union` hold, `config` the
    bytes of a config.json. Raises `UnsupportedFamilyError` where neither family nor config says how the vendor ships
    experts, `UnexpectedTensorError` for what the vendor's files hold in a form that is no rename.
    """
    table = json.loads(config) if config is not None else None
    if family is None and table is not None:
        family = by_config(table, "the state")[0]
    if family is None and layout is None:
        raise UnsupportedFamilyError(
            "a family, which says how its vendor ships experts", "none",
            hint="say family=, layout= or like=",
        )  # fmt: skip
    sizes = {"p": len(family.labels) if family else 2}
    if family is not None and table is not None:
        sizes.update(family.read_sizes(table))
    local = {}
    if shard is not None:
        if shard.axis not in sizes:
            raise UsageError(
                f"the size of {show(shard.axis)} with shard=", "none: no config says it",
                hint="save a module that has a config, or say like=",
            )  # fmt: skip
        local = {shard.axis: shard.run(sizes[shard.axis])[1]}
    again = _said_once(tied, family, table)
    union = {name: target for name, target in union.items() if name not in again}
    strange = [
        name for name in union if family is not None and any(fits(p, name, sizes) for p in family.foreign)
    ]
    if strange:
        raise UnexpectedTensorError(
            "tensors that a rename brings to the vendor's files", f"{len(strange)} that they hold in another form",
            tensor=strange[0], sections=[("tensors", map(show, strange))],
            hint="save them in transformers' own form, or leave them out of the state",
        )  # fmt: skip
    shapes = {name: target.shape for name, target in union.items()}
    candidates = candidates_of(family, None)
    found = find_modules(
        shapes,
        candidates,
        sizes,
        family=family,
        claimed=lambda name: True,
        local=local,
        partial=bool(local),
        what="the state",
    )
    if found.errors:
        raise merged(found.errors)
    to = (
        layout_of(layout or "hf", family)
        if encoding is None
        else plain_form(layout or "hf", family, encoding)
    )
    assert to is not None
    form = to if encoding is None else encoded_form(to, encoding)
    codec = codec_for(encoding, to) if encoding is not None else None
    back = _backwards(rename)
    routers = RouterRows(family)
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    owner = {
        name: path for path, m in found.modules.items() for names in m.tensors.values() for name in names
    }
    done: set[str] = set()
    others: list[tuple[str, tuple[int, ...]]] = []
    for name, target in union.items():
        path = owner.get(name)
        if path is None:
            row = routers.row(name)
            exact = row is not None and row.exact
            outer = _outer_name(name, family, back)
            specs.append((outer, _dtype(target.dtype, dtype, exact), target.shape))
            others.append((outer, target.shape))
        elif path not in done:
            done.add(path)
            module = found.modules[path]
            if codec is not None:
                noted = [
                    note_sizes(codec, row, module.sizes, _value(dtype, table))
                    for row in form.rows
                    if row.role.endswith(CODES)
                ]
                module = replace(module, sizes={**module.sizes, **dict(ChainMap(*noted))})
            specs += _expert_specs(module, union, form, layout, family, back, dtype, codec)
    if encoding is not None:
        config = with_quantization(config, encoding, skipped_modules(others))
        table = json.loads(config)
    said = statement(to, family) if encoding is None else {}
    files = new_files(specs, limit, {"format": "pt", **said})
    side = {INDEX: index_text(files)} if len(files) > 1 else {}
    if config is not None:
        side["config.json"] = config
    checkpoint = survey(
        entries_of(files), family=family, layout=None if family else to, config=table, path=".",
        stated=to if said else None, codec=read_codec(table) if encoding is not None else None,
    )  # fmt: skip
    raise_fatal(checkpoint)
    same = constants_of(checkpoint.modules, _value(dtype, table)) if codec is not None else {}
    return Outline(files, side, checkpoint, constants={name: one.data for name, one in same.items()})


def _value(dtype: str | None, config: Mapping[str, object] | None) -> str:
    """What codes decode to."""
    return dtype or value_dtype(config)


def _expert_specs(
    module: Module,
    union: Mapping[str, Target],
    to: Layout,
    layout: str | Layout | None,
    family: Family | None,
    back: Rename,
    dtype: str | None,
    codec: Codec | None,
) -> list[tuple[str, str, tuple[int, ...]]]:
    path = _outer_path(module, family, back)
    if family is not None and layout is None:
        spelling = next(s for s in family.spellings if "hf" in s.names)
        layer = family.on_hub(family.layer(path))
        path = f"{layer}.{spelling.container}".strip(".")
    specs = []
    for row in to.rows:
        role = row.role if row.role in module.tensors or codec is None else row.base
        if role not in module.tensors:
            continue
        given = union[next(n for n in module.tensors[role] if n is not None)].dtype
        if codec is not None and row.role.partition(".")[2] != "bias":
            given = coded_dtype(row, codec)
        shape = shape_of(row, module.sizes)
        for index in product(*(range(axis_size(row, axis, module.sizes)) for axis in row.name_axes)):
            name = f"{path}.{name_of(row, index, module.sizes)}"
            specs.append((name, _dtype(given, dtype, row.exact) if role == row.role else given, shape))
    return specs


def _outer_path(module: Module, family: Family | None, back: Rename) -> str:
    """Where the experts of a module lie in the files."""
    if not isinstance(back, Mapping):
        return _outer_name(module.path, None, back)
    name = _outer_name(
        next(n for names in module.tensors.values() for n in names if n is not None), None, back
    )
    before, gap, _ = name.partition("..")  # where the table has an expert's number, a stack has none
    if gap:
        return before
    known = sorted((c for line in family.containers for c in line) if family else (), key=len, reverse=True)
    found = next((c for c in known if f".{c}." in f".{name}"), None)
    return name[: f".{name}".index(f".{found}.") + len(found)] if found else name.rpartition(".")[0]


def _said_once(
    tied: Mapping[str, str], family: Family | None, config: Mapping[str, object] | None
) -> set[str]:
    """The names of tied tensors that are not written: all but one a memory, the head's first of all.

    Where a config says that its model does not tie them, a reader wants both: then the head is written too.
    """
    heads = (
        {family.canonical(p.lstrip("?")) for p in family.required if p.startswith("?")} if family else set()
    )
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    out: set[str] = set()
    for names in groups.values():
        head = {name for name in names if family is not None and family.canonical(name) in heads}
        kept = next((name for name in names if name not in head), names[0])
        apart = head if config is not None and family is not None and not family.ties(config) else set()
        out |= set(names) - {kept} - apart
    return out


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
