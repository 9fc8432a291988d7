"""Procedural scenes: coloured shapes in a 2x2 grid, and their rendering to an image.

A scene is pure data. It can be made from a seed on any machine, hashed, compared and assigned to a split without
rendering a picture.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw


SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 30),
    "purple": (140, 40, 170),
    "orange": (250, 135, 20),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "cyan": (150, 225, 230),
    "beige": (225, 205, 165),
}
# In reading order. No name is part of another one, so that an answer with one name does not contain another one.
PLACES = ("top left", "top right", "bottom left", "bottom right")
IMAGE_SIZE = 144  # pixels, square
GRID = 2
MAX_OBJECTS = 4
SPLITS = ("train", "validation", "test")

_CELL = IMAGE_SIZE // GRID
_RADIUS = {"small": 15, "large": 27}  # pixels
_JITTER = {"small": 18, "large": 7}  # pixels; an object never leaves its cell
_SUPERSAMPLING = 3
_OBJECT_WEIGHTS = (1, 2, 3, 2)


@dataclass(frozen=True)
class SceneObject:
    """One shape. `cell` is the index of its grid cell (0-3, in reading order), `offset` its shift from the centre of
    the cell in pixels (x, y)."""

    shape: str
    colour: str
    size: str
    cell: int
    offset: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        """The name of the grid cell, e.g. `"top left"`."""
        return PLACES[self.cell]

    @property
    def name(self) -> str:
        """Colour and shape, unique inside a scene, e.g. `"red circle"`."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        """Size, colour and shape, e.g. `"large red circle"`."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to four objects in distinct cells (sorted in reading order) on a background."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def key(self) -> str:
        """A canonical text of the scene without the offsets. Scenes with the same key have the same answers."""
        parts = [f"{item.cell}:{item.size}:{item.colour}:{item.shape}" for item in self.objects]
        return "|".join([self.background, *parts])


def split_of(key: str) -> str:
    """The split of the content that `key` names: 5% validation, 5% test, 90% train. It depends only on the key."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def check_split(split: str) -> None:
    """Raises `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")


def make_scene(rng: random.Random, split: str, num_objects: int | None = None) -> Scene:
    """Makes a random scene of `split`, with `num_objects` (1-4) or, by default, a random number of objects."""
    check_split(split)
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(f"A scene has 1 to {MAX_OBJECTS} objects, got {num_objects}.")
    while True:
        scene = _random_scene(rng, num_objects or rng.choices(range(1, MAX_OBJECTS + 1), _OBJECT_WEIGHTS)[0])
        if split_of(scene.key) == split:
            return scene


def _random_scene(rng: random.Random, num_objects: int) -> Scene:
    cells = sorted(rng.sample(range(GRID * GRID), num_objects))
    looks = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], num_objects)
    objects = []
    for cell, (shape, colour) in zip(cells, looks, strict=True):
        size = rng.choice(SIZES)
        reach = _JITTER[size]
        offset = (rng.randint(-reach, reach), rng.randint(-reach, reach))
        objects.append(SceneObject(shape, colour, size, cell, offset))
    return Scene(tuple(objects), rng.choice(list(BACKGROUNDS)))


def render(scene: Scene) -> Image.Image:
    """Draws a scene as an RGB image of 144x144 pixels."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        row, column = divmod(item.cell, GRID)
        x = (column * _CELL + _CELL / 2 + item.offset[0]) * _SUPERSAMPLING
        y = (row * _CELL + _CELL / 2 + item.offset[1]) * _SUPERSAMPLING
        draw_shape(draw, item.shape, x, y, _RADIUS[item.size] * _SUPERSAMPLING, COLOURS[item.colour])
    return image.reduce(_SUPERSAMPLING)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    """Draws a shape of `SHAPES` around (x, y), in pixels."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = radius * 0.86
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        points = [(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)]
        draw.polygon(points, fill=fill)
    elif shape == "cross":
        arm = radius * 0.32
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    elif shape == "star":
        points = []
        for corner in range(10):
            reach = radius * (1.08 if corner % 2 == 0 else 0.45)
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, fill=fill)
    else:
        raise ValueError(f"Unknown shape {shape!r}: choose one of {', '.join(SHAPES)}.")
