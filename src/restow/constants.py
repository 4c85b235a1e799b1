"""What some codecs keep beside every weight though it is always the same: the values of their codes, a note in JSON.

Written with the codes, and never read for their values. Nothing is rejected.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from restow.codecs import Codec
from restow.elements import ELEMENTS
from restow.layout import axis_size
from restow.module import Module
from restow.notation import Row

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Constant(NamedTuple):
    """The bytes of a tensor that follow from the codec, and the tensor of codes that it lies beside."""

    codes: str
    data: bytes


def note_sizes(codec: Codec, codes: Row, sizes: Mapping[str, int], dtype: str) -> dict[str, int]:
    """The sizes of the axes that only a note's text says, for one row of codes."""
    notes = [spare for spare in codec.spares if spare.how == "note"]
    return {f"s{codes.base}": len(_note(codec, codes, sizes, dtype)) for _ in notes}


def constants_of(modules: Mapping[str, Module], dtype: str) -> dict[str, Constant]:
    """Every tensor of modules in codes that a codec's table makes, by name; `dtype` is what the codes decode to."""
    found: dict[str, Constant] = {}
    for module in modules.values():
        if module.codec is None:
            continue
        how = {spare.role: spare.how for spare in module.codec.spares if spare.how}
        for row in module.layout.rows:
            kind = how.get(row.role.removeprefix(row.base))
            if kind is None:
                continue
            codes = module.layout.row(f"{row.base}.codes")
            if kind == "note":
                data = _note(module.codec, codes, module.sizes, dtype)
            else:
                values = ELEMENTS[module.codec.element].values
                data = struct.pack(f"<{len(values)}f", *values)
            pairs = zip(module.tensors[row.role], module.tensors[codes.role], strict=True)
            found.update(
                {name: Constant(of, data) for name, of in pairs if name is not None and of is not None}
            )
    return found


def _note(codec: Codec, codes: Row, sizes: Mapping[str, int], dtype: str) -> bytes:
    """What bitsandbytes writes of a weight: type, block, dtype and shape."""
    flat = next(dim for dim in codes.dims if len(dim.factors) > 1)
    *rows, columns = (axis_size(codes, factor.axis, sizes) for factor in flat.factors)
    block = next(int(dim.partition("/")[2]) for dim in codec.scales[0].dims if "/" in dim)
    body = {
        "quant_type": codec.element.removeprefix("bnb_"),
        "blocksize": block,
        "dtype": DTYPES[dtype],
        "shape": [prod(rows), columns],
    }
    return json.dumps(body).encode()
