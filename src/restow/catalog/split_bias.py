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
    """
    family    exaone_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    mlp.e_score_correction_bias mlp.gate.e_score_correction_bias
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                e d
              router.bias   mlp.e_score_correction_bias    e    exact
    ignore    mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    afmoe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.router.gate.weight   e d
              router.bias   mlp.expert_bias          e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    hy_v3
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    mlp.router.gate mlp.gate
    rename    mlp.expert_bias mlp.e_score_correction_bias
    rename    mlp.shared_mlp mlp.shared_experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.router.gate.weight   e d
              router.bias   mlp.expert_bias          e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The bias lies below the experts module, and is no expert weight.
    """
    family    laguna
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    mlp.experts.e_score_correction_bias mlp.gate.e_score_correction_bias
    rename    mlp.shared_expert mlp.shared_experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                       e d
              router.bias   mlp.experts.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    kolibri1
    size      e = num_local_experts|num_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    moe.router.expert_bias mlp.gate.e_score_correction_bias
    rename    post_attn_norm post_self_attn_layernorm
    rename    post_ffn_norm post_mlp_layernorm
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight          e d
              router.bias   moe.router.expert_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    ernie4_5_moe
    size      e = moe_num_experts|num_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    mlp.moe_statics mlp.gate.moe_statics
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                           e d
              router.bias   mlp.moe_statics.e_score_correction_bias   1 e  exact
    ignore    model.mtp_* mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    # Ling 2.5. The runtime has q, k and v of the short convolutions in one tensor.
    """
    family    bailing_hybrid
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.word_embeddings model.embed_tokens
    rename    attention self_attn
    rename    self_attn.f_proj self_attn.forget_gate.f_proj
    rename    self_attn.dt_bias self_attn.forget_gate.dt_bias
    rename    self_attn.A_log self_attn.forget_gate.A_log
    rename    self_attn.dense self_attn.o_proj
    rename    mlp.gate.expert_bias mlp.gate.e_score_correction_bias
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight        e d
              router.bias   mlp.gate.expert_bias   e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    foreign   *.self_attn.conv1d.weight
    require   model.word_embeddings.weight model.norm.weight ?lm_head.weight
    """,
    # Ling 2 and Ring, from their own code: not in transformers.
    """
    family    bailing_moe_v2 bailing_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight        e d
              router.bias   mlp.gate.expert_bias   e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    require   model.word_embeddings.weight model.norm.weight ?lm_head.weight
    """,
    # Past the experts come those that do nothing: the router and gate and up have rows for them, down has none.
    """
    family    longcat_flash
    size      e = n_routed_experts|num_local_experts
    size      f = expert_ffn_hidden_size|moe_intermediate_size
    size      d = hidden_size
    size      e@in = n_routed_experts + zero_expert_num
    size      e@router = n_routed_experts + zero_expert_num
    size      L = num_layers|num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.router.classifier.weight            e d
              router.bias   mlp.router.e_score_correction_bias      e    exact
    beside    *.mlps.*
    ignore    model.mtp.* *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # transformers writes `blocks` for `layers`. The vision tower's q, k and v are one tensor on the hub.
    """
    family    kimi_k25
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     ^language_model.model.blocks language_model.model.layers
    rename    ^language_model.lm_head lm_head
    rename    ^language_model.model model.language_model
    rename    ^mm_projector.proj.0 model.mm_projector.in_proj
    rename    ^mm_projector.proj.2 model.mm_projector.out_proj
    rename    ^vision_tower.encoder.blocks.{l}.norm0 model.vision_tower.layers.{l}.norm1
    rename    ^vision_tower.encoder.blocks.{l}.norm1 model.vision_tower.layers.{l}.norm2
    rename    ^vision_tower.encoder.blocks.{l}.mlp.fc0 model.vision_tower.layers.{l}.mlp.fc1
    rename    ^vision_tower.encoder.blocks.{l}.mlp.fc1 model.vision_tower.layers.{l}.mlp.fc2
    rename    ^vision_tower.encoder.blocks.{l}.wo model.vision_tower.layers.{l}.attn.proj
    rename    ^vision_tower.patch_embed.pos_emb.weight model.vision_tower.patch_embed.pos_emb.position_embeddings
    rename    ^vision_tower.encoder model.vision_tower
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        mlp.gate.weight                    e d
              router.bias   mlp.gate.e_score_correction_bias   e    exact
    ignore    language_model.model.layers.{l+L}.* *.rotary_emb.inv_freq
    foreign   model.vision_tower.*.attn.q_proj.* model.vision_tower.*.attn.k_proj.*
    foreign   model.vision_tower.*.attn.v_proj.*
    require   language_model.model.embed_tokens.weight language_model.model.norm.weight
    require   ?language_model.lm_head.weight
    """,
)
