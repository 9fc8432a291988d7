"""Batches for targets that read images by cross-attention, as Llama 3.2 Vision: each sample has one row of images."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def samples_apart(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """
    The inputs of each sample of a batch, without the images that pad it.

    Args:
        inputs: `input_ids` `[B, L]` and other values per token; with images `pixel_values` `[B, N, ...]`,
            `aspect_ratio_ids` `[B, N]`, 0 where a sample has no further image, `aspect_ratio_mask` `[B, N, tiles]`,
            and `cross_attention_mask` `[B, L, N, tiles]`.
    """
    ratios = inputs.get("aspect_ratio_ids")
    image_dims = {"pixel_values": 1, "aspect_ratio_ids": 1, "aspect_ratio_mask": 1, "cross_attention_mask": 2}
    for row in range(len(inputs["input_ids"])):
        count = 0 if ratios is None else int((ratios[row] > 0).sum())
        sample = {}
        for name, value in inputs.items():
            own = value[row : row + 1]
            if name not in image_dims:
                sample[name] = own
            elif count:
                sample[name] = own.narrow(image_dims[name], 0, count)
        yield sample


__all__ = ["samples_apart"]
