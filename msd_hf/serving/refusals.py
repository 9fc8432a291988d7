"""Requests that are not answered: the HTTP status, and the error object that clients of OpenAI's API read."""

from __future__ import annotations

import json
from typing import Any

from ..errors import MSDError


class RequestError(MSDError):
    """
    A request that cannot be answered.

    Args:
        status: of HTTP.
        message: what was wrong, what was got, what to do.
        code: short name of the error, by which programs know it.
        param: the field of the request that is to blame.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def content(self) -> dict[str, Any]:
        """The body of the reply, as OpenAI's API has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """`content` as JSON."""
        return json.dumps(self.content()).encode()


def refused(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that is wrong in itself: status 400."""
    return RequestError(400, message, code, param)


def server_error() -> RequestError:
    """An unforeseen error. Its text may name paths and is for the log of the server alone."""
    return RequestError(500, "The server failed; its log says why.", "internal_error")


def server_stops() -> RequestError:
    """The server ends before the answer does."""
    return RequestError(503, "The server is stopping.", "server_stopping")


__all__ = ["RequestError", "refused", "server_error", "server_stops"]
