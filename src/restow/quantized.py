"""Quantised weights against their scales and their config: names, dtypes and shapes; the values are `verify`'s to judge.

`codec` says what the config announces and `find` judges the experts' rows of scales; this looks at what they leave:
dtypes that are not the announced ones, weights outside the experts, scales whose weight is gone. It also says where
values would have to be decoded, which this version does not do. Its findings are `Problem`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from restow.checkpoint import Checkpoint
from restow.codec import SCALE, SUFFIX, Announced, lost_scales, odd_grids
from restow.errors import MissingTensorError, QuantizationError, RestowError, show
from restow.find import Module
from restow.problems import Problem

CODED = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "I8", "U8"})
SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})


def judge_quantized(found: Checkpoint, dtypes: Mapping[str, str]) -> tuple[Problem, ...]:
    """Every finding about a checkpoint whose config announces a codec."""
    if found.codec is None or any(isinstance(p.error, QuantizationError) for p in found.problems):
        return ()
    return tuple(Problem(error, True) for error in _errors(found, found.codec, dtypes))


def _errors(found: Checkpoint, codec: Announced, dtypes: Mapping[str, str]) -> Iterator[RestowError]:
    odd: list[str] = []
    bare: list[str] = []
    for path, module in found.modules.items():
        names = [n for role in ("in", "out") for n in module.tensors.get(role, ()) if n is not None]
        scaled = any(role.endswith(SCALE) for role in module.tensors)
        odd += [n for n in names if dtypes[n] != codec.dtype and not (codec.skips(path) and not scaled)]
        bare += [n + SUFFIX for n in names if dtypes[n] == codec.dtype and not scaled]
    scales, weights = _others(found, codec, dtypes)
    if odd:
        kinds = sorted({dtypes[name] for name in odd})
        yield QuantizationError(
            f"experts in {codec.dtype}, as quantization_config says",
            f"{', '.join(kinds)} in {len(odd)} tensors" if len(odd) > 1 else kinds[0],
            path=found.path,
            tensor=odd[0],
            sections=[("tensors", (f"{show(name)} {dtypes[name]}" for name in odd))],
            hint="get the config.json that belongs to these files, and the files again",
        )
    bare += [name + SUFFIX for name in weights if name + SUFFIX not in found.tensors]
    if bare:
        yield lost_scales(bare)
    lost = [name.removesuffix(SUFFIX) for name in scales if name.removesuffix(SUFFIX) not in found.tensors]
    if lost:
        yield MissingTensorError(
            "a weight for every scale",
            f"{len(lost)} scales without one",
            path=found.path,
            tensor=lost[0],
            sections=[("missing", map(show, lost))],
            hint="get the checkpoint again: nothing is filled in their place",
        )
    shapes = {name: found.tensors[name].shape for name in weights if name + SUFFIX in found.tensors}
    grids = [(n + SUFFIX, list(codec.grid(shape)), found.tensors[n + SUFFIX].shape) for n, shape in shapes.items()]
    wrong = [(name, f"{want}", shape) for name, want, shape in grids if tuple(want) != tuple(shape)]
    if wrong:
        yield odd_grids(wrong, codec)
    strange = [n for n in (*scales, *_expert_scales(found.modules.values())) if dtypes[n] not in SCALES]
    if strange:
        yield QuantizationError(
            f"scales in {', '.join(sorted(SCALES))}",
            dtypes[strange[0]],
            path=found.path,
            tensor=strange[0],
            sections=[("tensors", (f"{show(name)} {dtypes[name]}" for name in strange))],
        )


def _others(found: Checkpoint, codec: Announced, dtypes: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Scales outside the experts, and weights there in the codec's dtype."""
    others = found.others
    return [n for n in others if n.endswith(SUFFIX)], [n for n in others if dtypes[n] == codec.dtype]


def _expert_scales(modules: Iterator[Module] | Sequence[Module] | object) -> Iterator[str]:
    assert hasattr(modules, "__iter__")
    for module in modules:
        for role, names in module.tensors.items():
            if role.endswith(SCALE):
                yield from (name for name in names if name is not None)


def scales_of(found: Checkpoint) -> dict[str, str]:
    """Every scale of a checkpoint and the weight that it belongs to."""
    names = [*_expert_scales(found.modules.values()), *(n for n in found.others if n.endswith(SUFFIX))]
    return {name: name.removesuffix(SUFFIX) for name in names if name.removesuffix(SUFFIX) in found.tensors}


def refuse_decoding(source: Checkpoint, modules: Mapping[str, Module], pairs: Mapping[str, str]) -> None:
    """Raise where a destination has a place for coded experts and none for their scales: codes are no values."""
    for path, module in modules.items():
        there = source.modules[pairs[path]] if path in pairs else None
        roles = {row.role for row in module.layout.rows}
        for role in there.tensors if there is not None else ():
            if role.endswith(SCALE) and role not in roles and role.removesuffix(SCALE) in roles:
                assert there is not None
                raise _codec_error(source, next(filter(None, there.tensors[role.removesuffix(SCALE)]), None))


def refuse_cast(source: Checkpoint, name: str, dtype: str) -> None:
    """Raise where a coded tensor outside the experts would be cast as if its codes were values."""
    entry = source.tensors[name]
    if dtype != entry.dtype and entry.dtype in CODED and name + SUFFIX in source.tensors:
        raise _codec_error(source, name)


def _codec_error(source: Checkpoint, name: str | None) -> QuantizationError:
    codec = source.codec
    what = f"{codec.method} ({codec.dtype} with scales)" if codec is not None else "weights with scales"
    return QuantizationError(
        "weights in a codec that this version of restow turns into plain values: none",
        what,
        path=source.path,
        tensor=name,
        hint="take a checkpoint with plain weights, or decode this one with the tool that wrote it; "
        "inspect and verify read it as it is",
    )
