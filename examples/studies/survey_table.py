"""What the rules of `survey_configs` and `survey_inputs` cannot guess about a family, by its model_type."""

from __future__ import annotations

from typing import Any


def _mrope(*sections: int, **fields: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **fields}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3N = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "intermediate_size": [64] * 5,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    "laurel_rank": 8,
}
_BLOCKS = {"index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2}
_NGRAM = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_QWEN4 = {**_NGRAM, "indexer_compress_ratio": 2, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}


def _text(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"text_config.{name}": value for name, value in fields.items()}


# Fields of configurations, by path.
FIELDS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config.codebook_dim": 32,
        "audio_config.hidden_size": 32,
        "vision_config.codebook_size": 16,
        "image_token_offset": 104,
        "audio_token_offset": 120,
        "audio_config.codebook_size": 8,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {
        "vocabulary_map": {"<image>": 96, **{f"IMGIMG{letter}Z": 104 + n for n, letter in enumerate("ABCDEFGH")}},
        "vq_config.num_embeddings": 8,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 96,
            "<|extra_200|>": 97,
            **{f"<|visual token {n:06d}|>": 104 + n for n in range(8)},
        },
        "image_token_id": 96,
        "vq_config.codebook_size": 8,
        "vq_config.hidden_size": 128,
    },
    "evolla": {"use_cache": True, "resampler_depth": 1, "aligner_num_add_layers": 1},
    "dots3_note": {"text_config.per_layer_config": {}, "vision_config.adapter_in_dim": 32}
    | {"vision_config.adapter_out_dim": 64, "audio_config.adapter_out_dim": 64}
    | {"audio_config.adapter_input_size": 32, "vision_config.per_layer_config": {}},
    "dots3_note_text": {"per_layer_config": {}},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _mrope(4, 2, 2), "sliding_attention": _mrope(4, 2, 2)},
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "vision_config.deepstack_visual_indexes": [0, 1],
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _mrope(4, 2, 2), "sliding_attention": _mrope(4, 2, 2)},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "big_bird": {"attention_type": "original_full"},  # it becomes that at its first short text, and draws numbers then
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4},
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [32, 32],
        "vision_config.sam_config.output_channels": 32,
        "vision_config.sam_config.global_attn_indexes": [1],
        "text_config.num_experts_per_tok": 2,
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _mrope(3, 3, 2)},
    "fast_vlm": {"vision_config.hidden_size": 32, "vision_config.model_args": None},
    "perception_lm": {"vision_config.hidden_size": 32, "vision_config.model_args": {"embed_dim": 32}},
    "gemma3n": {
        **_text(_GEMMA3N),
        "vision_soft_tokens_per_image": 4,
        "image_token_id": 113,
        "vision_config.vocab_size": 8,
        "vision_config.vocab_offset": 112,
        "audio_token_id": 121,
        "audio_config.vocab_size": 8,
        "audio_config.vocab_offset": 120,
        "audio_config.conf_num_attention_heads": 2,
        "audio_config.conf_num_hidden_layers": 1,
        "audio_config.sscp_conv_channel_size": [8, 4],
    },
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"": {"vision_config": {"model_type": "gemma4_vision"}}, "vision_config.pooling_kernel_size": 2},
    "gemma4_unified": {
        "": {"vision_config": {"model_type": "gemma4_unified_vision"}},
        "vision_config.pooling_kernel_size": 2,
    },
    "glm4v": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "glm46v": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "glmga": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "glm_ocr": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "glm4v_moe": {"text_config.rope_parameters": _mrope(2, 1, 1, partial_rotary_factor=0.5)},
    "glm5_next": {
        "text_config.qk_rope_head_dim": 0,
        "text_config.head_dim": 0,
        "text_config.index_kpool": 4,
    },
    "granite4_vision": {
        "vision_config.hidden_size": 64,
        "qformer_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": _mrope(2, 2, 2, 2)},
    "hy_v4_vl": {"text_config.rope_parameters": _mrope(2, 1, 1)},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus": {"vq_config.base_channels": 32, "vq_config.num_embeddings": 64, "vq_config.image_token_embed_dim": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_vl": _text({"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "flint": {"mlp_only_layers": [0]},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl": _text({"layer_types": ["full_attention", "minimax_m3_sparse"], **_BLOCKS}),
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], **_BLOCKS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "inkling2": {"text_config.unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling2_loop": {"text_config.unpadded_vocab_size": 128},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling_mm_model": {"vision_config.patch_size": 4, "vision_config.n_layers": 4},
    "instructblipvideo": {"video_token_index": 96},
    "kimi_k25": {"projection_hidden_size": 32},
    "muse_glimmer": {"out_hidden_size": 128},
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "vision_config.patch_dim": 192,
        "vision_config.video_patch_dim": 384,
        "vision_config.max_img_size": 64,
    },
    "unlimited_ocr": {
        "vision_config.sam_config.downsample_channels": [32, 32],
        "vision_config.sam_config.output_channels": 32,
        "vision_config.sam_config.global_attn_indexes": [1],
    },
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2], "vision_config.image_size": [32, 32]},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": [16, 16, 16, 16],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "text_config.num_hidden_layers": 3,
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.vision_output_dim": 64,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120, "text_config.rope_parameters": _mrope(4, 2, 2)},
    "qwen2_5_vl": {"text_config.rope_parameters": _mrope(4, 2, 2)},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "qwen2_vl": {
        "vision_config.hidden_size": 64,
        "vision_config.embed_dim": 32,
        "text_config.rope_parameters": _mrope(4, 2, 2),
    },
    "qwen4_exp": _text(_QWEN4),
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "max_position_embeddings": 512},
    "step3p7": {"text_config.sliding_window": 8, "text_config.layer_types": ["sliding_attention", "full_attention"]},
    "t5gemma2": {
        **{
            f"encoder.text_config.{name}": value
            for name, value in {
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
            }.items()
        },
    },
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"embedding_dim": 64, "num_heads": 4},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
    "rwkv": {"attention_hidden_size": 64},
}

# Families that generate nothing without an image (or a protein).
NEEDS_IMAGE = frozenset({"blip", "blip-2", "evolla", "idefics", "instructblip", "instructblipvideo", "kosmos-2"})

# Families that are no targets, and why.
NO_TARGETS = {
    "gemma4_assistant": "it drafts for Gemma 4, and generates nothing without it",
    "gemma4_unified_assistant": "it drafts for Gemma 4, and generates nothing without it",
    "musicgen": "the class that transformers lists takes another configuration than that of its model_type",
    "musicgen_melody": "the class that transformers lists takes another configuration than that of its model_type",
    "pi0": "it controls robots: no text comes out of it, and it has no `generate`",
}


__all__ = ["FIELDS", "NEEDS_IMAGE", "NO_TARGETS"]
