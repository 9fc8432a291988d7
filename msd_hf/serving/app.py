"""The application: transformers' own, with the pair in the place of its models, behind the gate."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server
from transformers.utils import logging

from ..prompts import build_inputs, check_chat_template, move_inputs
from .call import current_call
from .fields import check_model, unknown_model
from .gate import Gate
from .generation import Generation, PairGenerationState
from .handlers import PairChatHandler, PairResponseHandler
from .limits import ServingLimits
from .pair import PairManager, ServedPair
from .refusals import RequestError, refused, server_error
from .replies import CHAT, RESPONSES


logger = logging.get_logger(__name__)

# Of transformers' server. Its others load and unload models, or transcribe.
_ROUTES = (CHAT, RESPONSES, "/v1/models", "/health")


def build_app(pair: ServedPair, limits: ServingLimits | None = None) -> Gate:
    """
    Makes the ASGI application that serves a pair.

    Args:
        pair: what is served.
        limits (*optional*): what requests may cost and name.

    Raises:
        MSDError: when the processor has no chat template.
    """
    check_chat_template(pair.processor)
    limits = limits or ServingLimits()
    positions = getattr(pair.target.config.get_text_config(), "max_position_embeddings", None)
    max_length = limits.max_length or positions
    generation = Generation(pair.draft, max_length)
    manager, state = PairManager(pair), PairGenerationState(generation)
    parts = (pair, manager, state, limits, max_length)
    # This server has none of the other handlers: their routes are taken out below.
    handlers: dict[str, Any] = {name: None for name in inspect.signature(build_server).parameters if "handler" in name}
    handlers |= {"chat_handler": PairChatHandler(*parts), "response_handler": PairResponseHandler(*parts)}
    app = build_server(manager, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
    gate = Gate(app, limits)
    _add_routes(app, pair, manager, gate)
    _add_error_handlers(app)
    _end_with(app, generation)
    _warm_up(pair, generation)
    return gate


def _add_routes(app: FastAPI, pair: ServedPair, manager: PairManager, gate: Gate) -> None:
    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        if name != pair.name:
            raise unknown_model(name, pair.name)
        return manager.list_models()[0]

    @app.post("/load_model")
    async def load_model(body: dict[str, Any]) -> StreamingResponse:  # `transformers chat` begins with it
        check_model(body, pair.name)
        return StreamingResponse(manager.load_model_streaming(), media_type="text/event-stream")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(gate.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    def reply(error: RequestError) -> JSONResponse:
        call = current_call.get(None)
        if call is not None:
            call.error = error
        return JSONResponse(error.content(), error.status)

    @app.exception_handler(RequestError)
    async def on_refusal(_: Request, error: RequestError) -> JSONResponse:
        return reply(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        return reply(RequestError(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def on_unreadable_body(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{item['msg']}" for item in error.errors())
        return reply(refused(f"The body must be a JSON object, sent as application/json: {problems}."))

    @app.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return reply(server_error())  # the gate logs the error


def _end_with(app: FastAPI, generation: Generation) -> None:
    """Ends the generation with the application."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with inner(app) as state:
            yield state
        generation.stop()

    app.router.lifespan_context = lifespan


def _warm_up(pair: ServedPair, generation: Generation) -> None:
    """Generates a few tokens: a pair that fails does so before the first request, which is then as fast as others."""
    inputs = move_inputs(build_inputs(pair.processor, "Hello."), pair.target)
    for draft in (pair.draft, None):
        arguments = {} if draft is None else {"assistant_model": draft}
        generation.submit(pair.target.generate, **inputs, **arguments, max_new_tokens=4).result()


__all__ = ["build_app"]
