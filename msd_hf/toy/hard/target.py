"""The target of the hard world: a LLaVA with a Dinov2 tower, which takes pictures of any size, and 20 layers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Dinov2Config, LlavaConfig, LlavaProcessor

from ...training.data.conversations import load_conversations
from ...training.data.encoding import ConversationEncoder
from ..target import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_SEED_LAYERS,
    build_text_config,
    build_untrained,
    collate_samples,
    join_configs,
)
from ..training import Budget, train
from .dataset import HardSamples, SampleKind
from .picture import make_picture, render
from .processor import MAX_LENGTH
from .vision import PATCH_SIZE


NUM_VISION_LAYERS = 3
IMAGE_SIDE = 144  # pixels of a large picture; the position embeddings are interpolated to the sizes of others
# Conversations of a batch, and how often a batch is of the kind. All pictures of a batch have one size.
Batches = dict[SampleKind, tuple[int, int]]
# One after the other. A model that has not learned to look yet finds a thing among a few, and later among many.
LESSONS: tuple[Batches, ...] = (
    {"text": (16, 1), "tiny": (16, 2)},
    {"text": (16, 2), "tiny": (12, 3), "small": (10, 5)},
    {"text": (24, 2), "small": (10, 1), "album": (6, 4), "large": (5, 5)},
)
LESSON_RATE = 0.7  # relative to the rates of `build_optimizer`
DEEP_LESSON: Batches = {"text": (16, 2), "small": (8, 1), "album": (6, 3), "large": (5, 4), "gallery": (2, 1)}
ROPE_THETA = 1e6
_POOL = 12  # batches whose samples are sorted by length together


def build_target_config(processor: LlavaProcessor, num_layers: int = NUM_LAYERS) -> LlavaConfig:
    """Builds the configuration of the target (4M parameters) for a processor's vocabulary and special tokens."""
    tokenizer = processor.tokenizer
    vision = Dinov2Config(
        hidden_size=HIDDEN_SIZE,
        mlp_ratio=2,
        num_hidden_layers=NUM_VISION_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        initializer_range=HIDDEN_SIZE**-0.5,
        use_mask_token=False,
    )
    text = build_text_config(tokenizer, num_layers, MAX_LENGTH)
    # With the usual 10,000 nearly all of a head's pairs turn within the rows of a large picture, and a layer cannot
    # find a cell by what it holds.
    text.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return join_configs(processor, vision, text)


def build_shallow_target(processor: LlavaProcessor, seed: int = 0) -> Any:
    """Builds an untrained target with few layers, to be trained first and then deepened."""
    return build_untrained(build_target_config(processor, NUM_SEED_LAYERS), seed)


@torch.no_grad()
def scale_features(model: Any, processor: LlavaProcessor, seed: int = 0) -> None:
    """
    Scales tower and untrained projector in place so that both give features of the size of token embeddings, 1.

    A projector of large features has small weights, which the first steps of training would destroy.
    """
    rng = random.Random(f"hard/projector/{seed}")
    images = [render(make_picture(rng, "train", 3)) for _ in range(32)]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def features() -> torch.Tensor:
        return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]

    # The layers normalise what they read, so this scales the whole residual stream and changes nothing else.
    size = features().pow(2).mean().sqrt()
    embeddings = tower.embeddings
    scaled = [embeddings.cls_token, embeddings.position_embeddings, *embeddings.patch_embeddings.parameters()]
    scaled += [
        getattr(layer, name).lambda1 for layer in tower.encoder.layer for name in ("layer_scale1", "layer_scale2")
    ]
    for parameter in scaled:
        parameter.div_(size)
    states = features()
    projector.linear_1.weight.div_(projector.linear_1(states).pow(2).mean().sqrt())
    projector.linear_2.weight.div_(projector(states).pow(2).mean().sqrt())


def stream_batches(
    processor: LlavaProcessor, seed: int, batches: Batches
) -> Iterator[dict[str, list[dict[str, torch.Tensor]]]]:
    """Yields batches of encoded training conversations without end, each of one kind and of similar lengths."""
    encoder = ConversationEncoder(processor, MAX_LENGTH)
    rng = random.Random(f"hard/batches/{seed}")
    pools: dict[SampleKind, list[list[dict[str, torch.Tensor]]]] = {kind: [] for kind in batches}
    used = dict.fromkeys(batches, 0)
    while True:
        kind = rng.choices(list(batches), [share for _, share in batches.values()])[0]
        if not pools[kind]:
            size = batches[kind][0]
            samples = HardSamples("train", used[kind] + size * _POOL, seed, kind)[used[kind] :]
            encoded = [encoder(conversation) for conversation in load_conversations(samples)]
            used[kind] += len(encoded)
            encoded.sort(key=lambda item: len(item["input_ids"]))
            pools[kind] = [encoded[start : start + size] for start in range(0, len(encoded), size)]
            rng.shuffle(pools[kind])
        yield {"samples": pools[kind].pop()}


def train_target(
    model: Any,
    processor: LlavaProcessor,
    lesson: Batches,
    budget: Budget,
    seed: int = 0,
    rate: float = LESSON_RATE,
) -> float:
    """Trains what is not frozen of a model in place on new conversations of a lesson; returns the mean training loss.
    `rate` is relative to the learning rates of `build_optimizer`."""
    pad_token_id = processor.tokenizer.pad_token_id
    return train(
        model,
        lambda: stream_batches(processor, seed, lesson),
        lambda items: collate_samples(items[0]["samples"], pad_token_id),
        budget,
        1,
        seed,
        rate,
    )
