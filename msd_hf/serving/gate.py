"""What stands before the application: how many requests, how large, how long. Ends those whose client has left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from transformers.utils import logging

from .call import Call, current_call
from .limits import ServingLimits
from .metrics import ServerMetrics
from .refusals import RequestError, server_error, server_stops
from .replies import error_event


logger = logging.get_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_LEFT = 499  # in the log alone, as other servers write it
_DRAIN_SECONDS, _DRAIN_TIMES = 5.0, 4
_SEND_SECONDS = 5.0


class _ClientLeft(Exception):
    pass


class Gate:
    """
    An ASGI application around another one.

    A request that is posted counts against `max_requests` from its first byte until its generation has left the
    thread, also when its client leaves earlier: a client that comes and goes cannot pile up work.

    Args:
        app: the application.
        limits: what the server allows.
    """

    def __init__(self, app: Any, limits: ServingLimits):
        self._app = app
        self._limits = limits
        self._running = 0
        self.metrics = ServerMetrics(lambda: self._running)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "http" and scope["method"] == "POST":
            await _Passage(self, scope, receive, send).run()
        else:
            await self._app(scope, receive, send)

    def enter(self) -> None:
        """Counts a request in. Raises [`RequestError`] (429) when there are too many."""
        if self._running >= self._limits.max_requests:
            raise RequestError(
                429, f"{self._running} requests are running or waiting: try again later.", "too_many_requests"
            )
        self._running += 1

    def leave(self, call: Call) -> None:
        """Counts a request out, when its generation has ended."""
        if call.job is None:
            self._running -= 1
        else:
            call.job.add_done_callback(lambda _: self._leave_from_thread(call.loop))

    def _leave_from_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(self._count_out)

    def _count_out(self) -> None:
        self._running -= 1


class _Passage:
    """One posted request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Message, receive: Receive, send: Send):
        self._gate = gate
        self._scope, self._receive, self._send = scope, receive, send
        self._app, self._limits = gate._app, gate._limits
        self._call = Call(asyncio.get_running_loop())
        self._started = time.perf_counter()
        self._status: int | None = None
        self._is_read = False  # the whole body
        self._has_ended = False
        self._is_stream = False

    async def run(self) -> None:
        try:
            self._gate.enter()
        except RequestError as error:
            await self._refuse(error, drains=True)
            self._note()
            return
        try:
            await self._pass()
        except _ClientLeft:
            self._status = CLIENT_LEFT
        except RequestError as error:
            await self._refuse(error, drains=error.status == 413)
        except asyncio.CancelledError:  # by the server, at its end; this task has nothing else to do
            await self._refuse(server_stops())
        except Exception as error:
            logger.error("A request failed.", exc_info=error)
            if self._status is None:
                await self._refuse(server_error())
        finally:
            self._call.cancel()
            self._gate.leave(self._call)
            self._note()

    async def _pass(self) -> None:
        try:
            body = await asyncio.wait_for(self._read_body(), self._left())
        except asyncio.TimeoutError:
            raise RequestError(408, f"The request took longer than {self._limits.timeout:g} s.", "timeout") from None
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def replay() -> Message:
            if messages:
                return messages.pop()
            return await asyncio.Future()  # nothing more comes; the gate ends the application when its client leaves

        token = current_call.set(self._call)  # the task copies it
        work = asyncio.ensure_future(self._app(self._scope, replay, self._forward))
        current_call.reset(token)
        watch = asyncio.ensure_future(self._until_client_leaves())
        try:
            await asyncio.wait({work, watch}, timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
            if self._has_ended:  # then the server says that the client has left, before the application returns
                await asyncio.wait({work}, timeout=1)
            if work.done():
                work.result()
                return
            if watch.done():
                raise _ClientLeft
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.wait({work, watch}, timeout=1)
        raise RequestError(504, f"The answer took longer than {self._limits.timeout:g} s.", "timeout")

    def _left(self) -> float:
        return max(0.0, self._limits.timeout - (time.perf_counter() - self._started))

    async def _read_body(self) -> bytes:
        too_large = RequestError(
            413, f"A request may have {self._limits.max_body_bytes:,} bytes.", "request_too_large"
        )
        if self._declared_size() > self._limits.max_body_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            self._is_read = not message.get("more_body", False)
            body += message.get("body", b"")
            if len(body) > self._limits.max_body_bytes:
                raise too_large
            if self._is_read:
                return bytes(body)

    def _declared_size(self) -> int:
        sizes = [value for name, value in self._scope["headers"] if name == b"content-length"]
        return int(sizes[0]) if sizes and sizes[0].isdigit() else 0

    async def _until_client_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._is_stream = any(b"event-stream" in value for _, value in message["headers"])
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def _refuse(self, error: RequestError, drains: bool = False) -> None:
        """Replies with an error, also in the middle of a stream."""
        self._call.error = error
        if drains:
            await self._drain()
        if self._has_ended:
            return
        if self._status is None:
            body = error.body()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            if error.status == 429:
                headers.append((b"retry-after", b"1"))
            await self._forward({"type": "http.response.start", "status": error.status, "headers": headers})
        else:
            body = error_event(self._scope["path"], error).encode() if self._is_stream else b""
        # A client that stopped reading would hold its place for good.
        end = self._forward({"type": "http.response.body", "body": body, "more_body": False})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(end, _SEND_SECONDS)

    async def _drain(self) -> None:
        """Reads on for a moment: many clients read a reply only when they have sent all."""
        if self._declared_size() > _DRAIN_TIMES * self._limits.max_body_bytes:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._discard(_DRAIN_TIMES * self._limits.max_body_bytes), _DRAIN_SECONDS)

    async def _discard(self, most_bytes: int) -> None:
        while most_bytes > 0 and not self._is_read:
            message = await self._receive()
            most_bytes -= len(message.get("body", b""))
            self._is_read = not message.get("more_body", False)

    def _note(self) -> None:
        seconds = time.perf_counter() - self._started
        self._gate.metrics.note(self._scope["path"], self._status or CLIENT_LEFT, seconds, self._call)


__all__ = ["CLIENT_LEFT", "Gate"]
