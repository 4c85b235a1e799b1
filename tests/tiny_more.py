"""The rest of the tiny models: what each family wants besides the small values that all of them take.

`SMALL` and `TOWER` hold a value for every config key that makes a model big; a class takes those that it has. A
family's own template says only what is special about it. `$e`, `$f`, `$d` and `$l` are as in `tiny`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL: dict[str, Any] = {  # for text configs
    "vocab_size": 56, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": "$d", "num_hidden_layers": "$l", "num_layers": "$l", "intermediate_size": 40,
    "moe_intermediate_size": "$f", "num_experts": "$e", "num_local_experts": "$e", "n_routed_experts": "$e",
    "moe_num_experts": "$e", "num_experts_per_tok": 3, "num_experts_per_token": 3, "moe_topk": 3, "moe_k": 3,
    "top_k_experts": 3, "n_shared_experts": 2, "num_shared_experts": 2, "moe_num_shared_experts": 2,
    "shared_expert_intermediate_size": 20, "shared_experts_intermediate_size": 20,
    "shared_intermediate_size": 20, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_group": 2,
    "num_expert_group": 2, "topk_group": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 8, "sliding_window_size": 8, "q_lora_rank": 14, "kv_lora_rank": 10,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "index_topk": 4, "index_head_dim": 8,
    "index_n_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "linear_num_heads": 4, "linear_head_dim": 6, "hc_mult": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {  # for vision and audio configs
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4,
    "out_hidden_size": "$d", "num_position_embeddings": 16, "position_embedding_size": 16,
    "deepstack_visual_indexes": [0], "spatial_merge_size": 2, "text_hidden_size": "$d",
}  # fmt: skip


@dataclass(frozen=True)
class More:
    """A model's class, its config's class, and what is special about it."""

    model: str
    config: str
    special: Mapping[str, Any]
    layers: int = 3


MLA = {"num_key_value_heads": 4}
MLP_TYPES = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
INKLING = {
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "rel_extent": 8,
    "d_rel": 4,
    "unpadded_vocab_size": 50,
}
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 28, "num_mel_bins": 8,
         "downsample_hidden_size": 6, "output_dim": "$d", "max_source_positions": 20}  # fmt: skip
DOTS_SLIDING = {f"swa_{key}": n for key, n in {
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12, "q_lora_rank": 14, "kv_lora_rank": 10,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}.items()}  # fmt: skip
SAM = {"sam_config": {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
       "image_size": 32, "patch_size": 4, "mlp_dim": 28, "window_size": 2, "global_attn_indexes": [0],
       "downsample_channels": [8, 16], "num_pos_feats": 4, "intermediate_size": 28}}  # fmt: skip

QWEN4 = {"hc_count": 2, "hc_lowrank": 5, "ngram_vocab_size_base": 40, "ple_embed_dim": 8, "split_ngram_parts": 2,
         "make_ngram_vocab_size_divisible_by": 4}  # fmt: skip

FAMILIES: dict[str, More] = {
    "minimax": More("MiniMaxForCausalLM", "MiniMaxConfig", {"intermediate_size": "$f", "block_size": 4}),
    "phimoe": More("PhimoeForCausalLM", "PhimoeConfig", {"intermediate_size": "$f", "num_experts_per_tok": 2}),
    "minimax_m3_vl": More("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLConfig", {
        "text_config": {"intermediate_size": "$f", "dense_intermediate_size": 40, "rotary_dim": 8},
        "projector_hidden_size": 18}),
    "kimi_linear": More("KimiLinearForCausalLM", "KimiLinearConfig", MLA),
    "lfm2_moe": More("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {
        "layer_types": ["conv", "full_attention", "conv"]}),
    "deepseek_v4": More("DeepseekV4ForCausalLM", "DeepseekV4Config", {
        "o_lora_rank": 10, "o_groups": 2, "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": [f"{kind}_attention" for kind in ("heavily_compressed", "compressed_sparse", "sliding")],}),
    "mistral_large4": More("MistralLarge4ForConditionalGeneration", "MistralLarge4Config", {
        "text_config": MLA}),
    "deepseek_v32": More("DeepseekV32ForCausalLM", "DeepseekV32Config", MLA),
    "glm4_moe_lite": More("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", MLA),
    "glm4v_moe": More("Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig", {}),
    "glm_moe_dsa": More("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", MLA),
    "glm5_next": More("Glm5NextForConditionalGeneration", "Glm5NextConfig", {
        "text_config": {**MLA, "qk_rope_head_dim": 0, "index_kpool": 2, **MLP_TYPES},
        "vision_config": {"projection_intermediate_size": 12}}),
    "dots1": More("Dots1ForCausalLM", "Dots1Config", {}),
    "ernie4_5_moe": More("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", {}),
    "ernie4_5_vl_moe": More("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig", {
        "text_config": {"moe_intermediate_size": ["$f", 20], "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}}),
    "longcat_flash": More("LongcatFlashForCausalLM", "LongcatFlashConfig", {
        **MLA, "ffn_hidden_size": 40, "expert_ffn_hidden_size": "$f", "zero_expert_num": 4}, layers=2),
    "solar_open": More("SolarOpenForCausalLM", "SolarOpenConfig", {}),
    "mellum": More("MellumForCausalLM", "MellumConfig", {}),
    "beam": More("BeamForCausalLM", "BeamConfig", MLP_TYPES),
    "hunyuan_v1_moe": More("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {"intermediate_size": "$f"}),
    "flex_olmo": More("FlexOlmoForCausalLM", "FlexOlmoConfig", {"intermediate_size": "$f"}),
    "exaone_moe": More("ExaoneMoeForCausalLM", "ExaoneMoeConfig", {}),
    "cohere2_moe": More("Cohere2MoeForCausalLM", "Cohere2MoeConfig", {"intermediate_size": "$f"}),
    "afmoe": More("AfmoeForCausalLM", "AfmoeConfig", {}),
    "axk1": More("AXK1ForCausalLM", "AXK1Config", MLA),
    "axk2": More("AXK2ForCausalLM", "AXK2Config", {**MLA, "gated_norm_rank": 4}),
    "bailing_hybrid": More("BailingHybridForCausalLM", "BailingHybridConfig", MLA),
    "kolibri1": More("Kolibri1ForCausalLM", "Kolibri1Config", {}),
    "flint": More("FlintForCausalLM", "FlintConfig", {"mlp_only_layers": [0]}),
    "mimo_v2_flash": More("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", {}),
    "hy_v3": More("HYV3ForCausalLM", "HYV3Config", {}),
    "hy_v4": More("HYV4ForCausalLM", "HYV4Config", MLA),
    "laguna": More("LagunaForCausalLM", "LagunaConfig", {}),
    "dots3_note_text": More("Dots3NoteForCausalLM", "Dots3NoteTextConfig", {
        **MLA, **DOTS_SLIDING}),
    "kimi_k25": More("Kimi_K25ForConditionalGeneration", "Kimi_K25Config", {
        "text_config": {**MLA, "model_type": "deepseek_v3"}, "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 16}),
    "deepseek_ocr2": More("DeepseekOcr2ForConditionalGeneration", "DeepseekOcr2Config", {
        "text_config": MLP_TYPES, "vision_config": SAM}),
    "unlimited_ocr": More("UnlimitedOcrForConditionalGeneration", "UnlimitedOcrConfig", {
        "text_config": MLP_TYPES, "vision_config": SAM}),
    "qwen3_omni_moe_thinker": More("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerConfig", {
        "audio_config": AUDIO}),
    "qwen3_omni_moe": More("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeConfig", {
        "enable_audio_output": False, "thinker_config": {"audio_config": AUDIO}}),
    "qwen4_exp_text": More("Qwen4ExpForCausalLM", "Qwen4ExpTextConfig", QWEN4),
    "diffusion_gemma": More("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaConfig", {}),
    "granitemoeshared": More("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", {"intermediate_size": "$f"}),
    "granitemoe_swa": More("GraniteMoeSWAForCausalLM", "GraniteMoeSWAConfig", {"intermediate_size": "$f"}),
    "granitemoehybrid": More("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        "intermediate_size": "$f", "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 6}),
    "jetmoe": More("JetMoeForCausalLM", "JetMoeConfig", {"intermediate_size": "$f", "kv_channels": 6}),
    "mistral4": More("Mistral4ForCausalLM", "Mistral4Config", MLA),
    "muse_spark": More("MuseSparkForConditionalGeneration", "MuseSparkConfig", {
        "text_config": {"hidden_size": 40, "moe_hidden_size": "$d"}, "out_hidden_size": 18,
        "projector_hidden_size": 18, "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "audio_config": {"hidden_sizes": [4], "depths": [1], "patch_sizes": [2], "out_hidden_size": 40}}),
    "inkling_text": More("InklingForCausalLM", "InklingTextConfig", INKLING),
    "inkling_mm_model": More("InklingForConditionalGeneration", "InklingConfig", {
        "text_config": INKLING, "vision_config": {"num_hidden_layers": 4},
        "audio_config": {"n_mel_bins": 3, "mel_vocab_size": 5}}),
    "inkling2_text": More("Inkling2ForCausalLM", "Inkling2TextConfig", INKLING),
    "zaya": More("ZayaForCausalLM", "ZayaConfig", {"num_experts_per_tok": 1, "router_hidden_size": 10}),
    "openai_privacy_filter": More("OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig", {
        "intermediate_size": "$f"}),
    "nllb-moe": More("NllbMoeForConditionalGeneration", "NllbMoeConfig", {
        "d_model": "$d", "encoder_ffn_dim": "$f", "decoder_ffn_dim": "$f", "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2}, layers=2),
    "switch_transformers": More("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
        "d_model": "$d", "d_kv": 8, "d_ff": "$f", "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_heads": 4}, layers=2),
    "qwen4_exp": More("Qwen4ExpForConditionalGeneration", "Qwen4ExpConfig", {"text_config": QWEN4}),
    "inkling2": More("Inkling2ForConditionalGeneration", "Inkling2Config", {"text_config": INKLING}),
}  # fmt: skip


def small(config: Any, special: Mapping[str, Any], pool: Mapping[str, Any] = SMALL) -> dict[str, Any]:
    """The template of a config's class: the small values of the keys that it has, then what is special."""
    keys = {key for cls in config.__mro__ for key in getattr(cls, "__annotations__", {})}
    template = {key: value for key, value in pool.items() if key in keys}
    own = config() if config.sub_configs else None
    for key in config.sub_configs or ():
        part = getattr(own, key)  # the default's class, where any class is admitted
        if part is not None:
            pool = SMALL if key in ("text_config", "thinker_config") else TOWER
            template[key] = {**small(type(part), special.get(key, {}), pool), "model_type": part.model_type}
    return {
        **template,
        **{key: value for key, value in special.items() if key not in (config.sub_configs or ())},
    }
