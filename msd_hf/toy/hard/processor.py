"""Tokenizer, image processor and chat template of the hard world: an ordinary `LlavaProcessor`."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor

from ..processor import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, TURNS_TEMPLATE, train_tokenizer
from .dataset import IMAGE_TAG, SampleKind, make_sample
from .vision import PATCH_SIZE


VOCABULARY_SIZE = 800
MAX_LENGTH = 16384

# The parts of a message keep their order, because albums have a title before each picture.
CHAT_TEMPLATE = (
    """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set parts.text = parts.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
"""
    + TURNS_TEMPLATE
)


def build_processor(seed: int = 0, num_samples: int = 4000) -> LlavaProcessor:
    """
    Builds the processor of the hard world. Its tokenizer, with one token a digit, is trained on `num_samples` training
    conversations.

    A picture keeps its size and becomes one `<image>` token a patch of 6x6 pixels: 64 in an album, 144 small, 576
    large.
    """
    kinds: tuple[SampleKind, ...] = ("text", "small", "large", "album")
    samples = (make_sample("train", index, seed, kinds[index % len(kinds)]) for index in range(num_samples))
    roles = {"human": "USER:", "gpt": " ASSISTANT:"}
    texts = (
        f"{roles[turn['from']]} {turn['value'].replace(IMAGE_TAG, ' ')}"
        for sample in samples
        for turn in sample["conversations"]
    )
    tokenizer = train_tokenizer(
        texts,
        VOCABULARY_SIZE,
        [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TAG],
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        model_max_length=MAX_LENGTH,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TAG},
    )
    return LlavaProcessor(
        # The image processor that uses Pillow, because the other one needs torchvision.
        image_processor=CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
