"""Replies of transformers' server, with what they lack: the acceptance in `usage`, and errors that clients know."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse

from .call import Call
from .fields import FIELD
from .refusals import RequestError


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def with_figures(reply: JSONResponse, call: Call) -> JSONResponse:
    """A reply with the figures of its call in `usage`."""
    return JSONResponse(_add(json.loads(bytes(reply.body)), call))


async def stream_with_figures(path: str, chunks: Any, call: Call) -> AsyncIterator[str]:
    """
    A stream with the figures of its call in `usage`, and an error that is valid JSON.

    Args:
        path: of the request.
        chunks: an asynchronous generator of server-sent events.
        call: the request.
    """
    async with aclosing(chunks):
        async for chunk in chunks:
            if call.error is not None and path == CHAT:
                yield error_event(path, call.error)
                return
            # A text cannot hold this: its quotes are escaped.
            yield _edit(chunk, call) if '"usage":{' in chunk else chunk
    if path == CHAT:
        yield "data: [DONE]\n\n"


def error_event(path: str, error: RequestError) -> str:
    """An error as the last event of a stream."""
    content = error.content()
    if path == RESPONSES:
        content = {**content["error"], "type": "error", "sequence_number": 0}
    return f"data: {json.dumps(content)}\n\n"


def _edit(event: str, call: Call) -> str:
    return f"data: {json.dumps(_add(json.loads(event.removeprefix('data: ')), call))}\n\n"


def _add(content: dict[str, Any], call: Call) -> dict[str, Any]:
    holder = content.get("response", content)
    if isinstance(holder.get("usage"), dict):
        holder["usage"][FIELD] = call.figures()
    return content


__all__ = ["CHAT", "RESPONSES", "error_event", "stream_with_figures", "with_figures"]
