"""Runs the decoding loop with a function of the caller in place of each verification, to measure inside the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..observer import observing
from ..tree.candidate import CandidateTree


class LoopEnd(Exception):
    """Raised in place of a verification, to end the loop."""


def run_intercepted(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    on_verify: Callable[[Callable[[CandidateTree], Any], CandidateTree, Cache], Any],
    max_new_tokens: int,
) -> None:
    """
    Runs `generate` with a draft and calls `on_verify(verify, tree, cache)` in place of each verification, until
    `on_verify` raises [`LoopEnd`]. `verify(tree)` is the verification itself.

    Args:
        target (`PreTrainedModel`), draft (`MSDDraftModel`): the pair. The target must not end an answer.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        on_verify (`Callable`): must return a `TargetVerification`, as `verify` does.
        max_new_tokens (`int`): must be more than the loop emits, because trees get smaller near the length limit.
    """
    with torch.no_grad(), suppress(LoopEnd), observing(on_verify=on_verify):
        target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, assistant_model=draft)


@contextmanager
def compilation(draft: MSDDraftModel, value: bool) -> Iterator[None]:
    """Sets `compile` in a draft's generation config inside the block, and restores it at the end."""
    before = getattr(draft.generation_config, "compile", None)
    draft.generation_config.compile = value
    try:
        yield
    finally:
        draft.generation_config.compile = before


__all__ = ["LoopEnd", "compilation", "run_intercepted"]
