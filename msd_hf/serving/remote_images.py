"""Fetching a picture from an address that a request names, without reaching what only this machine can reach."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
from urllib.parse import urljoin, urlsplit

from .refusals import RequestError, refused


SECONDS = 10.0  # for a whole picture, redirects included
_MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024


def fetch(url: str, most_bytes: int, place: str) -> bytes:
    """
    Fetches a picture.

    Args:
        url: an `http(s)://` URL.
        most_bytes: its largest size.
        place: where it stands in the request.

    Raises:
        RequestError: when it cannot be fetched, is too large, or the address is not a public one.
    """
    deadline = time.monotonic() + SECONDS
    try:
        for _ in range(_MOST_REDIRECTS + 1):
            content, target = _get(url, most_bytes, deadline, place)
            if target is None:
                return content
            url = urljoin(url, target)
    except RequestError:
        raise
    except (OSError, http.client.HTTPException, ValueError):
        pass  # One answer for all failures: a request does not learn what this machine can reach.
    raise refused(f"{place}: the picture cannot be fetched from its address.", place, "invalid_image")


def _get(url: str, most_bytes: int, deadline: float, place: str) -> tuple[bytes, str | None]:
    """Returns the content, or where a redirect leads."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no http(s) address")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    opened: list[socket.socket] = []
    # A server that sends a byte now and then would never meet the time limit of a single read.
    timer = threading.Timer(seconds, lambda: _end(opened[0] if opened else connection.sock))
    timer.start()
    try:
        connection.connect()
        opened.append(connection.sock)
        # The address is that of the open connection: what a name means could change a moment after a look-up.
        if not is_public(opened[0].getpeername()[0]):
            raise ValueError("not a public address")
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return b"", response.headers["Location"] or ""
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        content = _read(response, most_bytes, place)
        if time.monotonic() > deadline:
            raise TimeoutError
        return content, None
    finally:
        timer.cancel()
        connection.close()


def _read(response: http.client.HTTPResponse, most_bytes: int, place: str) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > most_bytes:
            raise RequestError(413, f"{place}: the picture is larger than a request may be.", "image_too_large", place)
    return bytes(content)


def _end(connection: socket.socket | None) -> None:
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an IP address is one that everybody can reach."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_global and not found.is_multicast


__all__ = ["SECONDS", "fetch", "is_public"]
