"""The blocks of one experts module as a format wants them: gate and up put together, or taken apart.

What a conversion before did to them is undone first, by the stamp. Rejected are factors that differ between experts
where a format has one for all (`AdapterError`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from restow.adapter_formats import Format
from restow.adapter_pair import Pair
from restow.adapter_place import key_of, module_key, place_of
from restow.adapter_stamp import Place
from restow.errors import AdapterError, show
from restow.torch.adapter_factors import Block, bits_equal
from restow.torch.adapter_join import filled_rank, joined, parts, places_of, resized, shared, split, there
from restow.torch.adapter_scale import Reading, exact

Parts = tuple[tuple[Place, ...], int]  # where gate and up lie along the rank of both; the rank of down


@dataclass(frozen=True)
class Arranged:
    """One experts module for a format: where it is written, its blocks, what a stamp should keep, what was said."""

    path: str
    blocks: tuple[Block, ...]
    parts: Parts | None
    notes: tuple[str, ...] = ()
    folded: Mapping[str, float] = field(default_factory=dict)  # by key: the true scale of what was multiplied
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict)  # B before multiplying rounded it


def arrange(pairs: Sequence[Pair], fmt: Format, reading: Reading) -> Arranged:
    """Read the pairs of one module and arrange their blocks for a format."""
    base, path = reading.base, pairs[0].path
    to, _ = place_of(base, path, fmt)
    known = reading.stamp.parts.get(module_key(base, path))
    blocks = shared([reading.block(pair) for pair in pairs])
    ins, outs = ([b for b in blocks if b.role == role] for role in ("in", "out"))
    made = Arranged(to, tuple(blocks), known)
    if fmt.kind in ("expert", "outer", "apart"):
        made = replace(made, blocks=_taken_apart(ins, outs, known, reading))
        if fmt.kind == "outer":
            _check_outer(made.blocks)
    elif ins:
        made = _put_together(made, ins, outs, fmt, reading)
    absent = [b for b in made.blocks if len(b.experts) < b.a.shape[0]]
    notes = made.notes
    if absent and fmt.kind != "expert":
        some, every = len(absent[0].experts), absent[0].a.shape[0]
        notes += (f"{show(to)}: {some} of {every} experts are adapted; the others hold zeros",)
    return replace(made, blocks=tuple(replace(b, path=to) for b in made.blocks), notes=notes)


def _taken_apart(
    ins: Sequence[Block], outs: Sequence[Block], known: Parts | None, reading: Reading
) -> tuple[Block, ...]:
    """One block a projection, of the rank that it had before it was joined; and the experts that are there."""
    rslora = reading.config.rslora
    found, cut = _apart(ins, known, rslora)
    found = [reading.unfolded(block) for block in found]
    if outs and cut and outs[0].rank == cut:
        outs = [resized(outs[0], _unpadded(outs[0], found, known), rslora)]
    return tuple(replace(block, experts=there(block)) for block in (*found, *outs))


def _put_together(
    made: Arranged, ins: Sequence[Block], outs: Sequence[Block], fmt: Format, reading: Reading
) -> Arranged:
    """One block for gate and up, and what has to be kept and said of it."""
    base, config = reading.base, reading.config
    one, multiplied = joined(ins, len(base.family.labels), config.rslora)
    notes: list[str] = []
    folded: dict[str, float] = {}
    originals: dict[str, torch.Tensor] = {}
    keep = made.parts
    for block, ratio in multiplied:
        key = key_of(base, block.path, "in", block.labels)
        folded[key] = config.scale(block.rank, block.alpha)
        if not exact(ratio):
            originals[key] = block.b
    if multiplied:
        notes.append(
            f"{show(made.path)}: gate and up have different scales; their ratio was multiplied into B"
        )
    if one is ins[0]:  # what is folded into parts of it, from a conversion before, stays known
        for key in (key_of(base, one.path, "in", (label,)) for label in one.labels):
            if key in reading.stamp.folded:
                folded[key] = reading.stamp.folded[key]
                if (kept := reading.original(key)) is not None:
                    originals[key] = kept
    else:
        keep = (tuple(places_of(ins)), outs[0].rank if outs else 0)
        notes.append(_said(ins, one, made.path))
        if fmt.kind == "native" and outs:
            outs = [resized(outs[0], max(outs[0].rank, one.rank), config.rslora)]
    return Arranged(made.path, (one, *outs), keep, tuple(notes), folded, originals)


def _said(ins: Sequence[Block], one: Block, path: str) -> str:
    labels = [label for block in ins for label in block.labels]
    if len(labels) < len(one.labels):
        return f"{show(path)}: one of gate and up is not adapted; its part of B holds zeros"
    return f"{show(path)}: gate and up have A of their own; side by side, rank {one.rank}"


def _apart(ins: Sequence[Block], known: Parts | None, rslora: bool) -> tuple[list[Block], int]:
    """One block a projection; and the joined rank, where blocks lay side by side."""
    found: list[Block] = []
    cut = 0
    for block in ins:
        places = parts(block, known[0] if known else None) if len(block.labels) > 1 else places_of([block])
        if places != [(block.labels, 0, block.rank)]:
            cut = block.rank
        for piece in split(block, places, rslora):
            for i, label in enumerate(piece.labels):
                found.append(replace(piece, labels=(label,), b=piece.b[:, i : i + 1]))
    return sorted(found, key=lambda block: block.labels), cut


def _unpadded(out: Block, ins: Sequence[Block], known: Parts | None) -> int:
    """The rank that `out` had before it was made as long as gate and up together."""
    need = filled_rank(out)
    for rank in ([known[1]] if known else []) + [block.rank for block in ins]:
        if need <= rank < out.rank:
            return rank
    return out.rank if need == out.rank else need


def _check_outer(blocks: Sequence[Block]) -> None:
    for block in blocks:
        factor, word = (block.a, "A") if block.role == "in" else (block.b, "B")
        if any(not bits_equal(factor[0], factor[i]) for i in range(1, factor.shape[0])):
            raise AdapterError(
                f"one {word} for all experts of {show(block.path)}, as this format has",
                f"experts that differ in {word} of '{block.role}'",
                hint="choose a format with factors for every expert",
            )
