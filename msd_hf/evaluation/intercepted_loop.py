"""The decoding loop with its verifications in other hands, for measurements inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..target.adapter import TargetAdapter
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
    Calls `generate` with a draft, and `on_verify(verify, tree, cache)` instead of each verification, until that raises
    [`LoopEnd`]. `verify(tree)` is the verification itself. Nothing is compiled: a device would verify by itself.

    Args:
        target (`PreTrainedModel`), draft (`MSDDraftModel`): the pair. The target must not end an answer.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        on_verify (`Callable`): gives what `TargetAdapter.verify` gives.
        max_new_tokens (`int`): more than what is emitted until the end: near it trees get smaller.
    """
    original = TargetAdapter.verify

    def verify(self, tree, cache, *args, **kwargs):
        return on_verify(lambda other: original(self, other, cache, *args, **kwargs), tree, cache)

    TargetAdapter.verify = verify  # type: ignore[method-assign]
    try:
        with torch.no_grad(), suppress(LoopEnd), compilation(draft, False):
            target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, assistant_model=draft)
    finally:
        TargetAdapter.verify = original  # type: ignore[method-assign]


@contextmanager
def compilation(draft: MSDDraftModel, value: bool) -> Iterator[None]:
    """Sets `compile` of a draft for a while."""
    before = getattr(draft.generation_config, "compile", None)
    draft.generation_config.compile = value
    try:
        yield
    finally:
        draft.generation_config.compile = before


__all__ = ["LoopEnd", "compilation", "run_intercepted"]
