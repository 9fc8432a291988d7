"""Which slots of a KV cache hold the context of each row.

A slot is not a position. The rows of a batch accept different numbers of tokens, so a row may leave the last slots of
the cache unused, and padding takes slots at the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional


@dataclass
class ContextSlots:
    """
    The slots that hold the context of each of B rows.

    Args:
        lengths (`list[int]`): for each row, the number of slots that it uses, counted from the first slot.
        prompt_mask (`torch.BoolTensor` of shape `[B, L]`, *optional*): false at padding among the first L slots;
            `None` without padding.
        inputs (`dict[str, torch.Tensor]`): inputs of the decoder that each token behind the prompt gets as the last
            one of the prompt did, by name, `[B, ...]`.
    """

    lengths: list[int]
    prompt_mask: torch.Tensor | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        """The number of slots of the cache, S: the length of the longest row."""
        return max(self.lengths)

    @property
    def is_ragged(self) -> bool:
        """Whether some rows use fewer slots than others."""
        return min(self.lengths) != max(self.lengths)

    @property
    def hides_slots(self) -> bool:
        """Whether a slot is hidden from some row, because it is padding or because the row does not use it."""
        return self.prompt_mask is not None or self.is_ragged

    def grow(self, counts: Sequence[int]) -> None:
        """Adds `counts[b]` slots to row b."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> ContextSlots:
        """The context of the given rows, in that order."""
        mask = None if self.prompt_mask is None else self.prompt_mask[list(rows)]
        inputs = {name: value[list(rows)] for name, value in self.inputs.items()}
        return ContextSlots([self.lengths[row] for row in rows], mask, inputs)

    def row_lengths(self, device: torch.device) -> torch.Tensor:
        """`lengths` as a tensor of shape `[B]`."""
        return torch.tensor(self.lengths, device=device)

    def padded_prompt_mask(self, num_slots: int, device: torch.device) -> torch.Tensor | None:
        """`prompt_mask` with true values up to `num_slots`, `[B, num_slots]`; `None` without padding."""
        if self.prompt_mask is None:
            return None
        missing = num_slots - self.prompt_mask.shape[1]
        return functional.pad(self.prompt_mask.to(device), (0, missing), value=True)

    def padding(self, device: torch.device) -> torch.Tensor | None:
        """How many padding slots each row has before its first token, `[B]`; `None` without padding."""
        if self.prompt_mask is None:
            return None
        return (self.prompt_mask.to(device).cumsum(1) == 0).sum(1)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Which of the S slots each row may see, `[B, S]`; `None` if every row may see every slot."""
        visible = None
        if self.is_ragged:
            visible = torch.arange(self.num_slots, device=device) < self.row_lengths(device).unsqueeze(1)
        if self.prompt_mask is not None:
            if visible is None:
                visible = torch.ones(len(self.lengths), self.num_slots, dtype=torch.bool, device=device)
            visible[:, : self.prompt_mask.shape[1]] &= self.prompt_mask.to(device)
        return visible


__all__ = ["ContextSlots"]
