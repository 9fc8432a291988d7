"""AdamW that moves hidden matrices along orthogonalised momentum (Muon).

Muon needs several times fewer steps than AdamW for a deep, narrow model. `torch.optim.Muon` updates one matrix at a
time, in bfloat16. For hundreds of small matrices on a CPU it is far faster to stack matrices of equal shape and update
each stack in float32, as here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Replaces each matrix of a `[stack, rows, columns]` tensor by roughly the closest semi-orthogonal matrix."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except that groups with `muon=True` (2-D weights only) get Muon steps with Nesterov momentum 0.95."""

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all groups once: those with `muon=True` by Muon, the others by AdamW."""
        for group in self.param_groups:
            if group.get("muon"):
                self._muon_step(group)
        return super().step(closure)

    def _muon_step(self, group: dict[str, Any]) -> None:
        stacks: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                stacks[parameter.shape].append(parameter)
        for shape, parameters in stacks.items():
            directions = []
            for parameter in parameters:
                gradient = parameter.grad
                assert gradient is not None
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
                directions.append(gradient.lerp(state["momentum_buffer"], self.momentum))
                # AdamW skips a parameter without a gradient.
                parameter.grad = None
            updates = orthogonalise(torch.stack(directions))
            scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-scale)


def build_optimizer(model: nn.Module, adamw_rate: float = 3e-3, muon_rate: float = 0.02) -> MuonAdamW:
    """Makes an optimizer with Muon for the matrices inside transformer layers and AdamW for all other trained weights.

    Embeddings and the output layer get AdamW, because their rows are separate entries rather than a linear map.
    """
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = any(part in name for part in ("layers.", "layer.", "blocks."))  # of a decoder or a vision tower
        (hidden if inside and parameter.ndim == 2 else others).append(parameter)
    groups = [
        {"params": hidden, "lr": muon_rate, "weight_decay": 0.01, "muon": True},
        {"params": others, "lr": adamw_rate, "weight_decay": 0.0, "muon": False},
    ]
    return MuonAdamW(groups, betas=(0.9, 0.98), eps=1e-9)
