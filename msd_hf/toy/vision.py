"""The first stage of the target's training: the vision tower learns to recognise the object in each grid cell.

Linear probes classify shape, colour and size from the patches of each cell, and are dropped afterwards. The language
model then gets useful visual features from its first step on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .training import Budget, train
from .world import BACKGROUNDS, COLOURS, GRID, SHAPES, SIZES, Scene, make_scene, render


_NUM_CELLS = GRID * GRID
_ATTRIBUTES = (SHAPES, tuple(COLOURS), SIZES)


def cell_labels(scene: Scene) -> torch.Tensor:
    """The classes `[4, 3]` of shape, colour and size in each cell. The last class of each means an empty cell."""
    labels = torch.tensor([[len(values) for values in _ATTRIBUTES]] * _NUM_CELLS)
    for item in scene.objects:
        for column, (values, value) in enumerate(zip(_ATTRIBUTES, (item.shape, item.colour, item.size), strict=True)):
            labels[item.cell, column] = values.index(value)
    return labels


# Computes the features `[images, patches, width]` of square images, in reading order, from a vision tower and the
# outputs of the image processor.
ReadFeatures = Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]


def clip_features(tower: Any, images: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The features of the patches, without that of the whole image."""
    return tower(pixel_values=images["pixel_values"]).last_hidden_state[:, 1:]


class CellProbe(nn.Module):
    """A vision tower with linear classifiers on the mean feature of each cell. The features have the width `width`."""

    def __init__(self, tower: nn.Module, width: int, read: ReadFeatures = clip_features):
        super().__init__()
        self.tower, self.read = tower, read
        self.attributes = nn.ModuleList(nn.Linear(width, len(values) + 1) for values in _ATTRIBUTES)
        self.cell = nn.Linear(width, _NUM_CELLS)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(
        self, images: Mapping[str, torch.Tensor], cells: torch.Tensor, background: torch.Tensor
    ) -> dict[str, Any]:
        """Computes the loss, and the accuracy of each attribute, from the outputs of the image processor, cells
        `[batch, 4, 3]` and backgrounds `[batch]`."""
        patches = self.read(self.tower, images)
        per_cell = math.isqrt(patches.shape[1]) // GRID
        grid = patches.unflatten(1, (GRID, per_cell, GRID, per_cell)).mean((2, 4)).flatten(1, 2)
        loss = functional.cross_entropy(self.background(patches.mean(1)), background)
        # The features must keep the position of a cell too, because questions name places.
        positions = torch.arange(_NUM_CELLS, device=patches.device).expand(len(patches), -1)
        loss = loss + functional.cross_entropy(self.cell(grid).flatten(0, 1), positions.flatten())
        accuracies = []
        for column, classifier in enumerate(self.attributes):
            scores = classifier(grid)
            target = cells[..., column]
            loss = loss + functional.cross_entropy(scores.flatten(0, 1), target.flatten())
            filled = target < scores.size(-1) - 1
            accuracies.append((scores.argmax(-1) == target)[filled].float().mean())
        return {"loss": loss, "accuracies": torch.stack(accuracies).detach()}


def _collate(processor: Any, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    pictures = [render(item["scene"]) for item in scenes]
    return {
        "images": dict(processor.image_processor(pictures, return_tensors="pt")),
        "cells": torch.stack([cell_labels(item["scene"]) for item in scenes]),
        "background": torch.tensor([list(BACKGROUNDS).index(item["scene"].background) for item in scenes]),
    }


def pretrain_vision_tower(
    tower: Any,
    processor: Any,
    budget: Budget,
    seed: int = 0,
    batch_size: int = 64,
    width: int | None = None,
    read: ReadFeatures = clip_features,
) -> dict[str, float]:
    """Trains `tower` in place; returns the accuracy of each attribute on the objects of 512 validation scenes.

    Args:
        tower, processor: a vision tower, and the processor of its model.
        budget, seed, batch_size: the arguments of `train`.
        width: the width of the features. Default: the tower's hidden size.
        read: computes the features.
    """

    def stream() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"vision/{seed}")
        while True:
            yield {"scene": make_scene(rng, "train")}

    probe = CellProbe(tower, width or tower.config.hidden_size, read)
    train(probe, stream, lambda scenes: _collate(processor, scenes), budget, batch_size, seed, logging_steps=100)
    rng = random.Random(f"vision/validation/{seed}")
    batch = _collate(processor, [{"scene": make_scene(rng, "validation")} for _ in range(512)])
    probe.eval()
    with torch.no_grad():
        accuracies = probe(**batch)["accuracies"].tolist()
    return dict(zip(("shape", "colour", "size"), accuracies, strict=True))
