"""The pictures of a request: data URLs, and, only where the server was told so, addresses and files."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import is_about_input, shown
from ..images import to_rgb
from .limits import ServingLimits
from .refusals import RequestError, refused
from .remote_images import fetch


if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow knows more, some of which run other programs (EPS) or are rarely tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class RequestImages:
    """
    Reads the pictures of one request and counts them.

    Args:
        limits: what the server allows.
    """

    def __init__(self, limits: ServingLimits):
        self._limits = limits
        self._count = 0
        self._pixels = 0

    def read(self, url: object, place: str) -> Image:
        """
        Reads a picture, as RGB.

        Args:
            url: a data URL; `http(s)://` and `file://` URLs where the server allows them.
            place: where it stands in the request.

        Raises:
            RequestError: when it is no such URL, is not allowed, is too large, or is no picture.
        """
        if not isinstance(url, str):
            raise refused(f"{place} must be a URL, not {shown(url)}.", place)
        self._count += 1
        if self._count > self._limits.max_images:
            raise refused(f"A request may have {self._limits.max_images} pictures; {place} is one more.", place)
        return self._decode(self._content(url, place), place)

    def _content(self, url: str, place: str) -> bytes:
        scheme = url[: url.find(":")].lower() if ":" in url[:8] else ""
        if scheme == "data":
            return _of_data_url(url, place)
        if scheme in ("http", "https"):
            if not self._limits.remote_images:
                raise refused(
                    f"{place}: this server fetches no pictures (`--remote-images` allows it). Send a data URL.", place
                )
            return fetch(url, self._limits.max_body_bytes, place)
        if scheme == "file":
            return self._of_file(url, place)
        raise refused(
            f"{place} must be a data URL of a picture, `data:image/png;base64,...`, not {shown(url)}.", place
        )

    def _of_file(self, url: str, place: str) -> bytes:
        folder = self._limits.image_folder
        if folder is None:
            raise refused(
                f"{place}: this server reads no files of its own (`--image-folder` allows it). Send a data URL.", place
            )
        # One answer for all paths outside: a request does not learn which files there are.
        missing = refused(f"{place}: there is no such picture in the image folder of this server.", place)
        try:
            parts = urlsplit(url)
            path = Path(url2pathname(parts.path)).resolve()
            is_inside = path.is_relative_to(folder.resolve()) and path.is_file()
        except (OSError, ValueError):
            raise missing from None
        if parts.netloc not in ("", "localhost") or not is_inside:
            raise missing
        if path.stat().st_size > self._limits.max_body_bytes:
            raise RequestError(413, f"{place}: the file is larger than a request may be.", "image_too_large", place)
        return path.read_bytes()

    def _decode(self, content: bytes, place: str) -> Image:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                self._pixels += image.width * image.height
                if self._pixels > self._limits.max_image_pixels:
                    raise RequestError(
                        413,
                        f"{place}: the pictures of a request may have {self._limits.max_image_pixels:,} pixels "
                        f"together, and with this one of {image.width} x {image.height} they have {self._pixels:,}.",
                        "image_too_large",
                        place,
                    )
                return to_rgb(image)
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            if isinstance(error, RequestError) or not is_about_input(error):
                raise
            problem = f"is no picture that can be read; known are {', '.join(_FORMATS)}"
            raise refused(f"{place} {problem}.", place, "invalid_image") from error


def _of_data_url(url: str, place: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise refused(f"{place}: a data URL of a picture reads `data:image/png;base64,...`.", place, "invalid_image")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"{place} is not base64: {error}.", place, "invalid_image") from error


__all__ = ["RequestImages"]
