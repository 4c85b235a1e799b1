"""Families whose vendors ship one tensor per expert and projection, under the names w1 (gate), w3 (up), w2 (down).

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Config keys behind `|` are those of vendors' own files and of older releases.
"""

TABLES = (
    """
    family    minimax
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
    """
    family    phimoe
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    rename    block_sparse_moe mlp
    rename    mlp.gate mlp.router
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router   block_sparse_moe.gate.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The first layers are dense and keep `mlp`. The runtime fuses gate and up of shared experts.
    # Re-quantised files name experts `mlp.experts.{e}.gate_proj`, `renamed` here.
    """
    family    minimax_m3_vl
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    rename    ^language_model.lm_head lm_head
    rename    ^language_model.model model.language_model
    rename    ^vision_tower.vision_model.embeddings.patch_embedding model.vision_tower.embeddings.proj
    rename    ^vision_tower.vision_model.encoder.layers model.vision_tower.layers
    rename    ^vision_tower.vision_model.pre_layrnorm model.vision_tower.pre_layrnorm
    rename    ^multi_modal_projector model.multi_modal_projector
    rename    ^patch_merge_mlp.linear_1 model.multi_modal_projector.merge_linear_1
    rename    ^patch_merge_mlp.linear_2 model.multi_modal_projector.merge_linear_2
    rename    self_attn.index_q_proj self_attn.indexer.q_proj
    rename    self_attn.index_k_proj self_attn.indexer.k_proj
    rename    self_attn.index_q_norm self_attn.indexer.q_norm
    rename    self_attn.index_k_norm self_attn.indexer.k_norm
    rename    block_sparse_moe.gate mlp.gate
    rename    block_sparse_moe.shared_experts mlp.shared_experts
    rename    block_sparse_moe.e_score_correction_bias mlp.gate.e_score_correction_bias
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    spelling  renamed @ mlp.experts
              in    {e}.{p:gate|up}_proj.weight   f d
              out   {e}.down_proj.weight          d f
    router    router        block_sparse_moe.gate.weight               e d
              router.bias   block_sparse_moe.e_score_correction_bias   e    exact
    ignore    *.mtp.* *.rotary_emb.inv_freq
    foreign   *.mlp.shared_experts.gate_up_proj.weight
    require   language_model.model.embed_tokens.weight language_model.model.norm.weight
    require   ?language_model.lm_head.weight
    """,
    # Dense layers keep `mlp` on the hub; transformers writes them below `block_sparse_moe`.
    """
    family    kimi_linear
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = routed_expert_hidden_size|hidden_size
    size      h = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    alias     block_sparse_moe.gate_proj mlp.gate_proj
    alias     block_sparse_moe.up_proj mlp.up_proj
    alias     block_sparse_moe.down_proj mlp.down_proj
    rename    self_attn.f_a_proj self_attn.forget_gate.f_a_proj
    rename    self_attn.f_b_proj self_attn.forget_gate.f_b_proj
    rename    self_attn.dt_bias self_attn.forget_gate.dt_bias
    rename    self_attn.A_log self_attn.forget_gate.A_log
    rename    block_sparse_moe.gate mlp.gate
    rename    block_sparse_moe.shared_experts mlp.shared_experts
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router        block_sparse_moe.gate.weight                    e h
              router.bias   block_sparse_moe.gate.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    foreign   *.self_attn.conv1d.weight
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # Not in transformers: from NeMo AutoModel's configs and adapter. Experts work in a latent width, d.
    """
    family    kimi_k3
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = routed_expert_hidden_size|hidden_size
    size      h = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe.experts mlp.experts
    rename    ^language_model.lm_head lm_head
    rename    ^language_model.model model
    rename    self_attn.f_a_proj self_attn.forget_gate.f_a_proj
    rename    self_attn.f_b_proj self_attn.forget_gate.f_b_proj
    rename    self_attn.dt_bias self_attn.forget_gate.dt_bias
    rename    self_attn.A_log self_attn.forget_gate.A_log
    rename    block_sparse_moe.gate mlp.gate
    rename    block_sparse_moe.shared_experts mlp.shared_experts
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router        block_sparse_moe.gate.weight                    e h
              router.bias   block_sparse_moe.gate.e_score_correction_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    foreign   *.self_attn.conv1d.weight
    require   language_model.model.embed_tokens.weight language_model.model.norm.weight
    require   ?language_model.lm_head.weight
    """,
    """
    family    lfm2_moe
    size      e = num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    feed_forward.experts
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router        feed_forward.gate.weight   e d
              router.bias   feed_forward.expert_bias   e    exact
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.embedding_norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    # On the hub layers have nothing before them; transformers writes `model.layers`. The first layers are
    # routed by a table of expert numbers (`tid2eid`) and have no bias.
    """
    family    deepseek_v4
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    ffn.experts mlp.experts
    rename    ^layers model.layers
    rename    ^embed model.embed_tokens
    rename    ^norm model.norm
    rename    ^head lm_head
    rename    ^hc_head_fn model.hc_head.hc_fn
    rename    ^hc_head_base model.hc_head.hc_base
    rename    ^hc_head_scale model.hc_head.hc_scale
    rename    attn self_attn
    rename    ffn mlp
    rename    attn_norm input_layernorm
    rename    ffn_norm post_attention_layernorm
    rename    hc_attn_fn attn_hc.fn
    rename    hc_attn_base attn_hc.base
    rename    hc_attn_scale attn_hc.scale
    rename    hc_ffn_fn ffn_hc.fn
    rename    hc_ffn_base ffn_hc.base
    rename    hc_ffn_scale ffn_hc.scale
    rename    self_attn.attn_sink self_attn.sinks
    rename    self_attn.q_norm self_attn.q_a_norm
    rename    self_attn.norm self_attn.kv_norm
    rename    self_attn.wq_a self_attn.q_a_proj
    rename    self_attn.wq_b self_attn.q_b_proj
    rename    self_attn.wkv self_attn.kv_proj
    rename    self_attn.wo_a self_attn.o_a_proj
    rename    self_attn.wo_b self_attn.o_b_proj
    rename    self_attn.indexer.compressor self_attn.compressor.indexer
    rename    self_attn.indexer.weights_proj self_attn.compressor.indexer.scorer.weights_proj
    rename    self_attn.indexer.wq_b self_attn.compressor.indexer.q_b_proj
    rename    compressor.norm compressor.kv_norm
    rename    compressor.ape compressor.position_bias
    rename    compressor.wkv compressor.kv_proj
    rename    compressor.wgate compressor.gate_proj
    rename    compressor.indexer.norm compressor.indexer.kv_norm
    rename    compressor.indexer.ape compressor.indexer.position_bias
    rename    compressor.indexer.wkv compressor.indexer.kv_proj
    rename    compressor.indexer.wgate compressor.indexer.gate_proj
    rename    mlp.gate.bias mlp.gate.e_score_correction_bias
    rename    shared_experts.w1 shared_experts.gate_proj
    rename    shared_experts.w3 shared_experts.up_proj
    rename    shared_experts.w2 shared_experts.down_proj
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router        ffn.gate.weight   e d
              router.bias   ffn.gate.bias     e    exact
    ignore    mtp.* model.mtp.* *.rotary_emb.inv_freq
    require   embed.weight norm.weight ?head.weight
    """,
    # The vision tower's q and k are permuted in the runtime: no rename.
    """
    family    mistral_large4
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    experts mlp.experts
    alias     ^model.language_model.layers.{l}.experts model.language_model.layers.{l}.mlp.experts
    rename    ^layers model.language_model.layers
    rename    ^tok_embeddings model.language_model.embed_tokens
    rename    ^norm model.language_model.norm
    rename    ^output lm_head
    rename    ^lerope.alpha model.language_model.rotary_emb.alpha
    rename    ^vision_encoder model.vision_tower
    rename    ^pre_mm_projector_norm model.multi_modal_projector.norm
    rename    ^patch_merger model.multi_modal_projector.patch_merger
    rename    ^vision_language_adapter.w_in model.multi_modal_projector.linear_1
    rename    ^vision_language_adapter.w_out model.multi_modal_projector.linear_2
    rename    attention.wv attention.v_proj
    rename    attention.wo attention.o_proj
    rename    feed_forward.w1 feed_forward.gate_proj
    rename    feed_forward.w3 feed_forward.up_proj
    rename    feed_forward.w2 feed_forward.down_proj
    rename    shared_experts.w1 shared_experts.gate_proj
    rename    shared_experts.w3 shared_experts.up_proj
    rename    shared_experts.w2 shared_experts.down_proj
    rename    ^model.language_model.layers.{l}.attention model.language_model.layers.{l}.self_attn
    rename    ^model.language_model.layers.{l}.attention_norm model.language_model.layers.{l}.input_layernorm
    rename    ^model.language_model.layers.{l}.ffn_norm model.language_model.layers.{l}.post_attention_layernorm
    rename    ^model.language_model.layers.{l}.feed_forward model.language_model.layers.{l}.mlp
    rename    ^model.language_model.layers.{l}.gate model.language_model.layers.{l}.mlp.gate
    rename    ^model.language_model.layers.{l}.shared_experts model.language_model.layers.{l}.mlp.shared_experts
    rename    self_attn.wq self_attn.q_proj
    rename    self_attn.wkv_a_with_mqa self_attn.kv_a_proj_with_mqa
    rename    self_attn.wkv_b self_attn.kv_b_proj
    rename    self_attn.kv_a_norm self_attn.kv_a_layernorm
    rename    ssmax_scaling.s softmax_scaling.scale
    rename    ssmax_scaling.b softmax_scaling.bias
    spelling  hf split
              in    {e}.w{p:1|3}.weight   f d
              out   {e}.w2.weight         d f
    router    router   gate.weight   e d
    ignore    mtp_dspark.* *.rotary_emb.inv_freq
    foreign   model.vision_tower.*.attention.q_proj.* model.vision_tower.*.attention.k_proj.*
    require   tok_embeddings.weight norm.weight ?output.weight
    """,
)
