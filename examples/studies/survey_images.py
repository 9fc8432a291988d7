"""Forms of an image for families that take another one than patches with a grid or squares, by model_type.

Each function yields inputs of `generate` for one image of 4 x 4 patches of 8 pixels, or of what a family has instead.
`tokens` are those of the image in the prompt (default: the image token, once a feature), `place` is their place in
the text; values that are functions get the ids of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


Noise = Callable[..., Any]
Forms = Iterator[dict[str, Any]]


def _two_sizes(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 3, 32, 32), "high_res_pixel_values": noise(1, 3, 32, 32)}


def _shaped_patches(model: Any, noise: Noise) -> Forms:
    yield {
        "pixel_values": noise(1, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16).long(),
    }


def _merged_grid(model: Any, noise: Noise) -> Forms:
    sizes = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "image_merge_sizes": torch.tensor([2])}
    yield {"pixel_values": noise(16, 192), **sizes}


def _tiles_of_any_shape(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])}


def _packed(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 3, 8, 64 * 8), "target_sizes": torch.tensor([[8, 8]]).int()}


def _cross_attended(model: Any, noise: Noise) -> Forms:
    tiles = model.config.vision_config.max_num_tiles
    yield {
        "pixel_values": noise(1, 1, tiles, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (tiles - 1)]]),
        "cross_attention_mask": lambda ids: torch.ones(1, ids.shape[1], 1, tiles).long(),
        "tokens": [model.config.image_token_index],
        "place": 0,
    }


def _pooled_crops(model: Any, noise: Noise) -> Forms:
    yield {
        "pixel_values": noise(2, 16, 192),
        "image_token_pooling": torch.arange(32).view(1, 8, 4)[0],
        "image_grids": torch.tensor([[2, 2, 2, 2]]),
        "image_num_crops": torch.tensor([2]),
    }


def _positioned_patches(model: Any, noise: Noise) -> Forms:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    side = model.config.vision_config.patch_size
    for factor in (1, getattr(model.config.vision_config, "pooling_kernel_size", 1)):
        yield {"pixel_values": noise(1, 16, 3 * (side * factor) ** 2), "image_position_ids": places}


def _queried(model: Any, noise: Noise) -> Forms:
    token = 100
    yield {
        "pixel_values": noise(1, 3, 32, 32),
        "image_embeds_position_mask": lambda ids: (ids == token).long(),
        "tokens": [token] * model.config.latent_query_num,
    }


def _flattened(model: Any, noise: Noise) -> Forms:
    token = 100
    patches = noise(1, 16, 2 + 768)
    patches[..., :2] = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], -1)
    yield {
        "flattened_patches": patches,
        "width": torch.tensor([32]),
        "height": torch.tensor([32]),
        "image_embeds_position_mask": lambda ids: (ids == token).long(),
        "tokens": [token] * model.config.latent_query_num,
    }


def _attended_images(model: Any, noise: Noise) -> Forms:
    yield {
        "pixel_values": noise(1, 1, 3, 32, 32),
        "image_attention_mask": lambda ids: torch.ones(1, ids.shape[1], 1).long(),
        "tokens": [],
    }


def _patches(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 16, 192)}


def _grid_of_two(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(16, 192), "image_grid_hw": torch.tensor([[4, 4]])}


def _tiles(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 2, 3, 32, 32)}


def _asked(model: Any, noise: Noise) -> Forms:
    ids = torch.tensor([[5, 6, 7]])
    asked = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    for count in (1, 4):
        frames = noise(1, 3, 32, 32) if count == 1 else noise(1, count, 3, 32, 32)
        yield {
            "pixel_values": frames,
            **asked,
            "tokens": [getattr(model.config, "image_token_index", 96)] * (4 * count),
        }


def _protein(model: Any, noise: Noise) -> Forms:
    ids = torch.arange(5, 15).unsqueeze(0)
    yield {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids), "tokens": []}


def _masked_tiles(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(1, 2, 3, 32, 32), "pixel_attention_mask": torch.ones(1, 2).bool()}


def _merged_squares(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(4, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def _frames_of_patches(model: Any, noise: Noise) -> Forms:
    yield {"pixel_values": noise(4, 2, 4, 4, 3)}


IMAGES: dict[str, Callable[[Any, Noise], Forms]] = {
    "deepseek_vl_hybrid": _two_sizes,
    "evolla": _protein,
    "fuyu": _patches,
    "gemma4": _positioned_patches,
    "gemma4_unified": _positioned_patches,
    "granite4_vision": _tiles_of_any_shape,
    "granite_docling": _masked_tiles,
    "inkling2": _merged_squares,
    "inkling2_loop": _merged_squares,
    "inkling_mm_model": _frames_of_patches,
    "idefics": _attended_images,
    "instructblip": _asked,
    "instructblipvideo": _asked,
    "kosmos-2": _queried,
    "kosmos-2.5": _flattened,
    "lfm2_vl": _shaped_patches,
    "llava_next": _tiles_of_any_shape,
    "llava_next_video": _tiles_of_any_shape,
    "llava_onevision": _tiles_of_any_shape,
    "minicpm_ocr": _packed,
    "minicpmv4_6": _packed,
    "minicpmv4_7": _packed,
    "mllama": _cross_attended,
    "molmo2": _pooled_crops,
    "nemotron_h_omni": _grid_of_two,
    "perception_lm": _tiles,
    "video_llama_3": _merged_grid,
}


__all__ = ["IMAGES"]
