"""One timed call of `generate`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from .methods import VANILLA, Method


@dataclass(frozen=True)
class TimedRun:
    """
    The tokens, the times and the acceptance lengths of one call of `generate`.

    Args:
        tokens (`list[int]`): the new tokens.
        seconds (`float`): wall clock of the whole call, vision tower and prefill included.
        prefill_seconds (`float`): the part of `seconds` until the target's first forward was done.
        acceptance_lengths (`list[int]`): tokens emitted by each verification of our loop; empty with another loop.
    """

    tokens: list[int]
    seconds: float
    prefill_seconds: float
    acceptance_lengths: list[int]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer over seconds of the whole call, prefill included."""
        return len(self.tokens) / self.seconds

    @property
    def decode_seconds(self) -> float:
        """Seconds after the target's first forward, a draft's prefill included."""
        return self.seconds - self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens/s after the prefill, without the token that the prefill gives."""
        return (len(self.tokens) - 1) / self.decode_seconds


def timed_generate(
    target: PreTrainedModel,
    inputs: Mapping[str, Any],
    draft: MSDDraftModel | None = None,
    method: Method = VANILLA,
    seed: int | None = None,
    **generate_arguments: Any,
) -> TimedRun:
    """
    Times one call of `target.generate`.

    Args:
        target (`PreTrainedModel`): the target.
        inputs (`Mapping`): the processor's result for one prompt.
        draft (`MSDDraftModel`, *optional*): given to `generate` if the method uses a draft.
        method (`Method`): how to decode.
        seed (`int`, *optional*): seed of torch that is set before the call.
        generate_arguments: further arguments of `generate`.
    """
    if seed is not None:
        torch.manual_seed(seed)
    prefilled_at: list[float] = []

    def note_prefill(module, args, output):
        handle.remove()
        synchronize(target)
        prefilled_at.append(time.perf_counter())

    with method.prepared(target, draft) as arguments:
        handle = target.register_forward_hook(note_prefill)
        try:
            synchronize(target)
            started = time.perf_counter()
            output = target.generate(**inputs, **{**generate_arguments, **arguments}, return_dict_in_generate=True)
            synchronize(target)
            ended = time.perf_counter()
        finally:
            handle.remove()
    return TimedRun(
        tokens=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        seconds=ended - started,
        prefill_seconds=prefilled_at[0] - started,
        acceptance_lengths=output.acceptance_lengths[0] if method.has_own_loop else [],
    )


def synchronize(model: PreTrainedModel) -> None:
    """Waits for a GPU that holds the model."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


__all__ = ["TimedRun", "synchronize", "timed_generate"]
