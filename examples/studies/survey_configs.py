"""The configuration of a tiny model of any kind that transformers knows, made from its default configuration.

The defaults of a configuration are those of a published model. Every size is replaced by a small one according to the
name of its field, wherever it stands; layers are chosen so that each kind of layer occurs; ids of tokens are moved
into a small vocabulary. `survey_table.FIELDS` has what these rules cannot guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from survey_table import FIELDS
from transformers import CONFIG_MAPPING, PreTrainedConfig


VOCAB_SIZE = 128
PAD, BOS, EOS = 0, 1, 2
TEXT = range(3, 96)  # tokens of prompts
FIRST_SPECIAL = TEXT.stop  # tokens that stand for images and the like
WINDOW = 8
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE = 64, 4, 2, 16, 64
IMAGE_SIZE, PATCH_SIZE = 32, 8

_EVERYWHERE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "local_attention": WINDOW,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    # With few heads many scores are exactly 0, and chance decides which of equal ones are chosen.
    "index_n_heads": 16,
    "index_topk": 12,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 16,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "mm_tokens_per_image": 4,
    "num_query_tokens": 4,
    "latent_query_num": 4,
    "position_embedding_size": 64,
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
    "base_channels": 32,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "num_image_tokens": 16,
    "num_nextn_predict_layers": 0,
    "depth": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "hidden_dropout_prob": 0.0,
    "is_decoder": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "in_channels": 3,
    "num_channels": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
# By role: that of the language model, and that of towers.
_SIZES = {
    "text": {
        r"(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|dim|word_embed_proj_dim)": HIDDEN,
        r"(input_embedding_size|output_embedding_size|lru_width|\w*projector_hidden_size)": HIDDEN,
        r"(out_hidden_size|projection_dim|projection_hidden_size)": HIDDEN,
        r"(num_(\w+_)?attention_heads|(\w+_)?attention_heads|n_heads?|num_heads)": HEADS,
        r"(num_key_value_heads|kv_n_heads|num_kv_heads|swa_num_key_value_heads)": KV_HEADS,
        r"(head_dim|attention_head_size|attention_head_dim|swa_head_dim|d_head|dim_head|kv_channels|d_kv)": HEAD_DIM,
        r"(\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|n_inner|dff|d_ff|dim_ff|d_inner)": WIDE,
        r"(share_expert_dim|moe_hidden_size|feed_forward_size)": WIDE,
    },
    "tower": {
        r"(hidden_size|d_model|n_embd|dim|embed_dim)": 32,
        r"(num_(\w+_)?attention_heads|(\w+_)?attention_heads|n_heads?|num_heads|num_key_value_heads)": 2,
        r"(head_dim|attention_head_size|d_kv)": 16,
        r"(\w*intermediate_size\w*|\w*ffn_dim|mlp_dim|d_ff)": 32,
        r"(out_hidden_size|text_hidden_size|output_dim|projection_dim|output_proj_dims|mm_embed_dim)": HIDDEN,
        r"(num_position_embeddings)": (IMAGE_SIZE // PATCH_SIZE) ** 2,
    },
}
_LAYERS = re.compile(
    r"(num_(\w+_)?layers|n_layers?|decoder_layers|encoder_layers|num_blocks|depth|layers|num_global_layers)"
)
_EXPERTS = re.compile(r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)")
_SHARED_EXPERTS = re.compile(r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)")
_TOKEN = re.compile(r"(\w+?)_(token_id|token_index|token_ids|id)")
_NOT_TOKENS = {"lang_id", "insert_layer_id"}
_TWINS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "head_dim": "qk_rope_head_dim",
}
_LEFT_OUT = {"transformers_version", "id2label", "label2id", "architectures", "_name_or_path", "torch_dtype", "dtype"}
_TEXT_PARTS = re.compile(r"(text_config|llm_config|language_config|decoder|thinker_config|vlm_config)")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """
    Args:
        model_type (`str`): a key of `CONFIG_MAPPING`.

    Returns:
        The configuration of a model with a few small layers.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = _Shrinker(FIELDS.get(model_type, {})).shrink(config_class)
    return config_class(**fields)


class _Shrinker:
    """Makes fields of small configurations. Tokens of one name get one id wherever the name occurs.

    Args:
        given (`Mapping`): fields of the configuration that are used as they are, by path (`text_config.head_dim`); the
            empty path has arguments for the default configuration.
    """

    def __init__(self, given: Mapping[str, Any]):
        self.given = given
        self.tokens: dict[str, int] = {}

    def shrink(self, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        return self._part(config_class(**self.given.get("", {})).to_dict(), "", "text")

    def _part(self, fields: dict[str, Any], path: str, role: str) -> dict[str, Any]:
        """The small form of a configuration, or of one within it."""
        count, lists = _layer_lists(fields)
        kept = _kept_layers(count, [fields[name] for name in lists])
        small = {}
        for name, value in fields.items():
            if isinstance(value, dict) and "model_type" in value:
                inner = "text" if role == "text" and _TEXT_PARTS.fullmatch(name) else "tower"
                small[name] = self._part(value, f"{path}.{name}" if path else name, inner)
            elif name in lists:
                small[name] = [value[number] for number in kept]
            elif name == "per_layer_config":
                small[name] = value
            elif type(value) is int and _LAYERS.fullmatch(name):
                small[name] = len(kept) if value == count else min(value, 2)
            else:
                twin = _TWINS.get(name, name)  # sizes that are equal by default stay equal
                small[name] = self._field(twin if value and fields.get(twin) == value else name, value, role)
        _fit_layers(small, fields, kept)
        for where, value in self.given.items():
            parent, _, name = where.rpartition(".")
            if name and parent == path:
                small[name] = value
        return {name: value for name, value in small.items() if name not in _LEFT_OUT}

    def _field(self, name: str, value: Any, role: str) -> Any:
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            return _small_rope(value)
        token = _TOKEN.fullmatch(name)
        is_token = type(value) is int or (value is None and re.match(r"image|video", name) is not None)
        if token and name not in _NOT_TOKENS and is_token:
            return self._token(token[1])
        if value is None or (isinstance(value, bool) and name not in _EVERYWHERE):
            return value
        if name in _EVERYWHERE:
            size = _EVERYWHERE[name]
            return size if isinstance(size, list) else _like(value, size)
        if _EXPERTS.fullmatch(name):
            return _like(value, 4)
        if _SHARED_EXPERTS.fullmatch(name) or name in ("first_k_dense_replace", "num_dense_layers"):
            return min(value, 1)
        for pattern, size in _SIZES[role].items():
            if re.fullmatch(pattern, name):
                if "key_value" in name and value == 1:
                    return 1
                return _like(value, size)
        if re.fullmatch(r"\w*(dropout|drop|pdrop|drop_rate)\w*", name) and isinstance(value, float):
            return 0.0
        return value

    def _token(self, name: str) -> int:
        fixed = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": BOS}
        if name not in fixed and name not in self.tokens:
            self.tokens[name] = FIRST_SPECIAL + len(self.tokens)
        return fixed.get(name, self.tokens.get(name, PAD))


def _like(value: Any, size: Any) -> Any:
    """A size in the form of the default: one number, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        return [size] * len(value)
    return size


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if rope and all(isinstance(value, dict) for value in rope.values()):  # one entry per kind of layer
        return {kind: _small_rope(value) for kind, value in rope.items()}
    rope = {**rope, "rope_theta": rope.get("rope_theta") or 10000.0}
    if rope.get("rope_type") in ("dynamic", "longrope", "mrope"):
        kept = ("rope_theta", "partial_rotary_factor", "mrope_section")
        rope = {"rope_type": "default", **{name: rope[name] for name in kept if name in rope}}
    if "mrope_section" in rope:
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        quarter = max(half // 4, 1)
        rope["mrope_section"] = [half - 2 * quarter, quarter, quarter] if half > 2 else [1, 1, 0]
    return rope


def _layer_lists(fields: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """The number of layers, and the names of the fields that have an entry for each layer."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    count = next((fields[name] for name in names if isinstance(fields.get(name), int)), None)
    lists = [
        name
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == count and count > 4 and not isinstance(value[0], dict)
    ]
    return count, lists


def _kept_layers(count: int | None, lists: list[list[Any]]) -> list[int]:
    """Numbers of the layers that a small model keeps: the first of each kind, and at least two."""
    if count is None:
        return [0, 1]
    kinds: dict[tuple[str, ...], int] = {}
    for number in range(count):
        kinds.setdefault(tuple(str(values[number]) for values in lists), number)
    kept = sorted(kinds.values())
    return kept[:6] if len(kept) > 1 else [0, 1][: max(count, 1)]


def _fit_layers(small: dict[str, Any], fields: Mapping[str, Any], kept: list[int]) -> None:
    """Settings of single layers follow their layers, in proportion to the size of the others."""
    layers = fields.get("per_layer_config")
    if not layers:
        return
    small["per_layer_config"] = {}
    for number, layer in enumerate(kept):
        own = layers.get(str(layer).zfill(2), layers.get(str(layer), {}))
        sizes = {name: value for name, value in own.items() if type(fields.get(name)) is int}
        fitted = {name: max(1, round(small[name] * value / fields[name])) for name, value in sizes.items()}
        if own:
            small["per_layer_config"][str(number)] = {**own, **fitted}


__all__ = ["BOS", "EOS", "HIDDEN", "IMAGE_SIZE", "PAD", "PATCH_SIZE", "TEXT", "VOCAB_SIZE", "WINDOW", "tiny_config"]
