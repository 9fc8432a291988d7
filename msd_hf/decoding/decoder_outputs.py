"""Hidden states and attentions of each step, in the form that `generate` returns without a draft."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers.utils import ModelOutput

from ..attention.masks import Reach


class DecoderOutputs:
    """
    Collects the hidden states and attentions of each step of each sequence from verifications of whole trees.

    Args:
        batch_size (`int`): number of sequences.
        reaches (`Sequence[Reach]`): how far back a token sees in each decoder layer. The attentions of a step are cut
            to it, as a cache without a draft keeps no more.
        image_layers (`Collection[int]`): the layers that attend to images. A call without images passes them over.
        output_flags (`dict[str, bool]`): `output_hidden_states` and `output_attentions`, whether to collect each.
    """

    def __init__(
        self,
        batch_size: int,
        reaches: Sequence[Reach],
        output_flags: dict[str, bool],
        image_layers: Collection[int] = (),
    ):
        self.reaches = reaches
        self.image_layers = image_layers
        self._prefill: ModelOutput | None = None
        self._spared_slots = 0
        # Indexed by sequence, step and layer.
        self._hidden_states: list[list[list[torch.Tensor]]] | None = None
        self._attentions: list[list[list[torch.Tensor]]] | None = None
        if output_flags.get("output_hidden_states"):
            self._hidden_states = [[] for _ in range(batch_size)]
        if output_flags.get("output_attentions"):
            self._attentions = [[] for _ in range(batch_size)]

    def add_prefill(self, outputs: ModelOutput, spared_slots: int = 0) -> None:
        """Collects the outputs for the prompt. `spared_slots` are its slots, for layers whose reach spares it."""
        self._spared_slots = spared_slots
        if self._hidden_states is not None or self._attentions is not None:
            self._prefill = outputs

    def add(
        self,
        outputs: ModelOutput,
        rows: Sequence[int],
        paths: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> None:
        """
        Collects the outputs of one verification.

        Args:
            outputs (`ModelOutput`): the target's outputs.
            rows (`Sequence[int]`): for each row of the outputs, the index of its sequence.
            paths (`Sequence[Sequence[int]]`): the accepted nodes of each row.
            lengths (`Sequence[int]`): the context length of each row, in slots of the cache.
        """
        for place, (row, path, length) in enumerate(zip(rows, paths, lengths, strict=True)):
            if self._hidden_states is not None:
                for node in path:
                    layers = [states[..., place : place + 1, node : node + 1, :] for states in outputs.hidden_states]
                    self._hidden_states[row].append(layers)
            if self._attentions is not None:
                for end in range(1, len(path) + 1):
                    layers = [
                        attention[place : place + 1, :, path[end - 1] : path[end - 1] + 1]
                        if number in self.image_layers
                        else self._of_step(attention, place, path[:end], length, self.reaches[number])
                        for number, attention in self._numbered(outputs.attentions)
                    ]
                    self._attentions[row].append(layers)

    def _numbered(self, attentions: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Attentions with the numbers of their layers."""
        numbers = list(range(len(self.reaches)))
        if len(attentions) < len(numbers):
            numbers = [number for number in numbers if number not in self.image_layers]
        return list(zip(numbers, attentions, strict=True))

    @property
    def hidden_states(self) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        """A tuple of layers for each step, `[B, 1, H]` each; `[B, L, H]` for the first step, which is the prompt.
        Layers with several streams, as those of Gemma 3n, have one more dimension in front."""
        first = None if self._prefill is None else self._prefill.get("hidden_states")
        return _by_step(first, self._hidden_states, -3)

    @property
    def attentions(self) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        """A tuple of layers for each step, `[B, heads, 1, slots]` each; `[B, heads, L, slots]` for the first step."""
        first = None if self._prefill is None else self._prefill.get("attentions")
        return _by_step(first, self._attentions, 0)

    def _of_step(
        self, attention: torch.Tensor, place: int, path: Sequence[int], length: int, reach: Reach
    ) -> torch.Tensor:
        """The attention of the last node of a path to the context and the path, `[1, heads, 1, slots]`."""
        num_slots = attention.shape[-1] - attention.shape[-2]
        columns = [*range(length), *(num_slots + node for node in path)]
        if reach.most is not None:
            first = self._spared_slots if reach.spares_prompt else 0
            columns = [*columns[:first], *columns[first:][-reach.most :]]
        return attention[place : place + 1, :, path[-1] : path[-1] + 1, columns]


def _by_step(
    first: tuple[torch.Tensor, ...] | None, sequences: list[list[list[torch.Tensor]]] | None, row_dim: int
) -> tuple[tuple[torch.Tensor, ...], ...] | None:
    if sequences is None or first is None:
        return None
    steps = zip(*sequences, strict=True)
    return (tuple(first), *(tuple(torch.cat(rows, dim=row_dim) for rows in zip(*step, strict=True)) for step in steps))


__all__ = ["DecoderOutputs"]
