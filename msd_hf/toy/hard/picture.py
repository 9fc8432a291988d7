"""Procedural pictures of many things: coloured shapes, and signs with a number or a word, in the cells of a grid.

A picture is pure data, as a scene of the small world is. A cell takes 24x24 pixels at any size of the grid, so that a
larger picture shows more, and not the same at another resolution.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ..world import BACKGROUNDS, COLOURS, SHAPES, SIZES, draw_shape, split_of


CELL = 24  # pixels
ORDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SIGN_WORDS = (
    "BANK", "BUS", "CAFE", "CITY", "EXIT", "FISH", "FREE", "GATE", "HELP", "INN", "JAZZ", "LIFT",
    "MENU", "NEWS", "OPEN", "PARK", "PIZZA", "SALE", "SHOP", "SOAP", "STOP", "TAXI", "TEA", "ZOO",
)  # fmt: skip
# How many things a picture has, by the number of cells a side.
NUM_THINGS = {2: (1, 4), 3: (2, 6), 6: (5, 20)}

_SUPERSAMPLING = 4
_RADIUS = {"small": 5.5, "large": 9.5}  # pixels
_JITTER = {"small": 5, "large": 2}  # pixels
_INK = (20, 20, 20)
_CARD = (255, 255, 255)
_SIGN_SHARE = 0.3


@dataclass(frozen=True)
class Thing:
    """What a cell holds: a shape with a colour and a size, or a sign with a text.

    `row` and `column` count from 0, `offset` is the shift from the middle of the cell in pixels (x, y).
    """

    row: int
    column: int
    shape: str = ""
    colour: str = ""
    size: str = ""
    text: str = ""
    offset: tuple[int, int] = (0, 0)

    @property
    def is_sign(self) -> bool:
        """Whether this is a sign."""
        return bool(self.text)

    @property
    def name(self) -> str:
        """Size, colour and shape, or the text of a sign, e.g. `"small red circle"`, `"sign saying 47"`."""
        return f"sign saying {self.text}" if self.is_sign else f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The cell in words, e.g. `"row two, column five"`."""
        return f"row {ORDINALS[self.row]}, column {ORDINALS[self.column]}"


@dataclass(frozen=True)
class Picture:
    """Things in distinct cells, in reading order, on a background. `grid` is the number of cells a side."""

    things: tuple[Thing, ...]
    background: str
    grid: int

    @property
    def key(self) -> str:
        """A canonical text of the picture without the offsets. It determines the split."""
        return "|".join([self.background, str(self.grid), *(f"{t.row}{t.column}:{t.name}" for t in self.things)])

    @property
    def num_pixels(self) -> int:
        """Pixels a side."""
        return self.grid * CELL


def make_picture(rng: random.Random, split: str, grid: int, num_things: int | None = None) -> Picture:
    """Makes a random picture of `split` with `grid` cells a side. Sizes outside `NUM_THINGS` need `num_things`."""
    while True:
        picture = _random_picture(rng, grid, num_things or rng.randint(*NUM_THINGS[grid]))
        if split_of(picture.key) == split:
            return picture


def _random_picture(rng: random.Random, grid: int, num_things: int) -> Picture:
    cells = sorted(rng.sample(range(grid * grid), num_things))
    things = tuple(_random_thing(rng, *divmod(cell, grid)) for cell in cells)
    return Picture(things, rng.choice(list(BACKGROUNDS)), grid)


def _random_thing(rng: random.Random, row: int, column: int) -> Thing:
    if rng.random() < _SIGN_SHARE:
        text = str(rng.randint(10, 99)) if rng.random() < 0.5 else rng.choice(SIGN_WORDS)
        return Thing(row, column, text=text, offset=(0, rng.randint(-4, 4)))
    size = rng.choice(SIZES)
    reach = _JITTER[size]
    offset = (rng.randint(-reach, reach), rng.randint(-reach, reach))
    return Thing(row, column, rng.choice(SHAPES), rng.choice(list(COLOURS)), size, offset=offset)


def render(picture: Picture) -> Image.Image:
    """Draws a picture as an RGB image of 24 pixels a cell."""
    image = Image.new("RGB", (picture.num_pixels, picture.num_pixels), BACKGROUNDS[picture.background])
    for thing in picture.things:
        sprite = _sign(thing.text) if thing.is_sign else _shape(thing.shape, thing.colour, thing.size)
        x, y = thing.column * CELL + thing.offset[0], thing.row * CELL + thing.offset[1]
        image.paste(sprite, (x, y), sprite)
    return image


@lru_cache(None)
def _shape(shape: str, colour: str, size: str) -> Image.Image:
    side = CELL * _SUPERSAMPLING
    sprite = Image.new("RGBA", (side, side), (*COLOURS[colour], 0))
    radius = _RADIUS[size] * _SUPERSAMPLING
    draw_shape(ImageDraw.Draw(sprite), shape, side / 2, side / 2, radius, (*COLOURS[colour], 255))
    return sprite.reduce(_SUPERSAMPLING)


@lru_cache(None)
def _sign(text: str) -> Image.Image:
    side = CELL * _SUPERSAMPLING
    sprite = Image.new("RGBA", (side, side), (*_CARD, 0))
    draw = ImageDraw.Draw(sprite)
    draw.rectangle((0, side * 0.2, side, side * 0.8), fill=(*_CARD, 255), outline=(*_INK, 255), width=2)
    font = ImageFont.load_default(size=(13 if text.isdigit() else 34 / max(len(text), 3)) * _SUPERSAMPLING)
    draw.text((side / 2, side / 2), text, fill=(*_INK, 255), font=font, anchor="mm")
    return sprite.reduce(_SUPERSAMPLING)
