"""A quantised checkpoint as its values are: names, shapes and layouts without codes and scales; nothing is decoded yet.

`decoded(checkpoint)` has a logical entry for every coded weight, no entries for companions, and `coded` says which bytes
stand for a weight and which scale belongs to which of its elements. Whoever plans sees plain weights. It rejects what no
codec of the announced ones says (`QuantizationError`, by name), when that tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from restow.checkpoint import Checkpoint
from restow.codecs import CODES, COMPANIONS, WEIGHTS, spelled, weight_of
from restow.coded import Coded, CodedWeights, DecodedTensors
from restow.coded_rows import coded_layouts, logical_row, suits
from restow.errors import UsageError, show
from restow.layout import Layout
from restow.module import Module


def decoded(found: Checkpoint, keep: Container[str] = ()) -> Checkpoint:
    """The checkpoint with its coded weights as plain ones, those whose raw names (or modules' paths) are in `keep` apart."""
    if found.codec is None or found.coded is not None:
        return found
    modules = {path: _plain(module) if path not in keep else module for path, module in found.modules.items()}
    view = CodedWeights(found, modules, keep)
    if not view.weights:
        return found
    return replace(found, tensors=DecodedTensors(view), modules=modules, coded=view)


def kept_coded(
    found: Checkpoint, targets: Container[str], modules: Mapping[str, Module], pairs: Mapping[str, str]
) -> frozenset[str]:
    """What stays in codes, since the destination has a place for its companions: modules by path, others by name."""
    if found.codec is None or found.coded is not None:
        return frozenset()
    kept = {
        pairs[path]
        for path, module in modules.items()
        if path in pairs and any(row.role.endswith(COMPANIONS) for row in module.layout.rows)
    }
    for name in found.others:
        for codec in found.codec.codecs:
            weight = weight_of(codec.codes.name, name)
            if weight is not None and any(spelled(scale.name, weight) in targets for scale in codec.scales):
                kept.add(name)
    return frozenset(kept)


def coded_as(layout: Layout, module: Module) -> Layout:
    """A layout with rows for the codes and companions that a module has. Raises `UsageError` where it has no such rows."""
    assert module.codec is not None
    codec = module.codec
    if suits(layout, codec):
        for found in coded_layouts(layout, codec):
            if set(module.tensors) <= set(found.roles):
                return found
    raise UsageError(
        f"a layout with the input axis {'before the last' if codec.across else 'last'}, as the {codec.name} codes of "
        f"{show(module.path)} have it",
        "; ".join(str(row) for row in layout.rows),
        hint="without keep_quantized the weights are decoded, which any layout can hold",
    )


def _plain(module: Module) -> Module:
    """A coded module as its weights are: rows of logical dims, without companions."""
    if module.codec is None:
        return module
    rows, tensors = [], {}
    for row in module.layout.rows:
        if row.role.endswith(COMPANIONS):
            continue
        plain = logical_row(module.codec, row) if row.role.removesuffix(CODES) in WEIGHTS else row
        rows.append(plain)
        tensors[plain.role] = module.tensors[row.role]
    return replace(module, layout=Layout(tuple(rows)), tensors=tensors, codec=None)


__all__ = ["Coded", "CodedWeights", "DecodedTensors", "coded_as", "decoded", "kept_coded"]
