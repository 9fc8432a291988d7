"""An observed run of `generate`, apart from the timed runs: rounds, phases and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoding.verified_streamer import VerifiedStreamer
from ..draft.modeling_msd import MSDDraftModel
from .memory import PeakMemory
from .methods import Method
from .phase_timer import PhaseTimer
from .round_timing import RoundTiming


@dataclass(frozen=True)
class Observation:
    """
    The acceptance lengths, the time of a round and the peak memory of one observed run.

    Args:
        acceptance_lengths (`list[int]`): tokens emitted by each forward of the target after the first.
        round_timing (`RoundTiming`, *optional*): the time of the decoding loop; `None` if the loop is not ours.
        peak_memory (`int`, *optional*): peak memory in bytes; `None` if [`PeakMemory`] cannot measure it.
    """

    acceptance_lengths: list[int]
    round_timing: RoundTiming | None
    peak_memory: int | None


def observe(
    target: PreTrainedModel,
    inputs: Mapping[str, Any],
    draft: MSDDraftModel | None,
    method: Method,
    seed: int | None = None,
    **generate_arguments: Any,
) -> Observation:
    """Runs `generate` once and observes it. The arguments are those of [`timed_generate`]."""
    if seed is not None:
        torch.manual_seed(seed)
    recorder = _RoundRecorder()
    with (
        method.prepared(target, draft) as arguments,
        PeakMemory(target.device) as memory,
        PhaseTimer(target.device) as timer,
    ):
        target.generate(**inputs, **{**generate_arguments, **arguments}, streamer=recorder)
    lengths = recorder.lengths[1:]  # the first token is that of the prefill
    timing = RoundTiming.from_phases(timer.inside("decode"), len(lengths)) if method.has_own_loop else None
    return Observation(lengths, timing, memory.num_bytes)


class _RoundRecorder(VerifiedStreamer):
    """A streamer that counts the tokens of each round."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        self.lengths.append(tokens.numel())


__all__ = ["Observation", "observe"]
