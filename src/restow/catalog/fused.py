"""Families whose vendors ship stacked experts. Checked against transformers 5.23."""

TABLES = (
    """
    family    gpt_oss
    size      e = num_local_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up f p
    module    mlp.experts
    spelling  hf
              in         gate_up_proj        e d (f p)
              out        down_proj           e f d
              in.bias    gate_up_proj_bias   e (f p)
              out.bias   down_proj_bias      e d
    router    router        mlp.router.weight   e d
              router.bias   mlp.router.bias     e
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
)
