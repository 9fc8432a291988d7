"""The target model: a real LLaVA (vision tower, projector, 20-layer language model) small enough to train on a CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..training.data.conversations import Conversation
from ..training.data.encoding import ConversationEncoder, collate_conversations
from ..writing.destination import FolderKind, read_config, replaced_folder
from .dataset import IMAGE_TAG, iterate_samples, make_samples
from .processor import IMAGE_SIDE, PATCH_SIZE
from .rounding import save_rounded
from .training import Budget, train
from .world import render


HIDDEN_SIZE = 128
NUM_LAYERS = 20
NUM_SEED_LAYERS = 5  # number of layers of the shallow model, which is trained first
NUM_VISION_LAYERS = 3
IGNORED = -100
# The weights whose output is added to the residual stream, in the decoders and vision towers of toy targets.
_LAYER_OUTPUTS = (
    ".self_attn.o_proj.weight",
    ".linear_attn.out_proj.weight",
    ".mlp.down_proj.weight",
    ".self_attn.out_proj.weight",
    ".mlp.fc2.weight",
    ".attn.proj.weight",
    ".mlp.linear_fc2.weight",
)
_POOL = 24  # batches whose samples are sorted by length together
_FILE_NAMES = frozenset(
    (
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
)
_LARGEST_VOCABULARY = 2048  # a LLaVA with fewer tokens is a toy


def _is_toy_target(folder: Path) -> bool:
    config = read_config(folder)
    text = config.get("text_config")
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return config.get("model_type") == "llava" and isinstance(size, int) and size <= _LARGEST_VOCABULARY


TARGET_FOLDER = FolderKind("a target of the toy world", lambda path: path.name in _FILE_NAMES, _is_toy_target)


def build_target_config(processor: LlavaProcessor, num_layers: int = NUM_LAYERS) -> LlavaConfig:
    """Builds the configuration of the target (3.9M parameters) for a processor's vocabulary and special tokens."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=NUM_VISION_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        projection_dim=HIDDEN_SIZE,
    )
    text = build_text_config(tokenizer, num_layers, 2048)
    return join_configs(processor, vision, text)


def build_text_config(tokenizer: Any, num_layers: int, max_length: int) -> LlamaConfig:
    """Builds the configuration of the decoder."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HIDDEN_SIZE // 4,
        max_position_embeddings=max_length,
        initializer_range=HIDDEN_SIZE**-0.5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def join_configs(processor: LlavaProcessor, vision: CLIPVisionConfig, text: PreTrainedConfig) -> LlavaConfig:
    """Joins the configurations of a vision tower and a language model to the configuration of a LLaVA target."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_shallow_target(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Builds an untrained target with few layers, to be trained first and then deepened by `deepen`."""
    return build_untrained(build_target_config(processor, NUM_SEED_LAYERS), seed)


def build_untrained(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Builds an image-text model of any family, with random weights that suit training from scratch at any depth."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_LAYER_OUTPUTS):
                list_name, *_ = name.rsplit(".", 4)  # of the list that holds the layer
                depth = len(model.get_submodule(list_name))
                # Each layer adds to the residual stream. This scale keeps the stream at the same size at any depth.
                parameter.mul_((2 * depth) ** -0.5)
        # Embeddings are as large as the outputs of layers, because the first layers would drown smaller ones.
        model.get_input_embeddings().weight.normal_()
    return model


@torch.no_grad()
def scale_projector(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int = 0) -> None:
    """Scales the untrained projector in place so that image features have the size of token embeddings, 1."""
    images = [render(sample["scene"]) for sample in make_samples("train", 32, seed, "visual")]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    states = model.model.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
    projector = model.model.multi_modal_projector
    projector.linear_1.weight.div_(projector.linear_1(states).pow(2).mean().sqrt())
    projector.linear_2.weight.div_(projector(states).pow(2).mean().sqrt())


def deepen(model: PreTrainedModel, config: PreTrainedConfig, period: int = 1) -> Any:
    """
    Expands a shallow model to the number of layers in `config`, for further training. The function of the model stays
    the same.

    A shallow model learns as much from a sample as a deep one, in a fraction of the time. Each layer, or each run of
    `period` layers if the kinds of layers alternate, is followed by copies of itself that add nothing to the residual
    stream yet (block expansion, arXiv 2401.02415).
    """
    deep = type(model)(config)
    shallow = model.state_dict()
    repeats = config.get_text_config().num_hidden_layers // model.config.get_text_config().num_hidden_layers
    weights = {}
    for name in deep.state_dict():
        head, marker, tail = name.partition("language_model.layers.")
        if not marker:
            weights[name] = shallow[name]
            continue
        number, _, part = tail.partition(".")
        run, place = divmod(int(number), period)
        source = shallow[f"{head}{marker}{run // repeats * period + place}.{part}"]
        adds_nothing = run % repeats > 0 and name.endswith(_LAYER_OUTPUTS)
        weights[name] = torch.zeros_like(source) if adds_nothing else source
    deep.load_state_dict(weights)
    return deep


def to_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat messages of a LLaVA-style sample; the image of a visual sample is a 144x144 PIL picture."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(sample["conversations"]):
        if turn["from"] == "gpt":
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["value"]}]})
            continue
        parts: list[dict[str, Any]] = [{"type": "text", "text": turn["value"].replace(f"{IMAGE_TAG}\n", "")}]
        if index == 0 and "scene" in sample:
            parts.insert(0, {"type": "image", "image": render(sample["scene"])})
        messages.append({"role": "user", "content": parts})
    return messages


def encode_sample(encoder: ConversationEncoder, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Encodes a sample by the encoder that drafts are trained with, because the assistant masks of
    `apply_chat_template` differ between releases of transformers and need generation marks in the chat template."""
    messages = to_messages(sample)
    images = tuple(part.pop("image") for message in messages for part in message["content"] if "image" in part)
    return encoder(Conversation(sample["id"], messages, images))


def collate_samples(samples: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Makes a right-padded batch of encoded samples, with labels `[batch, length]` at the tokens of the assistant.

    There is no attention mask, because in a causal model only padding sees the padding on the right, and attention
    without a mask is faster.
    """
    batch = collate_conversations(samples, pad_token_id)
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"].masked_fill(~batch.pop("assistant_mask"), IGNORED)
    return batch


def stream_encoded(processor: ProcessorMixin, seed: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields encoded training samples without end. The `batch_size` samples of a batch have similar lengths."""
    encoder = ConversationEncoder(processor)
    samples = iterate_samples("train", seed)
    rng = random.Random(f"batches/{seed}")
    while True:
        pool = [encode_sample(encoder, sample) for sample in islice(samples, batch_size * _POOL)]
        pool.sort(key=lambda item: len(item["input_ids"]))
        batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            yield from batch


def train_target(
    model: Any,
    processor: Any,
    budget: Budget,
    seed: int = 0,
    batch_size: int = 16,
    rate: float = 1.0,
) -> float:
    """
    Trains what is not frozen of a model in place on new conversations; returns the mean training loss.

    The vision tower should be frozen (`requires_grad_(False)`), because an untrained language model would only make it
    forget. `rate` is relative to the learning rates of `build_optimizer`.
    """
    pad_token_id = processor.tokenizer.pad_token_id
    return train(
        model,
        lambda: stream_encoded(processor, seed, batch_size),
        lambda features: collate_samples(features, pad_token_id),
        budget,
        batch_size,
        seed,
        rate,
    )


def save_target(model: PreTrainedModel, processor: Any, folder: str | Path, overwrite: bool = False) -> Path:
    """
    Writes the model, rounded by [`save_rounded`], and the processor to `folder`; returns `folder`.

    Raises:
        MSDError: when the folder exists; with `overwrite`, when it holds anything but a toy target.
    """
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with replaced_folder(folder, TARGET_FOLDER, overwrite) as temporary:
        save_rounded(model, temporary)
        processor.save_pretrained(temporary)
    return Path(folder)
