"""A target of an unknown kind is tried once: one forward over a small tree against token-by-token decoding."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..compat import CACHE_NAME
from ..errors import MSDUnsupportedError
from ..target.adapter import TargetAdapter
from ..target.support import KNOWN_MODEL_TYPES
from ..tree.candidate import CandidateTree
from .pair import PairState
from .running_rows import RunningRows


logger = logging.get_logger(__name__)

# Bound of the largest difference between logits, in units of their standard deviation.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.5}


def check_tree_verification(
    adapter: TargetAdapter,
    pair: PairState,
    running: RunningRows,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
    tokens_left: int | None = None,
) -> None:
    """
    Verifies a tree of two branches behind the prompt, and compares the second branch with what `generate` computes for
    it. Does nothing for known kinds of targets, and runs once for a pair with a target of another kind. The cache is
    left as it was.

    Args:
        adapter (`TargetAdapter`): the target.
        pair (`PairState`): remembers that the target passed.
        running (`RunningRows`): the rows after the prefill.
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts.
        model_kwargs: as given to the prefill.
        tokens_left (`int`, *optional*): how many tokens may still be emitted; `None`: no limit. The tree is no deeper,
            because the target may have no more positions. After a check with such a smaller tree the next call is
            checked again.

    Raises:
        MSDUnsupportedError: when the logits differ, or the target cannot run a tree.
    """
    target = adapter.target
    if target.config.model_type in KNOWN_MODEL_TYPES or pair.is_checked:
        return
    depth = 2 if tokens_left is None else min(2, tokens_left - 1)
    if depth < 1:  # nothing is drafted
        return
    path = [0, 2, 3][: depth + 1]
    cache = running.slots.cache
    roots = torch.tensor(running.tokens, device=running.next_position.device)
    # The root, two children, and a node below the second child, with any tokens.
    vocab_size = adapter.text_config.vocab_size
    branch = (roots.unsqueeze(1) + torch.arange(path[-1] + 1, device=roots.device)) % vocab_size  # [B, 3 or 4]
    parents = torch.tensor([[0, 0, 0, 2][: branch.shape[1]]], device=roots.device).expand_as(branch)
    tree = CandidateTree.from_parents(branch, parents, max_depth=depth)
    running.slots.begin()
    try:
        got = adapter.verify(tree, cache, running.context, running.next_position).logits[:, path]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise MSDUnsupportedError(
            f"`{type(target).__name__}` (model_type {target.config.model_type!r}) was tried and cannot run a "
            f"candidate tree ({type(error).__name__}: {error}). Call `generate` without `assistant_model`."
        ) from error
    running.slots.abort()

    # One token after the other, as in `generate`.
    expected, ids, kwargs = [], input_ids, {**model_kwargs, CACHE_NAME: cache}
    running.slots.begin()
    for node in path:
        outputs = CausalLMOutputWithPast(**{CACHE_NAME: cache})
        kwargs = target._update_model_kwargs_for_generation(outputs, kwargs)
        ids = torch.cat([ids, branch[:, node : node + 1].to(ids.device)], dim=1)
        inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        expected.append(target(**inputs, return_dict=True).logits[:, -1])
    running.slots.abort()

    reference = torch.stack(expected, dim=1)
    difference = float((got - reference).abs().max() / reference.float().std())
    if not difference <= _TOLERANCE.get(reference.dtype, 0.5):
        raise MSDUnsupportedError(
            f"`{type(target).__name__}` (model_type {target.config.model_type!r}) was tried and does not verify a "
            f"candidate tree as it decodes token by token: logits differ by {difference:.2g} standard deviations. "
            "Call `generate` without `assistant_model`."
        )
    if depth < 2:
        return
    logger.warning_once(
        f"{target.config.model_type!r} is not among the kinds of targets that msd_hf is tested with; a check of this "
        "model at its first call found no difference."
    )
    pair.is_checked = True


__all__ = ["check_tree_verification"]
