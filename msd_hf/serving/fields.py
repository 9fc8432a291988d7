"""The fields of a request beside its messages: those of msd_hf, and those that the server would have to ignore."""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import shown
from ..limits import LARGEST_SEED
from .call import Call
from .refusals import RequestError, refused


FIELD = "msd_hf"  # of a request: {"draft": false}; of `usage` in its reply: the acceptance
# transformers' server passes over these fields. They may have the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "tool_choice": ("auto", "none"),
    "web_search_options": (),
    "background": (False,),
    "previous_response_id": (),
    "prompt": (),
    "max_tool_calls": (),
    "include": ([],),
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_NUMBERS = {"temperature": (0, 100), "top_p": (0, 1), "frequency_penalty": (-0.9, 2)}
LEAST_TEMPERATURE = 0.001  # above 0; scores are divided by it and must stay finite
_MOST_BIAS, _MOST_BIASED = 100, 1024
_MOST_STOPS, _LONGEST_STOP = 8, 256  # each takes memory for every token of the vocabulary
# Names by which a template could be replaced, or pictures fetched.
_RESERVED = ("messages", "tools", "documents", "chat_template", "images", "videos", "audio", "text", "tokenize")


def take_own_fields(body: dict[str, Any], call: Call) -> None:
    """
    Takes out of a request what transformers' server does not know (`msd_hf`) or would apply too early (`seed`).

    Raises:
        RequestError: when one of them has a wrong value.
    """
    own = body.pop(FIELD, None)
    if own is not None:
        if not isinstance(own, dict) or own.keys() - {"draft"} or not isinstance(own.get("draft", True), bool):
            raise refused(f'`{FIELD}` must be {{"draft": true}} or {{"draft": false}}, not {shown(own)}.', FIELD)
        call.wants_draft = own.get("draft", True)
    seed = body.pop("seed", None)
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise refused(f"`seed` must be a number from 0 to {LARGEST_SEED}, not {shown(seed)}.", "seed")
        call.seed = seed


def check_model(body: dict[str, Any], name: str) -> None:
    """
    Checks the model that a request asks for, and sets it if the request names none.

    Raises:
        RequestError: when it is not the one that is served.
    """
    asked = body.setdefault("model", name)
    if asked != name:
        raise unknown_model(asked, name)


def unknown_model(asked: Any, name: str) -> RequestError:
    """The error of a request for another model: status 404."""
    message = f"There is no model {shown(asked, 200)} here: this server answers as {name!r}."
    return RequestError(404, message, "model_not_found", "model")


def check_fields(body: dict[str, Any], template: str) -> None:
    """
    Checks the fields of a request that change its answer.

    Args:
        body: the request.
        template: the chat template of the target.

    Raises:
        RequestError: for a field that is not supported, or a value that cannot be used.
    """
    for name in body.keys() & _NEUTRAL.keys():
        if body[name] is not None and body[name] not in _NEUTRAL[name]:
            raise refused(f"`{name}` is not supported: leave it out, not {shown(body[name])}.", name)
    for name in LENGTHS:
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise refused(f"`{name}` must be a number of tokens above 0, not {shown(value)}.", name)
    for name, (least, most) in _NUMBERS.items():
        value = body.get(name)
        if value is not None and not (is_number(value) and least <= value <= most):
            raise refused(f"`{name}` must be a number from {least} to {most}, and was {shown(value)}.", name)
    if 0 < (body.get("temperature") or 0) < LEAST_TEMPERATURE:
        raise refused(f"`temperature` must be 0, or not below {LEAST_TEMPERATURE}.", "temperature")
    _check_biases(body.get("logit_bias"))
    check_stop(body.get("stop"), "stop")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise refused(f"`stream` must be true or false, not {shown(stream)}.", "stream")
    _check_template_arguments(body.get("chat_template_kwargs"), template)


def check_stop(stop: Any, field: str) -> None:
    """Checks texts that end an answer. Raises [`RequestError`]."""
    texts = stop if isinstance(stop, list) else [stop]
    are_texts = all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in texts)
    if stop is not None and not (are_texts and 0 < len(texts) <= _MOST_STOPS):
        message = f"`{field}` must be a text of at most {_LONGEST_STOP} characters, or a list of at most {_MOST_STOPS}"
        raise refused(f"{message} of them, not {shown(stop)}.", field)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _check_biases(biases: Any) -> None:
    if biases is None:
        return
    is_right = isinstance(biases, dict) and len(biases) <= _MOST_BIASED and all(key.isdecimal() for key in biases)
    if not is_right or not all(is_number(value) and abs(value) <= _MOST_BIAS for value in biases.values()):
        message = f"`logit_bias` must map at most {_MOST_BIASED} ids of tokens to numbers from -{_MOST_BIAS} to"
        raise refused(f"{message} {_MOST_BIAS}, not {shown(biases)}.", "logit_bias")


def _check_template_arguments(given: Any, template: str) -> None:
    if given is None:
        return
    field = "chat_template_kwargs"
    if not isinstance(given, dict):
        raise refused(f"`{field}` must be an object, not {shown(given)}.", field)
    for name, value in given.items():
        # What the template does not use would go to the processor, which may take sizes of pictures and files.
        is_used = name not in _RESERVED and name.isidentifier() and re.search(rf"\b{name}\b", template)
        if not is_used or not isinstance(value, (bool, str)):
            raise refused(f"`{field}.{name}` must be a text or true or false that the chat template uses.", field)


__all__ = [
    "FIELD",
    "LEAST_TEMPERATURE",
    "LENGTHS",
    "check_fields",
    "check_model",
    "check_stop",
    "is_number",
    "take_own_fields",
    "unknown_model",
]
