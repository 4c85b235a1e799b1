"""Loading into codes: a destination that holds codes and scales is filled from values, block by block.

Which codec a destination is in follows from its names, dtypes and shapes, as a file's does. Its plain weights are
planned like any others, filled in float32 in whole blocks through a bounded buffer, and encoded into their place.
Rejected are destinations in codes that hold a part by `shard=`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from restow.boxes import whole
from restow.checkpoint import Checkpoint
from restow.codec import Announced, read_codec
from restow.coded import value_dtype
from restow.constants import Constant, constants_of
from restow.decoded import decoded
from restow.encodings import ENCODINGS
from restow.entries import Entry, Piece
from restow.errors import QuantizationError, RestowError, UsageError, show
from restow.landing import Wish, find_landing, pair_modules
from restow.module import Module
from restow.outfiles import nbytes
from restow.packing import Packed, packed_weights, pieces
from restow.prepare import Prepared, prepare
from restow.targets import Runs, Target
from restow.torch.chunks import Filled, Slice, stream
from restow.torch.dtypes import torch_dtype
from restow.torch.encode import encode
from restow.torch.encoded import encoders
from restow.torch.storage import Slot

CODED = frozenset({"F8_E4M3", "F8_E5M2", "U8", "I8"})
CHUNK = 5 << 20  # elements that are filled at once, in float32


@dataclass(frozen=True)
class PackedSide:
    """A destination in codes: `prepared` for its plain weights and all else, `weights` what is encoded, by name."""

    prepared: Prepared
    weights: Mapping[str, Packed]
    constants: Mapping[str, Constant]

    def plain(self, targets: Mapping[str, Target]) -> dict[str, Target]:
        """The targets that are filled in place."""
        return {name: target for name, target in targets.items() if name not in self.weights}


def packed_side(opened: Checkpoint, slots: Mapping[str, Slot], wish: Wish) -> PackedSide | None:
    """A destination in codes that the source does not have as they are; None for any other."""
    targets = {name: slot.target for name, slot in slots.items()}
    coded = {name: target for name, target in targets.items() if target.dtype in CODED}
    if not coded or all(_alike(opened, name, target) for name, target in coded.items()):
        return None
    for encoding in ENCODINGS.values():
        said = read_codec({"quantization_config": encoding.section})
        assert said is not None
        ends = tuple(scale.name.lstrip("{-_}") for codec in said.codecs for scale in codec.scales)
        if not any(name.endswith(ends) for name in targets):
            continue
        side = _in_codec(opened, targets, wish, said)
        if side is not None:
            return side
    return None


def _alike(opened: Checkpoint, name: str, target: Target) -> bool:
    """Whether the source has a tensor of this name, dtype and shape."""
    entry = opened.tensors.get(name)
    return entry is not None and (entry.dtype, entry.shape) == (target.dtype, target.shape)


def _in_codec(
    opened: Checkpoint, targets: Mapping[str, Target], wish: Wish, said: Announced
) -> PackedSide | None:
    """The destination as one in the codecs of `said`, or None where it is not, or holds the source's own codes."""
    try:
        modules = find_landing(opened, targets, wish, said).modules
    except RestowError:
        return None  # in other codes, or in none: who finds it so says what is wrong with it
    if not all(_right(module, targets) for module in modules.values()):
        return None
    seen = Checkpoint(
        tensors={name: _entry(target) for name, target in targets.items()},
        family=wish.family or opened.family,
        modules=modules,
        routers={},
        sizes=opened.sizes,
        codec=said,
    )
    view = decoded(seen, _as_they_are(opened, seen, pair_modules(opened, modules, wish)))
    if view is seen:
        return None
    if wish.shard is not None:
        raise UsageError(
            "DTensors, or whole tensors, as a destination in codes",
            "shard= with it",
            hint="a plain part does not say which blocks it holds",
        )
    weights = packed_weights(view)
    chosen = []
    for name in view.tensors:
        packed = weights.get(name)
        if packed is None:
            chosen.append(targets[name])
            continue
        runs = packed.needs(targets[packed.codes].runs, targets[packed.scale].runs)
        chosen.append(Target(name, packed.shape, "F32", runs))
    constants = constants_of(modules, value_dtype(opened.config))
    constants = {name: one for name, one in constants.items() if one.codes in weights}
    for name, (_, data) in constants.items():
        size = nbytes(targets[name].dtype, targets[name].shape)
        if size != len(data):
            raise QuantizationError(
                f"{len(data)} bytes in {show(name)}: what goes with a weight of this shape",
                f"{size}",
                tensor=name,
                sections=[("tensor", [show(name)])],
            )
    return PackedSide(prepare(opened, chosen, wish, view.modules), weights, constants)


def _entry(target: Target) -> Entry:
    box = tuple((0, n) for n in target.shape)
    return Entry(target.dtype, target.shape, (Piece(box, "", 0, 0),))


def _right(module: Module, targets: Mapping[str, Target]) -> bool:
    """Whether the codes and scales of a module have dtypes of its codec."""
    if module.codec is None:
        return True
    known = {"": module.codec.dtypes, ".codes": module.codec.dtypes}
    known |= {scale.role: scale.dtypes for scale in module.codec.scales}
    for role, names in module.tensors.items():
        dtypes = known.get(role.removeprefix(module.layout.row(role).base), ())
        if dtypes and any(name is not None and targets[name].dtype not in dtypes for name in names):
            return False
    return True


def _as_they_are(opened: Checkpoint, seen: Checkpoint, pairs: Mapping[str, str]) -> Container[str]:
    """Modules of the destination, and tensors outside them, that the source has in the very same codes."""
    if opened.codec is None:
        return frozenset()
    kept = {
        path
        for path, module in seen.modules.items()
        if path in pairs and module.codec is not None and opened.modules[pairs[path]].codec == module.codec
    }
    same = [codec for codec in opened.codec.codecs if seen.codec is not None and codec in seen.codec.codecs]
    kept |= {n for n in seen.others if same and n in opened.tensors and opened.tensors[n].dtype in CODED}
    return frozenset(kept)


def fill_packed(
    side: PackedSide,
    targets: Mapping[str, Target],
    slots: Mapping[str, Slot],
    *,
    memory: Mapping[str, torch.Tensor] | None,
    threads: int | None,
) -> tuple[int, int]:
    """Fill the weights in codes; the bytes read, and written."""
    written = 0
    with encoders(threads) as pool:

        def hand_on(filled: Sequence[Filled]) -> None:
            nonlocal written
            for one in filled:
                packed, runs = side.weights[one.slice.target.name], one.slice.target.runs
                made = encode(
                    one.tensor, packed.blocks, packed.codec.element, packed.scale_dtype, name=packed.codes, pool=pool
                )  # fmt: skip
                written += put(slots[packed.codes], packed.codes_runs(runs), made.codes)
                written += put(slots[packed.scale], packed.scale_runs(runs), made.scales)

        parts = (
            Slice(targets[name]._replace(runs=runs), 0)
            for name, packed in side.weights.items()
            if name in targets and all(targets[name].local_shape)
            for runs in pieces(targets[name].runs, packed.blocks, CHUNK)
        )
        read = stream(side.prepared, parts, hand_on, memory=memory, threads=threads, chunk=4 * CHUNK)
    for name, (codes, data) in side.constants.items():
        if codes in targets:
            runs = whole(slots[name].target.shape)
            written += put(slots[name], runs, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return read, written


def put(slot: Slot, runs: Runs, values: torch.Tensor) -> int:
    """Write what a slot holds of a part of its tensor; `values` are the part's, row-major. The bytes written."""
    dtype = torch_dtype(slot.target.dtype)
    flat = values.reshape(-1)
    part = (flat if flat.dtype == dtype else flat.view(dtype)).view([sum(n for _, n in dim) for dim in runs])
    written = 0
    shared = (list(_shared(mine, theirs)) for mine, theirs in zip(slot.target.runs, runs, strict=True))
    for places in product(*shared):
        here, there = slot.local, part
        for dim, (to, at, n) in enumerate(places):
            here, there = here.narrow(dim, to, n), there.narrow(dim, at, n)
        here.copy_(there)
        written += there.nbytes
    return written


def _shared(
    mine: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """What two lists of runs have in common: (place in the first, place in the second, length)."""
    to = 0
    for start, n in mine:
        at = 0
        for begin, count in theirs:
            low, high = max(start, begin), min(start + n, begin + count)
            if low < high:
                yield to + low - start, at + low - begin, high - low
            at += count
        to += n
