"""The `generation_config` of a request, which `transformers chat` sends: settings of sampling and of length."""

from __future__ import annotations

import json
from typing import Any

from ..errors import shown
from .refusals import refused


FIELD = "generation_config"
# fmt: off
_ALLOWED = frozenset((
    "max_new_tokens", "min_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "renormalize_logits", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version",
))
# fmt: on
# Others choose caches, other ways of decoding, or code of the Hub. They may have the value that changes nothing.
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


def check_generation_config(text: Any) -> dict[str, Any]:
    """
    Reads the `generation_config` of a request.

    Args:
        text: JSON; `None` if the request has none.

    Raises:
        RequestError: when it is no JSON object, or holds a setting that a request may not choose.
    """
    if text is None:
        return {}
    try:
        given = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise refused(f"`{FIELD}` must be a text that holds a JSON object, not {shown(text)}.", FIELD)
    for name, value in given.items():
        if name not in _ALLOWED and value is not None and value != _NEUTRAL.get(name):
            raise refused(f"`{FIELD}`: a request may not set {shown(name)}, which was {shown(value)}.", FIELD)
    length = given.get("max_new_tokens")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise refused(f"`{FIELD}`: `max_new_tokens` must be a number above 0, not {shown(length)}.", FIELD)
    return given


__all__ = ["check_generation_config"]
