"""The two endpoints: transformers' handlers, which get checked requests and read pictures."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from ..errors import describe_error, is_about_input
from .call import Call, current_call
from .fields import LENGTHS, check_fields, check_model, take_own_fields
from .generation import PairGenerationState
from .generation_settings import check_generation_config
from .limits import ServingLimits
from .messages import RequestMessages
from .pair import PairManager, ServedPair
from .refusals import RequestError, refused
from .replies import CHAT, RESPONSES, stream_with_figures, with_figures


class PairHandler(BaseHandler):
    """
    What both endpoints share.

    Args:
        pair: what is served.
        manager, state: the pair and its generation, as transformers' server asks for them.
        limits: what the server allows.
        max_length (`int`, *optional*): most tokens of prompt and answer together.
    """

    path: ClassVar[str]

    def __init__(
        self,
        pair: ServedPair,
        manager: PairManager,
        state: PairGenerationState,
        limits: ServingLimits,
        max_length: int | None,
    ):
        super().__init__(model_manager=manager, generation_state=state)
        self._pair = pair
        self._limits = limits
        self._takes_images = manager.get_model_modality(pair.target, pair.processor) is not Modality.LLM
        tokenizer = getattr(pair.processor, "tokenizer", pair.processor)
        longest = max(len(token) for token in tokenizer.get_vocab())
        self._most_characters = None if max_length is None else max_length * longest

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        Answers a request.

        Raises:
            RequestError: when it cannot be answered. A stream too begins only when its first token has come, so that
                what `generate` refuses has a status of its own.
        """
        call = current_call.get()
        await asyncio.to_thread(self._prepare, body, call)
        try:
            reply = await super().handle_request(body, request_id)
        except (RequestError, HTTPException):
            raise
        except Exception as error:  # of a template or a processor, about what the request holds
            if not is_about_input(error):
                raise
            raise refused(f"The request cannot be read: {describe_error(error)}") from error
        if not isinstance(reply, StreamingResponse):
            return with_figures(reply, call)
        await call.begun.wait()
        if call.error is not None:
            raise call.error
        reply.body_iterator = stream_with_figures(self.path, reply.body_iterator, call)
        return reply

    def _prepare(self, body: dict[str, Any], call: Call) -> None:
        """Checks a request, and puts its pictures in the place of their URLs."""
        check_model(body, self._pair.name)
        take_own_fields(body, call)
        self._validate_request(body)
        check_fields(body, str(self._pair.processor.chat_template))
        given = check_generation_config(body.get("generation_config"))
        lengths = given.get("max_new_tokens"), *(body.get(name) for name in LENGTHS)
        call.sets_length = any(length is not None for length in lengths)
        self._read_messages(body, RequestMessages(self._limits, self._takes_images, self._most_characters))

    def _read_messages(self, body: dict[str, Any], messages: RequestMessages) -> None:
        raise NotImplementedError

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature") is not None:  # transformers' server samples only if the target's config says so
            config.do_sample = body["temperature"] > 0
            config.temperature = body["temperature"] or None
        if not current_call.get().sets_length:
            config.max_new_tokens = self._limits.max_new_tokens
        return config


class PairChatHandler(PairHandler, ChatCompletionHandler):
    """Answers chat completions."""

    path = CHAT

    def _read_messages(self, body: dict[str, Any], messages: RequestMessages) -> None:
        body["messages"] = messages.chat(body.get("messages"))


class PairResponseHandler(PairHandler, ResponseHandler):
    """Answers requests of the Responses API."""

    path = RESPONSES

    def _read_messages(self, body: dict[str, Any], messages: RequestMessages) -> None:
        body["input"] = messages.responses(body.get("input"))
        body["instructions"] = messages.text(body.get("instructions"), "instructions")
        if body.get("stream") is None:  # transformers' server streams by default, OpenAI's does not
            body["stream"] = False


__all__ = ["PairChatHandler", "PairHandler", "PairResponseHandler"]
