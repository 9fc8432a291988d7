"""The decoding loop: prefill, then rounds of drafting, verification and acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..compiled.compile import is_compiled
from ..draft.modeling_msd import MSDDraftModel
from ..drafting.generator import MSDCandidateGenerator
from ..drafting.memory import Conversation
from ..kv.fixed import buffers_left, make_static
from ..kv.in_place import make_in_place
from ..phases import phase
from ..release import CACHE_NAME
from ..target.adapter import TargetAdapter
from ..target.support import check_positions, layer_windows
from ..tree.settings import TreeSettings
from ..tree.suffix import SuffixBranches
from .batch_selection import BatchSelector
from .decoder_outputs import DecoderOutputs
from .device_rounds import DeviceRounds
from .result import MSDGenerateOutput
from .running_rows import RunningRows
from .self_check import check_tree_verification
from .sizing import make_tree_policy
from .verification import verify


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
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts, image positions expanded.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate`.
        draft (`MSDDraftModel`): the draft; its `generation_config` sets the size of the tree.
        model_kwargs: the target's other inputs, with a `DynamicCache` among them.

    Returns:
        [`MSDGenerateOutput`] if `return_dict_in_generate` is set, else the sequences `[B, L + new tokens]`.
    """
    settings = TreeSettings.from_generation_config(draft.generation_config)
    adapter = TargetAdapter(target, draft.config.target_layers)
    cache = model_kwargs[CACHE_NAME]
    keeps_cache = _outlives_the_call(cache, generation_config)
    selector = BatchSelector(
        input_ids, logits_processor, stopping_criteria, generation_config, streamer, keeps_ended_rows=keeps_cache
    )
    flags = {name: True for name in ("output_hidden_states", "output_attentions") if model_kwargs.get(name)}
    policy = make_tree_policy(settings, draft, adapter, selector.batch_size, selector.eos_token_ids)
    branches = SuffixBranches(input_ids, adapter.visual_mask(input_ids))
    extras = DecoderOutputs(selector.batch_size, layer_windows(adapter.text_config), flags)
    num_slots = _slots_after_prompt(cache, input_ids, generation_config, model_kwargs)
    conversation = Conversation(cache, draft, input_ids, num_slots) if selector.batch_size == 1 else None
    max_slots = num_slots + max(generation_config.max_length - input_ids.shape[1], 0)
    check_positions(adapter.text_config, num_slots, max_slots, selector.batch_size, model_kwargs.get("attention_mask"))
    max_slots += settings.num_nodes + settings.suffix_nodes
    make_in_place(cache, max_slots)
    static_nodes: int | None = None
    if is_compiled(draft.generation_config):
        static_nodes = settings.num_nodes + settings.suffix_nodes
        make_static(cache, adapter.decoder, adapter.text_config.num_hidden_layers)

    static_settings = settings if static_nodes is not None else None
    generator = MSDCandidateGenerator(draft, adapter, max_slots + settings.num_candidates, static_settings)

    with phase("prefill"):
        prefill = adapter.prefill(input_ids, generation_config, model_kwargs)
    extras.add_prefill(prefill.outputs)
    tokens = selector.select(prefill.logits)
    running = RunningRows(cache, prefill.prompt_mask, prefill.next_position, tokens)
    if not selector.finished:
        check_tree_verification(adapter, running, input_ids, model_kwargs, selector.tokens_left)
    if keeps_cache or not selector.finished:
        with phase("prefill"):
            generator.prefill(prefill, torch.tensor(tokens), conversation)
    static_tokens = generator.static_tokens
    has_padding = prefill.prompt_mask is not None
    del prefill  # its [B, L, H] tensors are not needed any more

    leaves_buffers = static_nodes is not None and not keeps_cache
    with (
        phase("decode"),
        buffers_left(leaves_buffers, (cache, adapter.decoder), (generator.cache, draft)),
        running.cut_back_on_error(selector),
    ):
        if not selector.finished and not flags and DeviceRounds.can_serve(adapter, generator, selector, settings):
            DeviceRounds(adapter, generator, running, selector, keeps_cache).run()
        while not selector.finished:
            _drop_ended(selector, running, generator, keeps_cache)
            limits = policy.begin_round(selector.tokens_left, running.context.num_slots)
            roots = torch.tensor(running.tokens, device=draft.device)
            with phase("tree"):
                tree = generator.propose(roots, limits, policy, best_path_first=True)
                tree = branches.added_to(tree, limits.suffix_nodes, selector.running_tokens)
            tree = tree.to(running.next_position.device)
            if selector.padded_rows:
                tree = tree.with_chain(selector.padded_rows, selector.pad_token_id)
            tree = tree.with_emittable_depths(selector.tokens_left_by_row)

            with phase("cache"):
                running.settle()
            context_lengths = running.context.lengths
            policy.begin_verification()
            verification = adapter.verify(tree, cache, running.context, running.next_position, static_nodes, **flags)
            with phase("verification"):
                verified = verify(tree, verification.logits, selector)
            extras.add(verification.outputs, selector.running, verified.paths, context_lengths)

            paths = _padded(verified.paths, tree.tokens.device)
            running.accept(verified, paths)
            selector.end_round(verified.counts, verified.num_draft_tokens)
            if keeps_cache or not selector.finished:
                emitted, states = _padded(verified.tokens, draft.device, static_tokens), verification.hidden_states
                if tree.tokens.shape[1] > 1:
                    nodes = paths if static_tokens is None else _padded(verified.paths, states.device, static_tokens)
                    states = states.gather(1, nodes.to(states.device).unsqueeze(2).expand(-1, -1, states.shape[2]))
                generator.accept(emitted, states, verified.counts)
            del verification  # its logits are not to be held beside those of the next round
            policy.end_round(tree, verified.paths)

    if streamer is not None:
        streamer.end()
    if keeps_cache:
        running.complete(adapter, selector, extras, flags)
        if conversation is not None and not has_padding:
            generator.feed_pending()
            conversation.remember(cache, generator.cache, selector.row_tokens(0), generator.last_hidden_state)
    if not generation_config.return_dict_in_generate:
        return selector.sequences
    return MSDGenerateOutput(
        sequences=selector.sequences,
        scores=selector.scores,
        logits=selector.logits,
        hidden_states=extras.hidden_states,
        attentions=extras.attentions,
        acceptance_lengths=selector.acceptance_lengths,
        **{CACHE_NAME: cache},
    )


def _drop_ended(
    selector: BatchSelector, running: RunningRows, generator: MSDCandidateGenerator, keeps_cache: bool
) -> None:
    """Takes rows that have ended out of the batch: they cost nothing more."""
    rows = selector.running
    places = selector.drop_ended()
    if len(places) < len(rows):
        running.select(places, rows, keep_others=keeps_cache)
        generator.keep_rows(places)


def _outlives_the_call(cache: Cache, generation_config: GenerationConfig) -> bool:
    """Whether someone may look at the cache afterwards."""
    if generation_config.return_dict_in_generate:
        return True
    return getattr(cache, "_is_user_defined", False)


def _slots_after_prompt(
    cache: Cache, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> int:
    """Slots of the target's cache once the prompt is in it: `input_ids` are all of it, or what the cache lacks."""
    inputs_embeds = model_kwargs.get("inputs_embeds")
    if inputs_embeds is not None:
        return inputs_embeds.shape[1]
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None:
        return attention_mask.shape[1]
    return getattr(generation_config, "_mask_length", None) or cache.get_seq_length() + input_ids.shape[1]


def _padded(rows: Sequence[Sequence[int]], device: torch.device, length: int | None = None) -> torch.Tensor:
    """Lists as `[B, length]`, with zeros behind shorter ones; without a length as the longest."""
    if length is None:
        length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)


__all__ = ["msd_decoding"]
