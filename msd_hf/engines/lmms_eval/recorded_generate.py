"""`generate` of a target as lmms-eval calls it: with the draft, if there is one, and with a record of each call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...decoding.run_stats import last_run
from ...errors import MSDError
from ...evaluation.clock import synchronize


@dataclass(frozen=True)
class GenerateCall:
    """
    One call of `generate` for one question.

    Args:
        input_tokens (`int`): tokens of the prompt.
        output_tokens (`int`): new tokens.
        seconds (`float`): of the whole call, vision tower and prefill included.
        rounds (`int`, *optional*): verifications by the target; `None` without a draft.
        tau (`float`, *optional*): mean number of tokens that a verification emitted; `None` without a draft.
    """

    input_tokens: int
    output_tokens: int
    seconds: float
    rounds: int | None = None
    tau: float | None = None


class RecordedGenerate:
    """
    Stands in the place of `target.generate`.

    Args:
        target (`PreTrainedModel`): the target.
        draft (`MSDDraftModel` or another kind of draft, *optional*): given to each call.

    Attributes:
        on_call (`Callable`): gets the [`GenerateCall`] of each call that has ended.
        refusal (`MSDError`, *optional*): of a call that was refused. Model classes of lmms-eval catch every error of
            `generate` and count the answer as empty, which would look like a low score.
    """

    def __init__(self, target: PreTrainedModel, draft: Any = None):
        self._target, self._generate, self._draft = target, target.generate, draft
        self.on_call: Callable[[GenerateCall], None] = lambda call: None
        self.refusal: MSDError | None = None

    def __call__(self, **arguments: Any) -> torch.Tensor:
        if self._draft is not None:
            arguments["assistant_model"] = self._draft
        synchronize(self._target.device)
        started = time.perf_counter()
        try:
            sequences = self._generate(**arguments)
        except MSDError as error:
            self.refusal = error
            raise
        synchronize(self._target.device)
        seconds = time.perf_counter() - started
        input_tokens = arguments["input_ids"].shape[1]
        stats = None if self._draft is None else last_run(self._target)
        self.on_call(
            GenerateCall(
                input_tokens,
                sequences.shape[1] - input_tokens,
                seconds,
                *(() if stats is None else (stats.rounds, stats.tau)),
            )
        )
        return sequences


__all__ = ["GenerateCall", "RecordedGenerate"]
