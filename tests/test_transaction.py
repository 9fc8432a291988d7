"""A cache during a call: blocks are committed or aborted as a whole, whatever interrupts the call."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from transformers import DynamicCache

from msd_hf.compat import CACHE_NAME
from msd_hf.kv import in_place
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, make_in_place


def filled_cache(num_slots: int, batch_size: int = 2) -> tuple[DynamicCache, torch.Tensor]:
    """A cache of two layers, and what both hold, `[B, 3, num_slots, 4]`."""
    cache = DynamicCache()
    make_in_place(cache, 64)
    states = torch.randn(batch_size, 3, num_slots, 4)
    for layer in range(2):
        cache.update(states, states, layer)
    return cache, states


def append(cache: DynamicCache, num_slots: int, layers=(0, 1)) -> torch.Tensor:
    """Appends slots to some layers, as a forward does that is interrupted between two layers."""
    states = torch.randn(cache.layers[0].keys.shape[0], 3, num_slots, 4)
    for layer in layers:
        cache.update(states, states, layer)
    return states


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_an_aborted_block_leaves_no_slot(layers):
    torch.manual_seed(0)
    cache, states = filled_cache(5)
    slots = CacheTransaction(cache, ContextSlots([5, 5]))
    slots.begin()
    append(cache, 7, layers)
    slots.abort()
    for layer in cache.layers:
        assert torch.equal(layer.keys, states) and torch.equal(layer.values, states)
    slots.begin()
    new = append(cache, 3)
    slots.commit([2, 2], torch.tensor([[0, 2], [1, 2]]))
    for layer in cache.layers:
        assert torch.equal(layer.keys[0, :, 5:], new[0][:, [0, 2]]) and layer.get_seq_length() == 7


def test_after_an_error_every_row_is_back_and_cut_to_what_all_rows_have():
    torch.manual_seed(0)
    cache, states = filled_cache(5, batch_size=3)
    slots = CacheTransaction(cache, ContextSlots([5, 5, 5]))
    with pytest.raises(KeyboardInterrupt), slots.undone_on_error():
        slots.begin()
        new = append(cache, 4)
        slots.commit([3, 1, 2])
        slots.keep_rows([2, 0], store_others=True)
        slots.begin()
        append(cache, 4, layers=(0,))
        raise KeyboardInterrupt
    assert slots.rows == [0, 1, 2]
    expected = torch.cat([states, new[:, :, :1]], dim=2)  # row 1 has committed one slot
    for layer in cache.layers:
        assert torch.equal(layer.keys, expected) and torch.equal(layer.values, expected)


def test_reverting_drops_all_that_was_committed_since():
    torch.manual_seed(0)
    cache, states = filled_cache(5)
    slots = CacheTransaction(cache, ContextSlots([5, 5]))
    slots.begin()
    append(cache, 4)
    slots.commit([3, 3])
    slots.revert()
    assert slots.context.lengths == [5, 5]
    for layer in cache.layers:
        assert torch.equal(layer.keys, states) and torch.equal(layer.values, states)


def test_a_block_that_was_neither_committed_nor_aborted_is_noticed():
    cache, _ = filled_cache(2)
    slots = CacheTransaction(cache, ContextSlots([2, 2]))
    slots.begin()
    with pytest.raises(AssertionError, match="neither committed nor aborted"):
        slots.begin()


class Interrupted(KeyboardInterrupt):
    pass


def interrupt_at_line(number: int, path: str):
    """A trace function that raises at the given line event of a file, counted from 0; later ones pass."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != path:
            return None
        if event == "line":
            seen += 1
            if seen == number + 1:
                raise Interrupted
        return trace

    return trace


@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_interrupt_at_any_line_of_the_prefill_leaves_every_layer_alike(is_filled, is_compiled):
    """Ctrl-C may come between two layers, or inside the update of one. The cache can be used again in any case."""
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    ids = tiny.make_prompt(4, 9)["input_ids"]
    first = ids[:, :4] if is_filled else ids[:, :0]
    expected = pair.target.generate(ids, max_new_tokens=8)
    num_interrupts = 0
    for number in range(0, 40, 2):
        cache = DynamicCache(config=pair.target.config.get_text_config())
        if is_filled:
            pair.target(first, **{CACHE_NAME: cache})
        draft.generation_config.compile = is_compiled or None
        handle = pair.target.get_decoder().layers[-1].register_forward_hook(end_of_prefill)
        sys.settrace(interrupt_at_line(number, in_place.__file__))
        try:
            pair.target.generate(ids, max_new_tokens=8, assistant_model=draft, **{CACHE_NAME: cache})
        except Interrupted:
            num_interrupts += 1
        finally:
            sys.settrace(None)
            handle.remove()
        # A layer that has seen nothing holds empty tensors of one dimension.
        held = [states for layer in cache.layers if layer.is_initialized for states in (layer.keys, layer.values)]
        assert {states.shape[2] if states.numel() else 0 for states in held} <= {first.shape[1]}
        draft.generation_config.compile = None
        got = pair.target.generate(ids, max_new_tokens=8, assistant_model=draft, **{CACHE_NAME: cache})
        assert got.tolist() == expected.tolist()
    assert num_interrupts == 20


def end_of_prefill(module, args, output):
    raise Interrupted
