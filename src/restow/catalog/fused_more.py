"""More families whose vendors ship stacked experts, the output axis before the input axis, gate before up.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Where transformers converts nothing, its names are all that is known of the vendor's.
"""

TABLES = (
    """
    family    qwen4_exp
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router   mlp.gate.weight   e d
    ignore    mtp.* *.rotary_emb.inv_freq *.rotary_pos_emb.inv_freq
    require   model.language_model.embed_tokens.weight
    require   model.language_model.hyper_connection_mixer.hc_norm.weight ?lm_head.weight
    """,
    """
    family    qwen4_exp_text
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     ^model.language_model model
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router   mlp.gate.weight   e d
    ignore    mtp.* model.visual.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.hyper_connection_mixer.hc_norm.weight ?lm_head.weight
    """,
    # The encoder's experts are the decoder's, and are not written.
    """
    family    diffusion_gemma
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    experts moe.experts moe
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router         router.proj.weight        e d
              router.scale   router.per_expert_scale   e
    ignore    *.rotary_emb.inv_freq
    require   model.decoder.embed_tokens.weight model.decoder.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    """
    family    mistral4
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     ^language_model.model model
    alias     ^language_model.lm_head lm_head
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    hy_v4
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     mlp.linear_gate mlp.gate_proj
    alias     shared_experts.linear_gate shared_experts.gate_proj
    rename    hc_pre.hc_head hc_head
    rename    hc_head.hc_head_fn hc_head.hc_fn
    rename    hc_head.hc_head_base hc_head.hc_base
    rename    hc_head.hc_head_scale hc_head.hc_scale
    rename    hc_pre.hc_attn_layer.hc_fn attn_hc.fn
    rename    hc_pre.hc_attn_layer.hc_base attn_hc.base
    rename    hc_pre.hc_attn_layer.hc_scale attn_hc.scale
    rename    hc_pre.hc_mlp_layer.hc_fn ffn_hc.fn
    rename    hc_pre.hc_mlp_layer.hc_base ffn_hc.base
    rename    hc_pre.hc_mlp_layer.hc_scale ffn_hc.scale
    rename    self_attn.learnable_sink_param self_attn.sinks
    rename    self_attn.linear_gate self_attn.gate_proj
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.mtp_layers.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # Experts work in a latent width, d; the router's h is the model's.
    """
    family    muse_spark
    size      e = num_local_experts|num_experts
    size      f = moe_intermediate_size
    size      d = moe_hidden_size|hidden_size
    size      h = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router        mlp.gate.weight                    e h
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    beside    *.mlp.experts.post_expert_norm.weight
    ignore    *.rotary_emb.inv_freq
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight
    require   ?lm_head.weight
    """,
    # The router has one more row, for tokens that skip the experts.
    """
    family    zaya
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      e@router = num_experts + 1
    size      r = router_hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router        mlp.gate.router_mlp.out_proj.weight   e r
              router.bias   mlp.gate.balancing_biases             e    exact
    optional  *.mlp.gate.router_states_scale
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    # Its siblings are written as `input_linear` and `output_linear`; this one is not.
    """
    family    granitemoe_swa
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router   block_sparse_moe.router.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # Attention has experts too, as many; they are not gated, lie outside the experts module and stay as they are.
    """
    family    jetmoe
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp
    spelling  hf
              in    input_linear.weight    e (p f) d
              out   output_linear.weight   e d f
    router    router             mlp.router.layer.weight                         e d
              attention.in       self_attention.experts.input_linear.weight      e a d
              attention.out      self_attention.experts.output_linear.weight     e d a
              attention.router   self_attention.experts.router.layer.weight      e d
    beside    *.mlp.bias
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
)
