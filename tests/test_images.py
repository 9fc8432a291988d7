"""Pictures are read upright and with their true brightness, or refused."""

import pytest
from PIL import Image

from msd_hf.errors import MSDError
from msd_hf.images import read_image, to_rgb
from msd_hf.training.data.conversations import Conversation


def gradient(mode, values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


@pytest.mark.parametrize(
    "mode, values, name",
    [
        ("I;16", [0, 32768, 65535], "a.png"),
        ("I;16", [0, 32768, 65535], "a.tiff"),
        ("I;16B", [0, 32768, 65535], "a.tiff"),
        ("F", [0.0, 0.5, 1.0], "a.tiff"),
        ("F", [0.0, 128.0, 255.0], "a.tiff"),
        ("I", [0, 128, 255], "a.tiff"),
    ],
)
def test_deep_pictures_keep_their_brightness(mode, values, name, tmp_path):
    image = gradient("I;16" if mode == "I;16B" else mode, values)
    if mode == "I;16B":
        image = Image.frombytes(mode, image.size, b"".join(value.to_bytes(2, "big") for value in values))
    image.save(tmp_path / name)
    grey = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    (opened,) = Conversation("a", [], (tmp_path / name,)).open_images()
    for found in (read_image(tmp_path / name), to_rgb(image), opened):
        assert found.mode == "RGB" and [found.getpixel((x, 0)) for x in range(3)] == grey


@pytest.mark.parametrize("mode, values", [("F", [0.0, 300.0]), ("F", [float("nan")] * 2), ("I", [0, 10**6])])
def test_a_brightness_of_unknown_scale_is_refused(mode, values, tmp_path):
    gradient(mode, values).save(tmp_path / "a.tiff")
    with pytest.raises(MSDError, match="no known scale"):
        read_image(tmp_path / "a.tiff")


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 30)
    assert Conversation("a", [], (tmp_path / "a.jpg",)).open_images()[0].size == (20, 30)


def test_a_picture_with_too_many_pixels_is_refused_before_they_are_read(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    for limit in (100_000, 50_000):  # Pillow itself warns above the limit, and refuses twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(MSDError, match=r"bomb\.png"):
            read_image(tmp_path / "bomb.png")


def test_missing_memory_is_not_a_broken_picture(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")
    with pytest.raises(MemoryError):
        Conversation("a", [], (tmp_path / "a.png",)).open_images()
