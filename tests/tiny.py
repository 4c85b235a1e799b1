"""Tiny random models of real families, built offline with transformers: the oracle of the other tests.

`FAMILIES` is data: a config template per family, in which `$e`, `$f`, `$d` and `$l` stand for experts, the
width inside an expert, the width an expert sees, and layers. Every parameter and persistent buffer gets
values of its own, which follow from name and shape alone: a misplaced tensor cannot pass for the right one.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may ask a server

import torch
import transformers

import tiny_more

EXPERTS = 12  # two digits: "10" sorts before "2", which a reader of names must not fall for
SIZES = {  # d is the width an expert sees, f the width inside it
    "plain": {"d": 32, "f": 24},
    "2f == d": {"d": 32, "f": 16},  # a fused gate and up is square
    "f == d": {"d": 32, "f": 32},  # down is square
}
TOKENS = (3, 5, 7, 11, 13, 17, 19, 23)
VOCAB = 56


@dataclass(frozen=True)
class Family:
    """One tiny model: its class, its config's class and template. Each has a text-only forward on CPU."""

    model: str
    config: str
    template: Mapping[str, Any]
    layers: int = 3
    slow: bool = False
    small: bool = False  # the template says only what `tiny_more.SMALL` does not


HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 64}
TEXT: dict[str, Any] = {**COMMON, **HEADS, "num_hidden_layers": "$l", "hidden_size": "$d"}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOPK: dict[str, Any] = {"num_experts_per_tok": 3}
MLA: dict[str, Any] = {
    **TEXT, **TOPK, **ENDS, "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": "$f",
    "n_routed_experts": "$e", "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
DELTA: dict[str, Any] = {  # Qwen's gated delta net
    **TEXT, **TOPK, "head_dim": 16, "moe_intermediate_size": "$f", "shared_expert_intermediate_size": 20,
    "num_experts": "$e", "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 28, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": "$d", "num_position_embeddings": 16,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    **TEXT, **ENDS, "head_dim": 16, "intermediate_size": "$f", "intermediate_size_mlp": 40,
    "num_local_experts": "$e", "num_experts_per_tok": 1, "moe_layers": [1, 2], "attention_chunk_size": 8,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    **TEXT, "head_dim": 16, "global_head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": "$f",
    "num_experts": "$e", "top_k_experts": 3, "enable_moe_block": True, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 5,
    "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
ARIA: dict[str, Any] = {
    **TEXT, **ENDS, "head_dim": 16, "intermediate_size": "$f", "moe_num_experts": "$e", "moe_topk": 3,
    "moe_num_shared_experts": 2,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    **COMMON, **HEADS, **TOPK, **ENDS, "hidden_size": "$d", "head_dim": 16, "intermediate_size": 40,
    "moe_intermediate_size": "$f", "moe_shared_expert_intermediate_size": 20, "n_routed_experts": "$e",
    "ssm_state_size": 6, "mamba_num_heads": 4, "mamba_head_dim": 10, "n_groups": 2, "chunk_size": 8,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {
        **TEXT, **TOPK, "head_dim": 16, "intermediate_size": "$f", "num_local_experts": "$e"}, layers=2),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {
        **TEXT, **TOPK, **ENDS, "head_dim": 16, "intermediate_size": "$f", "num_local_experts": "$e",
        "rotary_dim": 8}, layers=2),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **TEXT, **TOPK, "intermediate_size": 40, "moe_intermediate_size": "$f", "num_experts": "$e",
        "shared_expert_intermediate_size": 20}, layers=2),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **TEXT, **TOPK, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": "$f",
        "num_experts": "$e", "mlp_only_layers": [0]}),
    "qwen3_next": Family("Qwen3NextForCausalLM", "Qwen3NextConfig", {**DELTA, "intermediate_size": 40}),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", DELTA),
    "qwen3_5_moe": Family("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", {
        "text_config": DELTA, "vision_config": QWEN_VISION}),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", {
        "text_config": {
            **TEXT, **TOPK, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": "$f",
            "num_experts": "$e", "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}}, layers=2),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "deepseek_v3-deep": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA, layers=12, slow=True),
    "glm4_moe": Family("Glm4MoeForCausalLM", "Glm4MoeConfig", {
        **TEXT, **TOPK, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": "$f",
        "use_qk_norm": True, "n_routed_experts": "$e", "first_k_dense_replace": 1}),
    "gpt_oss": Family("GptOssForCausalLM", "GptOssConfig", {
        **TEXT, **TOPK, "head_dim": 16, "intermediate_size": "$f", "num_local_experts": "$e",
        "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, layers=2),
    "llama4_text": Family("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "llama4": Family("Llama4ForConditionalGeneration", "Llama4Config", {
        "text_config": LLAMA4,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4, "vision_output_dim": 18, "projector_input_dim": 18,
            "projector_output_dim": 18, "pixel_shuffle_ratio": 0.5, "intermediate_size_mlp": 28},
        "image_token_index": 50, "boi_token_index": 51, "eoi_token_index": 52}),
    "granitemoe": Family("GraniteMoeForCausalLM", "GraniteMoeConfig", {
        **TEXT, **TOPK, "intermediate_size": "$f", "num_local_experts": "$e"}, layers=2),
    "step3p7": Family("Step3p7ForConditionalGeneration", "Step3p7Config", {
        "text_config": {
            **TEXT, **TOPK, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": "$f",
            "n_routed_experts": "$e", "num_local_experts": "$e", "share_expert_dim": 20, "sliding_window": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
            "patch_size": 4, "mlp_ratio": 1.75, "max_position_embeddings": 16},
        "image_token_id": 50}),
    "dbrx": Family("DbrxForCausalLM", "DbrxConfig", {
        "d_model": "$d", "n_heads": 4, "n_layers": "$l", "max_seq_len": 64, "vocab_size": VOCAB,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": "$f", "moe_num_experts": "$e", "moe_top_k": 3}}, layers=2),
    "jamba": Family("JambaForCausalLM", "JambaConfig", {
        **TEXT, **TOPK, "intermediate_size": "$f", "num_experts": "$e", "mamba_d_state": 6,
        "mamba_dt_rank": 5, "attn_layer_period": 3, "attn_layer_offset": 1}, layers=4),
    "gemma4_text": Family("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4, layers=2),
    "gemma4": Family("Gemma4ForConditionalGeneration", "Gemma4Config", {
        "text_config": GEMMA4,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16},
        "image_token_id": 50, "video_token_id": 51, "audio_token_id": 52, "boi_token_id": 53,
        "eoi_token_id": 54, "boa_token_id": 55, "eoa_token_index": 49}, layers=2),
    "nemotron_h": Family("NemotronHForCausalLM", "NemotronHConfig", NEMOTRON, layers=5),
    "nemotron_h-latent": Family("NemotronHForCausalLM", "NemotronHConfig", {
        **NEMOTRON, "hidden_size": 40, "moe_latent_size": "$d"}, layers=5),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", {
        **TEXT, **TOPK, "intermediate_size": "$f", "num_experts": "$e", "pad_token_id": 0, "eos_token_id": 2},
        layers=2),
    "aria_text": Family("AriaTextForCausalLM", "AriaTextConfig", ARIA, layers=2),
    "aria": Family("AriaForConditionalGeneration", "AriaConfig", {
        "text_config": ARIA,
        "vision_config": {
            "model_type": "idefics3_vision", "hidden_size": 16, "intermediate_size": 28,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2},
        "projector_patch_to_query_dict": {"16": 4}, "image_token_index": 50}, layers=2),
}  # fmt: skip
MORE: dict[str, Family] = {
    name: Family(more.model, more.config, more.special, more.layers, small=True)
    for name, more in tiny_more.FAMILIES.items()
}
EVERY: dict[str, Family] = {**FAMILIES, **MORE}


def config(family_id: str, sizes: str = "plain", *, tie: bool | None = None) -> Any:
    """The config of a tiny model; `tie` overrides the family's `tie_word_embeddings`."""
    family = EVERY[family_id]
    cls = getattr(transformers, family.config)
    values = {"$e": EXPERTS, "$l": family.layers, **{f"${axis}": n for axis, n in SIZES[sizes].items()}}
    plain = tiny_more.small(cls, family.template) if family.small else family.template
    template = _filled(plain, values)
    if tie is not None:
        template["tie_word_embeddings"] = tie
        if "text_config" in template:
            template["text_config"]["tie_word_embeddings"] = tie
    with _quiet():
        return cls(**template)


def build(
    family_id: str, sizes: str = "plain", dtype: torch.dtype = torch.float32, *, tie: bool | None = None
) -> Any:
    """A new tiny model in evaluation mode, filled by `fill`, in the dtypes `from_pretrained` would give."""
    with _quiet():
        cls = getattr(transformers, EVERY[family_id].model)
        model = cls._from_config(config(family_id, sizes, tie=tie), dtype=dtype, **_EAGER).eval()
        keep = tuple(model._keep_in_fp32_modules_strict or ())
        for name, tensor in model.state_dict(keep_vars=True).items():
            if any(part in keep for part in name.split(".")):
                tensor.data = tensor.data.float()
    return fill(model)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter and persistent buffer distinct values that follow from its name and shape alone.

    In float32 no value occurs twice in a tensor; a narrower dtype rounds them. Tied tensors are filled once.
    """
    seen = set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.numel() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensor.copy_(values(name, tensor.shape))
    return model


def values(name: str, shape: torch.Size) -> torch.Tensor:
    """A shuffled even grid over about (-0.5, 0.5), never zero; shuffle and step depend on `name`."""
    seed = zlib.crc32(name.encode())
    n = shape.numel()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double()
    grid = (order + 0.25) / n - 0.5
    return (grid * (0.8 + 0.2 * seed / 2**32)).float().reshape(shape)


def save(
    model: Any, folder: str | Path, original_format: bool = True, max_shard_size: str | int = "5GB"
) -> Path:
    """`save_pretrained` in the hub's form (`original_format`), or in the form the model has in memory."""
    folder = Path(folder)
    with _quiet():
        model.save_pretrained(folder, save_original_format=original_format, max_shard_size=max_shard_size)
    return folder


def reload(folder: str | Path, family_id: str) -> tuple[Any, dict[str, Any]]:
    """The model transformers reads from a folder, and its loading info (missing, unexpected keys ...)."""
    with _quiet():
        cls = getattr(transformers, EVERY[family_id].model)
        model, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **_EAGER)
    return model.eval(), info


def logits(model: Any) -> torch.Tensor:
    """What the model makes of a fixed small text, in float32."""
    with torch.no_grad(), _quiet():
        return model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits.float()


@cache
def saved(
    family_id: str, original_format: bool = True, sizes: str = "plain", dtype: torch.dtype = torch.float32
) -> Path:
    """A saved tiny model, written once per process; read it, never write to it."""
    folder = _scratch() / f"{len(list(_scratch().iterdir()))}"
    return save(build(family_id, sizes, dtype), folder, original_format)


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="restow-tiny-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the plain code paths


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' logger below errors and its progress bars; Python's warnings and errors pass."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _filled(template: Any, values: Mapping[str, int]) -> Any:
    if isinstance(template, Mapping):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, values) for value in template]
    return values.get(template, template) if isinstance(template, str) else template
