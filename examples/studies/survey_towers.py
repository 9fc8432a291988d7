"""A stand-in for vision towers of timm. They have the sizes of published models only, and need another library."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, TimmWrapperConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig


class StandInTower(PreTrainedModel):
    """Patches of 16 pixels, projected: `[B, C, height, width]`, or rows behind a class token if `model_args` has
    `embed_dim`, as PerceptionLM wants them."""

    config_class = TimmWrapperConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any):
        super().__init__(config)
        self.in_rows = "embed_dim" in (config.model_args or {})
        self.embed = nn.Conv2d(3, config.hidden_size, kernel_size=16, stride=16)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        states = self.embed(pixel_values)
        if self.in_rows:
            states = states.flatten(2).mT
            states = torch.cat([states.mean(1, keepdim=True), states], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=states)


class _StandInOfGemma3n(StandInTower):
    config_class = Gemma3nVisionConfig


def stand_in_for_timm(config: Any) -> None:
    """Makes the towers of timm in this process stand-ins, if a configuration has one."""
    if isinstance(getattr(config, "vision_config", None), (TimmWrapperConfig, Gemma3nVisionConfig)):
        for tower in (StandInTower, _StandInOfGemma3n):
            AutoModel.register(tower.config_class, tower, exist_ok=True)


__all__ = ["stand_in_for_timm"]
