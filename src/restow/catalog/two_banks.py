"""The family with two banks of experts in one numbering: text first, then vision, with another inner width.

Sources: transformers 5.23 (conversion mapping, models, configs; names, renames and routers by running it on
tiny models).
"""

TABLES = (
    # Routers are transposed on the hub, and both banks' biases are one tensor there.
    """
    family    ernie4_5_vl_moe
    size      e = moe_num_experts.0|moe_num_experts
    size      f = moe_intermediate_size.0
    size      d = hidden_size
    size      E = moe_num_experts.0|moe_num_experts
    size      f@in2 = moe_intermediate_size.1
    size      f@out2 = moe_intermediate_size.1
    size      L = num_hidden_layers
    order     gate|up p f
    module    mlp.experts mlp
    rename    ^model.layers model.language_model.layers
    rename    ^model.embed_tokens model.language_model.embed_tokens
    rename    ^model.norm model.language_model.norm
    rename    ^model.vision_model model.vision_tower
    rename    ^model.resampler_model.spatial_linear.0 model.resampler_model.spatial_linear.fc1
    rename    ^model.resampler_model.spatial_linear.2 model.resampler_model.spatial_linear.fc2
    rename    ^model.resampler_model.spatial_linear.3 model.resampler_model.spatial_linear.ln
    rename    ^model.resampler_model.temporal_linear.0 model.resampler_model.temporal_linear.fc1
    rename    ^model.resampler_model.temporal_linear.2 model.resampler_model.temporal_linear.fc2
    rename    ^model.resampler_model.temporal_linear.3 model.resampler_model.temporal_linear.ln
    spelling  hf split
              in     {e}.{p:gate|up}_proj.weight     f d
              out    {e}.down_proj.weight            d f
              in2    {e+E}.{p:gate|up}_proj.weight   f d
              out2   {e+E}.down_proj.weight          d f
    spelling  runtime @ mlp
              in     text_moe.experts.gate_up_proj     e (p f) d
              out    text_moe.experts.down_proj        e d f
              in2    vision_moe.experts.gate_up_proj   e (p f) d
              out2   vision_moe.experts.down_proj      e d f
    router    router        mlp.gate.weight                           d e
              router2       mlp.gate.weight_1                         d e
              router.bias   mlp.moe_statics.e_score_correction_bias   2 e  exact
    router    router         mlp.text_moe.gate.weight                                     e d
              router2        mlp.vision_moe.gate.weight                                   e d
              router.bias    mlp.text_moe.gate.moe_statics.e_score_correction_bias        1 e  exact
              router2.bias   mlp.vision_moe.gate.moe_statics.e_score_correction_bias      1 e  exact
    beside    *.mlp.shared_experts.*
    ignore    *.rotary_emb.inv_freq
    foreign   *.text_moe.gate.* *.vision_moe.gate.*
    require   model.embed_tokens.weight model.norm.weight ?lm_head.weight
    tie       tie_word_embeddings yes
    """,
)
