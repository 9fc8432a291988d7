"""The first stage of the target's training: the vision tower learns what each cell holds, and where the cell is.

Linear probes read the feature of each patch, and are dropped afterwards. Each patch has to tell what its whole cell
holds: a language model that looks at a few patches then learns to see in a fraction of the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..training import Budget, train
from ..world import BACKGROUNDS, COLOURS, SHAPES, SIZES
from .picture import CELL, SIGN_WORDS, Picture, Thing, make_picture, render


PATCH_SIZE = 6  # pixels
PATCHES_PER_CELL = CELL // PATCH_SIZE
_MAX_GRID = 6
# The classes of a cell, by attribute. Class 0 means that the attribute does not apply.
_ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "word": SIGN_WORDS,
    "tens": tuple("123456789"),
    "ones": tuple("0123456789"),
}
# How often a picture has each grid. Small ones teach in less time what things are, large ones where a cell ends.
_GRIDS = {2: 2, 3: 4, 6: 4}


def _classes(thing: Thing) -> tuple[str, ...]:
    if thing.text.isdigit():
        return "", "", "", "", thing.text[0], thing.text[1]
    return thing.shape, thing.colour, thing.size, thing.text, "", ""


def cell_labels(picture: Picture) -> torch.Tensor:
    """The classes `[cells, 6]` of shape, colour, size, word and the two digits in each cell, in reading order."""
    labels = torch.zeros(picture.grid**2, len(_ATTRIBUTES), dtype=torch.long)
    for thing in picture.things:
        for column, (values, value) in enumerate(zip(_ATTRIBUTES.values(), _classes(thing), strict=True)):
            labels[thing.row * picture.grid + thing.column, column] = values.index(value) + 1 if value else 0
    return labels


class CellProbe(nn.Module):
    """A vision tower with linear classifiers on the feature of each patch."""

    def __init__(self, tower: Any):
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.attributes = nn.ModuleList(nn.Linear(width, len(values) + 1) for values in _ATTRIBUTES.values())
        self.row, self.column = nn.Linear(width, _MAX_GRID), nn.Linear(width, _MAX_GRID)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(
        self, pixel_values: torch.Tensor, cells: torch.Tensor, background: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Computes the loss, and the accuracy `[6]` of each attribute, from pictures `[B, 3, side, side]` of one size,
        cells `[B, cells, 6]` and backgrounds `[B]`."""
        patches = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        grid = pixel_values.shape[-1] // CELL
        # The row and the column of the cell of each patch, [patches].
        places = torch.arange(grid, device=patches.device).repeat_interleave(PATCHES_PER_CELL)
        rows, columns = places.repeat_interleave(len(places)), places.repeat(len(places))
        loss = functional.cross_entropy(self.background(patches.mean(1)), background)
        # The features must keep the place of a cell too, because questions name places.
        for place, numbers in ((self.row, rows), (self.column, columns)):
            goals = numbers.repeat(len(patches))
            loss = loss + functional.cross_entropy(place(patches).flatten(0, 1), goals)
        held = cells[:, rows * grid + columns]  # [B, patches, 6]
        accuracies = []
        for number, classifier in enumerate(self.attributes):
            scores, goals = classifier(patches).flatten(0, 1), held[..., number].flatten()
            loss = loss + functional.cross_entropy(scores, goals)
            filled = goals > 0
            accuracies.append((scores.argmax(-1) == goals)[filled].float().mean())
        return {"loss": loss, "accuracies": torch.stack(accuracies).detach()}


def _collate(processor: Any, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pictures = [picture for item in items for picture in item["pictures"]]
    return {
        "pixel_values": processor.image_processor([render(p) for p in pictures], return_tensors="pt")["pixel_values"],
        "cells": torch.stack([cell_labels(p) for p in pictures]),
        "background": torch.tensor([list(BACKGROUNDS).index(p.background) for p in pictures]),
    }


def _batch(rng: random.Random, split: str, num_cells: int = 288) -> dict[str, list[Picture]]:
    """Pictures of one size, as many as have `num_cells` cells together."""
    grid = rng.choices(list(_GRIDS), list(_GRIDS.values()))[0]
    return {"pictures": [make_picture(rng, split, grid) for _ in range(num_cells // grid**2)]}


def pretrain_vision_tower(tower: Any, processor: Any, budget: Budget, seed: int = 0) -> dict[str, float]:
    """Trains `tower` in place; returns the accuracy of each attribute on validation pictures of the largest size."""

    def stream() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"hard/vision/{seed}")
        while True:
            yield _batch(rng, "train")

    probe = CellProbe(tower)
    train(probe, stream, lambda items: _collate(processor, items), budget, 1, seed, logging_steps=50)
    rng = random.Random(f"hard/vision/validation/{seed}")
    pictures = [make_picture(rng, "validation", _MAX_GRID) for _ in range(64)]
    probe.eval()
    with torch.no_grad():
        accuracies = probe(**_collate(processor, [{"pictures": pictures}]))["accuracies"].tolist()
    return dict(zip(_ATTRIBUTES, accuracies, strict=True))
