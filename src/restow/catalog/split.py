"""Families whose vendors ship one tensor per expert and projection.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Config keys behind `|` are those of vendors' own files and of older releases. Multi-token
prediction blocks lie past the last layer, or below `mtp`.
"""

TABLES = (
    """
    family    mixtral
    size      e = num_local_experts|num_experts
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
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The correction bias is float32 in vendors' files; transformers keeps it in the model's dtype.
    """
    family    minimax_m2
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    rename    block_sparse_moe mlp
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router        block_sparse_moe.gate.weight               e d
              router.bias   block_sparse_moe.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    qwen2_moe
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
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
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
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    qwen3_next
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
    ignore    mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    olmoe flex_olmo
    size      e = num_experts|num_local_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    deepseek_v2
    size      e = n_routed_experts|num_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # DeepSeek-V3, R1, V3.1 and V3.2; kimi_k2 is a model type of its own over DeepSeek-V3's code.
    """
    family    deepseek_v3 deepseek_v32 kimi_k2
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    glm4_moe glm4_moe_lite glm_moe_dsa
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    jamba
    size      e = num_experts|num_local_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    feed_forward.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   feed_forward.router.weight   e d
    require   model.embed_tokens.weight model.final_layernorm.weight ?lm_head.weight
    """,
    # Not gated. Where experts work in a latent width, d is that width and the router's h is the model's.
    """
    family    nemotron_h
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = moe_latent_size|hidden_size
    size      h = hidden_size
    size      L = num_hidden_layers|#layers_block_type|#hybrid_override_pattern
    order     up p f
    module    mixer.experts
    alias     ^language_model.backbone backbone
    alias     ^language_model.lm_head lm_head
    rename    ^backbone model
    spelling  hf split
              in    {e}.{p:up}_proj.weight   f d
              out   {e}.down_proj.weight     d f
    spelling  fused
              in    {p:up}_proj   e f d
              out   down_proj     e d f
    router    router        mixer.gate.weight                    e h
              router.bias   mixer.gate.e_score_correction_bias   e    exact
    ignore    mtp.*
    require   backbone.embeddings.weight backbone.norm_f.weight ?lm_head.weight
    tie       never
    """,
)
