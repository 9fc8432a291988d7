"""Published architectures with random weights, to measure the cost of a round at real sizes without real weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from ..decoders import head_of
from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDError
from ..tree.settings import default_size


# Standard deviation of the logits. The largest of 32,000 such logits has a probability of about 0.6.
LOGIT_STD = 8.0


def _llava(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> LlavaConfig:
    """LLaVA-1.5 as published: CLIP ViT-L/14 at 336 pixels, a Llama decoder, a vocabulary padded to 32,064."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_7b() -> LlavaConfig:
    return _llava(4096, 11008, 32, 32)


def _llava_13b() -> LlavaConfig:
    return _llava(5120, 13824, 40, 40)


def _qwen2_vl_7b() -> Qwen2VLConfig:
    """Qwen2-VL-7B-Instruct as published."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def _small() -> LlavaConfig:
    """Not a published model: a decoder that a CPU runs in reasonable time, and a vision tower of one layer."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=31999, image_seq_length=4)


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-1.5-7b": _llava_7b,
    "llava-1.5-13b": _llava_13b,
    "qwen2-vl-7b": _qwen2_vl_7b,
    "small": _small,
}


def shape_config(name: str) -> PreTrainedConfig:
    """
    Makes the configuration of a shape in `SHAPES`.

    Raises:
        MSDError: when there is no shape of this name.
    """
    if name not in SHAPES:
        raise MSDError(f"Unknown shape {name!r}: choose from {', '.join(SHAPES)}.")
    return SHAPES[name]()


def small_config(
    hidden_size: int, intermediate_size: int, num_heads: int, vocab_size: int, num_layers: int
) -> LlavaConfig:
    """The configuration of the shape "small" with another decoder, without grouped-query attention."""
    config = _small()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.vocab_size = hidden_size, intermediate_size, vocab_size
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = num_layers, num_heads, num_heads
    text.head_dim = hidden_size // num_heads
    config.image_token_id = vocab_size - 1
    return config


def build_pair(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    draft_vocab_size: int | None = None,
) -> tuple[PreTrainedModel, MSDDraftModel]:
    """
    Builds a target and a draft for it, with random weights that are made on the device. The target never ends an
    answer. Its head is scaled so that the draft clearly prefers a few tokens, as trained drafts do; the trees of an
    unsure draft would be wide and flat.

    Args:
        config: configuration of the target.
        dtype: dtype of both models.
        device: device of both models.
        seed: seed of the weights.
        draft_vocab_size (*optional*): size of a draft vocabulary of random tokens; `None` for no draft vocabulary.
    """
    torch.manual_seed(seed)
    with device:
        target = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        draft = MSDDraftModel.from_target(target).eval()
    # Acceptance is simulated, so there is nothing that automatic trees could learn.
    draft.generation_config.update(**default_size(draft.generation_config))
    if device.type != "meta":
        _scale_head(target, draft)
    if draft_vocab_size is not None:
        # The ids are spread over the whole vocabulary, like those of frequent tokens. `set_draft_vocab` copies their
        # rows of the head.
        vocab_size = config.get_text_config(decoder=True).vocab_size
        draft.set_draft_vocab(torch.randperm(vocab_size)[:draft_vocab_size])
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target, draft


@torch.no_grad()
def _scale_head(target: PreTrainedModel, draft: MSDDraftModel) -> None:
    # The states are outputs of the draft, because the head reads such states below the first level of a tree.
    shape = (1, 64, draft.config.hidden_size)
    states = torch.randn(shape, device=draft.device).to(draft.dtype)
    for _ in range(2):
        states = draft(torch.zeros_like(states), states).last_hidden_state
    head = head_of(target)
    head.weight.mul_(LOGIT_STD / head(states).float().std().item())


def random_prompt(target: PreTrainedModel, context: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `generate` with `context` random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    # Special tokens, those of images included, lie at both ends of a vocabulary.
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    input_ids = torch.randint(100, vocab_size * 9 // 10, (1, context), generator=generator).to(target.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


__all__ = ["SHAPES", "build_pair", "random_prompt", "shape_config", "small_config"]
