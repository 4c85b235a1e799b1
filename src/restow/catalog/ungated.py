"""Families without a gate, and those that number experts in words.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models). NLLB and Switch are written as they lie in memory, one module per expert.
"""

TABLES = (
    """
    family    nllb-moe
    size      e = num_experts
    size      f = encoder_ffn_dim
    size      d = d_model
    order     up p f
    module    ffn.experts
    spelling  hf
              in         expert_{e}.{p:fc1}.weight   f d
              out        expert_{e}.fc2.weight       d f
              in.bias    expert_{e}.{p:fc1}.bias     f
              out.bias   expert_{e}.fc2.bias         d
    router    router   ffn.router.classifier.weight   e d
    require   model.shared.weight model.decoder.layer_norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    """
    family    switch_transformers
    size      e = num_experts
    size      f = d_ff
    size      d = d_model
    order     up p f
    module    mlp.experts
    spelling  hf
              in    expert_{e}.{p:wi}.weight   f d
              out   expert_{e}.wo.weight       d f
    router    router   mlp.router.classifier.weight   e d
    require   shared.weight decoder.final_layer_norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
    # A hub file in NeMo AutoModel's own layout: stacked, in-major, under the gated name.
    """
    family    nemo_speechlm
    size      e = n_routed_experts|num_local_experts
    size      f = moe_intermediate_size
    size      d = moe_latent_size|hidden_size
    size      h = hidden_size
    size      L = num_hidden_layers|#layers_block_type|#hybrid_override_pattern
    order     up p f
    module    mixer.experts
    rename    ^llm.model.embed_tokens model.language_model.embeddings
    rename    ^llm.model.norm model.language_model.norm_f
    rename    ^llm.model.layers model.language_model.layers
    rename    ^llm.lm_head lm_head
    spelling  hf grouped
              in    gate_and_up_projs   e d (p f)
              out   down_projs          e f d
    spelling  fused
              in    {p:up}_proj   e f d
              out   down_proj     e d f
    router    router        mixer.gate.weight                    e h
              router.bias   mixer.gate.e_score_correction_bias   e    exact
    require   llm.model.embed_tokens.weight llm.model.norm.weight ?llm.lm_head.weight
    tie       never
    """,
)
