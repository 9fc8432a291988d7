"""Renders conversations with a chat template and finds the places of the assistant's answers in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...errors import MSDDataError, MSDError, is_about_input
from ...prompts import check_chat_template
from .conversations import count_images


_PROBE = ("Ping?", "Pong.", "Ping again?", "Pong again.")
_ADVICE = (
    "Give the processor a chat template in which each answer stands between {% generation %} and {% endgeneration %}."
)


@dataclass(frozen=True)
class RenderedChat:
    """
    The text of a conversation, and the places of the assistant's answers in it.

    Args:
        text: the text up to the last trained token, before the processor expands images.
        answers: begin and end of each answer, in characters. The token that ends the turn belongs to the answer.
    """

    text: str
    answers: list[tuple[int, int]]


class ChatRenderer:
    """
    Renders conversations with the chat template of a processor or tokenizer.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's processor.

    Raises:
        MSDError: when there is no template, or the template does not show where an answer begins.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        check_chat_template(processor)
        added = sorted(self.tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
        self._added = "|".join(re.escape(token.content) for token in added) or "(?!)"
        self._as_text = isinstance(processor, PreTrainedTokenizerBase)
        self._check_template()
        self.image_tokens = self._find_image_tokens()
        special = {token.content for token in added if token.special} | set(self.image_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def __call__(self, messages: list[dict[str, Any]], complete: bool = True) -> RenderedChat:
        """
        Renders messages. The last message must be the assistant's.

        Args:
            messages: chat messages in the form of [`Conversation`].
            complete: `False` if a length limit cut the last answer. The text then ends with this answer, without a
                token that ends the turn.

        Raises:
            MSDDataError: when the template refuses the messages, or changes an answer.
        """
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text" and (found := self._special.search(part["text"])):
                    raise MSDDataError(
                        "special token in text", f"{found[0]!r} is written in a turn of the {message['role']}."
                    )
        answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
        text = self._render(messages)
        # First choice: an answer begins where its prompt ends, because the target writes all text after the prompt,
        # white space too, which generation marks may leave out. Second choice: the generation marks, for templates
        # that write an earlier turn in another way than the last turn.
        for find_begins in (self._after_prompts, self._at_marks):
            begins = find_begins(messages, text)
            ends = [_end_of(answer, text, begin) for answer, begin in zip(answers, begins, strict=False)]
            if len(begins) == len(answers) and None not in ends:
                break
        else:
            raise MSDDataError("refused by chat template", "the chat template hides where an answer begins.")
        spans = [(begin, end) for begin, end in zip(begins, ends, strict=True) if end is not None]
        return self._with_ends(text, spans, complete)

    def count_images(self, messages: list[dict[str, Any]]) -> int:
        """
        Counts the images of messages.

        Raises:
            MSDDataError: when there are images and the target takes none.
        """
        num_images = count_images(messages)
        if num_images and not self.image_tokens:
            raise MSDDataError("image for a text-only target", "has an image, but the target's chat takes none.")
        return num_images

    def _with_ends(self, text: str, spans: list[tuple[int, int]], complete: bool) -> RenderedChat:
        # No turn follows the last answer, so an added token right after it is the token that ends turns. That token
        # may differ from `eos_token`, as in Gemma.
        eos_token = self.tokenizer.eos_token
        last_end = spans[-1][1]
        found = re.compile(rf"\s*({self._added})").match(text, last_end)
        ends = {token for token in (eos_token, found and found[1]) if token}
        end_pattern = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends)) or '(?!)'})")
        result = []
        for begin, end in spans[:-1] if not complete else spans:
            match = end_pattern.match(text, end)
            # An answer without an end token loses its trailing white space, which may share a token with the
            # template's text after it.
            result.append((begin, match.end() if match else begin + len(text[begin:end].rstrip())))
        if not complete:
            return RenderedChat(text[:last_end], [*result, spans[-1]])
        text = text[: result[-1][1]]
        if not end_pattern.match(text, last_end) and eos_token:
            text += eos_token
            result[-1] = (result[-1][0], len(text))
        return RenderedChat(text, result)

    def _after_prompts(self, messages: list[dict[str, Any]], text: str) -> list[int]:
        """The places where the prompts for the answers end. A prompt that the text does not begin with is left out."""
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self._render(messages[:place], add_generation_prompt=True) for place in places]
        return [len(prompt) for prompt in prompts if text.startswith(prompt)]

    def _at_marks(self, messages: list[dict[str, Any]], text: str) -> list[int]:
        """The places where answers begin by the generation marks of the template; empty without such marks."""
        template = self.processor.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if template is None or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return []
        with _template_errors():
            rendered, marks = render_jinja_template(
                conversations=[self._to_chat(messages)],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return [begin for begin, _ in marks[0]] if rendered == [text] else []

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        with _template_errors():
            return self.processor.apply_chat_template(
                self._to_chat(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )

    def _to_chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages for `apply_chat_template`, copied because some releases of transformers write into them."""
        if not self._as_text:
            return [{**message, "content": [dict(part) for part in message["content"]]} for message in messages]
        return [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])}
            for message in messages
        ]

    def _check_template(self) -> None:
        """Renders a chat with known answers, to find out whether the template takes a text or a list of parts."""
        messages = [_message(role, text) for role, text in zip(("user", "assistant") * 2, _PROBE, strict=True)]
        self._special = re.compile("(?!)")
        problem: Exception | None = None
        for as_text in (self._as_text, not self._as_text):
            self._as_text = as_text
            try:
                self(messages)
                return
            except MSDDataError as error:
                problem = problem or error
        name = type(self.processor).__name__
        raise MSDError(
            f"The chat template of `{name}` does not show where an answer begins: {problem} {_ADVICE}"
        ) from problem

    def _find_image_tokens(self) -> list[str]:
        """The tokens that stand for an image before it is expanded; empty if the target takes no images."""
        if self._as_text or getattr(self.processor, "image_processor", None) is None:
            return []
        without = _message("user", _PROBE[0])
        with_image = {"role": "user", "content": [{"type": "image"}, *without["content"]]}
        try:
            tokens = [re.findall(self._added, self._render([message])) for message in (with_image, without)]
        except MSDDataError as error:
            raise MSDError(f"The processor takes images, but for a message with an image {error}") from error
        return sorted(set(tokens[0]) - set(tokens[1]))


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program, which can fail in any way
        if not is_about_input(error):
            raise
        kind = "refuses it" if isinstance(error, TemplateError) else f"fails ({type(error).__name__})"
        raise MSDDataError("refused by chat template", f"the chat template {kind}: {error}.") from error


def _end_of(answer: str, text: str, begin: int) -> int | None:
    """The place where `answer` ends if it stands in `text` at `begin`, else `None`. White space before the answer is
    skipped, because a template may add or strip some."""
    if text.startswith(answer, begin):
        return begin + len(answer)
    while begin < len(text) and text[begin].isspace():
        begin += 1
    answer = answer.strip()
    return begin + len(answer) if text.startswith(answer, begin) else None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


__all__ = ["ChatRenderer", "RenderedChat"]
