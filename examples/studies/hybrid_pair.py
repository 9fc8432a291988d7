"""
The toy world on a hybrid target: a small Qwen3.5, whose decoder has three gated-delta layers for each layer of full
attention, M-RoPE and a vision tower with a grid of patches.

    python examples/studies/hybrid_pair.py build --output DIR  # trains target and draft
    python examples/studies/hybrid_pair.py measure DIR         # `generate`, chains and trees, in turns

A stopped build continues after its last finished stage. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    PaddleOCRVLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3_5VisionConfig,
)
from transformers.utils import logging

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError, errors_end_script
from msd_hf.evaluation.make_report import report_pair
from msd_hf.evaluation.methods import CHAIN, TREE, VANILLA, Method
from msd_hf.evaluation.report import print_report, write_report
from msd_hf.loading import load_target, load_target_and_processor
from msd_hf.terminal import make_console
from msd_hf.toy import make_samples, render
from msd_hf.toy.build import DEEP_RATE, build_draft_folder, print_accuracy
from msd_hf.toy.evaluate import toy_prompts
from msd_hf.toy.processor import CHAT_TEMPLATE, build_processor
from msd_hf.toy.stages import stage
from msd_hf.toy.target import build_untrained, deepen, save_target, train_target
from msd_hf.toy.training import Budget
from msd_hf.toy.vision import pretrain_vision_tower


PERIOD = 4  # three layers with the gated delta rule, then one with full attention
NUM_LAYERS = 16
HIDDEN_SIZE = 128
HEAD_SIZE = 32
NUM_HEADS = 4
IMAGE_SIDE, PATCH_SIZE, MERGE_SIZE = 96, 12, 2  # an image becomes 4 x 4 tokens
VIDEO, VISION_START, VISION_END = "<video>", "<vision_start>", "<vision_end>"

app = typer.Typer(add_completion=False, help=__doc__.split("\n\n")[0])
console = make_console(width=110)


def make_processor(tokenizer: Any) -> PaddleOCRVLProcessor:
    """A tokenizer of the toy world, to which it adds tokens, with an image processor of Qwen. The processor class of
    Qwen3.5 itself needs torchvision, for videos; this one makes the same inputs of an image."""
    tokenizer.add_tokens([VIDEO, VISION_START, VISION_END], special_tokens=True)
    area = IMAGE_SIDE * IMAGE_SIDE
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area, "longest_edge": area}, patch_size=PATCH_SIZE, merge_size=MERGE_SIZE
    )
    template = CHAT_TEMPLATE.replace("<image>\\n", f"{VISION_START}<image>{VISION_END}")
    return PaddleOCRVLProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


def make_config(processor: Any, num_layers: int) -> Qwen3_5Config:
    tokenizer = processor.tokenizer
    vision_size = 96
    text = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        full_attention_interval=PERIOD,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        linear_num_key_heads=NUM_HEADS,
        linear_num_value_heads=NUM_HEADS,
        linear_key_head_dim=HEAD_SIZE,
        linear_value_head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        initializer_range=HIDDEN_SIZE**-0.5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = Qwen3_5VisionConfig(
        depth=2,
        hidden_size=vision_size,
        intermediate_size=2 * vision_size,
        num_heads=4,
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        out_hidden_size=HIDDEN_SIZE,
        num_position_embeddings=(IMAGE_SIDE // PATCH_SIZE) ** 2,
        initializer_range=vision_size**-0.5,
    )
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
    )


def make_untrained(processor: Any, seed: int) -> Qwen3_5ForConditionalGeneration:
    """A model of one period, to be trained first and then deepened."""
    model = build_untrained(make_config(processor, PERIOD), seed)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            if hasattr(layer, "linear_attn"):
                # Heads whose memory lasts from one to a hundred tokens. By default most of these few heads would
                # forget within a token.
                layer.linear_attn.A_log.copy_(torch.linspace(math.log(0.01), 0.0, NUM_HEADS))
    return model


def read_features(tower: Any, images: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The features `[images, tokens, width]` that the decoder gets."""
    features = tower(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    return features.unflatten(0, (len(images["image_grid_thw"]), -1))


@torch.no_grad()
def scale_features(model: Qwen3_5ForConditionalGeneration, processor: Any, seed: int) -> None:
    """Scales the tower's last layer in place so that image features have the size of token embeddings, 1."""
    pictures = [render(sample["scene"]) for sample in make_samples("train", 32, seed, "visual")]
    features = read_features(model.model.visual, processor.image_processor(pictures, return_tensors="pt"))
    last = model.model.visual.merger.linear_fc2
    size = features.pow(2).mean().sqrt()
    last.weight.div_(size)
    last.bias.div_(size)


def freeze_vision(model: Qwen3_5ForConditionalGeneration) -> None:
    """Freezes the vision tower, without the projection to the decoder."""
    model.model.visual.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)


@app.command()
def build(
    output: Annotated[Path, typer.Option(help="Folder that `target` and `draft` are written to.")],
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = 600,
    shallow_steps: Annotated[int, typer.Option(min=1, help="Steps of a target of four layers.")] = 1600,
    deep_steps: Annotated[int, typer.Option(min=1, help="Steps of the target with all layers.")] = 60,
    draft_steps: Annotated[int, typer.Option(min=1, help="Steps of the draft.")] = 500,
    draft_samples: Annotated[int, typer.Option(min=2, help="Conversations of the draft, half of them visual.")] = 1600,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations per step.")] = 16,
    prompts_per_kind: Annotated[int, typer.Option(min=1, help="Held-out questions of each kind in the test.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of data and initial weights.")] = 0,
) -> None:
    """Train and save a hybrid target and its draft."""
    logging.set_verbosity_info()
    work, target_folder = output / "work", output / "target"
    if (output / "draft").exists():
        raise MSDError(f"{str(output / 'draft')!r} exists: choose another folder for --output.")
    if not target_folder.exists():
        processor = make_processor(build_processor(seed).tokenizer)

        def see() -> Any:
            model = make_untrained(processor, seed)
            tower, budget = model.model.visual, Budget(vision_steps)
            probes = pretrain_vision_tower(tower, processor, budget, seed, width=HIDDEN_SIZE, read=read_features)
            console.print("vision tower:", {name: f"{value:.1%}" for name, value in probes.items()})
            scale_features(model, processor, seed)
            return model

        def learn() -> Any:
            model = stage(work / "vision", see)
            freeze_vision(model)
            train_target(model, processor, Budget(shallow_steps), seed, batch_size)
            return model

        model = deepen(stage(work / "shallow", learn), make_config(processor, NUM_LAYERS), PERIOD)
        console.print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads")
        freeze_vision(model)
        train_target(model, processor, Budget(deep_steps), seed + 1, batch_size, DEEP_RATE)
        save_target(model, processor, target_folder)
        print_accuracy(load_target(target_folder), processor, prompts_per_kind, seed)
    build_draft_folder(output, draft_steps, draft_samples, batch_size, seed)


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="Folder with `target` and `draft`.")],
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out questions; their kinds take turns.")] = 65,
    nodes: Annotated[str, typer.Option(help="Sizes of trees besides those that size themselves.")] = "8,16,32",
    depth: Annotated[int, typer.Option(min=1, help="Levels of these trees, and tokens of a chain of set size.")] = 9,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each method, in turns.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 140,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for report.json and report.md.")] = None,
) -> None:
    """Compare the target alone, chains and trees on held-out questions, in turns on the same prompts."""
    logging.disable_progress_bar()
    target, processor = load_target_and_processor(folder / "target")
    draft = MSDDraftModel.from_pretrained(folder / "draft")
    prompts = toy_prompts(processor, num_prompts, seed)
    methods = make_methods([int(number) for number in nodes.split(",")], depth)
    report = report_pair(target, draft, prompts, methods, repeats, max_new_tokens, 1, temperature, seed, False)
    print_report(report, console)
    if output is not None:
        for path in write_report(report, output, False):
            console.print(f"Wrote {path}", soft_wrap=True)


def make_methods(sizes: list[int], depth: int) -> list[Method]:
    """`generate` alone, chains and trees. Chain and trees of a set size have up to `depth` levels below the root."""

    def with_draft(name: str, description: str, **settings: int) -> Method:
        return Method(name, description, drafted=True, tree=settings)

    # The first level needs no expansion.
    chain = {"num_assistant_tokens": depth + 1, "tree_depth": depth - 1, "tree_top_k": 1}
    methods = [VANILLA, with_draft(f"chain-{depth}", f"chains of {depth} tokens", **chain), CHAIN]
    for size in sizes:
        tree = {"num_assistant_tokens": size, "tree_depth": depth - 1, "tree_top_k": 4}
        methods.append(with_draft(f"tree-{size}", f"trees of {size} nodes", **tree))
    return [*methods, TREE]


if __name__ == "__main__":
    with errors_end_script():
        app()
