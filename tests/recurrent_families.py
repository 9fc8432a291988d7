"""Tiny targets with recurrent or convolutional layers, for the families that `families.py` has no place for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from families import (
    _GRIDS,
    _MROPE,
    END_TOKEN_ID,
    HIDDEN_SIZE,
    IMAGE_TOKEN_ID,
    START_TOKEN_ID,
    VIDEO_TOKEN_ID,
    Family,
    Picture,
    Rows,
    _decoder,
    _multimodal,
    _noise,
)
from transformers import PreTrainedConfig


LINEAR, FULL = "linear_attention", "full_attention"
_DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_expand": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _qwen3_5(**fields: Any) -> PreTrainedConfig:
    return _decoder(
        "Qwen3_5TextConfig",
        **{**_DELTA, "num_hidden_layers": 4, "layer_types": [LINEAR, LINEAR, LINEAR, FULL], **fields},
    )


def _qwen3_5_with_images() -> PreTrainedConfig:
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return _multimodal(
        "Qwen3_5Config",
        _qwen3_5(rope_parameters={**_MROPE, "partial_rotary_factor": 1.0}),
        transformers.Qwen3_5Config().vision_config.__class__(
            **vision, hidden_size=16, out_hidden_size=HIDDEN_SIZE, intermediate_size=16, num_position_embeddings=16
        ),
        video_token_id=VIDEO_TOKEN_ID,
        vision_start_token_id=START_TOKEN_ID,
        vision_end_token_id=END_TOKEN_ID,
    )


def _lfm2(**fields: Any) -> PreTrainedConfig:
    return _decoder(
        "Lfm2Config",
        **{
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", FULL, "conv"],
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": 3,
            **fields,
        },
    )


def _patches_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """An image of its own size: its patches of 4 x 4 pixels, with 2 x 2 patches per token."""
    height, width = ((4, 4), (2, 6), (4, 2))[number % 3]
    return Picture([IMAGE_TOKEN_ID] * (height * width // 4), _noise(generator, height * width, 48), (height, width))


def _collate_patches(rows: Rows) -> dict[str, Any]:
    pictures = [picture for row in rows for picture in row]
    most = max(len(picture.pixels) for picture in pictures)
    pixel_values = torch.zeros(len(pictures), most, 48, dtype=torch.float64)
    mask = torch.zeros(len(pictures), most, dtype=torch.long)
    for number, picture in enumerate(pictures):
        pixel_values[number, : len(picture.pixels)] = picture.pixels
        mask[number, : len(picture.pixels)] = 1
    return {
        "pixel_values": pixel_values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([picture.size for picture in pictures]),
    }


def _lfm2_vl() -> PreTrainedConfig:
    vision = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return _multimodal("Lfm2VlConfig", _lfm2(), vision, projector_hidden_size=16)


def _text(name: str, model_class: str, config_class: str, **fields: Any) -> Family:
    config: Callable[[], PreTrainedConfig] = lambda: _decoder(config_class, **fields)  # noqa: E731
    return Family(name, model_class, config)


_REGISTRY = [
    Family("qwen3_5_text", "Qwen3_5ForCausalLM", _qwen3_5),
    Family("qwen3_5", "Qwen3_5ForConditionalGeneration", _qwen3_5_with_images, **_GRIDS),
    _text(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        num_hidden_layers=4,
        layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
        **_DELTA,
        **_MOE,
    ),
    _text(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        num_hidden_layers=3,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    Family("lfm2", "Lfm2ForCausalLM", _lfm2),
    Family("lfm2_vl", "Lfm2VlForConditionalGeneration", _lfm2_vl, _patches_image, collate_images=_collate_patches),
    _text(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        num_hidden_layers=4,
        layer_types=["conv", FULL, "conv", FULL],
        num_dense_layers=1,
        **_MOE,
    ),
    _text("falcon_h1", "FalconH1ForCausalLM", "FalconH1Config", mamba_d_ssm=64, head_dim=8, **_MAMBA2),
    _text("bamba", "BambaForCausalLM", "BambaConfig", num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA2),
    _text(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        num_hidden_layers=3,
        layer_types=[LINEAR, FULL, LINEAR],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        **_MAMBA2,
    ),
    _text(
        "nemotron_h",
        "NemotronHForCausalLM",
        "NemotronHConfig",
        layers_block_type=[LINEAR, "mlp", FULL, "moe", LINEAR],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    _text(
        "zamba2",
        "Zamba2ForCausalLM",
        "Zamba2Config",
        num_hidden_layers=4,
        mamba_d_state=8,
        mamba_ngroups=2,
        mamba_headdim=16,
        n_mamba_heads=4,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
        num_mem_blocks=1,
        num_key_value_heads=4,
        attention_head_dim=16,
        attention_hidden_size=64,
        adapter_rank=4,
    ),
    _text(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        num_hidden_layers=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    _text(
        "kimi_linear",
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        num_hidden_layers=4,
        layer_types=[LINEAR, LINEAR, FULL, LINEAR],
        linear_head_dim=8,
        linear_num_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
]
RECURRENT_FAMILIES = {family.name: family for family in _REGISTRY}
