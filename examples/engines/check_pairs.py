"""
Small pairs for `vllm_check.py`, trained on the toy world of `msd_hf` in a few minutes: a LLaVA of another size than
the bundled one, whose draft does not normalise its input, and a Qwen2-VL with M-RoPE and biases. And an EAGLE-3 draft
for the target of the bundled pair.

    python examples/engines/check_pairs.py DIR

The two targets see a picture through an untrained vision tower, so their answers about it are guesses; how often a
draft guesses the target's next token can be measured all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from msd_hf.loading import load_target_and_processor
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.dataset import IMAGE_TAG
from msd_hf.toy.draft import save_draft, toy_samples, train_draft
from msd_hf.toy.processor import CHAT_TEMPLATE, IMAGE_SIDE, PATCH_SIZE, build_processor
from msd_hf.toy.target import build_untrained, join_configs, scale_projector, train_target
from msd_hf.toy.training import Budget


HIDDEN_SIZE, HEAD_SIZE, NUM_LAYERS = 96, 32, 3
VISION_START, VISION_END, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SEED, BATCH_SIZE = 0, 8
TARGET_STEPS, DRAFT_STEPS, NUM_SAMPLES = 300, 200, 200  # half of the conversations are visual
VOCAB_SIZE, EAGLE3_PASSES = 400, 3  # tokens of the EAGLE-3 draft; passes of a step of its training


def text_fields(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HIDDEN_SIZE // HEAD_SIZE,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "initializer_range": HIDDEN_SIZE**-0.5,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def llava() -> tuple[Any, Any]:
    """A LLaVA that is narrower and shallower than the bundled one, with grouped-query attention."""
    processor = build_processor(SEED)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(**text_fields(processor.tokenizer), head_dim=HEAD_SIZE)
    model = build_untrained(join_configs(processor, vision, text), SEED)
    scale_projector(model, processor, SEED)
    model.model.vision_tower.requires_grad_(False)
    return model, processor


def qwen2_vl() -> tuple[Any, Any]:
    """A Qwen2-VL. An image becomes 4 x 4 tokens."""
    tokenizer = build_processor(SEED).tokenizer
    tokenizer.add_tokens([VISION_START, VISION_END, VIDEO], special_tokens=True)
    area = 96 * 96
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": area, "longest_edge": area},
        "patch_size": 12,
        "merge_size": 2,
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE.replace("<image>\\n", f"{VISION_START}{IMAGE_TAG}{VISION_END}"),
    )
    number = tokenizer.convert_tokens_to_ids
    text = {
        **text_fields(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": HIDDEN_SIZE,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 12,
        "spatial_merge_size": 2,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number(IMAGE_TAG),
        video_token_id=number(VIDEO),
        vision_start_token_id=number(VISION_START),
        vision_end_token_id=number(VISION_END),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = build_untrained(config, SEED)
    model.model.visual.requires_grad_(False)
    return model, processor


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {"llava": llava, "qwen2_vl": qwen2_vl}


def build(
    kind: str,
    folder: Path,
    target_steps: int = TARGET_STEPS,
    draft_steps: int = DRAFT_STEPS,
    num_samples: int = NUM_SAMPLES,
) -> Path:
    """Trains a target and its draft, unless `folder` has them; returns the folder with `target` and `draft`."""
    folder = folder / kind
    if (folder / "draft").is_dir():
        return folder
    model, processor = KINDS[kind]()
    train_target(model, processor, Budget(target_steps), SEED, BATCH_SIZE)
    model.eval()
    model.generation_config.update(
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    model.save_pretrained(folder / "target")
    processor.save_pretrained(folder / "target")
    # Without a copy of the target's last layer, the draft of a LLaMA does not normalise its input.
    start = {"init_from_last_layer": kind != "llava"}
    trainer = train_draft(
        model, processor, folder / "work", draft_steps, toy_samples(num_samples, SEED), SEED, BATCH_SIZE, **start
    )
    save_draft(trainer, folder / "draft")
    return folder


def build_eagle3(folder: Path, draft_steps: int = DRAFT_STEPS, num_samples: int = NUM_SAMPLES) -> Path:
    """Trains an EAGLE-3 draft for the bundled target, unless `folder` has it; returns its folder. At visual positions
    it is fed as in vLLM: with the embedding of the placeholder."""
    folder = folder / "eagle3"
    if (folder / "draft").is_dir():
        return folder / "draft"
    target, processor = load_target_and_processor(TARGET_DIR, "float32")
    samples = toy_samples(num_samples, SEED)
    kind = {"draft_kind": "eagle3", "visual_positions": "placeholder", "draft_vocab_size": VOCAB_SIZE}
    passes = {"unroll_passes": EAGLE3_PASSES, "curriculum": "mixed"}
    trainer = train_draft(target, processor, folder / "work", draft_steps, samples, SEED, BATCH_SIZE, **kind, **passes)
    save_draft(trainer, folder / "draft")
    return folder / "draft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--target-steps", type=int, default=TARGET_STEPS)
    parser.add_argument("--draft-steps", type=int, default=DRAFT_STEPS)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    args = parser.parse_args()
    for kind in args.kinds:
        print(build(kind, args.folder, args.target_steps, args.draft_steps, args.samples))
    print(build_eagle3(args.folder, args.draft_steps, args.samples))


if __name__ == "__main__":
    main()
