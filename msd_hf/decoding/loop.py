"""The decoding loop: prefill, then rounds that draft, verify and accept (paper section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE_NAME
from ..draft.interface import Draft
from ..kv.fixed import buffers_left
from ..kv.reference_window import spared_slots
from ..observer import phase
from ..target.tree_forward import TargetVerification
from ..tree.candidate import CandidateTree
from ..tree.settings import TreeSettings
from .call import DecodingCall, prepare_call
from .device_rounds import DeviceRounds
from .result import MSDGenerateOutput
from .run_stats import note_run
from .running_rows import RunningRows
from .self_check import check_tree_verification
from .verification import verify


@torch.no_grad()
def msd_decoding(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Draft,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> MSDGenerateOutput | torch.Tensor:
    """
    Generates the tokens that the target alone would generate, several per forward of the target.

    Args:
        target (`PreTrainedModel`): the target. The hook has checked it and all other arguments.
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts, image positions expanded.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate`.
        draft (`Draft`): the draft; its `generation_config` sets the size of the tree.
        model_kwargs: the target's other inputs, among them a `DynamicCache`.

    Returns:
        [`MSDGenerateOutput`] if `return_dict_in_generate` is set, else the sequences `[B, L + new tokens]`.
    """
    call = prepare_call(
        target, draft, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
    )
    leaves_buffers = call.num_fixed_nodes is not None and not call.keeps_cache
    spares = (call.slots.cache, call.pair.target_buffers), (call.drafter.cache, call.pair.draft_buffers)
    with call.slots.undone_on_error(), buffers_left(leaves_buffers, *spares):
        running = _prefill(call, input_ids, generation_config, model_kwargs)
        _run_rounds(call, running)
        _note_run(call)  # before the streamer ends, because its reader may ask for it
        if streamer is not None:
            streamer.end()
        if call.keeps_cache:
            _complete_cache(call, running)
    if generation_config.return_dict_in_generate:
        return _output(call)
    return call.selector.sequences


def _prefill(
    call: DecodingCall, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> RunningRows:
    """Runs the prompts through target and draft, and emits the first token of each row."""
    selector = call.selector
    call.slots.begin()
    with phase("prefill"):
        prefill = call.target.prefill(input_ids, generation_config, model_kwargs)
    call.slots.commit_prompt(prefill.prompt_mask, prefill.repeated_inputs)
    call.outputs.add_prefill(prefill.outputs, spared_slots(call.slots.cache.layers))
    tokens = selector.select(prefill.logits)
    running = RunningRows(call.slots, prefill.next_position, tokens)
    if not selector.finished:
        check_tree_verification(
            call.target,
            call.pair,
            running,
            input_ids,
            model_kwargs,
            prefill.outputs,
            selector.tokens_left,
            is_compiled=call.num_fixed_nodes is not None,
        )
        call.is_chain = call.pair.is_chain
    if call.keeps_cache or not selector.finished:
        call.drafter.put_off(prefill, torch.tensor(tokens), call.memory)
        if not call.policy.is_paused:
            _read_prompt(call)
    return running


def _read_prompt(call: DecodingCall) -> float:
    """Runs the draft over the prompt, if it has not read it. Returns the seconds that it took."""
    started = time.perf_counter()
    if call.drafter.awaits_prompt:
        with phase("prefill"):
            call.drafter.read_prompt()
    return time.perf_counter() - started


def _run_rounds(call: DecodingCall, running: RunningRows) -> None:
    """Decodes until every row has ended."""
    with phase("decode"):
        call.tally.begin()
        if DeviceRounds.can_serve(call):
            DeviceRounds(call, running).run()
        while not call.selector.finished:
            _run_round(call, running)
        call.tally.end()


def _run_round(call: DecodingCall, running: RunningRows) -> None:
    _drop_ended(call, running)
    started = time.perf_counter()
    num_slots, num_rows = running.context.num_slots, len(running.tokens)
    limits = call.policy.begin_round(call.selector.tokens_left, num_slots, num_rows)
    if limits.num_nodes > 1 and call.drafter.awaits_prompt:  # drafting paused until now
        seconds = _read_prompt(call)
        call.policy.leave_out(seconds)
        started += seconds
    tree, is_drafted = _draft(call, running, limits)
    call.tally.add_drafting(started)
    with phase("cache"):
        running.settle()
    call.policy.begin_verification()
    verification = _verify(call, running, tree)
    _accept(call, running, tree, verification)
    call.tally.drafted.append(is_drafted)


def _drop_ended(call: DecodingCall, running: RunningRows) -> None:
    """Takes rows that have ended out of the batch, so that they cost nothing more."""
    num_rows = len(call.selector.running)
    places = call.selector.drop_ended()
    if len(places) < num_rows:
        running.select(places, keep_others=call.keeps_cache)
        call.drafter.keep_rows(places)


def _draft(call: DecodingCall, running: RunningRows, limits: TreeSettings) -> tuple[CandidateTree, bool]:
    """Drafts a candidate tree for each running row. Returns the trees, and whether they hold anything to verify."""
    selector = call.selector
    device = running.next_position.device
    with phase("tree"):
        if limits.num_nodes == 1:  # nothing is drafted; a pair that does not pay runs most rounds so
            tree = CandidateTree.bare(torch.tensor(running.tokens, device=device))
        else:
            tree = call.drafter.propose(torch.tensor(running.tokens, device=call.drafter.device), limits)
        if call.is_chain and limits.top_k > 1 and tree.max_depth:
            tree = tree.best_path()  # this call has found out that the target verifies chains only
        elif limits.suffix_nodes and not call.is_chain:
            tree = call.branches.added_to(tree, limits.suffix_nodes, selector.running_tokens)
    is_drafted = tree.tokens.shape[1] > 1
    if is_drafted:
        tree = tree.to(device)
    if selector.padded_rows:
        tree = tree.with_chain(selector.padded_rows, selector.pad_token_id)
    return tree.with_emittable_depths(selector.tokens_left_by_row), is_drafted


def _verify(call: DecodingCall, running: RunningRows, tree: CandidateTree) -> TargetVerification:
    """Runs one forward of the target over all nodes of the trees."""
    cache, observer = running.slots.cache, call.observer

    def verify_tree(tree: CandidateTree) -> TargetVerification:
        return call.target.verify(
            tree, cache, running.context, running.next_position, call.num_fixed_nodes, **call.flags
        )

    running.slots.begin()
    verification = verify_tree(tree) if observer.on_verify is None else observer.on_verify(verify_tree, tree, cache)
    if observer.on_logits is not None:
        observer.on_logits(tree, verification.logits)
    return verification


def _accept(call: DecodingCall, running: RunningRows, tree: CandidateTree, verification: TargetVerification) -> None:
    """Emits the longest path that the target would have chosen itself, and the target's token behind it."""
    selector, drafter = call.selector, call.drafter
    with phase("verification"):
        verified = verify(tree, verification.logits, selector)
    call.outputs.add(verification.outputs, selector.running, verified.paths, running.context.lengths)
    paths = _padded(verified.paths, tree.tokens.device)
    running.accept(verified, paths)
    selector.end_round(verified.counts, verified.num_draft_tokens)
    if call.keeps_cache or not selector.finished:
        emitted = _padded(verified.tokens, drafter.device, drafter.block_length)
        states = verification.hidden_states
        if tree.tokens.shape[1] > 1 or emitted.shape[1] > 1:
            nodes = paths
            if emitted.shape[1] != paths.shape[1]:
                nodes = _padded(verified.paths, states.device, emitted.shape[1])
            states = states.gather(1, nodes.to(states.device).unsqueeze(2).expand(-1, -1, states.shape[2]))
        drafter.accept(emitted, states, verified.counts)
    call.policy.end_round(tree, verified.paths)


def _padded(rows: Sequence[Sequence[int]], device: torch.device, length: int | None = None) -> torch.Tensor:
    """Lists as a tensor `[B, length]`, zeros behind shorter lists; by default as long as the longest list."""
    if length is None:
        length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)


def _complete_cache(call: DecodingCall, running: RunningRows) -> None:
    """Brings the target's cache to the state in which `generate` alone leaves it, with the draft's memory on it."""
    running.complete(call.target, call.selector, call.outputs, call.flags)
    if call.memory is not None and running.context.prompt_mask is None:
        _read_prompt(call)
        call.drafter.feed_pending()
        emitted = call.selector.row_tokens(0)
        call.memory.remember(call.slots.cache, call.drafter.cache, emitted, call.drafter.last_hidden_state)


def _note_run(call: DecodingCall) -> None:
    """Keeps and logs what the call has done, and adds it to what is known of the pair."""
    selector, tally, observer = call.selector, call.tally, call.observer
    lengths = selector.acceptance_lengths
    note_run(call.target.target, tally.stats(selector.num_tokens, lengths))
    # Rows in step advance at the pace of the slowest, and a measurement may simulate acceptance.
    is_own_pace = selector.batch_size == 1 or not selector.in_step
    if is_own_pace and observer.notices and observer.on_logits is None and observer.on_verify is None:
        call.pair.notice.add(len(tally.drafted), tally.drafted_lengths(lengths))


def _output(call: DecodingCall) -> MSDGenerateOutput:
    return MSDGenerateOutput(
        sequences=call.selector.sequences,
        scores=call.selector.scores,
        logits=call.selector.logits,
        hidden_states=call.outputs.hidden_states,
        attentions=call.outputs.attentions,
        acceptance_lengths=call.selector.acceptance_lengths,
        **{CACHE_NAME: call.slots.cache},
    )


__all__ = ["msd_decoding"]
