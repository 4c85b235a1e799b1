"""Families whose vendors ship stacked experts, the input axis before the output axis, as `x @ W` wants them.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Where the same names are met in both orders (`fused` and `hf` of qwen3_vl_moe, llama4, gpt_oss),
the shapes of both projections together tell them apart.
"""

TABLES = (
    # Gate and up are interleaved, and the activation reads them so: in every layout of this family.
    """
    family    gpt_oss
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up f p
    module    mlp.experts
    spelling  hf interleaved_in_major
              in         gate_up_proj        e d (f p)
              out        down_proj           e f d
              in.bias    gate_up_proj_bias   e (f p)
              out.bias   down_proj_bias      e d
    router    router        mlp.router.weight   e d
              router.bias   mlp.router.bias     e
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # Names, biases and activation are gpt_oss's, but gate and up lie one after the other.
    """
    family    openai_privacy_filter
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf
              in         gate_up_proj        e d (p f)
              out        down_proj           e f d
              in.bias    gate_up_proj_bias   e (p f)
              out.bias   down_proj_bias      e d
    router    router        mlp.router.weight   e d
              router.bias   mlp.router.bias     e
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?score.weight
    tie       never
    """,
    # transformers 5.23 writes `fused` under the vendor's names.
    """
    family    qwen3_vl_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf fused_in_major
              in    gate_up_proj   e d (p f)
              out   down_proj      e f d
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq *.rotary_pos_emb.inv_freq
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight ?lm_head.weight
    """,
    """
    family    llama4
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    feed_forward.experts
    spelling  hf fused_in_major
              in    gate_up_proj   e d (p f)
              out   down_proj      e f d
    router    router   feed_forward.router.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   language_model.model.embed_tokens.weight language_model.model.norm.weight
    require   ?language_model.lm_head.weight
    tie       text_config.tie_word_embeddings
    """,
    """
    family    llama4_text
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    feed_forward.experts
    spelling  hf fused_in_major
              in    gate_up_proj   e d (p f)
              out   down_proj      e f d
    router    router   feed_forward.router.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The runtime keeps the vendor's order of axes under the usual names.
    """
    family    aria
    size      e = moe_num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^language_model.lm_head lm_head
    rename    ^language_model.model model.language_model
    rename    ^vision_tower model.vision_tower
    rename    ^multi_modal_projector model.multi_modal_projector
    spelling  hf
              in    fc1.weight   e d (p f)
              out   fc2.weight   e f d
    spelling  fused_in_major
              in    gate_up_proj   e d (p f)
              out   down_proj      e f d
    router    router   mlp.router.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   language_model.model.embed_tokens.weight language_model.model.norm.weight
    require   ?language_model.lm_head.weight
    """,
    """
    family    aria_text
    size      e = moe_num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf
              in    fc1.weight   e d (p f)
              out   fc2.weight   e f d
    spelling  fused_in_major
              in    gate_up_proj   e d (p f)
              out   down_proj      e f d
    router    router   mlp.router.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # Two-dimensional: expert and inner width are one dim. Every projection has the model's width last.
    """
    family    dbrx
    size      e = ffn_config.moe_num_experts
    size      f = ffn_config.ffn_hidden_size
    size      d = d_model
    size      L = n_layers
    order     gate|up p f
    module    ffn.experts.mlp ffn.experts.mlp ffn.experts
    spelling  hf flat
              in    {p:w1|v1}   (e f) d
              out   w2          (e f) d
    router    router   ffn.router.layer.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   transformer.wte.weight transformer.norm_f.weight ?lm_head.weight
    tie       never
    """,
)
