"""The rows between which the mixin converts, as layouts: weights, biases, and three forms of LoRA. Text and
no code.

`e` expert, `p` projection (gate, up), `f` expert hidden, `d` model, `r` LoRA rank. The weights are the
layouts that have a name everywhere; the LoRA rows are here: what NeMo's grouped experts train (`LORA`), what
PEFT writes for one `nn.Linear` per expert (`LORA_SPLIT`), and what its ParamWrapper writes for stacked
experts (`LORA_WRAPPED`), by the version that changed which of the two matrices is called A. A role of one
layout is the same role of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from restow.layout import Layout
from restow.named import NAMED
from restow.notation import Labels, Part, Row

GROUPED = NAMED["grouped"]
SPLIT = NAMED["split"]

# The product of a token with A, then with B: A has no p, since gate and up share one input projection.
LORA = Layout.parse("""
    in_A    lora_gate_and_up_A   e d r
    in_B    lora_gate_and_up_B   e r (p f)
    out_A   lora_down_A          e f r
    out_B   lora_down_B          e r d
""")

# nn.Linear of each expert: A as (rank, in), B as (out, rank). Here A does have p: one for each projection.
LORA_SPLIT = Layout.parse("""
    in_A    {e}.{p:gate|up}_proj.lora_A.weight   r d
    in_B    {e}.{p:gate|up}_proj.lora_B.weight   f r
    out_A   {e}.down_proj.lora_A.weight          r f
    out_B   {e}.down_proj.lora_B.weight          d r
""")

LORA_WRAPPED: Mapping[str, Layout] = MappingProxyType({
    "peft-0.19.1": Layout.parse("""
        in_A    base_layer.lora_A.weight   (e r) d
        in_B    base_layer.lora_B.weight   (p f) (r e)
        out_A   lora_A.weight              (e r) f
        out_B   lora_B.weight              d (r e)
    """),
    "peft-0.18": Layout.parse("""
        in_B    base_layer.lora_A.weight   (e r) (p f)
        in_A    base_layer.lora_B.weight   d (r e)
        out_B   lora_A.weight              (e r) d
        out_A   lora_B.weight              f (r e)
    """),
})  # fmt: skip


def with_labels(layout: Layout, gated: bool) -> Layout:
    """`layout` for gated experts (as it is) or for experts that have an up projection only."""
    return layout if gated else Layout(tuple(one_label(row, "up") for row in layout.rows))


def one_label(row: Row, label: str) -> Row:
    """`row` for one of its projections: `{p:gate|up}` becomes `{p:gate}`; rows without labels stay as they
    are.
    """

    def chosen(part: Part) -> Part:
        return Labels(part.axis, (label,)) if isinstance(part, Labels) else part

    return replace(row, name=tuple(map(chosen, row.name)))


def row_named(layout: Layout, name: str) -> Row | None:
    """The row whose tensors' name, which carries no axis, is `name`; None where there is none."""
    return next(
        (row for row in layout.rows if not row.name_axes and "".join(map(str, row.name)) == name), None
    )
