"""A chat that the target answers itself, and the entry that is written for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import BatchFeature

from ...errors import MSDDataError, MSDError
from ...prompts import build_chat_inputs
from ...writing.saving import remove_temporary_files, replaced_file
from ..data.chat_rendering import ChatRenderer
from ..data.conversations import Conversation, count_images


_IMAGE_TAG = "<image>"
_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


class AnsweredChat:
    """A conversation that the target answers: `messages` holds the questions and answers so far, `questions` the
    remaining questions."""

    def __init__(self, conversation: Conversation):
        self.id, self.complete = conversation.id, True
        # The images keep their order, since a system message comes first and answers hold no images.
        self.messages = [message for message in conversation.messages if message["role"] == "system"]
        self.questions = [message for message in conversation.messages if message["role"] == "user"]
        self.sources, self.images = conversation.images, conversation.open_images()
        parts = [part for message in (*self.messages, *self.questions) for part in message["content"]]
        if any(_IMAGE_TAG in part.get("text", "") for part in parts):
            raise MSDDataError("special token in text", f"{_IMAGE_TAG!r} is written in a text.", self.id)

    @property
    def is_answered(self) -> bool:
        """Whether there is at least one answer."""
        return any(message["role"] == "assistant" for message in self.messages)

    def with_question(self) -> list[dict[str, Any]]:
        """The messages so far, followed by the next question."""
        return [*self.messages, *self.questions[:1]]

    def prompt(self, processor: Any, renderer: ChatRenderer) -> BatchFeature:
        """The target's inputs for the next answer."""
        messages = self.with_question()
        num_images = renderer.count_images(messages)
        renderer([*messages, _ANY_ANSWER])  # raises if the chat template refuses the messages
        # A copy, because some releases of transformers write into the messages.
        return build_chat_inputs(processor, copy.deepcopy(messages), self.images[:num_images])

    def answer(self, text: str, ended: bool) -> None:
        """Adds the next answer. An empty answer is dropped. An answer that has not `ended` is the last one."""
        # The target may write the tag as ordinary text, but in the file it would stand for an image.
        text = text.replace(_IMAGE_TAG, "").strip()
        if not ended:
            text = text.rstrip("\ufffd")  # the first bytes of a character that the limit cut
        if text:
            self.messages = [*self.with_question(), _answer(text)]
            self.complete = ended
        self.questions = self.questions[1:] if text and ended else []


class EntryWriter:
    """Makes the LLaVA-style entries of answered chats. Writes images in memory as PNG files beside the output."""

    def __init__(self, output: Path, image_folder: Path | None):
        self.folder, self.image_folder = output.with_name(f"{output.stem}_images"), image_folder

    def __call__(self, index: int, chat: AnsweredChat) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": chat.id}
        names = [self._name(chat, number, index) for number in range(count_images(chat.messages))]
        if names:
            entry["image"] = names[0] if len(names) == 1 else names
        entry["conversations"] = [
            {"from": _NAMES[message["role"]], "value": _to_value(message["content"])} for message in chat.messages
        ]
        return entry if chat.complete else {**entry, "complete": False}

    def _name(self, chat: AnsweredChat, number: int, index: int) -> str:
        source = chat.sources[number]
        if isinstance(source, Path) and self.image_folder is not None:
            return source.relative_to(self.image_folder).as_posix()
        self.folder.mkdir(exist_ok=True)
        name = f"{index:07d}-{number}.png"
        path = self.folder / name
        remove_temporary_files(path)
        with replaced_file(path) as temporary:
            chat.images[number].save(temporary, format="PNG")
            # A resumed run writes the image of its first sample again.
            if path.exists() and path.read_bytes() != temporary.read_bytes():
                raise MSDError(f"{str(path)!r} is there, with another image: choose another name for the output.")
        return f"{self.folder.name}/{name}"


def _to_value(content: list[dict[str, Any]]) -> str:
    """The text that `load_conversations` reads back as `content`. Reading drops a line break on each side of a tag."""
    value, text = "", ""
    for part in content:
        if part["type"] == "text":
            text = part["text"]
            value += text
        else:
            value += ("\n" if text.endswith("\n") else "") + f"{_IMAGE_TAG}\n"
            text = ""
    return value


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


_ANY_ANSWER = _answer("Yes.")

__all__ = ["AnsweredChat", "EntryWriter"]
