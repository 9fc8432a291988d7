"""The decoding loop with its verifications in other hands, for measurements inside it."""

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
    Calls `generate` with a draft, and `on_verify(verify, tree, cache)` in place of each verification, until
    `on_verify` raises [`LoopEnd`]. `verify(tree)` is the verification itself.

    Args:
        target (`PreTrainedModel`), draft (`MSDDraftModel`): the pair. The target must not end an answer.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        on_verify (`Callable`): gives what `TargetAdapter.verify` gives.
        max_new_tokens (`int`): more than the calls emit: near the length limit trees get smaller.
    """
    with torch.no_grad(), suppress(LoopEnd), observing(on_verify=on_verify):
        target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, assistant_model=draft)


@contextmanager
def compilation(draft: MSDDraftModel, value: bool) -> Iterator[None]:
    """Sets `compile` of a draft inside the block."""
    before = getattr(draft.generation_config, "compile", None)
    draft.generation_config.compile = value
    try:
        yield
    finally:
        draft.generation_config.compile = before


__all__ = ["LoopEnd", "compilation", "run_intercepted"]
