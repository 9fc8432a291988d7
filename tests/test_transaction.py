"""A cache during a call: blocks are committed or aborted as a whole, whatever interrupts the call."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

from msd_hf.compat import CACHE_NAME
from msd_hf.errors import MSDCacheError
from msd_hf.kv import in_place
from msd_hf.kv.image_states import ImageStatesLayer
from msd_hf.kv.indexed import InPlaceIndexedLayer
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, can_commit, make_in_place


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


class IndexedStates:
    """A cache with an indexed layer, whose keys of the indexer and positions are parts of its keys, and with a layer
    of images. Everything that is done to the cache must keep them together."""

    def __init__(self, batch_size: int = 3):
        self.cache = DynamicCache()
        self.cache.layers = [InPlaceIndexedLayer(64), ImageStatesLayer()]
        self.cache.layer_class_to_replicate = None
        self.slots = CacheTransaction(self.cache, ContextSlots([0] * batch_size))
        self.images = torch.randn(batch_size, 1, 5, 4)

    def append(self, num_slots: int) -> None:
        keys = torch.randn(len(self.slots.rows), 2, num_slots, 4)
        layer = self.cache.layers[0]
        positions = [part for part in (layer.indexer_position_ids, keys[None, :, 0, :, 0]) if part is not None]
        layer.indexer_position_ids = torch.cat(positions, dim=-1)
        self.cache.update(keys, -keys, 0)
        assert torch.equal(layer.update_indexer(keys[:, 0, :, :3]), layer.keys[:, 0, :, :3])

    def check(self) -> None:
        layer, images = self.cache.layers
        assert torch.equal(layer.values, -layer.keys)
        assert torch.equal(layer.indexer_keys, layer.keys[:, 0, :, :3])
        assert torch.equal(layer.indexer_position_ids[0], layer.keys[:, 0, :, 0])
        assert torch.equal(images.keys, self.images[self.slots.rows]) and torch.equal(images.values, -images.keys)


def test_keys_of_an_indexer_move_with_their_slots_and_images_stay():
    torch.manual_seed(0)
    states = IndexedStates()
    slots = states.slots
    slots.begin()
    states.append(5)
    states.cache.update(states.images, -states.images, 1)
    slots.commit_prompt(None)
    states.check()
    steps = [
        lambda: slots.commit([2, 2, 2], torch.tensor([[0, 3], [1, 2], [0, 4]])),
        lambda: slots.commit([3, 1, 2], torch.tensor([[0, 2, 4], [3, 0, 0], [1, 2, 0]])),
        lambda: slots.commit([1, 4, 2]),
        lambda: slots.abort(),
        lambda: (slots.commit([2, 2, 2]), slots.keep_rows([2, 0], store_others=True)),
        lambda: slots.commit([3, 1], torch.tensor([[0, 1, 4], [2, 0, 0]])),
        lambda: (slots.commit([1, 1]), slots.restore_rows()),
    ]
    for step in steps:
        slots.begin()
        states.append(6)
        step()
        states.check()
    assert slots.rows == [0, 1, 2]
    length = slots.context.num_slots
    states.cache.crop(-2)
    states.check()
    assert states.cache.layers[0].get_seq_length() == length - 2
    for change in (
        lambda: states.cache.batch_repeat_interleave(2),
        lambda: states.cache.batch_select_indices(torch.tensor([4, 0])),
        lambda: states.cache.reorder_cache(torch.tensor([1, 0])),
    ):
        change()
        layer = states.cache.layers[0]
        assert torch.equal(layer.indexer_keys, layer.keys[:, 0, :, :3])
        assert torch.equal(layer.indexer_position_ids[0], layer.keys[:, 0, :, 0])
    assert torch.equal(states.cache.layers[1].keys, states.images[[0, 2]])
    states.cache.reset()
    layer = states.cache.layers[0]
    # Older releases of transformers keep the slots, filled with zeros.
    assert layer.index.get_seq_length() == layer.get_seq_length() and layer.indexer_position_ids is None


def test_a_crop_that_is_refused_leaves_the_indexer_alone():
    states = IndexedStates(1)
    states.append(6)
    layer = states.cache.layers[0]
    layer.min_length = 5
    with pytest.raises(MSDCacheError):
        layer.crop(-3)
    assert torch.equal(layer.indexer_keys, layer.keys[:, 0, :, :3]) and layer.get_seq_length() == 6


@pytest.mark.parametrize("num_slots", [0, 7])
def test_an_indexed_layer_of_transformers_keeps_its_content(num_slots):
    indexed = getattr(cache_utils, "DynamicIndexedLayer", None)
    if indexed is None:
        pytest.skip("This release of transformers has no such layer.")
    layer = indexed()
    keys = torch.randn(2, 2, num_slots, 4)
    if num_slots:
        layer.update(keys, -keys)
        layer.update_indexer(keys[:, 0])
        layer.indexer_position_ids = torch.arange(14).view(1, 2, 7)
    cache = DynamicCache()
    cache.layers = [layer]
    make_in_place(cache, 64)
    (made,) = cache.layers
    assert isinstance(made, InPlaceIndexedLayer) and made.get_seq_length() == num_slots
    assert num_slots == 0 or torch.equal(made.indexer_keys, keys[:, 0])
    assert made.indexer_position_ids is layer.indexer_position_ids
    make_in_place(cache, 64)  # a later call
    assert cache.layers[0].is_indexer_initialized == (num_slots > 0)


def test_images_go_with_the_block_that_brought_them():
    states = IndexedStates(1)
    slots = states.slots
    slots.begin()
    states.append(1)
    states.cache.update(states.images, -states.images, 1)
    slots.commit_prompt(None)
    slots.begin()
    states.append(2)
    more = torch.randn(1, 1, 3, 4)
    states.cache.update(more, -more, 1)
    assert states.cache.layers[1].get_seq_length() == 8
    slots.abort()
    states.check()
    slots.revert()
    assert [layer.get_seq_length() for layer in states.cache.layers] == [0, 0]


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


def test_layers_that_may_hold_more_than_is_known_are_not_served():
    class Layer(DynamicLayer):
        pass

    assert not can_commit(Layer()) and not can_commit(None)
    assert can_commit(DynamicLayer()) and can_commit(InPlaceIndexedLayer()) and can_commit(ImageStatesLayer())
