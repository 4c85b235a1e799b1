"""Files for a state that no checkpoint is the model of: in a layout, by a family's names, encoded or not.

It rejects states whose family and layout nobody said, and tensors that the vendor's files hold in a form that no rename
brings about.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterable, Mapping
from itertools import product
from typing import NamedTuple

from restow.checkpoint import RouterRows, survey
from restow.codec import read_codec
from restow.codecs import CODES, Codec
from restow.coded import value_dtype
from restow.constants import constants_of, note_sizes
from restow.encodings import (
    Encoding,
    codec_for,
    coded_dtype,
    encoded_form,
    plain_form,
    skipped_modules,
    with_quantization,
)
from restow.entries import FLOATS
from restow.errors import UnexpectedTensorError, UnsupportedFamilyError, UsageError, show
from restow.family import Family
from restow.find import candidates_of, find_modules
from restow.landing import layout_of
from restow.layout import Layout, axis_size, name_of, shape_of
from restow.module import Module
from restow.naming import Rename, fits
from restow.opening import by_config
from restow.outfiles import INDEX, index_text, new_files
from restow.prepare import raise_fatal
from restow.problems import merged
from restow.stated import statement
from restow.targets import Shard, Target
from restow.torch.outline import Outline, entries_of
from restow.torch.outline_names import backwards, outer_name, outer_path, said_once

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class _Files(NamedTuple):
    """How the files spell experts: `form` with rows for codes where there is a `codec`; `values`: what they decode to.

    `vendor`: in the container of the family's own spelling; `dtype` is what floats are cast to, None for none.
    """

    form: Layout
    codec: Codec | None
    values: str
    vendor: bool
    family: Family | None
    back: Rename
    dtype: str | None


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
    bytes of a config.json, `limit` the bytes of data in one file. Raises `UnsupportedFamilyError` where neither family
    nor config says how the vendor ships experts, `UnexpectedTensorError` for what the vendor's files hold in a form that
    is no rename, `UsageError` for a shard of an axis without a size.
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
    local = _local(shard, sizes)
    again = said_once(tied, family, table)
    union = {name: target for name, target in union.items() if name not in again}
    _judge_names(union, family, sizes)
    modules = _modules(union, family, sizes, local)
    wanted = layout or "hf"
    to = layout_of(wanted, family) if encoding is None else plain_form(wanted, family, encoding)
    assert to is not None
    form = to if encoding is None else encoded_form(to, encoding)
    codec = codec_for(encoding, to) if encoding is not None else None
    values = dtype or value_dtype(table)
    vendor = family is not None and layout is None
    how = _Files(form, codec, values, vendor, family, backwards(rename), dtype)
    specs, others = _specs(union, modules, how)
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
    same = constants_of(checkpoint.modules, values) if codec is not None else {}
    return Outline(files, side, checkpoint, constants={name: one.data for name, one in same.items()})


def _local(shard: Shard | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of what plain expert tensors hold of the axis that a shard cuts."""
    if shard is None:
        return {}
    if shard.axis not in sizes:
        raise UsageError(
            f"the size of {show(shard.axis)} with shard=", "none: no config says it",
            hint="save a module that has a config, or say like=",
        )  # fmt: skip
    return {shard.axis: shard.run(sizes[shard.axis])[1]}


def _judge_names(names: Iterable[str], family: Family | None, sizes: Mapping[str, int]) -> None:
    foreign = family.foreign if family is not None else ()
    strange = [name for name in names if any(fits(pattern, name, sizes) for pattern in foreign)]
    if strange:
        raise UnexpectedTensorError(
            "tensors that a rename brings to the vendor's files", f"{len(strange)} that they hold in another form",
            tensor=strange[0], sections=[("tensors", map(show, strange))],
            hint="save them in transformers' own form, or leave them out of the state",
        )  # fmt: skip


def _modules(
    union: Mapping[str, Target], family: Family | None, sizes: dict[str, int], local: dict[str, int]
) -> Mapping[str, Module]:
    """The state's own experts modules. Raises what is wrong with them."""
    found = find_modules(
        {name: target.shape for name, target in union.items()},
        candidates_of(family, None),
        sizes,
        family=family,
        claimed=lambda name: True,
        local=local,
        partial=bool(local),
        what="the state",
    )
    if found.errors:
        raise merged(found.errors)
    return found.modules


def _specs(
    union: Mapping[str, Target], modules: Mapping[str, Module], how: _Files
) -> tuple[list[Spec], list[tuple[str, tuple[int, ...]]]]:
    """The tensors of the files in the state's order, and (name, shape) of those outside the experts."""
    routers = RouterRows(how.family)
    owner = {name: path for path, m in modules.items() for names in m.tensors.values() for name in names}
    specs: list[Spec] = []
    others: list[tuple[str, tuple[int, ...]]] = []
    done: set[str] = set()
    for name, target in union.items():
        path = owner.get(name)
        if path is None:
            row = routers.row(name)
            exact = row is not None and row.exact
            outer = outer_name(name, how.family, how.back)
            specs.append((outer, _dtype(target.dtype, how.dtype, exact), target.shape))
            others.append((outer, target.shape))
        elif path not in done:
            done.add(path)
            specs += _expert_specs(modules[path], union, how)
    return specs, others


def _expert_specs(module: Module, union: Mapping[str, Target], how: _Files) -> list[Spec]:
    family, codec = how.family, how.codec
    path = outer_path(module, family, how.back)
    if family is not None and how.vendor:
        spelling = next(s for s in family.spellings if "hf" in s.names)
        path = f"{family.on_hub(family.layer(path))}.{spelling.container}".strip(".")
    sizes = dict(module.sizes)
    if codec is not None:
        coded = [row for row in how.form.rows if row.role.endswith(CODES)]
        sizes |= ChainMap(*(note_sizes(codec, row, module.sizes, how.values) for row in coded))
    specs = []
    for row in how.form.rows:
        role = row.role if row.role in module.tensors or codec is None else row.base
        if role not in module.tensors:
            continue
        given = union[next(n for n in module.tensors[role] if n is not None)].dtype
        if codec is not None and row.role.partition(".")[2] != "bias":
            given = coded_dtype(row, codec)
        dtype = _dtype(given, how.dtype, row.exact) if role == row.role else given
        shape = shape_of(row, sizes)
        for index in product(*(range(axis_size(row, axis, sizes)) for axis in row.name_axes)):
            specs.append((f"{path}.{name_of(row, index, sizes)}", dtype, shape))
    return specs


def _dtype(given: str, wanted: str | None, exact: bool) -> str:
    return wanted if wanted is not None and given in FLOATS and not exact else given
