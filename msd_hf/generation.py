"""The decoding loop: prefill, then rounds of drafting, verification and acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .cache import CACHE_NAME, keep_slots, make_in_place
from .candidate_generator import MSDCandidateGenerator
from .modeling_msd import MSDDraftModel
from .phases import phase
from .targets import TargetAdapter
from .token_selection import TokenSelector
from .tree import TreeSettings
from .verification import verify


@dataclass
class MSDGenerateOutput(GenerateDecoderOnlyOutput):
    """
    What `generate(assistant_model=draft, return_dict_in_generate=True)` returns: all that `generate` returns without a
    draft, and

    Args:
        acceptance_lengths (`list[list[int]]`):
            One list a sequence: the tokens emitted by each verification, the bonus token included. Their mean is tau.
    """

    acceptance_lengths: list[list[int]] | None = None


@torch.no_grad()
def msd_decoding(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: MSDDraftModel,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> MSDGenerateOutput | torch.Tensor:
    """
    Generates the tokens that the target alone would generate, several per forward of the target.

    Args:
        target (`PreTrainedModel`): checked by `integration.py`, as all other arguments.
        input_ids (`torch.LongTensor` of shape `[1, L]`): the prompt, image positions expanded.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate`.
        draft (`MSDDraftModel`): the draft; its `generation_config` sets the size of the tree.
        model_kwargs: the target's other inputs, with an empty cache among them.

    Returns:
        [`MSDGenerateOutput`] if `return_dict_in_generate` is set, else the sequence `[1, L + new tokens]`.
    """
    settings = TreeSettings.from_generation_config(draft.generation_config)
    selector = TokenSelector(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    adapter = TargetAdapter(target, draft.config.target_layers)
    cache = model_kwargs[CACHE_NAME]
    max_slots = generation_config.max_length + settings.num_nodes
    make_in_place(cache, max_slots)

    with phase("prefill"):
        prefill = adapter.prefill(input_ids, generation_config, model_kwargs)
    root = selector.select(prefill.logits)
    selector.stream([root], num_draft_tokens=0)
    acceptance_lengths: list[int] = []

    if not selector.finished:
        tokens = torch.tensor([[root]], device=prefill.hidden_states.device)
        generator = MSDCandidateGenerator(draft, adapter, max_slots + settings.depth * settings.top_k)
        with phase("prefill"):
            generator.prefill(prefill, tokens[:, -1])
        next_position, prompt_mask = prefill.next_position, prefill.prompt_mask
        del prefill  # its [1, L, H] tensors are not needed any more

        with phase("decode"):
            while not selector.finished:
                tokens_left = selector.tokens_left
                limited = settings if tokens_left is None else settings.limited_to(tokens_left - 1)
                with phase("tree"):
                    tree = generator.propose(tokens[:, -1].to(draft.device), limited).to(next_position.device)

                num_slots = cache.get_seq_length()
                logits, hidden_states = adapter.verify(tree, cache, next_position, prompt_mask)
                with phase("verification"):
                    verified = verify(tree, logits, selector)
                with phase("cache"):
                    keep_slots(cache, num_slots, verified.path)

                tokens = verified.tokens
                acceptance_lengths.append(tokens.shape[1])
                selector.stream(tokens[0].tolist(), verified.num_draft_tokens)
                if not selector.finished:
                    next_position = next_position + tokens.shape[1]
                    generator.accept(tokens, hidden_states[:, verified.path[0].to(hidden_states.device)])

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return selector.input_ids
    return MSDGenerateOutput(
        sequences=selector.input_ids,
        scores=selector.scores,
        logits=selector.logits,
        acceptance_lengths=[acceptance_lengths],
        **{CACHE_NAME: cache},
    )


__all__ = ["MSDGenerateOutput", "msd_decoding"]
