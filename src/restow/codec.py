"""What a config announces about quantised weights, and the rows of the scales that then stand beside them.

Scales are companions of the weights in the layout's own table: a codec turns a spelling into one with rows for them, so
that whoever finds, pairs or moves experts needs no second mechanism. Rejected are methods that this version does not
know (`QuantizationError`, by name) and blocks that are none (`ConfigError`). It knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from restow.codecs import CODECS, COMPANIONS, Codec
from restow.coded_rows import coded_layouts, suits
from restow.errors import ConfigError, QuantizationError, RestowError, show
from restow.family import Spelling

SECTIONS = ("quantization_config", "compression_config")
SUFFIX = "_scale_inv"
SCALE = ".scale"  # what the role of a companion row ends with
BLOCK_LIMIT = 2**20
METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType({"mxfp4": ("mxfp4",), "mxfp8": ("mxfp8",)})
MODELOPT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # beside NVFP4, what its source keeps: FP4 prediction blocks, FP8 in blocks or MXFP8 outside the experts
        "NVFP4": ("nvfp4", "nvfp4_across", "fp4", "fp8_scale", "mxfp8"),
        "FP8_PB_WO": ("fp8_modelopt",),
    }
)
BITS: Mapping[tuple[str, bool], tuple[str, ...]] = MappingProxyType({  # by type, and whether scales are coded too
    ("nf4", False): ("nf4", "nf4_experts"),
    ("fp4", False): ("bnb_fp4", "bnb_fp4_experts"),
    ("nf4", True): ("nf4_double", "nf4_experts"),  # stacked experts have plain scales beside double-quantised linears
    ("fp4", True): ("bnb_fp4_double", "bnb_fp4_experts"),
})  # fmt: skip
KNOWN = (
    "fp8",
    *METHODS,
    "bitsandbytes (nf4, fp4)",
    "compressed-tensors",
    *(f"modelopt {algo}" for algo in MODELOPT),
)
COMPRESSED: Mapping[tuple[str, str, int], str] = MappingProxyType({  # by format, type, bits
    ("pack-quantized", "int", 4): "int4_packed",
    ("float-quantized", "float", 8): "fp8_group",
    ("naive-quantized", "float", 8): "fp8_group",
    ("nvfp4-pack-quantized", "float", 4): "nvfp4_packed",
    ("mxfp4-pack-quantized", "float", 4): "mxfp4_packed",
})  # fmt: skip


class Announced(NamedTuple):
    """What a config says: `codecs` its weights may be in, the usual `dtype` of codes, and the `block` of rows and columns
    that share a scale (None: the whole)."""

    method: str
    dtype: str
    block: tuple[int, int] | None
    skipped: tuple[str, ...]
    codecs: tuple[Codec, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the config leaves a module as it is: by its name, or a run of whole segments of it."""
        return any(f".{word}." in f".{name}." for word in self.skipped)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a matrix, or of a stack of them."""
        if self.block is None:
            return tuple(shape[:-2])
        return (*shape[:-2], *(-(-n // block) for n, block in zip(shape[-2:], self.block, strict=True)))


def announced(config: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The part of a config that speaks of quantisation, wherever it stands; None where there is none."""
    text = (config or {}).get("text_config")
    for part in (config or {}, text if isinstance(text, Mapping) else {}):
        for key in SECTIONS:
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def without_quantization(config: bytes) -> bytes:
    """config.json of the same weights as plain ones."""
    body = json.loads(config)
    for part in (body, body.get("text_config")):
        for key in SECTIONS if isinstance(part, dict) else ():
            part.pop(key, None)
    return (json.dumps(body, indent=2) + "\n").encode()


def read_codec(config: Mapping[str, object] | None) -> Announced | None:
    """What a config announces, or None. Raises `QuantizationError` for methods that nobody here knows."""
    said = announced(config)
    if said is None:
        return None
    method = said.get("quant_method")
    keys = ("modules_to_not_convert", "ignore", "exclude_modules", "llm_int8_skip_modules")
    skipped = next((said[key] for key in keys if key in said), None)
    words = tuple(word for word in skipped if isinstance(word, str)) if isinstance(skipped, list) else ()
    if method == "fp8":
        return _fp8(said, words)
    if isinstance(method, str) and method in METHODS:
        names, block = METHODS[method], None
    elif method == "bitsandbytes":
        names, block = _bitsandbytes(said), None
    elif method == "compressed-tensors":
        names, block = _compressed(said)
    elif method == "modelopt" and str(said.get("quant_algo")) in MODELOPT:
        names, block = MODELOPT[str(said.get("quant_algo"))], (128, 128)
    else:
        algo = f" with quant_algo {said.get('quant_algo')!r}" if method == "modelopt" else ""
        raise QuantizationError(
            f"quantization_config with a quant_method that this version of restow knows: {', '.join(KNOWN)}",
            show(repr(method) + algo),
            path="config.json",
            hint="decode the weights with the tool that wrote them, and restow the result",
        )
    codecs = tuple(CODECS[name]._replace(block=block or (0, 0)) for name in names)
    return Announced(str(method), codecs[0].dtypes[0], block, words, codecs)


def _fp8(said: Mapping[str, object], words: tuple[str, ...]) -> Announced:
    dtype = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}.get(str(said.get("fmt", "e4m3")).lower())
    if dtype is None:
        raise QuantizationError(
            "fmt e4m3 or e5m2 in quantization_config",
            show(repr(said["fmt"])),
            path="config.json",
            hint="get the config.json that belongs to these files",
        )
    block = _block(said.get("weight_block_size"))
    names: tuple[str, ...] = ("fp8_expert", "fp8_tensor") if block is None else ("fp8", "fp8_scale", "fp4")
    if dtype == "F8_E5M2":
        names = ("fp8_e5m2",)
    elif block == (1, 32):
        names = ("mxfp8",)
    return Announced(
        "fp8", dtype, block, words, tuple(CODECS[name]._replace(block=block or (0, 0)) for name in names)
    )


def _bitsandbytes(said: Mapping[str, object]) -> tuple[str, ...]:
    """The codecs of a bitsandbytes config: 4 bits, a scale per 64 of them, bytes as storage."""
    kind = str(said.get("bnb_4bit_quant_type", "fp4"))
    double = said.get("bnb_4bit_use_double_quant", False)
    odd = {
        "load_in_4bit": said.get("load_in_4bit", said.get("_load_in_4bit")) is not True,
        "bnb_4bit_quant_type": (kind, False) not in BITS,
        "bnb_4bit_use_double_quant": not isinstance(double, bool),
        "bnb_4bit_quant_storage": said.get("bnb_4bit_quant_storage", "uint8") != "uint8",
    }
    if any(odd.values()):
        raise QuantizationError(
            "bitsandbytes weights in 4 bits (nf4 or fp4) in uint8, their scales in float32 or double-quantised",
            ", ".join(f"{key} {said.get(key)!r}" for key, wrong in odd.items() if wrong),
            path="config.json",
            hint="decode the weights with the tool that wrote them, and restow the result",
        )
    return BITS[kind, bool(double)]


def _compressed(said: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """The codecs and the block of a compressed-tensors config: one for all of its groups."""
    groups = said.get("config_groups")
    found: set[tuple[tuple[str, ...], tuple[int, int] | None]] = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        kind = group.get("format") or said.get("format") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        columns = size if isinstance(size, int) else -1
        blocks = {"channel": (1, 0), "tensor": (0, 0), "group": (1, columns), "tensor_group": (1, columns)}
        block: tuple[int, int] | None = blocks.get(str(strategy))
        if strategy == "block":
            block = _block(weights.get("block_structure"))
        plain = weights.get("symmetric", True) is True and weights.get("actorder") in (
            None,
            False,
            "weight",
            "static",
        )
        name = COMPRESSED.get((str(kind), str(weights.get("type")), bits if isinstance(bits, int) else 0))
        if name is None or not plain or block is None or min(block) < 0:
            raise QuantizationError(
                f"a compressed-tensors format that this version of restow knows: {', '.join(k for k, *_ in COMPRESSED)}; "
                "symmetric, in groups, channels or blocks",
                show(f"format {kind!r} of {bits!r} bits, strategy {strategy!r}, group_size {size!r}, "
                     f"symmetric {weights.get('symmetric', True)!r}, actorder {weights.get('actorder')!r}"),
                path="config.json",
                hint="decode the weights with the tool that wrote them, and restow the result",
            )  # fmt: skip
        found.add(((name,), block))
    if len(found) != 1:
        raise QuantizationError(
            "one group of weights in compressed-tensors' config_groups",
            f"{len(found)} that differ",
            path="config.json",
            hint="decode the weights with the tool that wrote them, and restow the result",
        )
    return found.pop()


def _block(block: object) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if all(type(n) is int and 0 < n <= BLOCK_LIMIT for n in block):
            return rows, columns
    raise ConfigError(
        f"weight_block_size as two whole numbers from 1 to {BLOCK_LIMIT}",
        show(repr(block)),
        path="config.json",
        hint="get the config.json that belongs to these files",
    )


def with_scales(spellings: Sequence[Spelling], said: Announced | None) -> tuple[Spelling, ...]:
    """The spellings, those with the input axis where an announced codec has it also as that codec stores them."""
    coded = [
        replace(s, layout=layout, codec=codec)
        for s in spellings
        if said is not None and not any(row.role.endswith(COMPANIONS) for row in s.layout.rows)
        for codec in said.codecs
        if suits(s.layout, codec)
        for layout in coded_layouts(s.layout, codec)
    ]
    return (*coded, *spellings)


def lost_scales(names: Sequence[str]) -> RestowError:
    """Scales that are not there, for weights that are; `names` are the scales'."""
    return QuantizationError(
        f"a scale for every quantised weight, such as {show(names[0])} for {show(names[0].removesuffix(SUFFIX))}",
        "none" if len(names) == 1 else f"none for {len(names)}",
        tensor=names[0],
        sections=[("missing", map(show, names))],
        hint="get the checkpoint again: without its scale a weight has no value",
    )


def odd_grids(wrong: Sequence[tuple[str, str, Sequence[int]]], codec: Announced | None) -> RestowError:
    """Scales of another shape than blocks and weights give: (name, expected, found)."""
    name, expected, found = wrong[0]
    block = list(codec.block) if codec is not None and codec.block is not None else None
    lines = [f"{show(n)} {list(f)}, expected {e}" for n, e, f in wrong]
    return QuantizationError(
        f"shape {expected} for {show(name)}, since weight_block_size is {block}",
        f"{list(found)}",
        tensor=name,
        sections=[("tensors", lines)],
        hint="get the config.json that belongs to these files",
    )
