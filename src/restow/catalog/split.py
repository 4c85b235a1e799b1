"""Families whose vendors ship one tensor per expert and projection. Checked against transformers 5.23."""

TABLES = (
    """
    family    qwen3_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    mixtral
    size      e = num_local_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    rename    block_sparse_moe mlp
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router   block_sparse_moe.gate.weight   e d
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
)
