"""Taking a port of this machine."""

from __future__ import annotations

import socket


def bound_socket(host: str, port: int) -> socket.socket:
    """
    Takes a port.

    Args:
        host: address or name to listen on.
        port: 0 for any that is free.

    Raises:
        OSError: when it cannot be had, or the host is no name.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except UnicodeError as error:  # a name with a part that is empty or too long
        raise OSError(f"{host!r} is no name of a machine") from error
    opened = socket.socket(family, kind)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


__all__ = ["bound_socket"]
