"""The socket and the server process."""

from __future__ import annotations

import logging as python_logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from transformers.utils import logging

from ..errors import MSDError
from .sockets import bound_socket


_SHUTDOWN_SECONDS = 5  # for answers that are being written


def open_socket(host: str, port: int) -> socket.socket:
    """
    Takes a port, before anything is loaded.

    Args:
        host: address or name to listen on.
        port: 0 for any that is free.

    Raises:
        MSDError: when it cannot be had.
    """
    try:
        return bound_socket(host, port)
    except OSError as error:
        raise MSDError(f"--host {host} --port {port} cannot be used: {error.strerror or error}.") from error


def make_server(app: Any) -> uvicorn.Server:
    """The server of an application. `server.run(sockets=[...])` serves until it is interrupted."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # the gate logs requests
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def log_requests(print_line: Callable[[str], None]) -> None:
    """
    Prints the lines of the log of requests, and silences those of transformers' server.

    Args:
        print_line: prints a line.
    """

    class Handler(python_logging.Handler):
        def emit(self, record: python_logging.LogRecord) -> None:
            print_line(self.format(record))

    # `msd_hf.serving`
    own = logging.get_logger(__name__.rpartition(".")[0])
    own.setLevel(python_logging.INFO)
    own.addHandler(Handler())
    own.propagate = False
    logging.get_logger("transformers.cli.serving").setLevel(python_logging.ERROR)


__all__ = ["log_requests", "make_server", "open_socket"]
