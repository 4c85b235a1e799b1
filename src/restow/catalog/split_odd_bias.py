"""Families whose vendors ship one tensor per expert and projection, and the router or its bias under unusual names.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). `bailing_moe_v2` is not in transformers: its names are those of public adapters.
"""

TABLES = (
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
    alias     ^vision_tower.encoder.patch_embed vision_tower.patch_embed
    rename    ^language_model.lm_head lm_head
    rename    ^language_model.model model.language_model
    rename    ^mm_projector.proj.0 model.mm_projector.in_proj
    rename    ^mm_projector.proj.2 model.mm_projector.out_proj
    rename    ^vision_tower.encoder.blocks.{l}.norm0 model.vision_tower.layers.{l}.norm1
    rename    ^vision_tower.encoder.blocks.{l}.norm1 model.vision_tower.layers.{l}.norm2
    rename    ^vision_tower.encoder.blocks.{l}.mlp.fc0 model.vision_tower.layers.{l}.mlp.fc1
    rename    ^vision_tower.encoder.blocks.{l}.mlp.fc1 model.vision_tower.layers.{l}.mlp.fc2
    rename    ^vision_tower.encoder.blocks.{l}.wo model.vision_tower.layers.{l}.attn.proj
    rename    ^vision_tower.encoder.final_layernorm model.vision_tower.final_layernorm
    rename    ^vision_tower.patch_embed model.vision_tower.patch_embed
    rename    vision_tower.patch_embed.pos_emb.weight vision_tower.patch_embed.pos_emb.position_embeddings
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
