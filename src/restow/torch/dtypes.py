"""Dtypes by safetensors' names and as torch has them; which casts lose precision. Rejects dtypes torch lacks."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

import torch

from restow.errors import DtypeMismatchError

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

TORCH = MappingProxyType(
    {name: getattr(torch, word) for name, word in _NAMES.items() if hasattr(torch, word)}
)
NAME = MappingProxyType({dtype: name for name, dtype in TORCH.items()})
INTS = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})  # by bytes of one

# (bits of precision, largest exponent, smallest exponent): a float type holds another if all three reach as far
_REACH = {"F64": (53, 1023, -1074), "F32": (24, 127, -149), "BF16": (8, 127, -133), "F16": (11, 15, -24),
          "F8_E4M3": (4, 8, -9), "F8_E5M2": (3, 15, -16)}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name. Raises `DtypeMismatchError` where torch has none."""
    if name not in TORCH:
        raise DtypeMismatchError("a dtype that this torch has", name)
    found: torch.dtype = TORCH[name]
    return found


def whole_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as whole numbers of their width, in its own storage: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.view(INTS[tensor.element_size()])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises `DtypeMismatchError` where the format has none."""
    if dtype not in NAME:
        raise DtypeMismatchError("a dtype that safetensors can hold", str(dtype))
    return NAME[dtype]


def is_float(name: str) -> bool:
    """Whether a dtype of safetensors holds numbers with a fraction, as weights are."""
    return name[0] in "FBC" and name != "BOOL"


def wider(dtypes: Iterable[str]) -> str | None:
    """The dtype in which all of these lose nothing: the one that holds the others, F32 for two floats of which none
    does; None for no dtype at all, or where there is no such one."""
    found: str | None = None
    for dtype in dtypes:
        if found is None or not narrows(found, dtype):
            found = dtype
        elif narrows(dtype, found):
            if found not in _REACH or dtype not in _REACH:
                return None
            found = "F32"
    return found


def narrows(source: str, target: str) -> bool:
    """Whether a cast can lose something: any that is not to itself or from a float to one that holds it."""
    if source == target:
        return False
    if source in _REACH and target in _REACH:
        (p, top, low), (q, cap, floor) = _REACH[source], _REACH[target]
        return not (q >= p and cap >= top and floor <= low)
    return True
