"""What the tensors of a source are in another layout: their names, shapes and dtypes, whole or a rank's part.

Experts modules keep their paths, unless their family spells the layout below another container only. It rejects a source
of which not one tensor of a role is there to say a dtype (`MissingTensorError`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from types import MappingProxyType

from restow.checkpoint import Checkpoint
from restow.coded_rows import ragged
from restow.decoded import coded_as, decoded
from restow.family import Family
from restow.landing import Wish, chosen_experts, layout_of, with_count
from restow.layout import Layout, axis_size, name_of, shape_of
from restow.lost import lost_error
from restow.module import Module
from restow.notation import Row
from restow.notes import note_pairs
from restow.targets import Target, whole_target

NOTHING: Mapping[str, Iterable[int]] = MappingProxyType({})


def default_targets(
    source: Checkpoint, layout: str | Layout | None, wish: Wish, *, keep_quantized: bool = False
) -> list[Target]:
    """The tensors that `source` has in another layout (`grouped` if None), whole, or a rank's part by `wish.shard`.

    Quantised weights are plain ones there, unless `keep_quantized`: then the layout has rows for their companions.
    """
    targets = []
    source = source if keep_quantized else decoded(source)
    for path, module in source.modules.items():
        to = layout_of(layout or "grouped", source.family)
        assert to is not None
        home = home_of(path, to, source.family)
        to = coded_as(to, module) if module.codec is not None else to
        experts = chosen_experts(wish.experts, path, module.sizes.get("e", 0))
        sizes = with_count(module.sizes, len(experts)) if experts is not None else module.sizes
        for row in to.rows:
            if row.role not in module.tensors:
                continue
            first = next((n for n in module.tensors[row.role] if n is not None), None)
            if first is None:  # not one of its tensors is there to say a dtype
                lost = range(len(module.tensors[row.role]))
                raise lost_error(source, [(module, row.role, lost)])
            dtype, shape = source.tensors[first].dtype, shape_of(row, sizes)
            if wish.shard is not None and wish.shard.axis in row.axes:
                start, length = wish.shard.run(axis_size(row, wish.shard.axis, sizes))
                local = {wish.shard.axis: length}
                keep = {wish.shard.axis: range(start, start + length)}
                shape = shape_of(row, {**sizes, **local})
            else:
                keep = {}
            notes = _note_shapes(source, module, row, sizes, experts)
            for name in row_names(row, sizes, keep):
                targets.append(whole_target(f"{home}.{name}", notes.get(name, shape), dtype))
    others = ((name, source.tensors[name]) for name in source.others)
    targets += [whole_target(name, entry.shape, entry.dtype) for name, entry in others]
    return targets


def _note_shapes(
    source: Checkpoint, module: Module, row: Row, sizes: Mapping[str, int], experts: tuple[int, ...] | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a row whose tensors have lengths of their own, by name; nothing for other rows."""
    if not ragged(row):
        return {}
    names, held = row_names(row, sizes), module.tensors[row.role]
    pairs = note_pairs(module, row, sizes, (("e", experts),) if experts is not None else ())
    found = {names[place]: held[other] for place, other in pairs.items()}
    return {name: source.tensors[note].shape for name, note in found.items() if note is not None}


def home_of(path: str, to: Layout, family: Family | None) -> str:
    """An experts module's path in layout `to`: the same, unless the family spells that below another container only."""
    containers = [s.container for s in family.candidates() if s.layout == to] if family is not None else []
    if family is None or not containers or any(f".{path}".endswith(f".{c}" if c else "") for c in containers):
        return path
    return f"{family.layer(path)}.{containers[0]}".lstrip(".")


def row_names(row: Row, sizes: Mapping[str, int], keep: Mapping[str, Iterable[int]] = NOTHING) -> list[str]:
    """The names of a row's tensors below their module, of some places along an axis or of all."""
    axes = [keep.get(axis, range(axis_size(row, axis, sizes))) for axis in row.name_axes]
    return [name_of(row, index, sizes) for index in product(*axes)]
