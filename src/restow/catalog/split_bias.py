"""Families whose vendors ship one tensor per expert and projection, beside a router with a correction bias.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). The bias is float32 in most files, and is named in many ways. Multi-token prediction blocks lie
past the last layer, or below `mtp`.
"""

TABLES = (
    """
    family    dots1 solar_open
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
    # It reads the whole model's files too, towers apart.
    """
    family    dots3_note_text
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     ^model.language_model model
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.mtp.* model.vision_tower.* model.audio_tower.* model.layers.{l+L}.*
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    beam
    size      e = num_experts|num_local_experts
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
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    glm4v_moe
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
    ignore    model.layers.{l+L}.* model.language_model.layers.{l+L}.* *.rotary_emb.inv_freq
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight
    require   ?lm_head.weight
    """,
    """
    family    glm5_next
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    self_attn.f_a_proj self_attn.forget_gate.f_a_proj
    rename    self_attn.f_b_proj self_attn.forget_gate.f_b_proj
    rename    self_attn.dt_bias self_attn.forget_gate.dt_bias
    rename    self_attn.A_log self_attn.forget_gate.A_log
    rename    hc_attn_fn attn_hc.fn
    rename    hc_attn_base attn_hc.base
    rename    hc_attn_scale attn_hc.scale
    rename    hc_ffn_fn ffn_hc.fn
    rename    hc_ffn_base ffn_hc.base
    rename    hc_ffn_scale ffn_hc.scale
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.language_model.layers.{l+L}.* *.rotary_emb.inv_freq
    foreign   *.self_attn.conv1d.weight
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight
    require   ?lm_head.weight
    """,
    """
    family    mimo_v2_flash
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    self_attn.attention_sink_bias self_attn.sinks
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    model.mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    axk1
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.layers.{l}.post_mlp_layernorm model.layers.{l}.mlp.post_mlp_layernorm
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    axk2
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    W_down mlp.fc1
    rename    W_up mlp.fc2
    rename    self_attn.q_b_proj self_attn.q_gate_proj
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
)
