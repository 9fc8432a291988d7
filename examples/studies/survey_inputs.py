"""Inputs of `generate` for any family: text, and text with an image whose tokens the model accepts.

Images are made from the names of the inputs that a model takes: patches with a grid, squares, squares with a mask, and
so on. Several forms are tried; the model's own image features say how many image tokens a prompt needs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from survey_configs import IMAGE_SIZE, PATCH_SIZE, TEXT
from survey_images import IMAGES
from transformers import PreTrainedModel


Inputs = dict[str, Any]


class NoInputError(Exception):
    """No input could be built; says why."""


def text_inputs(model: PreTrainedModel, seed: int, length: int = 12) -> Inputs:
    """A prompt of random text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TEXT.start, TEXT.stop, (1, length), generator=generator)
    return _with_types(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def image_inputs(model: PreTrainedModel, seed: int) -> Inputs:
    """
    A prompt of text and one image.

    Raises:
        NoInputError: when the model accepts none of the forms that are tried.
    """
    reasons = []
    for pixels in _forms(model, seed):
        try:
            inputs = _prompt_with(model, pixels, seed)
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
    raise NoInputError(" ;; ".join(reasons) if reasons else "it takes no input named like pixels")


def other_image(inputs: Inputs) -> Inputs:
    """The same prompt with another picture."""
    generator = torch.Generator().manual_seed(99)
    changed = dict(inputs)
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.numel() > 1:
            changed[name] = torch.randn(value.shape, generator=generator).to(value)
            if name == "flattened_patches":
                changed[name][..., :2] = value[..., :2]  # the place of each patch
        elif name == "protein_input_ids":
            changed[name] = value.flip(-1)
    return changed


def _accepted(model: PreTrainedModel) -> set[str]:
    names = set(inspect.signature(model.forward).parameters)
    inner = getattr(model, "model", None)
    return names | (set(inspect.signature(inner.forward).parameters) if inner is not None else set())


def _forms(model: PreTrainedModel, seed: int) -> Iterator[Inputs]:
    """Forms of one image that a model may take, the likeliest first. Floats have the dtype of the model."""
    names = _accepted(model)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    own = IMAGES.get(model.config.model_type)
    if own is not None:
        yield from own(model, noise)
    if "image_grid_thw" in names:
        yield from _grids(model, noise)
    elif "pixel_values" in names:
        yield from _squares(names, noise)


def _vision(model: PreTrainedModel) -> Any:
    config = model.config
    for name in ("vision_config", "vision_tower_config", "vq_config", "vision_encoder_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _grids(model: PreTrainedModel, noise: Callable[..., torch.Tensor]) -> Iterator[Inputs]:
    vision = _vision(model)
    patch = getattr(vision, "patch_size", PATCH_SIZE)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    times = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    grid = torch.tensor([[1, 4, 4]])
    for frames in dict.fromkeys((times, 1, 2)):
        yield {"pixel_values": noise(16, channels * frames * patch * patch), "image_grid_thw": grid}
    yield {"pixel_values": noise(16, channels, patch, patch), "image_grid_thw": grid}


def _squares(names: set[str], noise: Callable[..., torch.Tensor]) -> Iterator[Inputs]:
    size = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    square, tiles = noise(1, 3, IMAGE_SIZE, IMAGE_SIZE), noise(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    if "pixel_attention_mask" in names:
        yield {"pixel_values": tiles, "pixel_attention_mask": torch.ones(1, 2, IMAGE_SIZE, IMAGE_SIZE).long()}
    if "image_sizes" in names:
        yield {"pixel_values": square, "image_sizes": size}
        yield {"pixel_values": tiles, "image_sizes": size}
    yield {"pixel_values": square}
    yield {"pixel_values": tiles}


_FEATURES = re.compile(r"features:? (\d+)")


def _prompt_with(model: PreTrainedModel, pixels: Inputs, seed: int) -> Inputs:
    """A prompt with as many image tokens as the model has features for."""
    pixels = dict(pixels)
    tokens = pixels.pop("tokens", None)
    if tokens is None:
        token = image_token(model)
        tokens = [] if token is None else _framed(model, [token] * _count_features(model, pixels))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT.start, TEXT.stop, (9,), generator=generator).tolist()
    place = pixels.pop("place", 3)
    ids = torch.tensor([[*text[:place], *tokens, *text[place:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, value in pixels.items():
        inputs[name] = value(ids) if callable(value) else value
    return _with_types(model, inputs)


def image_token(model: PreTrainedModel) -> int | None:
    """The id of the token that stands for a feature of an image."""
    for name in ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def _framed(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    config = model.config
    for kind in ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "im_start_id"):
        start = getattr(config, kind, None)
        if isinstance(start, int):
            kind = kind.replace("start", "end").replace("boi", "eoi")
            end = getattr(config, kind, None)
            return [start, *tokens, *([end] if isinstance(end, int) else [])]
    return tokens


def _count_features(model: PreTrainedModel, pixels: Inputs) -> int:
    """How many image tokens a picture has, as the model's features say, or its complaint about a wrong number."""
    reason = "it has no `get_image_features`"
    for owner in (model, getattr(model, "model", None)):
        function = getattr(owner, "get_image_features", None)
        if function is None:
            continue
        known = inspect.signature(function).parameters
        for given in ({name: value for name, value in pixels.items() if name in known}, pixels):
            try:
                with torch.no_grad():
                    output = function(**given)
                features = getattr(output, "pooler_output", None)
                return _rows(output if features is None else features)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
    token = image_token(model)
    ids = torch.tensor([[TEXT.start, token, TEXT.start]])
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)
    except Exception as error:
        found = _FEATURES.search(str(error))
        if found:
            return int(found[1])
    raise NoInputError(reason)


def _rows(features: Any) -> int:
    if torch.is_tensor(features):
        return features.numel() // features.shape[-1]
    if isinstance(features, (list, tuple)):
        return sum(map(_rows, features))
    return _rows(features.last_hidden_state)


def _with_types(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Adds types of tokens (text 0, image 1), where a multimodal model asks for them."""
    names, token = inspect.signature(model.forward).parameters, image_token(model)
    if token is None:
        return inputs
    is_image = (inputs["input_ids"] == token).long()
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            inputs[name] = is_image * (model.config.model_type != "paligemma")
    return inputs


__all__ = ["NoInputError", "image_inputs", "image_token", "other_image", "text_inputs"]
