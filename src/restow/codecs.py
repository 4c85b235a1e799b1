"""How quantised weights are stored: tables of codecs.

    fp8    e4m3  8  F8_E4M3
      codes    {}             r c
      scale    {}_scale_inv   r/R c/C   multiply  F32 F16 BF16 F8_E8M0

A codec is a record: what an element's bits mean, and rows below the weight's name `{}` (`{-}`: without `.weight`,
`{_}`: without `_proj`). `r c` stand for the weight's last two dims (codes `r/2 c` are packed along the first of them, which is
then the input axis), `rc` for both in one, `R C` for the block that the
config announces, `?` for a length that only the file says; dims before the last two stay before them.
Companions (`scale`, `scale2`) say how they act on the element; `spare` rows are carried along and change no value, or
follow from this table: the element's `values`, a `note` of type and shape.
A scale may itself be `coded`: the next row is the `table` of what its bytes mean, `nested` its scales, `offset` a note
whose `nested_offset` is added; such notes have lengths of their own.
What rows a weight's row turns into under a codec is for `coded_rows` to say. Nothing is rejected: the table is ours.
"""

from __future__ import annotations

from typing import NamedTuple

from restow.roles import LEAF

WORD_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "U8": 8, "I8": 8, "I32": 32}
COMPANIONS = (".scale", ".scale2", ".scale3", ".scale4", ".spare", ".spare2")  # the ends of companions' roles
CODES = ".codes"
WEIGHTS = tuple(LEAF)  # the roles that are coded
NESTED = ("table", "nested", "offset")  # what acts on the coded scale before it, not on elements
ACTS = ("multiply", "divide", "exponent", "coded", *NESTED, "values", "note")

TABLE = """
fp8                e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale_inv          r/R c/C      multiply  F32 F16 BF16 F8_E8M0
fp8_e5m2           e5m2  8  F8_E5M2
  codes    {}                    r c
  scale    {}_scale_inv          r/R c/C      multiply  F32 F16 BF16 F8_E8M0
fp8_scale          e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {-}.scale             r/R c/C      multiply  F32 F16 BF16 F8_E8M0
fp8_expert         e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale_inv          1 1          multiply  F32 F16 BF16
  spare    {}_activation_scale   1 1
fp8_tensor         e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale_inv          -            multiply  F32 F16 BF16
fp8_channel        e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale              r 1          multiply  F32 F16 BF16
fp8_group          e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale              r/R c/C      multiply  F32 F16 BF16
fp8_modelopt       e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale              r/R 1 c/C 1  multiply  F32 F16 BF16
mxfp8              e4m3  8  F8_E4M3
  codes    {}                    r c
  scale    {}_scale_inv          r c/32       exponent  U8 F8_E8M0
mxfp4              e2m1  4  U8
  codes    {}_blocks             r c/32 16
  scale    {}_scales             r c/32       exponent  U8
fp4                e2m1  4  I8 U8
  codes    {}                    r c/2
  scale    {-}.scale             r c/32       exponent  F8_E8M0
mxfp4_packed       e2m1  4  U8
  codes    {}_packed             r c/2
  scale    {}_scale              r c/32       exponent  U8 F8_E8M0
int4_packed        int4  4  I32
  codes    {}_packed             r c/8
  scale    {}_scale              r/R c/C      multiply  F32 F16 BF16
  spare    {}_shape              2
nvfp4              e2m1  4  U8
  codes    {}                    r c/2
  scale    {}_scale              r c/16       multiply  F8_E4M3
  scale2   {}_scale_2            -            multiply  F32
  spare    {-}.input_scale       -
nvfp4_across       e2m1  4  U8
  codes    {}                    r/2 c
  scale    {-}_weight_scale      r/16 c       multiply  F8_E4M3
  scale2   {-}_weight_scale_2    -            multiply  F32
  spare    {-}_input_scale       -
nvfp4_packed       e2m1  4  U8
  codes    {}_packed             r c/2
  scale    {}_scale              r c/16       multiply  F8_E4M3
  scale2   {}_global_scale       1            divide    F32
  spare    {-}.input_global_scale  1
nf4                nf4   4  U8
  codes    {}                    rc/2 1
  scale    {}.absmax             rc/64        multiply  F32
  spare    {}.quant_map          16           values    F32
  spare2   {}.quant_state.bitsandbytes__nf4  ?  note  U8
bnb_fp4            bnb_fp4  4  U8
  codes    {}                    rc/2 1
  scale    {}.absmax             rc/64        multiply  F32
  spare    {}.quant_map          16           values    F32
  spare2   {}.quant_state.bitsandbytes__fp4  ?  note  U8
nf4_double         nf4   4  U8
  codes    {}                    rc/2 1
  scale    {}.absmax             rc/64        coded     U8
  scale2   {}.nested_quant_map   256          table     F32
  scale3   {}.nested_absmax      rc/16384     nested    F32
  scale4   {}.quant_state.bitsandbytes__nf4  ?  offset  U8
  spare    {}.quant_map          16           values    F32
bnb_fp4_double     bnb_fp4  4  U8
  codes    {}                    rc/2 1
  scale    {}.absmax             rc/64        coded     U8
  scale2   {}.nested_quant_map   256          table     F32
  scale3   {}.nested_absmax      rc/16384     nested    F32
  scale4   {}.quant_state.bitsandbytes__fp4  ?  offset  U8
  spare    {}.quant_map          16           values    F32
nf4_experts        nf4   4  U8
  codes    {}                    rc/2
  scale    {_}_absmax            rc/64        multiply  F32
bnb_fp4_experts    bnb_fp4  4  U8
  codes    {}                    rc/2
  scale    {_}_absmax            rc/64        multiply  F32
"""


class Companion(NamedTuple):
    """A row beside the codes: its role's end, name and dims, how it acts, and the dtypes it is met in."""

    role: str
    name: str
    dims: tuple[str, ...]
    how: str = ""
    dtypes: tuple[str, ...] = ()


class Codec(NamedTuple):
    """A way of coding weights. `element` is what an element's `bits` mean; `block` what `R C` stand for.

    `scales` act on a weight in their order; `spares` change nothing, and may be absent.
    """

    name: str
    element: str
    bits: int
    dtypes: tuple[str, ...]
    codes: Companion
    scales: tuple[Companion, ...]
    spares: tuple[Companion, ...] = ()
    block: tuple[int, int] = (0, 0)

    @property
    def across(self) -> bool:
        """Whether several elements of the last dim but one share a place of the codes: then that is the input axis."""
        return any(dim.startswith("r/") for dim in self.codes.dims)

    @property
    def exact(self) -> bool:
        """Whether every scale is a power of two, so that a value has no more digits than its code."""
        return all(scale.how == "exponent" for scale in self.scales)

    def companions(self, spares: bool) -> tuple[Companion, ...]:
        """The rows beside the codes, in order."""
        return (*self.scales, *(self.spares if spares else ()))


def rounds(codec: Codec, dtype: str) -> bool:
    """Whether values may have more digits than `dtype` holds."""
    return dtype not in ("F64", "F32") and not (codec.exact and dtype == "BF16")


def parse_codecs(text: str) -> dict[str, Codec]:
    """The codecs of a table by name."""
    found: dict[str, Codec] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if not line.startswith(" "):
            name, element, bits, *dtypes = words
            found[name] = last = Codec(name, element, int(bits), tuple(dtypes), Companion("", "", ()), ())
            continue
        role, spelled, *rest = words
        cut = next((i for i, word in enumerate(rest) if word in ACTS), len(rest))
        how, dtypes = (rest[cut], rest[cut + 1 :]) if cut < len(rest) else ("", [])
        row = Companion(f".{role}", spelled, tuple(w for w in rest[:cut] if w != "-"), how, tuple(dtypes))
        if role == "codes":
            last = last._replace(codes=row)
        elif role.startswith("scale"):
            last = last._replace(scales=(*last.scales, row))
        else:
            last = last._replace(spares=(*last.spares, row))
        found[last.name] = last
    return found


CODECS = parse_codecs(TABLE)


def spelled(pattern: str, name: str) -> str:
    """The name of a weight's companion, or of its codes."""
    for word, end in (("{-}", ".weight"), ("{_}", "_proj"), ("{}", "")):
        pattern = pattern.replace(word, name.removesuffix(end))
    return pattern


def weight_of(pattern: str, name: str) -> str | None:
    """The name of the weight whose codes or companion has this name, or None."""
    bare = pattern.startswith("{-}")
    end = pattern[3:] if bare else pattern[2:]
    if not name.endswith(end) or len(name) == len(end):
        return None
    return name[: len(name) - len(end)] + (".weight" if bare else "")
