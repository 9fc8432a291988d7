"""Reading pictures: completely, upright, and as RGB with 8 bits a channel, which processors expect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from .errors import MSDError, is_about_input


if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: str | Path) -> Image:
    """
    Reads an image file completely, as RGB.

    Raises:
        MSDError: when the file is missing, is not an image, is too large or is damaged.
    """
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise MSDError(f"There is no image file {str(path)!r}.")
    try:
        with open_image(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        if isinstance(error, MSDError) or not is_about_input(error):
            raise
        problem = "is not an image that Pillow can read" if _is_unknown(error) else f"is damaged: {error}"
        raise MSDError(f"The image {str(path)!r} {problem}.") from error


def open_image(source: str | Path | BinaryIO) -> Image:
    """
    Opens an image without reading its pixels.

    Raises:
        MSDError: when Pillow is not installed.
        Exception: of Pillow's, when the source is not an image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MSDError('Reading images needs Pillow: pip install "msd-hf[images]".') from error
    return Image.open(source)


def to_rgb(image: Image) -> Image:
    """
    Reads the pixels of an image, turns it as its EXIF orientation says, and converts it to RGB, as `load_image` of
    transformers does. 16-bit and floating-point pixels are scaled to 8 bits, where Pillow would clip them.

    Raises:
        ValueError: when the picture has too many pixels, or a brightness whose scale is not known.
        Exception: of Pillow's, when the file is damaged.
    """
    from PIL import Image, ImageOps

    width, height = image.size
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"it has {width} x {height} pixels, and `PIL.Image.MAX_IMAGE_PIXELS` allows {most:,}")
    is_png = image.format == "PNG"  # the orientation step returns a copy without its format
    return _to_8_bits(ImageOps.exif_transpose(image), is_png).convert("RGB")


def _to_8_bits(image: Image, is_png: bool) -> Image:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and is_png)  # 16-bit PNGs may open as "I"
    image = image if image.mode == "F" else image.convert("I")
    if is_16_bit:
        return image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    low, high = cast(tuple[float, float], image.getextrema())
    if image.mode == "F" and 0 <= low <= high <= 1:
        return image.point(lambda value: value * 255 + 0.5).convert("L")
    if not 0 <= low <= high <= 255:  # also for NaN
        raise ValueError(f"its pixels go from {low} to {high}, which is no known scale: convert it to 8 bits")
    return image


def _is_unknown(error: Exception) -> bool:
    from PIL import UnidentifiedImageError

    return isinstance(error, UnidentifiedImageError)


__all__ = ["open_image", "read_image", "to_rgb"]
