"""The messages of a request: their form is checked, and pictures are read, so that no URL reaches a processor."""

from __future__ import annotations

from typing import Any

from ..errors import shown
from ..prompts import is_unicode
from .images import RequestImages
from .limits import ServingLimits
from .refusals import refused


_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "input_image")
_FILES = ("file", "input_file")
_ITEMS = ("reasoning", "function_call", "function_call_output")  # of the Responses API, which are no messages


class RequestMessages:
    """
    Checks the messages of one request, and replaces each picture by what it shows.

    Args:
        limits: what the server allows.
        takes_images: whether the target sees pictures.
        most_characters: a longer text has more tokens than the target takes; `None` for no limit.
    """

    def __init__(self, limits: ServingLimits, takes_images: bool, most_characters: int | None):
        self._images = RequestImages(limits)
        self._takes_images = takes_images
        self._most_characters = most_characters
        self._characters = 0

    def chat(self, messages: Any) -> list[dict[str, Any]]:
        """The `messages` of a chat completion. Raises [`RequestError`]."""
        if not isinstance(messages, list) or not messages:
            raise refused(f"`messages` must be a list of messages, not {shown(messages)}.", "messages")
        return [self._message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def responses(self, given: Any) -> str | list[dict[str, Any]]:
        """The `input` of a response. Raises [`RequestError`]."""
        if isinstance(given, str):
            return self._text(given, "input")
        if not isinstance(given, list) or not given:
            raise refused(f"`input` must be a text or a list of items, not {shown(given)}.", "input")
        if all(isinstance(item, dict) and "role" not in item and item.get("type") not in _ITEMS for item in given):
            return self._content(given, "input")
        if isinstance(given[0], dict) and "role" not in given[0]:  # transformers' server would pass over it
            raise refused(f"input[0] must be a message, as others follow, not {shown(given[0])}.", "input[0]")
        return [self._item(item, f"input[{index}]") for index, item in enumerate(given)]

    def text(self, text: Any, place: str) -> str | None:
        """A text beside the messages, such as `instructions`. Raises [`RequestError`]."""
        return None if text is None else self._text(text, place)

    def _item(self, item: Any, place: str) -> dict[str, Any]:
        if isinstance(item, dict) and "role" not in item and item.get("type") in _ITEMS:
            return item
        return self._message(item, place)

    def _message(self, message: Any, place: str) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise refused(f"{place} must be an object with a `role`, not {shown(message)}.", place)
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content")
        if isinstance(content, list):
            content = self._content(content, f"{place}.content")
        elif content is not None or not message.get("tool_calls"):
            content = self._text(content, f"{place}.content")
        return {**message, "role": role, "content": content}

    def _content(self, parts: list[Any], place: str) -> list[dict[str, Any]]:
        return [self._part(part, f"{place}[{index}]") for index, part in enumerate(parts)]

    def _part(self, part: Any, place: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS:
            return {"type": "text", "text": self._text(part.get("text"), f"{place}.text")}
        if kind in _IMAGES:
            url = part.get("image_url")
            return self._image(url.get("url") if isinstance(url, dict) else url, f"{place}.image_url")
        if kind in _FILES:
            file = part.get("file", part)
            content = file.get("file_data", file.get("file_url")) if isinstance(file, dict) else None
            return self._image(content, f"{place}.file_data")
        raise refused(
            f"{place} must be a part of type `text` or `image_url` (`input_text` or `input_image` in responses), "
            f"not {shown(part)}.",
            place,
        )

    def _image(self, url: Any, place: str) -> dict[str, Any]:
        if not self._takes_images:
            raise refused(f"{place}: the target of this server reads text only.", place)
        # transformers' server takes this key, and its processors a picture in place of a URL.
        return {"type": "image_url", "image_url": {"url": self._images.read(url, place)}}

    def _text(self, text: Any, place: str) -> str:
        if not isinstance(text, str):
            raise refused(f"{place} must be a text, not {shown(text)}.", place)
        if not is_unicode(text):
            raise refused(f"{place} is not valid Unicode.", place)
        self._characters += len(text)
        if self._most_characters is not None and self._characters > self._most_characters:
            raise refused(
                f"The prompt is too long: its text has more than {self._most_characters:,} characters.",
                place,
                "context_length_exceeded",
            )
        return text


__all__ = ["RequestMessages"]
