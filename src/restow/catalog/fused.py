"""Families whose vendors ship stacked experts, the output axis before the input axis, as `nn.Linear` has it.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). Their quantised files, and most files saved again, hold one tensor per expert.
"""

TABLES = (
    # transformers 5.23 itself writes `split` from a fresh model; the vendor's bfloat16 files are stacked.
    """
    family    qwen3_5_moe
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
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight ?lm_head.weight
    """,
    # The text model alone; it reads the files of the whole model too.
    """
    family    qwen3_5_moe_text
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
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    """
    family    gemma4
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
    require   model.language_model.embed_tokens.weight model.language_model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    """
    family    gemma4_text
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
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    # On the hub the stacked weights lie beside the router; the runtime puts a module of experts between.
    """
    family    granitemoe granitemoeshared granitemoehybrid
    size      e = num_local_experts|num_experts
    size      f = intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    block_sparse_moe block_sparse_moe.experts
    rename    block_sparse_moe.router.layer block_sparse_moe.router
    spelling  hf @ block_sparse_moe
              in    input_linear.weight    e (p f) d
              out   output_linear.weight   e d f
    router    router   block_sparse_moe.router.layer.weight   e d
    ignore    *.rotary_emb.inv_freq
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
    # The correction bias is float32 in the vendor's files; transformers keeps it in the model's dtype.
    # The vision tower's `attn.in_proj_*` are the runtime's q, k and v, fused and permuted: no rename.
    """
    family    step3p7 step3p5
    size      e = n_routed_experts|moe_num_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = hidden_size
    size      L = num_hidden_layers
    order     gate|up p f
    module    moe mlp.experts
    rename    moe.gate mlp.gate
    rename    moe.router_bias mlp.gate.e_score_correction_bias
    rename    share_expert mlp.shared_experts
    rename    ^model.layers model.language_model.layers
    rename    ^model.embed_tokens model.language_model.embed_tokens
    rename    ^model.norm model.language_model.norm
    rename    ^vit_large_projector model.multi_modal_projector
    rename    ^vision_model.conv1 model.vision_model.embeddings.patch_embedding
    rename    ^vision_model.positional_embedding model.vision_model.embeddings.position_embedding.weight
    rename    ^vision_model.ln_pre model.vision_model.pre_layernorm
    rename    ^vision_model.vit_downsampler1 model.vision_model.downsampler1
    rename    ^vision_model.vit_downsampler2 model.vision_model.downsampler2
    rename    ^vision_model.transformer.resblocks model.vision_model.layers
    rename    attn.out_proj self_attn.out_proj
    rename    ln_1 layernorm_before
    rename    ln_2 layernorm_after
    rename    ls_1.gamma lambda_1
    rename    ls_2.gamma lambda_2
    rename    mlp.c_fc mlp.fc1
    rename    mlp.c_proj mlp.fc2
    spelling  hf stacked_linear @ moe
              in    {p:gate|up}_proj.weight   e f d
              out   down_proj.weight          e d f
    router    router        moe.gate.weight   e d
              router.bias   moe.router_bias   e    exact
    ignore    model.layers.{l+L}.* *.rotary_emb.inv_freq
    foreign   model.vision_model.*.self_attn.q_proj.* model.vision_model.*.self_attn.k_proj.*
    foreign   model.vision_model.*.self_attn.v_proj.*
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    """,
)
