"""Quantised weights against their scales and their config: names, dtypes and shapes; the values are `verify`'s to judge.

`codec` says what the config announces and `find` judges the experts' rows of scales; this looks at what they leave:
dtypes that are not the announced ones, weights outside the experts, scales whose weight is gone. It also says where
values would have to be decoded, which this version does not do. Its findings are `Problem`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from restow.checkpoint import Checkpoint
from restow.codec import SCALE, SUFFIX, Announced, lost_scales, odd_grids
from restow.codecs import CODECS, WEIGHTS, Codec, spelled, weight_of
from restow.errors import MissingTensorError, QuantizationError, RestowError, show
from restow.module import Module
from restow.problems import Problem

CODED = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "I8", "U8"})
ACTING = ("multiply", "divide", "exponent")  # how a scale's own value acts on an element's
SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})
BESIDE = tuple(dict.fromkeys(s.name for c in CODECS.values() if c.codes.name == "{}" for s in c.scales))


def judge_quantized(found: Checkpoint, dtypes: Mapping[str, str]) -> tuple[Problem, ...]:
    """Every finding about a checkpoint whose config announces a codec."""
    if found.codec is None or any(isinstance(p.error, QuantizationError) for p in found.problems):
        return ()
    return tuple(Problem(error, True) for error in _errors(found, found.codec, dtypes))


def _errors(found: Checkpoint, codec: Announced, dtypes: Mapping[str, str]) -> Iterator[RestowError]:
    odd: list[str] = []
    bare: list[str] = []
    for path, module in found.modules.items():
        names = [n for role in WEIGHTS for n in module.tensors.get(role, ()) if n is not None]
        if module.codec is not None:
            strays = list(_dtypes_wrong(module, dtypes))
            odd += [name for name in strays if name in names]
            if strange := [name for name in strays if name not in names]:
                yield _strange(found, module, strange, dtypes)
        elif codec.method == "fp8":
            odd += [n for n in names if dtypes[n] != codec.dtype and not codec.skips(path)]
            bare += [n + SUFFIX for n in names if dtypes[n] == codec.dtype]
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
    bare += [name + SUFFIX for name in weights if not any(_scaled(found, c, name) for c in codec.codecs)]
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
    shapes = shapes if codec.method == "fp8" else {}
    grids = [
        (n + SUFFIX, list(codec.grid(shape)), found.tensors[n + SUFFIX].shape) for n, shape in shapes.items()
    ]
    wrong = [(name, f"{want}", shape) for name, want, shape in grids if tuple(want) != tuple(shape)]
    if wrong:
        yield odd_grids(wrong, codec)
    if (
        found.modules
        and not any(module.codec for module in found.modules.values())
        and codec.method not in ("fp8", "bitsandbytes")
    ):
        yield QuantizationError(
            f"weights in {', '.join(c.name for c in codec.codecs)}, as quantization_config says ({codec.method})",
            "experts in none of them",
            path=found.path,
            hint="get the config.json that belongs to these files, and the files again",
        )


def _scaled(found: Checkpoint, codec: Codec, name: str) -> bool:
    return all(spelled(scale.name, name) in found.tensors for scale in codec.scales)


def _dtypes_wrong(module: Module, dtypes: Mapping[str, str]) -> Iterator[str]:
    """The codes and scales of a module that are in no dtype that its codec has them in."""
    assert module.codec is not None
    known = {companion.role: companion.dtypes for companion in module.codec.scales}
    for role, names in module.tensors.items():
        base, _, end = role.partition(".")
        allowed = module.codec.dtypes if end in ("", "codes") and base in WEIGHTS else known.get(f".{end}")
        yield from (name for name in names if name is not None and allowed and dtypes[name] not in allowed)


def _strange(
    found: Checkpoint, module: Module, names: Sequence[str], dtypes: Mapping[str, str]
) -> QuantizationError:
    assert module.codec is not None
    kinds = sorted({dtype for scale in module.codec.scales for dtype in scale.dtypes})
    return QuantizationError(
        f"codes of {module.codec.name} in {', '.join(module.codec.dtypes)}, scales in {', '.join(kinds)}, as quant_method "
        f"{found.codec.method if found.codec is not None else '?'} is read",
        dtypes[names[0]],
        path=found.path,
        tensor=names[0],
        sections=[("tensors", (f"{show(name)} {dtypes[name]}" for name in names))],
    )


def _others(found: Checkpoint, codec: Announced, dtypes: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Scales outside the experts, and weights there in the codec's dtype."""
    others = found.others
    weights = [n for n in others if dtypes[n] == codec.dtype] if codec.dtype.startswith("F8") else []
    return [n for n in others if n.endswith(SUFFIX)], weights


def _expert_scales(modules: Iterator[Module] | Sequence[Module] | object) -> Iterator[str]:
    assert hasattr(modules, "__iter__")
    for module in modules:
        for role, names in module.tensors.items():
            if role.endswith(SCALE):
                yield from (name for name in names if name is not None)


def scales_of(found: Checkpoint) -> dict[str, str]:
    """Every scale of a checkpoint and the weight that it belongs to."""
    names = [*_expert_scales(found.modules.values()), *(n for n in found.others if n.endswith(SUFFIX))]
    return {
        name: name.removesuffix(SUFFIX)
        for name in names
        if name.endswith(SUFFIX)
        and name.removesuffix(SUFFIX) in found.tensors
        and found.tensors[name].dtype in SCALES
    }


def factors_of(found: Checkpoint) -> dict[str, str]:
    """The same with the scales of every codec that the config announces, exponents too; bytes that a table explains apart."""
    known = scales_of(found)
    for module in found.modules.values():
        acting = [s.role for s in module.codec.scales if s.how in ACTING] if module.codec is not None else []
        for role in (role for role in module.tensors if any(role.endswith(end) for end in acting)):
            known |= {name: name for name in module.tensors[role] if name is not None and name not in known}
    pairs = (
        [(c, s) for c in found.codec.codecs for s in c.scales if s.how in ACTING]
        if found.codec is not None
        else []
    )
    for codec, scale in pairs:
        for name in found.others:
            weight = weight_of(scale.name, name)
            if weight is None or name in known or found.tensors[name].dtype not in scale.dtypes:
                continue
            codes = spelled(codec.codes.name, weight)
            if codes in found.tensors and found.tensors[codes].dtype in codec.dtypes:
                known[name] = codes
    return known


def no_values(source: str, target: str, dtype: str) -> QuantizationError:
    """A destination that can hold neither the codes, for want of a place for their scales, nor what they decode to."""
    return QuantizationError(
        f"a float dtype for {show(target)}, or a place for the scales of {show(source)}",
        dtype,
        tensor=target,
        hint="quantised weights are decoded into F64, F32, F16 or BF16",
    )


def refuse_cast(source: Checkpoint, name: str, dtype: str) -> None:
    """Raise where a coded tensor outside the experts would be cast as if its codes were values.

    Any codec's scale beside it makes it one: what the config announces need not be all that a file holds.
    """
    entry = source.tensors[name]
    if dtype == entry.dtype or entry.dtype not in CODED:
        return
    for pattern in BESIDE:
        if (scale := spelled(pattern, name)) in source.tensors:
            raise _codec_error(source, name, entry.dtype, scale)


def _codec_error(source: Checkpoint, name: str, dtype: str, scale: str) -> QuantizationError:
    said = f"quant_method {source.codec.method}" if source.codec is not None else "no quantization_config"
    return QuantizationError(
        f"weights in a codec that config.json announces ({said}), where plain values are wanted",
        f"{dtype} with {show(scale)} {source.tensors[scale].dtype} {list(source.tensors[scale].shape)} beside it",
        path=source.path,
        tensor=name,
        hint="take a checkpoint with plain weights, or decode this one with the tool that wrote it; "
        "inspect and verify read it as it is",
    )
