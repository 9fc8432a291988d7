"""The limits of the fields of a draft's configuration. They are checked before anything is allocated."""

from __future__ import annotations

from typing import Any

from transformers.activations import ACT2FN

from ..errors import shown


# The least and the largest value of each integer. The largest values are far above those of any known model.
INTEGER_LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 64),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2**31 - 1),
    "draft_vocab_size": (1, 2**24),
    "trained_visual_rows": (0, 2**24),
    "pad_token_id": (-1, 2**31 - 1),
    "bos_token_id": (-1, 2**31 - 1),
    "chunk_size_feed_forward": (0, 2**20),
}
# Of some kinds of drafts only.
_MORE_LIMITS: dict[str, tuple[int, int]] = {"target_hidden_size": (1, 2**16)}
# These may be `None`: they are not needed, or follow from others.
OPTIONAL_INTEGERS = (
    "num_key_value_heads",
    "head_dim",
    "draft_vocab_size",
    "trained_visual_rows",
    "pad_token_id",
    "bos_token_id",
)
BOOLEANS = (
    "attention_bias",
    "mlp_bias",
    "use_cache",
    "tie_word_embeddings",
    "input_layernorm",
    "decouple_visual_tokens",
    "fc_bias",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "qk_norm",
    "has_own_embedding",
)
MAX_TARGET_LAYERS = 64  # layers of the target that a draft may read
MAX_LAYER_NUMBER = 1023
MAX_NAME_LENGTH = 200  # characters
MAX_FINGERPRINT_ENTRIES = 16
MAX_FINGERPRINT_LENGTH = 1024  # characters

DTYPES = ("float32", "bfloat16", "float16", "float64")

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# The range of each number of the rotary settings, without its lower end.
_ROPE_LIMITS: dict[str, tuple[float, float]] = {
    "rope_theta": (0, 1e15),
    "factor": (0, 1e6),
    "attention_factor": (0, 1e6),
    "beta_fast": (0, 1e6),
    "beta_slow": (0, 1e6),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
    "low_freq_factor": (0, 1e6),
    "high_freq_factor": (0, 1e6),
    "short_mscale": (0, 1e6),
    "long_mscale": (0, 1e6),
}
# Numbers without which a kind of rotary embedding cannot be computed.
_ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def check_limits(config: Any) -> None:
    """
    Checks the types and values of a draft's configuration.

    Args:
        config (`MSDDraftConfig`): the configuration. `head_dim` and `num_key_value_heads` may still be `None`.

    Raises:
        ValueError: names the field, its value and what was expected.
    """
    for name, (least, most) in INTEGER_LIMITS.items():
        if getattr(config, name) is not None or name not in OPTIONAL_INTEGERS:
            _check_integer(name, getattr(config, name), least, most)
    for name, (least, most) in _MORE_LIMITS.items():
        if getattr(config, name, None) is not None:
            _check_integer(name, getattr(config, name), least, most)
    for name in BOOLEANS:
        if not isinstance(getattr(config, name, False), bool):  # each kind of draft has some of them
            raise ValueError(f"`{name}` must be true or false, got {shown(getattr(config, name))}.")
    for name in ("target_model_type", "target_text_model_type", "target_name_or_path", "target_revision"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_NAME_LENGTH):
            raise ValueError(f"`{name}` must be a text of at most {MAX_NAME_LENGTH} characters, got {shown(value)}.")
    _check_number("rms_norm_eps", config.rms_norm_eps, 0, 1)
    _check_number("initializer_range", config.initializer_range, 0, 100, includes_least=True)
    _check_number("attention_dropout", config.attention_dropout, 0, 1, includes_least=True)
    for token in config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]:
        if token is not None:
            _check_integer("eos_token_id", token, *INTEGER_LIMITS["bos_token_id"])
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be the name of an activation function, got {shown(config.hidden_act)}.")
    if config.is_encoder_decoder:
        raise ValueError("`is_encoder_decoder` must be false: a draft is a decoder.")
    _check_target_layers("target_layers", getattr(config, "target_layers", None))
    _check_target_layers("eagle_aux_hidden_state_layer_ids", getattr(config, "eagle_aux_hidden_state_layer_ids", None))
    _check_fingerprint(config.target_fingerprint)
    check_dtype(config.dtype)
    _check_heads(config)
    check_rope(config.rope_parameters, config.head_dim)


def check_dtype(dtype: Any) -> None:
    """Checks the dtype of a configuration, as [`check_limits`] does."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {shown(name)}.")


def _check_heads(config: Any) -> None:
    num_heads, num_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if num_heads % (num_kv_heads or 1) != 0:
        raise ValueError(
            f"`num_attention_heads` ({num_heads}) must be a multiple of `num_key_value_heads` ({num_kv_heads})."
        )
    if (head_dim or 0) % 2:
        raise ValueError(f"`head_dim` must be even, because rotary positions turn pairs, got {head_dim}.")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`{name}` must be an integer between {least} and {most}, got {shown(value)}.")


def _check_number(name: str, value: Any, least: float, most: float, includes_least: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (value == least and not includes_least):  # NaN is not between
        bound = "between" if includes_least else "above"
        raise ValueError(f"`{name}` must be a number {bound} {least:g} and at most {most:g}, got {shown(value)}.")


def _check_target_layers(name: str, layers: Any) -> None:
    if layers is None:
        return
    if not isinstance(layers, list | tuple) or len(layers) > MAX_TARGET_LAYERS:
        raise ValueError(f"`{name}` must be a list of at most {MAX_TARGET_LAYERS} layers, got {shown(layers)}.")
    for layer in layers:
        _check_integer(name, layer, 0, MAX_LAYER_NUMBER)
    if len(set(layers)) < len(layers):
        raise ValueError(f"`{name}` must name each layer once, got {shown(layers)}.")


def _check_fingerprint(fingerprint: Any) -> None:
    if fingerprint is None:
        return
    if not isinstance(fingerprint, dict) or len(fingerprint) > MAX_FINGERPRINT_ENTRIES:
        raise ValueError(
            f"`target_fingerprint` must be an object of at most {MAX_FINGERPRINT_ENTRIES} entries, got "
            f"{shown(fingerprint)}."
        )
    for name, value in fingerprint.items():
        is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        if not is_number and not (isinstance(value, str) and len(value) <= MAX_FINGERPRINT_LENGTH):
            raise ValueError(f"`target_fingerprint.{name}` must be an integer or a short text, got {shown(value)}.")


def check_rope(rope: Any, head_dim: int | None) -> None:
    """Checks the rotary settings of a configuration, as [`check_limits`] does."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ValueError(f"`rope_parameters` must be an object, got {shown(rope)}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ValueError(f"`rope_parameters` must have a `rope_type` of {', '.join(ROPE_KINDS)}, got {shown(kind)}.")
    for name in (*_ROPE_REQUIRED.get(kind, ()), *(["rope_theta"] if "rope_theta" in rope else [])):
        if rope.get(name) is None:
            raise ValueError(f"`rope_parameters` of type {kind!r} must have a `{name}`.")
    for name, (least, most) in _ROPE_LIMITS.items():
        if rope.get(name) is not None:
            _check_number(f"rope_parameters.{name}", rope[name], least, most)
    name = "original_max_position_embeddings"
    if rope.get(name) is not None:
        _check_integer(f"rope_parameters.{name}", rope[name], 1, 2**31 - 1)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("`rope_parameters.partial_rotary_factor` must be 1: a draft turns whole heads.")
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if factors is None:
            continue
        if not isinstance(factors, list) or head_dim not in (None, 2 * len(factors)):
            raise ValueError(f"`rope_parameters.{name}` must be a list of one number for each two of a head.")
        for factor in factors:
            _check_number(f"rope_parameters.{name}", factor, 0, 1e6)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"`rope_parameters.low_freq_factor` must be below `high_freq_factor`, got {low} and {high}.")


__all__ = ["DTYPES", "INTEGER_LIMITS", "check_limits"]
