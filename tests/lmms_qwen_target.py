"""Writes a tiny random Qwen target with its processor, and a random draft: `lmms_qwen_target.py KIND FOLDER`. It runs
in the environment of lmms-eval, because the video processor that belongs to such a processor needs torchvision."""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from msd_hf import MSDDraftModel
from msd_hf.toy import TARGET_DIR


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def write_pair(kind: str, folder: Path) -> None:
    """Writes `folder/target` and `folder/draft` for a kind: `Qwen2VL`, `Qwen2_5_VL` or `Qwen3VL`."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(names)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": MROPE,
        "initializer_range": 0.5,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "Qwen2VL": {"patch_size": 14, "embed_dim": 16, "hidden_size": 32},
        "Qwen2_5_VL": {"patch_size": 14, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32},
        "Qwen3VL": {"patch_size": 16, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    }[kind]
    if kind == "Qwen3VL":
        text["head_dim"] = 8
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    target = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    target.generation_config.eos_token_id = tokenizer.eos_token_id
    target.save_pretrained(folder / "target")
    image_processor = transformers.Qwen2VLImageProcessor(patch_size=vision["patch_size"], merge_size=2)
    video_class = transformers.Qwen3VLVideoProcessor if kind == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    processor_class = getattr(transformers, f"{kind}Processor")
    video_processor = video_class(patch_size=vision["patch_size"], merge_size=2)
    processor_class(image_processor, tokenizer, video_processor, chat_template=TEMPLATE).save_pretrained(
        folder / "target"
    )
    MSDDraftModel.from_target(target).save_pretrained(folder / "draft")


if __name__ == "__main__":
    write_pair(sys.argv[1], Path(sys.argv[2]))
