"""Tokenizer, image processor and chat template of the toy models: an ordinary `LlavaProcessor`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from .dataset import IMAGE_TAG, iterate_samples


VOCABULARY_SIZE = 512
IMAGE_SIDE = 72  # pixels after resizing
PATCH_SIZE = 12  # pixels
NUM_IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIZE) ** 2
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"

# As in LLaVA-1.5, the image tag stands in the first user turn. The end-of-sequence token is inside the generation
# marks, so that a model trained on the marked tokens learns to stop.
TURNS_TEMPLATE = """\
{%- if message['role'] == 'assistant' -%}
{{- ' ' -}}{%- generation -%}{{- text + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + text + ' ASSISTANT:' -}}
{%- else -%}
{{- text + ' ' -}}
{%- endif -%}
{%- endfor -%}
"""
CHAT_TEMPLATE = (
    """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{%- set parts.text = parts.text + '<image>\\n' -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set parts.text = parts.text + part['text'] -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
"""
    + TURNS_TEMPLATE
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of 512 entries on `texts`."""
    return train_tokenizer(
        texts,
        VOCABULARY_SIZE,
        [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TAG],
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TAG},
    )


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    special_tokens: list[str],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    model_max_length: int = 2048,
    **roles: Any,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; `roles` says which special token is the `pad_token`, the `eos_token`, ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        **roles,
    )


def build_processor(seed: int = 0, num_samples: int = 4000) -> LlavaProcessor:
    """Builds the processor of the toy world. Its tokenizer is trained on `num_samples` training conversations.

    An image becomes 3x72x72 pixels and 36 `<image>` tokens.
    """
    samples = islice(iterate_samples("train", seed), num_samples)
    roles = {"human": "USER:", "gpt": " ASSISTANT:"}
    # The texts include the roles, so that the tokenizer learns them and they take few tokens in a chat.
    texts = (
        f"{roles[turn['from']]} {turn['value'].replace(IMAGE_TAG, '')}"
        for sample in samples
        for turn in sample["conversations"]
    )
    return join_processor(build_tokenizer(texts), IMAGE_SIDE, PATCH_SIZE, CHAT_TEMPLATE)


def join_processor(
    tokenizer: PreTrainedTokenizerFast, image_side: int, patch_size: int, chat_template: str, **arguments: Any
) -> LlavaProcessor:
    """Builds a processor with this tokenizer that resizes images to a square of `image_side` pixels."""
    square = {"height": image_side, "width": image_side}
    # The image processor that uses Pillow, because the other one needs torchvision.
    image_processor = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
        **arguments,
    )
