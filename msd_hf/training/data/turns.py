"""Converts the turns of a raw sample, in any of the known forms, to chat messages and references to images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import MSDDataError
from ...prompts import is_unicode


ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# LLaVA writes "<image>\n". The line breaks are dropped, since a chat template writes its own.
_IMAGE_TAG = re.compile(r"\n?<image>\n?")
_INLINE_KEYS = ("image", "path", "url")
_TURN_KEYS = ("conversations", "messages", "conversation")
_SPLIT_KEYS = ("prompt", "completion")  # as in trl
# Where a question without an answer stands. `turns` holds the questions of a chat, as in MT-Bench.
_QUESTION_KEYS = ("question", "prompt", "text", "query", "instruction", "turns")
TURN_COLUMNS = "`messages`, `conversations`, or `prompt` and `completion`"
QUESTION_COLUMNS = f"`messages`, `conversations`, or one of {', '.join(f'`{key}`' for key in _QUESTION_KEYS)}"

# While a sample is read, an image part also holds the reference to its image.
_Part = dict[str, Any]


def has_turns(names: Iterable[str], needs_answer: bool = True) -> bool:
    """Whether a data set with columns of these names has turns, or at least questions if it needs no answers."""
    names = set(names)
    if not needs_answer and not names.isdisjoint(_QUESTION_KEYS):
        return True
    return not names.isdisjoint(_TURN_KEYS) or names.issuperset(_SPLIT_KEYS)


def read_messages(sample: Mapping[str, Any], needs_answer: bool = True) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Reads the chat messages of a raw sample, and one reference (path, PIL image or `{"bytes", "path"}`) for each image
    part.

    Turns that are out of order are mended as is usual for ShareGPT: turns of the assistant before the first turn of
    the user are dropped, and consecutive turns of one role are joined with a line break.

    Args:
        sample: the raw sample.
        needs_answer: whether a sample without an answer is broken. If not, a question may also stand under a name of
            its own, see [`load_conversations`].

    Raises:
        MSDDataError: when the turns cannot be used, or the sample has more or fewer images than places for them.
    """
    turns = _first(sample, _TURN_KEYS)
    if turns is None:
        turns = _prompt_and_completion(sample)
    if turns is None and not needs_answer:
        turns = _question(sample)
    if not isinstance(turns, (list, tuple)) or not turns:
        where = TURN_COLUMNS if needs_answer else QUESTION_COLUMNS
        raise MSDDataError("no conversation", f"has no turns under {where}.")
    messages = [_read_turn(turn) for turn in turns]
    system = sample.get("system")
    if isinstance(system, str) and system.strip() and messages[0][0] != "system":
        messages.insert(0, ("system", [_text(system)]))
    images = _images_of(sample)
    if images and sample.get("conversations") is None and _has_only_texts(turns):
        _place_first(messages, len(images))
    _assign_images(messages, images)
    messages = _in_order(messages)
    roles = {role for role, _ in messages}
    if needs_answer and "assistant" not in roles:
        raise MSDDataError("no assistant turn", "no turn of the assistant answers the user.")
    if "user" not in roles:
        raise MSDDataError("no conversation", "no turn is the user's.")
    return _split_references(messages)


def _prompt_and_completion(sample: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a prompt and its completion, each of them turns or the text of one; `None` without both."""
    turns: list[Any] = []
    for key, role in zip(_SPLIT_KEYS, ("user", "assistant"), strict=True):
        value = sample.get(key)
        if isinstance(value, str):
            turns.append({"role": role, "content": value})
        elif isinstance(value, (list, tuple)):
            turns += value
        else:
            return None
    return turns


def _question(sample: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a question: a text, turns, or several questions, of which the first one is taken."""
    value = _first(sample, _QUESTION_KEYS)
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], Mapping):
            return list(value)
        value = value[0]
    if not isinstance(value, str):
        return None
    if not _images_of(sample) and sample.get("image_id") is not None:
        raise MSDDataError(
            "missing image",
            f"is about the image {_shorten(sample['image_id'])}, and does not say which file this is: add its path as "
            "`image`.",
        )
    return [{"role": "user", "content": value}]


def _read_turn(turn: Any) -> tuple[str, list[_Part]]:
    if not isinstance(turn, Mapping):
        raise MSDDataError("malformed turn", f"a turn is {_shorten(turn)}, not an object.")
    name, content = _first(turn, ("from", "role")), _first(turn, ("value", "content"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise MSDDataError("unknown role", f"the role {_shorten(name)} is none of {', '.join(ROLES)}.")
    if isinstance(content, str):
        parts = _split_tags(content)
    elif isinstance(content, (list, tuple)):
        parts = [_read_part(part) for part in content]
    else:
        raise MSDDataError("malformed turn", f"a turn of the {role} has no text but {_shorten(content)}.")
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise MSDDataError("empty turn", f"a turn of the {role} is empty.")
    for part in parts:
        if part["type"] == "text" and not is_unicode(part["text"]):  # for example, a text that was cut
            raise MSDDataError("malformed turn", "a text is not valid Unicode: it holds half of a surrogate pair.")
    if role == "assistant":
        if any(part["type"] == "image" for part in parts):
            raise MSDDataError("image in answer", "there is an image in a turn of the assistant.")
        parts = [_text("".join(part["text"] for part in parts))]
    return role, parts


def _read_part(part: Any) -> _Part:
    if isinstance(part, str):
        return _text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"])
    if kind != "image":
        raise MSDDataError("malformed turn", f"a part of a turn is neither text nor image: {_shorten(part)}.")
    if part.get("bytes") is not None:
        return {"type": "image", "reference": {"bytes": part["bytes"], "path": part.get("path")}}
    return {"type": "image", "reference": _first(part, _INLINE_KEYS)}


def _split_tags(text: str) -> list[_Part]:
    first, *rest = _IMAGE_TAG.split(text)
    parts = [_text(first)]
    for piece in rest:
        parts += [{"type": "image", "reference": None}, _text(piece)]
    # A part of white space alone, as between two tags, is dropped.
    return [part for part in parts if part["type"] == "image" or part["text"].strip()] if rest else parts


def _images_of(sample: Mapping[str, Any]) -> list[Any]:
    images = sample.get("images") or sample.get("image")
    if images is None or images == "":
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _has_only_texts(turns: Iterable[Any]) -> bool:
    """Whether all turns are plain texts without a mark for an image."""
    contents = [_first(turn, ("value", "content")) for turn in turns]
    return all(isinstance(content, str) and not _IMAGE_TAG.search(content) for content in contents)


def _place_first(messages: list[tuple[str, list[_Part]]], count: int) -> None:
    """Makes places for images at the beginning of the user's first turn, where trl puts them too."""
    first = next((parts for role, parts in messages if role == "user"), None)
    if first is not None:
        first[:0] = [{"type": "image", "reference": None} for _ in range(count)]


def _assign_images(messages: list[tuple[str, list[_Part]]], images: list[Any]) -> None:
    """Assigns the images of the sample, in order and in place, to the image parts that have no reference yet."""
    places = [part for part in _image_parts(messages) if part["reference"] is None]
    if len(places) != len(images):
        raise MSDDataError(
            "image count",
            f"the number of images is {len(images)}, but of places for them (`<image>` in a text, image parts) "
            f"{len(places)}.",
        )
    for part, image in zip(places, images, strict=True):
        part["reference"] = image


def _in_order(messages: list[tuple[str, list[_Part]]]) -> list[tuple[str, list[_Part]]]:
    ordered: list[tuple[str, list[_Part]]] = []
    for role, parts in messages:
        last = ordered[-1][0] if ordered else None
        if role == "assistant" and last in (None, "system"):
            continue
        if role == "system" and last not in (None, "system"):
            raise MSDDataError("misplaced system turn", "a system turn comes after other turns.")
        if role == last:
            _append(ordered[-1][1], parts)
        else:
            ordered.append((role, list(parts)))
    return ordered


def _append(parts: list[_Part], more: list[_Part]) -> None:
    if parts[-1]["type"] == "text" and more[0]["type"] == "text":
        parts[-1] = _text(f"{parts[-1]['text']}\n{more[0]['text']}")
        more = more[1:]
    parts += more


def _split_references(messages: list[tuple[str, list[_Part]]]) -> tuple[list[dict[str, Any]], list[Any]]:
    references = [part.pop("reference") for part in _image_parts(messages)]
    return [{"role": role, "content": parts} for role, parts in messages], references


def _image_parts(messages: Iterable[tuple[str, list[_Part]]]) -> list[_Part]:
    return [part for _, parts in messages for part in parts if part["type"] == "image"]


def _text(text: str) -> _Part:
    return {"type": "text", "text": text}


def _first(mapping: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value under `names` that is not `None`. Data sets with columns hold `None` for a missing value."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


__all__ = ["QUESTION_COLUMNS", "ROLES", "TURN_COLUMNS", "has_turns", "read_messages"]
