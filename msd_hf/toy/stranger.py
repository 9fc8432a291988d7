"""Another target of the toy world, unlike the bundled one: `python -m msd_hf.toy.stranger --output DIR`.

It has a Qwen2 decoder with grouped-query attention, another vision tower and another tokenizer. Its chat template is
ChatML, without a start token and without generation marks. Drafts are trained for it as for any other model:

    msd-hf train --target DIR/target --text-data DIR/data/text.json --visual-data DIR/data/visual.json \\
        --image-folder DIR/data --output-dir DIR/draft
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.text import Text
from tokenizers import pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from ..errors import errors_end_script
from ..loading import load_target
from ..terminal import make_console
from ..writing.destination import check_destination
from .accuracy import KIND_GROUPS, accuracy_table, generate_answers, make_evaluation_prompts, score_answers
from .dataset import IMAGE_TAG, iterate_samples
from .processor import join_processor, train_tokenizer
from .target import TARGET_FOLDER, build_untrained, join_configs, save_target, scale_projector, train_target
from .training import Budget
from .training_data import write_training_data
from .vision import pretrain_vision_tower


console = make_console(width=100)

VOCABULARY_SIZE = 700
IMAGE_SIDE = 80  # pixels after resizing
PATCH_SIZE = 20  # pixels
HIDDEN_SIZE = 96
NUM_LAYERS = 6
NUM_HEADS, NUM_KV_HEADS = 6, 2
END_OF_TEXT, TURN_START, TURN_END, IMAGE_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"
SYSTEM_PROMPT = "You are a helpful assistant."

# As in Qwen2, a chat without a system turn gets a default one, and a line break follows the end of each turn.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|image_pad|>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_stranger(
    output: Annotated[Path, typer.Option(help="Folder that `target` and `data` are written to.")],
    vision_seconds: Annotated[float, typer.Option(help="Seconds for training the vision tower alone.")] = 60.0,
    seconds: Annotated[float, typer.Option(help="Seconds for training the whole model.")] = 360.0,
    vision_steps: Annotated[int | None, typer.Option(help="Steps instead of --vision-seconds.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of --seconds.")] = None,
    batch_size: Annotated[int, typer.Option(help="Conversations per step.")] = 16,
    num_samples: Annotated[int, typer.Option(help="Training conversations for a draft.")] = 6000,
    prompts_per_kind: Annotated[int, typer.Option(help="Held-out questions of each kind in the final test.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of data and initial weights.")] = 0,
) -> None:
    """Train and save a target unlike the bundled one, and write the conversations to train a draft on."""
    check_destination(output / "target", TARGET_FOLDER)
    write_training_data(output / "data", num_samples, seed)
    processor = build_stranger_processor(seed)
    model = build_untrained(build_stranger_config(processor), seed)
    console.print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads")
    vision_budget = Budget(vision_steps, None if vision_steps else vision_seconds)
    probes = pretrain_vision_tower(model.model.vision_tower, processor, vision_budget, seed)
    console.print("vision tower:", {name: f"{value:.1%}" for name, value in probes.items()})
    scale_projector(model, processor, seed)
    model.model.vision_tower.requires_grad_(False)
    budget = Budget(steps, None if steps else seconds)
    train_target(model, processor, budget, seed, batch_size)
    save_target(model, processor, output / "target")
    prompts = make_evaluation_prompts(prompts_per_kind, seed)
    answers = generate_answers(load_target(output / "target"), processor, prompts)
    console.print(accuracy_table(score_answers(prompts, answers), KIND_GROUPS))
    for prompt, answer in list(zip(prompts, answers, strict=True))[::prompts_per_kind]:
        console.print(Text(prompt.question, style="bold") + Text(f" {answer}"))


def build_stranger_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of 700 entries, with single digits and without a start token."""
    digits_apart = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return train_tokenizer(
        texts,
        VOCABULARY_SIZE,
        [END_OF_TEXT, TURN_START, TURN_END, IMAGE_TOKEN],
        digits_apart,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens={"image_token": IMAGE_TOKEN, "turn_start_token": TURN_START},
    )


def build_stranger_processor(seed: int = 0, num_samples: int = 4000) -> LlavaProcessor:
    """Builds the processor of this target. Its tokenizer is trained on `num_samples` training conversations.

    An image becomes 3x80x80 pixels and 16 `<|image_pad|>` tokens.
    """

    def texts() -> Iterator[str]:
        for sample in islice(iterate_samples("train", seed), num_samples):
            # The texts include the words of the chat template, so that the tokenizer learns them as few tokens.
            yield f"system\n{SYSTEM_PROMPT}"
            for turn in sample["conversations"]:
                role = "user" if turn["from"] == "human" else "assistant"
                yield f"{role}\n" + turn["value"].replace(f"{IMAGE_TAG}\n", "")

    return join_processor(
        build_stranger_tokenizer(texts()), IMAGE_SIDE, PATCH_SIZE, CHAT_TEMPLATE, image_token=IMAGE_TOKEN
    )


def build_stranger_config(processor: LlavaProcessor) -> LlavaConfig:
    """Builds the configuration of this target (0.9M parameters): 6 Qwen2 layers with 6 query and 2 key-value heads."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=2048,
        initializer_range=HIDDEN_SIZE**-0.5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return join_configs(processor, vision, text)


if __name__ == "__main__":
    logging.set_verbosity_info()
    with errors_end_script():
        typer.run(build_stranger)
