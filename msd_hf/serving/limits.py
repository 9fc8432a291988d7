"""What a request may cost and name. The defaults are those of `msd-hf serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServingLimits:
    """
    Limits of a server.

    Args:
        max_new_tokens (`int`): length of an answer if the request sets none.
        max_length (`int`, *optional*): most tokens of prompt and answer together; `None`: the positions that the
            target's config gives, or no limit if it gives none.
        max_body_bytes (`int`): size of a request.
        max_images (`int`): pictures of a request.
        max_image_pixels (`int`): pixels of all pictures of a request together.
        max_requests (`int`): requests at once, running and waiting.
        timeout (`float`): seconds from the first byte of a request to the last of its answer.
        remote_images (`bool`): whether pictures may be fetched from `http(s)://` addresses.
        image_folder (`Path`, *optional*): folder whose pictures a request may name as `file://` URLs.
    """

    max_new_tokens: int = 1024
    max_length: int | None = None
    max_body_bytes: int = 32 * MEBIBYTE
    max_images: int = 8
    max_image_pixels: int = 32_000_000
    max_requests: int = 16
    timeout: float = 300.0
    remote_images: bool = False
    image_folder: Path | None = None


__all__ = ["MEBIBYTE", "ServingLimits"]
