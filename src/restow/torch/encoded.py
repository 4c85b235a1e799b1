"""A conversion into codes: what its files will hold, and how a chunk of values becomes chunks of codes and scales.

The destination is surveyed as the quantised checkpoint that it will be, so that it is one that `restow.open` reads; its
plain weights are filled in float32 as any destination is, in whole blocks, and encoded on their way to the disk. It
rejects what the codec cannot say, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from restow.checkpoint import Checkpoint, survey
from restow.codec import read_codec
from restow.codecs import CODES, WEIGHTS
from restow.coded import value_dtype
from restow.constants import Constant, constants_of, note_sizes
from restow.decoded import decoded
from restow.encodings import (
    Encoding,
    codec_for,
    coded_dtype,
    encoded_form,
    skipped_modules,
    with_quantization,
)
from restow.entries import DTYPE_BITS
from restow.landing import Wish, chosen_experts
from restow.layout import Layout, shape_of
from restow.module import owners_of
from restow.outfiles import OutFile
from restow.packing import Packed, first_element, packed_weights, pieces
from restow.prepare import Prepared, prepare
from restow.problems import merged
from restow.targets import Target, whole_target
from restow.torch.chunks import Filled, Slice, slices
from restow.torch.dtypes import torch_dtype
from restow.torch.encode import encode
from restow.torch.outline import entries_of
from restow.torch.threads import default_threads
from restow.wanted import row_names

CHUNK = 16 << 20  # elements that are filled at once, in float32


@dataclass(frozen=True)
class Packing:
    """The coded side of a conversion: `written` are the files' own tensors, `weights` what is encoded, by name."""

    written: Prepared
    weights: Mapping[str, Packed]
    constants: Mapping[str, Constant]

    @cached_property
    def beside(self) -> Mapping[str, tuple[str, ...]]:
        """The tensors that are written with a tensor of codes and hold always the same."""
        found: dict[str, tuple[str, ...]] = {}
        for name, (codes, _) in self.constants.items():
            found[codes] = (*found.get(codes, ()), name)
        return found


def encoded_config(opened: Checkpoint, config: bytes | None, encoding: Encoding) -> bytes:
    """config.json of a checkpoint with its experts encoded."""
    source = decoded(opened)
    others = ((name, source.tensors[name].shape) for name in source.others)
    return with_quantization(config, encoding, skipped_modules(others))


def encoded_targets(
    opened: Checkpoint, targets: Sequence[Target], plain: Layout, encoding: Encoding, wish: Wish
) -> list[Target]:
    """The plain targets of a conversion with those of the experts' weights in codes and scales."""
    codec, layout = codec_for(encoding, plain), encoded_form(plain, encoding)
    coded = [row for row in layout.rows if row.role.partition(".")[2] != "bias"]
    found: list[Target] = []
    gone: set[str] = set()
    for path, module in decoded(opened).modules.items():
        experts = chosen_experts(wish.experts, path, module.sizes.get("e", 0))
        sizes = {**module.sizes, **({"e": len(experts)} if experts is not None else {})}
        for row in coded:
            if row.role.endswith(CODES) and row.base in module.tensors:
                sizes |= note_sizes(codec, row, sizes, value_dtype(opened.config))
        for row in plain.rows:
            if row.role in WEIGHTS:
                gone.update(f"{path}.{name}" for name in row_names(row, sizes))
        for row in coded:
            if row.base in module.tensors:
                shape = shape_of(row, sizes)
                found += [
                    whole_target(f"{path}.{n}", shape, coded_dtype(row, codec)) for n in row_names(row, sizes)
                ]
    return [*found, *(target for target in targets if target.name not in gone)]


def packing_of(
    opened: Checkpoint, files: Sequence[OutFile], config: bytes, plain: Layout, wish: Wish
) -> tuple[Prepared, Packing]:
    """What fills the plain weights of files in codes, and what is then written. Raises what the codec cannot say."""
    about = json.loads(config)
    seen = survey(
        entries_of(files),
        family=opened.family,
        layout=plain,
        config=about,
        path=opened.path,
        codec=read_codec(about),
    )
    fatal = [problem.error for problem in seen.problems if problem.fatal]
    if fatal:
        raise merged(fatal)
    view = decoded(seen)
    weights = packed_weights(view)
    targets = [
        whole_target(name, entry.shape, "F32" if name in weights else entry.dtype)
        for name, entry in view.tensors.items()
    ]
    prepared = prepare(opened, targets, replace(wish, layout=None), view.modules)
    own = {t.name: whole_target(t.name, t.shape, t.dtype) for file in files for t in file.tensors}
    written = Prepared(prepared.source, own, wish, seen.modules, {}, owners_of(seen.modules), prepared.plain)
    return prepared, Packing(written, weights, constants_of(seen.modules, value_dtype(about)))


def encoded_slices(
    packing: Packing, prepared: Prepared, files: Sequence[OutFile], kept: Container[str], limit: int
) -> Iterator[Slice]:
    """What is filled for files in codes, those in `kept` apart: plain tensors as they lie, weights in whole blocks."""
    where = {tensor.name: file.name for file in files for tensor in file.tensors}
    raw = {packed.codes: name for name, packed in packing.weights.items()}
    others = {packed.scale for packed in packing.weights.values()} | packing.constants.keys()
    for file in files:
        for tensor in file.tensors:
            if tensor.name in others or tensor.end == tensor.begin:
                continue
            if tensor.name not in raw:
                if file.name not in kept:
                    yield from slices(prepared.targets[tensor.name], limit)
                continue
            packed = packing.weights[raw[tensor.name]]
            names = (packed.codes, packed.scale, *packing.beside.get(packed.codes, ()))
            if all(where[name] in kept for name in names):
                continue
            target = prepared.targets[raw[tensor.name]]
            for runs in pieces(target.runs, packed.blocks, CHUNK):
                yield Slice(target._replace(runs=runs), 4 * first_element(runs, packed.shape))


def coded_chunks(
    packing: Packing, filled: Sequence[Filled], kept: Container[str], pool: ThreadPoolExecutor
) -> list[Filled]:
    """Filled slices as the files hold them: plain ones as they are, weights as codes and scales. `kept` names tensors
    that are there already."""
    found: list[Filled] = []
    for one in filled:
        packed = packing.weights.get(one.slice.target.name)
        if packed is None:
            found.append(one)
            continue
        runs = one.slice.target.runs
        made = encode(
            one.tensor, packed.blocks, packed.codec.element, packed.scale_dtype, name=packed.codes, pool=pool
        )
        for name, runs_there, tensor in (
            (packed.codes, packed.codes_runs(runs), made.codes),
            (packed.scale, packed.scale_runs(runs), made.scales),
        ):
            if name not in kept:
                target = packing.written.targets[name]._replace(runs=runs_there)
                offset = first_element(runs_there, target.shape) * DTYPE_BITS[target.dtype] // 8
                found.append(Filled(Slice(target, offset), _shaped(target, tensor)))
        if one.slice.offset == 0:
            for name in (n for n in packing.beside.get(packed.codes, ()) if n not in kept):
                data = torch.frombuffer(bytearray(packing.constants[name].data), dtype=torch.uint8)
                target = packing.written.targets[name]
                found.append(Filled(Slice(target, 0), _shaped(target, data)))
    return found


def _shaped(target: Target, tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor as a part of a target."""
    dtype = torch_dtype(target.dtype)
    flat = tensor.reshape(-1)
    return (flat if flat.dtype == dtype else flat.view(dtype)).view(target.local_shape)


def encoders(threads: int | None) -> ThreadPoolExecutor:
    """Threads that encode."""
    return ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="restow encode")
