"""The parts of one call of `generate` with a draft, made before the first forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE_NAME
from ..compiled.compile import is_compiled
from ..decoders import decoder_of
from ..draft.interface import Draft
from ..drafting.drafter import Drafter
from ..drafting.fixed import FixedDrafter
from ..drafting.growing import GrowingDrafter
from ..drafting.memory import ChatMemory
from ..drafting.visual_rows import most_visual_rows
from ..kv.fixed import make_fixed
from ..kv.reference_window import spared_slots
from ..kv.slots import ContextSlots
from ..kv.transaction import CacheTransaction, make_in_place
from ..observer import Observer, current_observer
from ..target.adapter import TargetAdapter
from ..target.layer_kinds import layer_reaches
from ..target.support import check_padding, check_positions
from ..tree.policy import TreePolicy
from ..tree.saved_experience import Circumstances
from ..tree.settings import TreeSettings
from ..tree.suffix import SuffixBranches
from .batch_selection import BatchSelector
from .decoder_outputs import DecoderOutputs
from .pair import PairState, state_of
from .run_stats import RunTally


@dataclass
class DecodingCall:
    """
    The parts that one call works with. `prepare_call` makes them, the loop uses them.

    Args:
        target (`TargetAdapter`): verifies trees.
        draft (`Draft`): the draft, which `drafter` runs.
        drafter (`Drafter`): drafts trees.
        branches (`SuffixBranches`): adds repetitions of the text to trees.
        policy (`TreePolicy`): chooses the sizes of trees.
        settings (`TreeSettings`): settings of the draft's trees.
        selector (`BatchSelector`): chooses and emits tokens.
        slots (`CacheTransaction`): the transaction over the target's cache.
        outputs (`DecoderOutputs`): collects the hidden states and attentions that are returned.
        memory (`ChatMemory`, *optional*): what the draft knows from earlier turns, for a single sequence.
        pair (`PairState`): what is kept between calls.
        observer (`Observer`): functions of a measurement that encloses the call.
        tally (`RunTally`): counts the rounds.
        flags (`dict[str, bool]`): `output_hidden_states`, `output_attentions`, if they are asked for.
        keeps_cache (`bool`): whether the target's cache outlives the call.
        num_fixed_nodes (`int`, *optional*): nodes of a tree in compiled verifications; `None`: nothing is compiled.
        is_chain (`bool`): whether the target verifies chains only, as the check of unknown kinds may find.
    """

    target: TargetAdapter
    draft: Draft
    drafter: Drafter
    branches: SuffixBranches
    policy: TreePolicy
    settings: TreeSettings
    selector: BatchSelector
    slots: CacheTransaction
    outputs: DecoderOutputs
    memory: ChatMemory | None
    pair: PairState
    observer: Observer
    tally: RunTally
    flags: dict[str, bool]
    keeps_cache: bool
    num_fixed_nodes: int | None
    is_chain: bool = False


def prepare_call(
    target: PreTrainedModel,
    draft: Draft,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> DecodingCall:
    """
    Makes the parts of a call from the arguments of [`msd_decoding`].

    Raises:
        MSDPairingError: when the target lacks a layer that the draft reads.
        MSDUnsupportedError: when positions of the call cannot be served.
    """
    pair = state_of(target, draft)
    settings = TreeSettings.from_generation_config(draft.generation_config)
    if pair.is_chain:
        settings = settings.as_chain()
    adapter = TargetAdapter(target, draft.reads_of(decoder_of(target)), pair.compiled)
    adapter.masks_attention = pair.masks_attention
    cache = model_kwargs[CACHE_NAME]
    keeps_cache = _outlives_the_call(cache, generation_config)
    selector = BatchSelector(
        input_ids, logits_processor, stopping_criteria, generation_config, streamer, keeps_ended_rows=keeps_cache
    )
    batch_size = selector.batch_size
    circumstances = _circumstances(target, draft, batch_size if selector.in_step and batch_size > 1 else 0)
    policy = pair.tree_policy(settings, circumstances, draft, selector.eos_token_ids, batch_size)

    num_slots = _slots_after_prompt(cache, input_ids, generation_config, model_kwargs)
    max_slots = num_slots + max(generation_config.max_length - input_ids.shape[1], 0)
    check_positions(adapter.text_config, num_slots, max_slots, batch_size, model_kwargs.get("attention_mask"))
    prompt_length = spared_slots(cache.layers) or num_slots
    check_padding(adapter.text_config, max_slots - prompt_length, model_kwargs.get("attention_mask"))
    max_slots += settings.num_nodes + settings.suffix_nodes
    make_in_place(cache, max_slots, adapter.image_layers)
    num_fixed_nodes = None
    if is_compiled(draft.generation_config):
        num_fixed_nodes = settings.num_nodes + settings.suffix_nodes
        make_fixed(cache, pair.target_buffers, adapter.text_config.num_hidden_layers)

    max_visual_rows = most_visual_rows(draft.generation_config, draft.config.trained_visual_rows)
    drafter: Drafter
    if num_fixed_nodes is not None and settings.num_nodes > 1 and draft.is_plain:
        drafter = FixedDrafter(draft, adapter, settings, pair.compiled, pair.draft_buffers, max_visual_rows)
    else:
        drafter = GrowingDrafter(
            draft, adapter, max_slots + settings.num_candidates, policy, True, max_visual_rows=max_visual_rows
        )
    # Last, because `ChatMemory` takes the draft's memory of a chat off the cache. A refused call must leave it there.
    memory = ChatMemory(cache, draft, input_ids, num_slots) if batch_size == 1 else None
    flags = {name: True for name in ("output_hidden_states", "output_attentions") if model_kwargs.get(name)}
    return DecodingCall(
        target=adapter,
        draft=draft,
        drafter=drafter,
        branches=SuffixBranches(input_ids, adapter.visual_mask(input_ids)),
        policy=policy,
        settings=settings,
        selector=selector,
        slots=CacheTransaction(cache, ContextSlots([cache.get_seq_length()] * batch_size)),
        outputs=DecoderOutputs(batch_size, layer_reaches(adapter.text_config), flags, adapter.image_layers),
        memory=memory,
        pair=pair,
        observer=current_observer(),
        # Automatic trees read the scores of each level, so the host goes on when the tree is there.
        tally=RunTally(is_timed=settings.is_auto or draft.device.type == "cpu"),
        flags=flags,
        keeps_cache=keeps_cache,
        num_fixed_nodes=num_fixed_nodes,
    )


def _circumstances(target: PreTrainedModel, draft: Draft, rows_in_step: int) -> Circumstances:
    """What the costs of a round depend on, in words that name no machine."""
    device, config = draft.device, target.config.get_text_config(decoder=True)
    is_gpu = device.type == "cuda"
    return Circumstances(
        device=torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {torch.get_num_threads()} threads",
        draft_dtype=str(draft.dtype).removeprefix("torch."),
        target_dtype=str(target.dtype).removeprefix("torch."),
        attention=target.config._attn_implementation,
        target=config.model_type,
        hidden_size=getattr(config, "hidden_size", None),
        num_layers=getattr(config, "num_hidden_layers", None),
        vocab_size=getattr(config, "vocab_size", None),
        rows_in_step=rows_in_step,
    )


def _outlives_the_call(cache: Cache, generation_config: GenerationConfig) -> bool:
    """Whether the cache outlives the call, because it is returned or belongs to the user."""
    if generation_config.return_dict_in_generate:
        return True
    return getattr(cache, "_is_user_defined", False)


def _slots_after_prompt(
    cache: Cache, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> int:
    """The number of slots of the target's cache once the prompt is in it. `input_ids` are the whole prompt, or the
    part that the cache lacks."""
    inputs_embeds = model_kwargs.get("inputs_embeds")
    if inputs_embeds is not None:
        return inputs_embeds.shape[1]
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None:
        return attention_mask.shape[1]
    return getattr(generation_config, "_mask_length", None) or cache.get_seq_length() + input_ids.shape[1]


__all__ = ["DecodingCall", "prepare_call"]
