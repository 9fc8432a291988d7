"""The `generation_config` of a request, which `transformers chat` sends: settings of sampling and of length."""

from __future__ import annotations

import json
from typing import Any

from ..errors import shown
from .fields import LEAST_TEMPERATURE, check_stop, is_number
from .refusals import refused


FIELD = "generation_config"
# fmt: off
_ALLOWED = frozenset((
    "max_new_tokens", "min_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
    "renormalize_logits", "remove_invalid_values", "pad_token_id", "bos_token_id", "eos_token_id",
    "transformers_version",
))
# fmt: on
# Others choose caches, other ways of decoding or code of the Hub, or could forbid every token, which breaks a GPU's
# process. They may have the value that changes nothing.
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
# Scores must stay finite.
_RANGES = {"temperature": (LEAST_TEMPERATURE, 100), "repetition_penalty": (0.1, 10)}


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
        given = json.loads(text, parse_constant=_refuse_constant) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise refused(f"`{FIELD}` must be a text that holds a JSON object, not {shown(text)}.", FIELD)
    for name, value in given.items():
        if name not in _ALLOWED and value is not None and value != _NEUTRAL.get(name):
            raise refused(f"`{FIELD}`: a request may not set {shown(name)}, which was {shown(value)}.", FIELD)
    for name, (least, most) in _RANGES.items():
        value = given.get(name)
        if value is not None and not (is_number(value) and least <= value <= most):
            raise refused(f"`{FIELD}`: `{name}` must be from {least} to {most}, and was {shown(value)}.", FIELD)
    check_stop(given.get("stop_strings"), f"{FIELD}.stop_strings")
    length = given.get("max_new_tokens")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise refused(f"`{FIELD}`: `max_new_tokens` must be a number above 0, not {shown(length)}.", FIELD)
    return given


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


__all__ = ["check_generation_config"]
