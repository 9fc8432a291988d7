"""
Tiny targets of several families with random weights, drafts that guess a good part of their text, and prompts.

A target's head follows its embeddings: after a token t comes mostly p(t), for a random permutation p, and what the
layers add makes it another token now and then. A draft passes embeddings on, with noise, so that it knows p and not
what the layers add. A permutation has short cycles too: such text repeats itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from msd_hf import MSDDraftModel


VOCAB_SIZE, HIDDEN_SIZE, IMAGE_SIZE, WINDOW = 80, 32, 16, 8
PAD = 0
TEXT = range(3, 75)  # tokens of prompts and, mostly, of answers
END, START, VIDEO, IMAGE = range(76, VOCAB_SIZE)

DRAFTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vocabulary": {},
    "wide": {"num_hidden_layers": 2, "input_layernorm": True, "decouple_visual_tokens": False},
    "layers": {"target_layers": [0, 1]},
    "single": {},  # in float32
}


def _text(kind: str, **fields: Any) -> PreTrainedConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    return getattr(transformers, kind)(**{**sizes, **heads, **tokens, "initializer_range": 0.15, **fields})


def _tower(kind: str, patch_size: int, **fields: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return getattr(transformers, kind)(**{**sizes, "image_size": IMAGE_SIZE, "patch_size": patch_size, **fields})


def _pair(kind: str, text: PreTrainedConfig, vision: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    fields = {"image_token_id": IMAGE, "tie_word_embeddings": False, **fields}
    return getattr(transformers, kind)(text_config=text, vision_config=vision, **fields)


_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _gemma3() -> PreTrainedConfig:
    text = _text("Gemma3TextConfig", **_GEMMA)
    return _pair("Gemma3Config", text, _tower("SiglipVisionConfig", 4, vision_use_head=False), mm_tokens_per_image=4)


def _qwen2_5_vl() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = type(transformers.Qwen2_5_VLConfig().vision_config)(
        depth=2,
        num_heads=2,
        patch_size=4,
        hidden_size=16,
        out_hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    tokens = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return _pair("Qwen2_5_VLConfig", _text("Qwen2_5_VLTextConfig", rope_parameters=rope), vision, **tokens)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama": lambda: _text("LlamaConfig"),
    "Mistral": lambda: _text("MistralConfig", sliding_window=WINDOW),
    "Gemma2": lambda: _text("Gemma2Config", final_logit_softcapping=20.0, attn_logit_softcapping=3.0, **_GEMMA),
    "Llava": lambda: _pair("LlavaConfig", _text("LlamaConfig"), _tower("CLIPVisionConfig", 8), image_seq_length=4),
    "InternVL": lambda: _pair("InternVLConfig", _text("Qwen2Config"), _tower("InternVLVisionConfig", 4)),
    "SmolVLM": lambda: _pair("SmolVLMConfig", _text("LlamaConfig"), _tower("SmolVLMVisionConfig", 4)),
    "Qwen2_5_VL": _qwen2_5_vl,
    "Gemma3": _gemma3,
    "PaliGemma": lambda: _pair(
        "PaliGemmaConfig",
        _text("GemmaConfig", head_dim=16),
        _tower("SiglipVisionConfig", 8, vision_use_head=False),
        projection_dim=HIDDEN_SIZE,
    ),
}
_LINEAR, _FULL = "linear_attention", "full_attention"


def _qwen3_5() -> PreTrainedConfig:
    text = _text(
        "Qwen3_5TextConfig",
        num_hidden_layers=4,
        layer_types=[_LINEAR, _LINEAR, _LINEAR, _FULL],
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    )
    vision = type(transformers.Qwen3_5Config().vision_config)(
        depth=2,
        num_heads=2,
        patch_size=4,
        hidden_size=16,
        out_hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_position_embeddings=16,
    )
    tokens = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return _pair("Qwen3_5Config", text, vision, **tokens)


def _lfm2_vl() -> PreTrainedConfig:
    text = _text(
        "Lfm2Config", num_hidden_layers=4, layer_types=["conv", "conv", _FULL, "conv"], block_auto_adjust_ff_dim=False
    )
    vision = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return _pair("Lfm2VlConfig", text, vision, projector_hidden_size=16)


RECURRENT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3_5": _qwen3_5,
    "Lfm2Vl": _lfm2_vl,
    "NemotronH": lambda: _text(
        "NemotronHConfig",
        layers_block_type=[_LINEAR, "mlp", _FULL, "moe", _LINEAR],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "FalconH1": lambda: _text(
        "FalconH1Config",
        mamba_d_ssm=64,
        head_dim=8,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=2,
    ),
}
TEXT_ONLY = ("Llama", "Mistral", "Gemma2", "NemotronH", "FalconH1")
_TYPES = {
    "Qwen2_5_VL": "mm_token_type_ids",
    "Qwen3_5": "mm_token_type_ids",
    "Gemma3": "token_type_ids",
    "PaliGemma": "token_type_ids",
}
# Image tokens of one picture in a prompt, and tokens around them.
_PICTURES = {
    "Llava": [IMAGE] * 4,
    "PaliGemma": [IMAGE] * 4,
    "Lfm2Vl": [IMAGE] * 4,
    "SmolVLM": [START, *[IMAGE] * 4, END],
}


def attentions(family: str) -> tuple[str, ...]:
    """Implementations of attention that a family is right with. In float64 eager attention gives NaN for padded rows
    where it computes the softmax in float32: leave padding out then."""
    return ("eager",) if family == "Gemma2" else ("sdpa", "eager")


@functools.cache
def target(family: str, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A target, built once."""
    torch.manual_seed(seed)
    config = {**CONFIGS, **RECURRENT_CONFIGS}[family]()
    kind = "ForCausalLM" if family in TEXT_ONLY else "ForConditionalGeneration"
    model = getattr(transformers, family + kind)(config)
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    torch.nn.init.normal_(embedding)
    head.normal_(std=0.02)
    text = torch.tensor(TEXT)
    head[text[torch.randperm(len(text))]] += 0.25 * embedding[text]
    if "Gemma" in family:  # which multiplies embeddings by the square root of the hidden size
        embedding *= 1.4 * HIDDEN_SIZE**-0.5
    for name, parameter in model.named_parameters():
        if "layers" in name and ("o_proj" in name or "down_proj" in name):
            parameter.data *= 1.4  # or layers hardly matter
        if "layers" in name and "out_proj" in name and family in RECURRENT_CONFIGS:
            parameter.data *= 1.4
        # Or images do not.
        if parameter.ndim > 1 and any(part in name for part in ("patch_embed", "projector", "connector", "merger")):
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model = model.to(dtype).eval()
    # transformers hooks into the modules of a model at its first forward.
    inputs = prompt(family, [(4, int(family not in TEXT_ONLY))], torch.Generator().manual_seed(0))
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    model.set_attn_implementation("eager")
    model(**inputs, output_hidden_states=True, output_attentions=True)
    return model


@functools.cache
def draft(family: str, seed: int, kind: str, dtype: torch.dtype = torch.float64) -> MSDDraftModel:
    """A draft of one of the `DRAFTS`, built once."""
    owner = target(family, seed, dtype)
    torch.manual_seed(seed)
    made = MSDDraftModel.from_target(owner, **DRAFTS[kind])
    size = made.config.hidden_size
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name == "fc.weight":
                weight.normal_(std=0.08)
                weight[:, :size] += torch.eye(size)
            elif name == "feature_proj.weight":
                weight.normal_(std=0.03)
            elif "o_proj" in name or "down_proj" in name:
                weight *= 0.5
    if kind == "vocabulary":
        made.set_draft_vocab([token for token in TEXT if token % 6])
    return made.to(torch.float32 if kind == "single" else dtype).eval()


def prompt(family: str, rows: list[tuple[int, int]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """
    Inputs of `generate`: a batch of prompts, padded on the left.

    Args:
        family (`str`): one of `CONFIGS`.
        rows (`list[tuple[int, int]]`): for each row its text tokens, and its pictures.
        generator (`torch.Generator`): draws text and pictures.
    """
    tokens = [_tokens(family, *row, generator) for row in rows]
    length = max(map(len, tokens))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens])
    inputs = {"input_ids": ids, "attention_mask": mask, **token_types(family, ids)}
    num_pictures = [pictures for _, pictures in rows]
    return {**inputs, **_pixels(family, num_pictures, generator)} if any(num_pictures) else inputs


def token_types(family: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What tells images from text, where a family wants to know."""
    if family not in _TYPES:
        return {}
    return {_TYPES[family]: (ids == IMAGE).long() * (family != "PaliGemma")}


def _tokens(family: str, num_text: int, num_pictures: int, generator: torch.Generator) -> list[int]:
    text = torch.randint(TEXT.start, TEXT.stop, (num_text,), generator=generator).tolist()
    picture = _PICTURES.get(family, [START, *[IMAGE] * 4, END])
    places = torch.randint(0, num_text + 1, (num_pictures,), generator=generator).tolist()
    for place in sorted(places, reverse=True):
        text[place:place] = picture
    return text


def _pixels(family: str, num_pictures: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    count = sum(num_pictures)
    if family in ("Qwen2_5_VL", "Qwen3_5"):  # 4 x 4 patches, of which 2 x 2 become a token
        pixels = torch.randn(16 * count, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    if family == "Lfm2Vl":
        pixels = torch.randn(count, 16, 3 * 4 * 4, generator=generator, dtype=torch.float64)
        mask = torch.ones(count, 16, dtype=torch.long)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[4, 4]] * count),
        }
    pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64)
    if family != "SmolVLM":
        return {"pixel_values": pixels}
    padded = pixels.new_zeros(len(num_pictures), max(num_pictures), *pixels.shape[1:])
    mask = torch.zeros(*padded.shape[:2], *padded.shape[3:], dtype=torch.long)
    start = 0
    for row, number in enumerate(num_pictures):
        padded[row, :number], mask[row, :number] = pixels[start : start + number], 1
        start += number
    return {"pixel_values": padded, "pixel_attention_mask": mask}
