"""The first stage of the target's training: the vision tower learns to recognise the object in each grid cell.

Linear probes classify shape, colour and size from the patches of each cell, and are dropped afterwards. The language
model then gets useful visual features from its first step on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel, LlavaProcessor

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


class CellProbe(nn.Module):
    """A vision tower with linear classifiers on the mean feature of each cell."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.attributes = nn.ModuleList(nn.Linear(width, len(values) + 1) for values in _ATTRIBUTES)
        self.cell = nn.Linear(width, _NUM_CELLS)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, pixel_values: torch.Tensor, cells: torch.Tensor, background: torch.Tensor) -> dict[str, Any]:
        """Computes the loss, and the accuracy of each attribute, from pixels `[batch, 3, height, width]`, cells
        `[batch, 4, 3]` and backgrounds `[batch]`."""
        patches = self.tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        per_cell = self.tower.config.image_size // self.tower.config.patch_size // GRID
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


def _collate(processor: LlavaProcessor, scenes: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pictures = [render(item["scene"]) for item in scenes]
    return {
        "pixel_values": processor.image_processor(pictures, return_tensors="pt")["pixel_values"],
        "cells": torch.stack([cell_labels(item["scene"]) for item in scenes]),
        "background": torch.tensor([list(BACKGROUNDS).index(item["scene"].background) for item in scenes]),
    }


def pretrain_vision_tower(
    tower: CLIPVisionModel, processor: LlavaProcessor, budget: Budget, seed: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """Trains `tower` in place; returns the accuracy of each attribute on the objects of 512 validation scenes."""

    def stream() -> Iterator[dict[str, Any]]:
        rng = random.Random(f"vision/{seed}")
        while True:
            yield {"scene": make_scene(rng, "train")}

    probe = CellProbe(tower)
    train(probe, stream, lambda scenes: _collate(processor, scenes), budget, batch_size, seed, logging_steps=100)
    rng = random.Random(f"vision/validation/{seed}")
    batch = _collate(processor, [{"scene": make_scene(rng, "validation")} for _ in range(512)])
    probe.eval()
    with torch.no_grad():
        accuracies = probe(**batch)["accuracies"].tolist()
    return dict(zip(("shape", "colour", "size"), accuracies, strict=True))
