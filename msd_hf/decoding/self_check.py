"""A target of an unknown kind is tried once: forwards over a small tree against token-by-token decoding.

If trees differ, two other ways are tried. Some decoders take no mask of a tree, and their attention functions get it
past them. Others take positions from the order of slots in the cache, which is that of the text only while no sibling
stands between, or have recurrent layers of an unknown kind: such a target verifies chains, one sequence at a time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from ..errors import MSDUnsupportedError
from ..target.adapter import TargetAdapter
from ..target.layer_kinds import attention_reaches
from ..target.support import KNOWN_MODEL_TYPES
from .pair import PairState
from .running_rows import RunningRows
from .trial import NUM_SIBLINGS, Trial, compare, name_of


logger = logging.get_logger(__name__)

_DEPTH = 3  # the root, two levels of the tree, and a token behind the accepted path
_SHORT_CONTEXT = 8
# Contexts of a target that has failed with a tree. It may read the order of slots and group them: here a group of any
# of the usual sizes ends within the trial.
_BLOCK_ENDS = (7, 15, 31, 63, 127)


def check_tree_verification(
    adapter: TargetAdapter,
    pair: PairState,
    running: RunningRows,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
    prefill_outputs: ModelOutput,
    tokens_left: int | None = None,
    is_compiled: bool = False,
) -> None:
    """
    Verifies trees behind the prompt, and compares two branches with what `generate` computes for them. Does nothing
    for known kinds of targets, and runs once for a pair with a target of another kind. The cache is left as it was.
    Where trees differ and another way of verifying does not, the pair is marked, and goes that way from now on.

    Args:
        adapter (`TargetAdapter`): the target.
        pair (`PairState`): remembers that the target passed.
        running (`RunningRows`): the rows after the prefill.
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts.
        model_kwargs: as given to the prefill.
        prefill_outputs (`ModelOutput`): what the prefill returned, from which a target may prepare its next step.
        tokens_left (`int`, *optional*): how many tokens may still be emitted; `None`: no limit. The trial goes no
            further, because the target may have no more positions. The first call that may go further tries the rest:
            deeper trees, and contexts beyond a sliding window.
        is_compiled (`bool`): whether rounds have fixed shapes, which chains in place of trees have not.

    Raises:
        MSDUnsupportedError: when the logits differ or cannot be compared, or the target cannot run a tree.
    """
    if adapter.target.config.model_type in KNOWN_MODEL_TYPES:
        return
    adapter.masks_attention = pair.masks_attention  # another thread may have tried the target since this call began
    _check_way(adapter, pair, running, is_compiled)
    depth = _DEPTH if tokens_left is None else min(_DEPTH, tokens_left - 1)
    if depth < 1:  # nothing is drafted
        return
    trial = Trial(adapter, running, input_ids, model_kwargs, prefill_outputs, depth, pair.is_chain)
    inputs = running.context.inputs.keys()  # of a call with images a decoder may run code that others do not
    if not pair.is_checked or not inputs <= pair.checked_inputs:
        trial = _passing_trial(trial, pair)
        _check_way(adapter, pair, running, is_compiled)
        pair.is_checked = depth == _DEPTH
        if pair.is_checked:
            pair.checked_inputs |= inputs
            logger.warning_once(
                f"{adapter.target.config.model_type!r} is not among the kinds of targets that msd_hf is tested with; "
                f"a check of this model at its first call found no difference{' in chains' * pair.is_chain}."
            )
    reaches = [reach.most for reach in attention_reaches(adapter.text_config).values()]
    windows = [most for most in reaches if most is not None]
    if not windows or pair.is_window_checked:
        return
    longest = max(windows) + max(max(windows) // 4, NUM_SIBLINGS)
    reachable = longest if tokens_left is None else running.context.num_slots + tokens_left - 1 - depth
    length = min(longest, reachable)
    if length + depth >= min(windows):  # the call can leave the window
        compare(adapter, trial.in_made_up_context, length, max(windows))
        pair.is_window_checked = length == longest and depth == _DEPTH


def _try_short_contexts(trial: Trial) -> None:
    compare(trial.adapter, trial.in_context)
    is_second_way = trial.is_chain or trial.adapter.masks_attention
    for length in _BLOCK_ENDS if is_second_way else (_SHORT_CONTEXT,):
        compare(trial.adapter, trial.in_made_up_context, length)


def _passing_trial(trial: Trial, pair: PairState) -> Trial:
    """
    The first trial that passes, of three: the tree; the tree with masks that attention functions get themselves; a
    chain. The pair is marked with what passed. Raises what the first trial raised if none passes.
    """
    try:
        _try_short_contexts(trial)
        return trial
    except MSDUnsupportedError:
        other = None if trial.is_chain else _other_way(trial, pair)
        if other is None:
            raise
        return other


def _other_way(tree: Trial, pair: PairState) -> Trial | None:
    """A trial that passes where the tree has failed; `None` if there is none."""
    adapter, running = tree.adapter, tree.running
    if len(attention_reaches(adapter.text_config)) == 1:
        adapter.masks_attention = True
        with suppress(MSDUnsupportedError):
            _try_short_contexts(tree)
            pair.masks_attention = True
            return tree
        adapter.masks_attention = False
    if _has_several_texts(running):
        return None
    chain = Trial(adapter, running, tree.input_ids, tree.model_kwargs, tree.prefill_outputs, tree.depth, is_chain=True)
    with suppress(MSDUnsupportedError):
        _try_short_contexts(chain)
        pair.is_chain = True
        return chain
    return None


def _has_several_texts(running: RunningRows) -> bool:
    """Whether there are several sequences, or one with padding."""
    return len(running.tokens) > 1 or running.context.hides_slots


def _check_way(adapter: TargetAdapter, pair: PairState, running: RunningRows, is_compiled: bool) -> None:
    """Refuses what a target cannot do that verifies in another way than with the mask of a tree."""
    compiled = "`draft.generation_config.compile=True` cannot be used here"
    if pair.masks_attention and is_compiled:
        raise MSDUnsupportedError(
            f"{compiled}: the decoder of {name_of(adapter)} takes no tree mask, which compiled code would "
            "have to give it."
        )
    if pair.is_chain and is_compiled:
        raise MSDUnsupportedError(
            f"{compiled}: {name_of(adapter)} verifies chains only, whose rounds are not compiled."
        )
    if pair.is_chain and _has_several_texts(running):
        raise MSDUnsupportedError(
            f"{name_of(adapter)} verifies chains only, of one sequence without padding. Give it one prompt at "
            "a time, or call `generate` without `assistant_model`."
        )


__all__ = ["NUM_SIBLINGS", "check_tree_verification"]
