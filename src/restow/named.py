"""The layouts that have a name everywhere, and which of them every family has a form of.

A table and nothing else: the ten dense layouts in which MoE checkpoints are met, and the native layouts of grouped
trainers and engines. `FORMS` are those that a family takes over in its own order and labels; the others mean what
they say, to the letter. Sources: transformers 5.23, NeMo AutoModel 0.7, torchtitan, Megatron-Bridge, MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from restow.layout import Layout

_TABLE = {
    # One tensor per expert and projection, as nn.Linear stores it: nearly every hub checkpoint.
    "split": """
        in        {e}.{p:gate|up}_proj.weight   f d
        out       {e}.down_proj.weight          d f
        in.bias   {e}.{p:gate|up}_proj.bias     f
        out.bias  {e}.down_proj.bias            d
    """,
    # Stacked, gate above up: transformers' runtime, and Qwen3.5, Gemma4, Mistral4 on the hub.
    "fused": """
        in        gate_up_proj        e (p f) d
        out       down_proj           e d f
        in.bias   gate_up_proj_bias   e (p f)
        out.bias  down_proj_bias      e d
    """,
    # What grouped GEMM over x @ W wants: NeMo AutoModel's native layout.
    "grouped": """
        in        gate_and_up_projs   e d (p f)
        out       down_projs          e f d
        in.bias   gate_up_proj_bias   e (p f)
        out.bias  down_proj_bias      e d
    """,
    # One stacked tensor per projection: torchtitan before 2026.
    "stacked": """
        in        w{p:1|3}        e f d
        out       w2              e d f
        in.bias   w{p:1|3}_bias   e f
        out.bias  w2_bias         e d
    """,
    # torchtitan's present names, with the axes in them.
    "torchtitan": """
        in        w{p:1|3}_EFD   e f d
        out       w2_EDF         e d f
        in.bias   w{p:1|3}_bias_EF   e f
        out.bias  w2_bias_ED     e d
    """,
    # Gate and up on a dim of their own: a shard of f then holds both.
    "epfd": """
        in        w13        e p f d
        out       w2         e d f
        in.bias   w13_bias   e p f
        out.bias  w2_bias    e d
    """,
    # Per expert, fused: TransformerEngine's grouped linear, as Megatron-Bridge names it.
    "megatron": """
        in        linear_fc1.weight{e}   (p f) d
        out       linear_fc2.weight{e}   d f
        in.bias   linear_fc1.bias{e}     (p f)
        out.bias  linear_fc2.bias{e}     d
    """,
    # Per expert, fused, one module each: Megatron's sequential experts.
    "megatron_sequential": """
        in        local_experts.{e}.linear_fc1.weight   (p f) d
        out       local_experts.{e}.linear_fc2.weight   d f
        in.bias   local_experts.{e}.linear_fc1.bias     (p f)
        out.bias  local_experts.{e}.linear_fc2.bias     d
    """,
    # MLX's SwitchGLU.
    "mlx": """
        in        switch_mlp.{p:gate|up}_proj.weight   e f d
        out       switch_mlp.down_proj.weight          e d f
        in.bias   switch_mlp.{p:gate|up}_proj.bias     e f
        out.bias  switch_mlp.down_proj.bias            e d
    """,
    # The rest is met in the families that spell it: never taken for granted, always by name.
    "split_ungated": """
        in        {e}.{p:up}_proj.weight   f d
        out       {e}.down_proj.weight     d f
    """,
    "fused_in_major": """
        in        gate_up_proj   e d (p f)
        out       down_proj      e f d
    """,
    "interleaved_in_major": """
        in        gate_up_proj        e d (f p)
        out       down_proj           e f d
        in.bias   gate_up_proj_bias   e (f p)
        out.bias  down_proj_bias      e d
    """,
    "interleaved": """
        in        w13_weight   e (f p) d
        out       w2_weight    e d f
    """,
    "stacked_linear": """
        in        {p:gate|up}_proj.weight   e f d
        out       down_proj.weight          e d f
    """,
    "flat": """
        in        {p:w1|v1}   (e f) d
        out       w2          (e f) d
    """,
    "fused_ungated": """
        in        {p:up}_proj   e f d
        out       down_proj     e d f
    """,
}

FORMS = (
    "split",
    "fused",
    "grouped",
    "stacked",
    "torchtitan",
    "epfd",
    "megatron",
    "megatron_sequential",
    "mlx",
)


def _without_biases(name: str, layout: Layout) -> Layout:
    """A form without its bias rows, which only a family that has biases puts in."""
    if name not in FORMS:
        return layout
    rows = tuple(row for row in layout.rows if not row.role.endswith(".bias"))
    return Layout(rows)


NAMED: Mapping[str, Layout] = MappingProxyType({name: Layout.parse(text) for name, text in _TABLE.items()})
"""Every named layout, bias rows of the forms included."""

GENERAL: Mapping[str, Layout] = MappingProxyType(
    {n: _without_biases(n, layout) for n, layout in NAMED.items()}
)
"""The same without the forms' bias rows: what a name means where no family is known."""
