"""What `quantize=` may say, and what a config then says about it: codec, layout and `quantization_config` of vendors.

The experts' weights are encoded and nothing else is; every other module with a matrix is named in the config as one
that is not. Nothing here says how a value becomes a code: that follows from the table of codecs. Rejected are names
that nobody here knows, and layouts whose rows a codec has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from restow.codecs import CODECS, Codec
from restow.coded_rows import coded_layouts, is_linear
from restow.errors import ConfigError, QuantizationError, UsageError, show
from restow.family import Family
from restow.landing import layout_of
from restow.layout import Layout
from restow.notation import Row


class Encoding(NamedTuple):
    """A codec of the table, the `form` of experts that vendors ship it in, and what their configs say of it.

    `skip` is the key that names modules left as they are; `stacked` is the codec of weights of all experts in one
    tensor, where that is another.
    """

    codec: str
    form: str
    section: Mapping[str, Any]
    skip: str = "modules_to_not_convert"
    stacked: str = ""


ENCODINGS: Mapping[str, Encoding] = MappingProxyType({
    "fp8": Encoding("fp8", "split", {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }),
    "mxfp4": Encoding("mxfp4", "fused", {"quant_method": "mxfp4"}),
    "mxfp8": Encoding("mxfp8", "split", {
        "quant_method": "mxfp8", "fmt": "e4m3", "weight_block_size": [1, 32], "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
    }),
    "nf4": Encoding("nf4", "split", {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16",
    }, "llm_int8_skip_modules", "nf4_experts"),
})  # fmt: skip


def encoding_of(name: str) -> Encoding:
    """An encoding by its name. Raises `UsageError` for another."""
    if name not in ENCODINGS:
        raise UsageError(f"quantize as one of {', '.join(ENCODINGS)}", f"'{show(name)}'")
    return ENCODINGS[name]


def codec_for(encoding: Encoding, layout: Layout) -> Codec:
    """The codec of an encoding in a layout, with the block that its config announces."""
    rows, columns = encoding.section.get("weight_block_size", (0, 0))
    stacked = encoding.stacked if len(layout.row("in").dims) > 2 else ""
    return CODECS[stacked or encoding.codec]._replace(block=(rows, columns))


def plain_form(to: str | Layout, family: Family | None, encoding: Encoding) -> Layout:
    """The layout that is encoded. `hf` is the vendor's own where that keeps projections apart, else the form in which
    vendors ship this codec: blocks of scales do not straddle gate and up there."""
    layout = layout_of(to, family)
    assert layout is not None
    if to == "hf" and not (encoding.form == "split" and _apart(layout) and is_linear(layout)):
        layout = layout_of(encoding.form, family)
        assert layout is not None
    return layout


def _apart(layout: Layout) -> bool:
    row = layout.row("in")
    return "p" in row.name_axes


def encoded_form(layout: Layout, encoding: Encoding) -> Layout:
    """A plain layout with rows for codes and all that goes with them. Raises `QuantizationError` where a row has none."""
    codec = codec_for(encoding, layout)
    if not is_linear(layout):
        raise QuantizationError(
            f"rows in and out with the input axis last, as {codec.name} scales run along it",
            "; ".join(str(row) for row in layout.rows),
            hint="take a layout such as split or fused",
        )
    *_, whole = coded_layouts(layout, codec)  # with what lies beside every weight
    return whole


def coded_dtype(row: Row, codec: Codec) -> str:
    """The dtype in which codes, or their scales, are written: the first that the table has."""
    end = row.role.removeprefix(row.base)
    return next((one.dtypes[0] for one in codec.companions(True) if one.role == end), codec.dtypes[0])


def with_quantization(config: bytes | None, encoding: Encoding, skipped: Sequence[str]) -> bytes:
    """config.json of the same weights encoded; `skipped` are the modules that are not."""
    if config is None:
        raise ConfigError("a config.json, which says how weights are encoded", "none")
    body = json.loads(config)
    body["quantization_config"] = {**encoding.section, encoding.skip: list(skipped)}
    return (json.dumps(body, indent=2) + "\n").encode()


def skipped_modules(others: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """The modules among tensors (name, shape) outside the experts whose weight is a matrix."""
    ends = ".weight"
    return sorted({n.removesuffix(ends) for n, shape in others if n.endswith(ends) and len(shape) > 1})
