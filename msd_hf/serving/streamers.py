"""Streamers that hand tokens on, and end `generate` when its request was given up."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from transformers.cli.serving.utils import DirectStreamer
from transformers.generation.streamers import BaseStreamer

from .call import Call


class CallListener(BaseStreamer):
    """
    Listens to `generate` for a request that is answered at once.

    Args:
        call: the request.
    """

    def __init__(self, call: Call):
        self._call = call
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, then tokens. Raises [`CallCancelled`] when the request was given up."""
        self._call.go_on()
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._call.note_begun()

    def end(self) -> None: ...


class CallStreamer(DirectStreamer):
    """
    Streams the text of a request to the queue that transformers' server reads.

    Args:
        call: the request.
        tokenizer: the tokenizer of `tokenizers`.
        queue: gets pieces of text.
        response_parser (*optional*): of transformers' server.
    """

    def __init__(self, call: Call, tokenizer: Any, queue: asyncio.Queue, response_parser: Any = None):
        super().__init__(tokenizer, call.loop, queue, response_parser=response_parser)
        self._listener = CallListener(call)
        self._call = call

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, then tokens. Raises [`CallCancelled`] when the request was given up."""
        self._listener.put(value)
        super().put(value)

    def end(self) -> None:
        """Nothing: the reader asks for the figures of the call when the stream ends, so [`Generation`] ends it."""

    def finish(self) -> None:
        """Ends the stream."""
        super().end()

    def cancel(self) -> None:
        """Called by transformers' server when the client has gone."""
        self._call.cancel()


__all__ = ["CallListener", "CallStreamer"]
