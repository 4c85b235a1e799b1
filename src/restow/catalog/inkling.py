"""Inkling and Inkling 2: gate and up are interleaved in the vendor's files and lie one after the other in the runtime.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Named layouts are those of the runtime. `inkling_text` alone is written under runtime names.
"""

TABLES = (
    # Shared experts and dense layers are interleaved on the hub too: no rename.
    # The router has rows for shared experts.
    """
    family    inkling_mm_model
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      e@router = n_routed_experts + n_shared_experts
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.llm.layers model.language_model.layers
    rename    ^model.llm.embed_norm model.language_model.embed_tokens.embed_norm
    rename    ^model.llm.embed.weight model.language_model.embed_tokens.weight
    rename    ^model.llm.norm model.language_model.norm
    rename    ^model.llm.unembed lm_head
    rename    ^model.audio model.audio_tower
    rename    audio_tower.encoder audio_tower.embed_audio_tokens.embed_audio_tokens
    rename    audio_tower.final_norm audio_tower.norm
    rename    ^model.visual model.vision_tower
    rename    vision_tower.layers.linear_0 vision_tower.encoder_layers.0.projection
    rename    vision_tower.layers.norm_0 vision_tower.encoder_layers.0.layer_norm
    rename    vision_tower.layers.linear_1 vision_tower.encoder_layers.1.projection
    rename    vision_tower.layers.norm_1 vision_tower.encoder_layers.1.layer_norm
    rename    vision_tower.layers.linear_2 vision_tower.encoder_layers.2.projection
    rename    vision_tower.layers.norm_2 vision_tower.encoder_layers.2.layer_norm
    rename    vision_tower.layers.linear_3 vision_tower.encoder_layers.3.projection
    rename    vision_tower.layers.norm_3 vision_tower.encoder_layers.3.layer_norm
    rename    vision_tower.layers.linear_4 vision_tower.encoder_layers.4.projection
    rename    vision_tower.layers.norm_4 vision_tower.encoder_layers.4.layer_norm
    rename    vision_tower.layers.linear_5 vision_tower.encoder_layers.5.projection
    rename    vision_tower.layers.norm_5 vision_tower.encoder_layers.5.layer_norm
    rename    vision_tower.layers.linear_6 vision_tower.encoder_layers.6.projection
    rename    vision_tower.layers.norm_6 vision_tower.encoder_layers.6.layer_norm
    rename    vision_tower.layers.linear_7 vision_tower.encoder_layers.7.projection
    rename    vision_tower.layers.norm_7 vision_tower.encoder_layers.7.layer_norm
    rename    attn_norm input_layernorm
    rename    mlp_norm post_attention_layernorm
    rename    attn self_attn
    rename    self_attn.wq_du self_attn.q_proj
    rename    self_attn.wk_dv self_attn.k_proj
    rename    self_attn.wv_dv self_attn.v_proj
    rename    self_attn.wr_du self_attn.r_proj
    rename    self_attn.wo_ud self_attn.o_proj
    rename    mlp.gate.bias mlp.gate.e_score_correction_bias
    rename    k_sconv.weight k_sconv.conv1d.weight
    rename    v_sconv.weight v_sconv.conv1d.weight
    rename    attn_sconv.weight attn_sconv.conv1d.weight
    rename    mlp_sconv.weight mlp_sconv.conv1d.weight
    rename    shared_experts.shared_w2_weight shared_experts.down_proj
    rename    mlp.w2_md mlp.down_proj
    spelling  hf interleaved
              in    w13_weight   e (f p) d
              out   w2_weight    e d f
    router    router   mlp.gate.weight   e d
              bias     mlp.gate.bias     e    exact
    beside    *.mlp.shared_experts.*
    ignore    model.mtp.* *.rotary_emb.inv_freq
    foreign   *.mlp.shared_experts.gate_proj *.mlp.shared_experts.up_proj *.mlp.gate_proj.weight
    foreign   *.mlp.up_proj.weight
    require   model.llm.embed.weight model.llm.norm.weight ?model.llm.unembed.weight
    tie       never
    """,
    """
    family    inkling_text
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      e@router = n_routed_experts + n_shared_experts
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf fused
              in    gate_up_proj   e (p f) d
              out   down_proj      e d f
    router    router   mlp.gate.weight                    e d
              bias     mlp.gate.e_score_correction_bias   e    exact
    beside    *.mlp.shared_experts.*
    ignore    model.mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       never
    """,
    """
    family    inkling2_text
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.llm model
    rename    ^model.unembed lm_head
    rename    ^model.embed_norm model.embed_tokens.embed_norm
    rename    ^model.embed.weight model.embed_tokens.weight
    rename    ^model.attn_res.attn_queries.{l} model.layers.{l+1}.attention_input.query
    rename    ^model.attn_res.mlp_queries.{l} model.layers.{l}.mlp_input.query
    rename    ^model.attn_res.output_query model.final_input.query
    rename    attn_norm input_layernorm
    rename    mlp_norm post_attention_layernorm
    rename    ^model.layers.{l}.attn model.layers.{l}.self_attn
    rename    ^model.layers.{l}.self_attn.wq_du model.layers.{l}.self_attn.q_proj
    rename    ^model.layers.{l}.self_attn.wk_dv model.layers.{l}.self_attn.k_proj
    rename    ^model.layers.{l}.self_attn.wv_dv model.layers.{l}.self_attn.v_proj
    rename    ^model.layers.{l}.self_attn.wr_du model.layers.{l}.self_attn.r_proj
    rename    ^model.layers.{l}.self_attn.wo_ud model.layers.{l}.self_attn.o_proj
    rename    mlp.gate.bias mlp.gate.e_score_correction_bias
    rename    self_attn.gate_attn self_attn.gate_proj
    rename    self_attn.attn_sink_proj self_attn.sink_proj
    rename    k_sconv.weight k_sconv.conv1d.weight
    rename    v_sconv.weight v_sconv.conv1d.weight
    rename    attn_sconv.weight post_attention_convolution.conv1d.weight
    rename    mlp_sconv.weight post_mlp_convolution.conv1d.weight
    spelling  hf interleaved
              in    w13_weight   e (f p) d
              out   w2_weight    e d f
    router    router        mlp.gate.weight   e d
              router.bias   mlp.gate.bias     e    exact
    optional  *.attention_input.query
    ignore    model.visual.* *.rotary_emb.inv_freq
    require   model.llm.embed.weight model.llm.norm.weight ?model.llm.unembed.weight
    tie       never
    """,
    """
    family    inkling2
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.llm model.language_model
    rename    ^model.language_model.unembed lm_head
    rename    ^model.language_model.embed_norm model.language_model.embed_tokens.embed_norm
    rename    ^model.language_model.embed.weight model.language_model.embed_tokens.weight
    rename    ^model.language_model.attn_res.attn_queries.{l} model.language_model.layers.{l+1}.attention_input.query
    rename    ^model.language_model.attn_res.mlp_queries.{l} model.language_model.layers.{l}.mlp_input.query
    rename    ^model.language_model.attn_res.output_query model.language_model.final_input.query
    rename    attn_norm input_layernorm
    rename    mlp_norm post_attention_layernorm
    rename    ^model.language_model.layers.{l}.attn model.language_model.layers.{l}.self_attn
    rename    ^model.language_model.layers.{l}.self_attn.wq_du model.language_model.layers.{l}.self_attn.q_proj
    rename    ^model.language_model.layers.{l}.self_attn.wk_dv model.language_model.layers.{l}.self_attn.k_proj
    rename    ^model.language_model.layers.{l}.self_attn.wv_dv model.language_model.layers.{l}.self_attn.v_proj
    rename    ^model.language_model.layers.{l}.self_attn.wr_du model.language_model.layers.{l}.self_attn.r_proj
    rename    ^model.language_model.layers.{l}.self_attn.wo_ud model.language_model.layers.{l}.self_attn.o_proj
    rename    mlp.gate.bias mlp.gate.e_score_correction_bias
    rename    self_attn.gate_attn self_attn.gate_proj
    rename    self_attn.attn_sink_proj self_attn.sink_proj
    rename    k_sconv.weight k_sconv.conv1d.weight
    rename    v_sconv.weight v_sconv.conv1d.weight
    rename    attn_sconv.weight post_attention_convolution.conv1d.weight
    rename    mlp_sconv.weight post_mlp_convolution.conv1d.weight
    rename    ^model.visual.backbone model.vision_tower
    rename    vision_tower.ln_pre vision_tower.pre_layernorm
    rename    vision_tower.embeddings.position_embedding$ vision_tower.embeddings.position_embedding.weight
    rename    ^model.visual.proj_in model.vision_tower.merger.linear_1
    rename    ^model.visual.proj_out model.vision_tower.merger.linear_2
    rename    ln_1 layernorm_before
    rename    ln_2 layernorm_after
    rename    ls_1.gamma lambda_1
    rename    ls_2.gamma lambda_2
    rename    mlp.c_fc mlp.fc1
    rename    mlp.c_proj mlp.fc2
    spelling  hf interleaved
              in    w13_weight   e (f p) d
              out   w2_weight    e d f
    router    router        mlp.gate.weight   e d
              router.bias   mlp.gate.bias     e    exact
    optional  *.attention_input.query
    ignore    *.rotary_emb.inv_freq
    require   model.llm.embed.weight model.llm.norm.weight ?model.llm.unembed.weight
    tie       never
    """,
)
