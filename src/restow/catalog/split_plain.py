"""Families whose vendors ship one tensor per expert and projection, beside a router of one matrix.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Config keys behind `|` are those of vendors' own files and of older releases.
"""

TABLES = (
    """
    family    mellum
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
    family    cohere2_moe
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
    tie       tie_word_embeddings yes
    """,
    """
    family    hunyuan_v1_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size|intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.wg.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    flint
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    self_attn.softmax_offset self_attn.sinks
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The thinker alone: it reads the whole model's files too. The talker's experts have sizes of their own.
    """
    family    qwen3_omni_moe_thinker
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    alias     ^thinker.lm_head lm_head
    alias     ^thinker.model model
    alias     ^thinker.visual visual
    alias     ^thinker.audio_tower audio_tower
    rename    ^model.layers model.language_model.layers
    rename    ^model.embed_tokens model.language_model.embed_tokens
    rename    ^model.norm model.language_model.norm
    rename    ^visual model.visual
    rename    ^audio_tower model.audio_tower
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    beside    talker.*
    ignore    talker.* code2wav.* *.rotary_emb.inv_freq *.rotary_pos_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       text_config.tie_word_embeddings
    """,
    # The whole model: the thinker's experts are stowed, the talker's come along as they are.
    """
    family    qwen3_omni_moe
    size      e = thinker_config.text_config.num_experts|thinker_config.text_config.num_local_experts
    size      f = thinker_config.text_config.moe_intermediate_size
    size      d = thinker_config.text_config.hidden_size
    size      L = thinker_config.text_config.num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^thinker.model.layers thinker.model.language_model.layers
    rename    ^thinker.model.embed_tokens thinker.model.language_model.embed_tokens
    rename    ^thinker.model.norm thinker.model.language_model.norm
    rename    ^thinker.visual thinker.model.visual
    rename    ^thinker.audio_tower thinker.model.audio_tower
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    beside    talker.*
    ignore    talker.* code2wav.* *.rotary_emb.inv_freq *.rotary_pos_emb.inv_freq
    require   thinker.model.embed_tokens.weight thinker.model.norm.weight ?thinker.lm_head.weight
    tie       thinker_config.text_config.tie_word_embeddings
    """,
    """
    family    deepseek_ocr2
    size      e = n_routed_experts|num_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.layers model.language_model.layers
    rename    ^model.embed_tokens model.language_model.embed_tokens
    rename    ^model.norm model.language_model.norm
    rename    ^model.projector.layers model.multi_modal_projector
    rename    ^model.view_seperator model.view_separator
    rename    ^model.qwen2_model.model.model model.vision_tower.vision_encoder
    rename    ^model.qwen2_model.query_768 model.vision_tower.query_768_resolution
    rename    ^model.qwen2_model.query_1024 model.vision_tower.query_1024_resolution
    rename    ^model.sam_model model.vision_tower.sam_encoder
    rename    sam_encoder.blocks sam_encoder.layers
    rename    sam_encoder.layers.{l}.norm1 sam_encoder.layers.{l}.layer_norm1
    rename    sam_encoder.layers.{l}.norm2 sam_encoder.layers.{l}.layer_norm2
    rename    sam_encoder.neck.0 sam_encoder.neck.conv1
    rename    sam_encoder.neck.1 sam_encoder.neck.layer_norm1
    rename    sam_encoder.neck.2 sam_encoder.neck.conv2
    rename    sam_encoder.neck.3 sam_encoder.neck.layer_norm2
    rename    sam_encoder.net_2 sam_encoder.proj.conv1
    rename    sam_encoder.net_3 sam_encoder.proj.conv2
    rename    sam_encoder.patch_embed.proj sam_encoder.patch_embed.projection
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The vision tower's q, k and v are one tensor on the hub: no rename.
    """
    family    unlimited_ocr
    size      e = n_routed_experts|num_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts
    rename    ^model.layers model.language_model.layers
    rename    ^model.embed_tokens model.language_model.embed_tokens
    rename    ^model.norm model.language_model.norm
    rename    ^model.projector.layers model.multi_modal_projector
    rename    ^model.view_seperator model.view_separator
    rename    ^model.sam_model model.vision_tower.sam_encoder
    rename    sam_encoder.blocks sam_encoder.layers
    rename    sam_encoder.layers.{l}.norm1 sam_encoder.layers.{l}.layer_norm1
    rename    sam_encoder.layers.{l}.norm2 sam_encoder.layers.{l}.layer_norm2
    rename    sam_encoder.neck.0 sam_encoder.neck.conv1
    rename    sam_encoder.neck.1 sam_encoder.neck.layer_norm1
    rename    sam_encoder.neck.2 sam_encoder.neck.conv2
    rename    sam_encoder.neck.3 sam_encoder.neck.layer_norm2
    rename    sam_encoder.net_2 sam_encoder.proj.conv1
    rename    sam_encoder.net_3 sam_encoder.proj.conv2
    rename    sam_encoder.patch_embed.proj sam_encoder.patch_embed.projection
    rename    ^model.vision_model model.vision_tower.vision_encoder
    rename    vision_encoder.transformer vision_encoder.encoder
    spelling  hf split
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router   mlp.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    foreign   model.vision_tower.*.self_attn.q_proj.* model.vision_tower.*.self_attn.k_proj.*
    foreign   model.vision_tower.*.self_attn.v_proj.*
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
)
