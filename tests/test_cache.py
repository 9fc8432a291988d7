"""The in-place cache layer is compared with transformers' own `DynamicLayer`."""

import random

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from msd_hf.kv.in_place import InPlaceLayer, truncate
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, make_in_place


def states(length: int, batch_size: int = 2, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch_size, heads, length, 4), torch.randn(batch_size, heads, length, 6)


def capacity_of(layer: InPlaceLayer) -> int:
    buffer = layer.keys._base
    assert buffer is not None
    return buffer.shape[-2]


@pytest.mark.parametrize("max_slots", [None, 8, 1000])
def test_behaves_like_a_dynamic_layer_under_everything_generate_does(max_slots):
    torch.manual_seed(0)
    rng = random.Random(0)
    ours, theirs = InPlaceLayer(max_slots), DynamicLayer()
    for _ in range(200):
        operation = rng.choice(["update", "update", "update", "crop", "reorder", "repeat", "select", "reset"])
        batch_size = ours.keys.shape[0] if ours.get_seq_length() else 2
        if operation == "update":
            new = states(rng.choice([1, 1, 5, 60]), batch_size)
            for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(got, expected)
        elif operation == "crop" and ours.get_seq_length() > 3:
            ours.crop(-3)
            theirs.crop(-3)
        elif operation == "reorder" and ours.get_seq_length():
            order = torch.randperm(batch_size)
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        elif operation == "repeat" and 0 < batch_size <= 4:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
        elif operation == "select" and batch_size > 2:
            ours.batch_select_indices(torch.tensor([1, 0]))
            theirs.batch_select_indices(torch.tensor([1, 0]))
        elif operation == "reset" and rng.random() < 0.2:
            ours, theirs = InPlaceLayer(max_slots), DynamicLayer()
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if ours.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize(("length", "has_buffer"), [(20, False), (4000, True)])
def test_a_single_token_copies_a_small_layer_only(length, has_buffer):
    layer = InPlaceLayer()
    layer.update(*states(length))
    layer.update(*states(1))
    assert (layer.keys._base is not None) == has_buffer and layer.get_seq_length() == length + 1


def test_grows_without_copying_what_it_holds():
    layer = InPlaceLayer(max_slots=320)
    prompt = states(200)
    layer.update(*prompt)
    assert layer.keys is prompt[0] and layer.values is prompt[1]  # the prompt is held without a copy
    layer.update(*states(6))
    start = layer.keys.data_ptr()
    assert capacity_of(layer) == 206 + 64
    for _ in range(64):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == start and layer.get_seq_length() == 270
    layer.update(*states(1))
    assert capacity_of(layer) == 320 and layer.get_seq_length() == 271  # growth stops at the bound
    layer.update(*states(60))  # a cache that exceeds the bound still works
    assert capacity_of(layer) == layer.get_seq_length() == 331


def test_a_prompt_is_copied_if_it_is_a_view_or_an_inference_tensor():
    keys = torch.randn(1, 9, 5, 4)
    both = keys[:, :3], keys[:, 3:]  # views would keep their whole tensor in memory
    with torch.inference_mode():
        inferred = states(5)
    for key_states, value_states in (both, inferred):
        layer = InPlaceLayer()
        layer.update(key_states, value_states)
        assert torch.equal(layer.keys, key_states) and torch.equal(layer.values, value_states)
        assert layer.keys.data_ptr() != key_states.data_ptr() and not layer.keys.is_inference()


def test_a_prompt_that_is_held_without_a_copy_is_not_written_to():
    layer, prompt = InPlaceLayer(), states(5)
    kept = prompt[0].clone()
    layer.update(*prompt)
    layer.crop(-3)
    layer.update(*states(2))
    assert torch.equal(prompt[0], kept)
    for places in (None, torch.tensor([[3, 4]] * 2)):
        layer = InPlaceLayer()
        layer.update(*prompt)
        if places is None:
            layer.keep_slots(1, torch.tensor([[2, 3], [1, 2]]))
        else:
            layer.move_slots(1, torch.tensor([[2, 3], [1, 2]]), places, 5)
        assert torch.equal(prompt[0], kept) and not torch.equal(layer.keys, kept)


def test_a_long_context_grows_in_larger_steps():
    """With a fixed amount of room, a long context would be copied too often."""
    layer = InPlaceLayer()
    layer.update(*states(4000))
    layer.update(*states(8))
    assert capacity_of(layer) == 4008 + 501


def test_dropping_nothing_leaves_the_views():
    layer = InPlaceLayer()
    layer.update(*states(5))
    layer.update(*states(1))
    keys = layer.keys
    layer.truncate(6)
    assert layer.keys is keys
    layer.truncate(4)
    assert layer.get_seq_length() == 4


def test_keeps_accepted_slots_in_place():
    torch.manual_seed(0)
    layer = InPlaceLayer()
    keys, values = states(10)
    layer.update(keys[:, :, :4], values[:, :, :4])
    layer.update(keys[:, :, 4:], values[:, :, 4:])
    start = layer.keys.data_ptr()
    slots = torch.tensor([[0, 2, 5], [0, 1, 3]])  # one path per row
    layer.keep_slots(4, slots)
    assert layer.keys.data_ptr() == start and layer.get_seq_length() == 7
    for row in range(2):
        kept = torch.cat([torch.arange(4), slots[row] + 4])
        assert torch.equal(layer.keys[row], keys[row, :, kept])
        assert torch.equal(layer.values[row], values[row, :, kept])
    new = states(2)
    layer.update(*new)
    assert torch.equal(layer.keys[:, :, 7:], new[0]) and layer.keys.data_ptr() == start


@pytest.mark.parametrize("lazy", [True, False])
def test_a_dynamic_cache_is_turned_in_place_as_the_same_object(lazy):
    cache = DynamicCache()
    if not lazy:
        cache.layers = [DynamicLayer(), DynamicLayer()]
    make_in_place(cache, 300)
    for layer_idx in range(2):
        cache.update(*states(20), layer_idx)
    assert isinstance(cache, Cache) and [type(layer) for layer in cache.layers] == [InPlaceLayer, InPlaceLayer]
    CacheTransaction(cache, ContextSlots([5, 5])).commit([1, 1], torch.tensor([[3], [1]]))
    assert cache.get_seq_length() == 6
    truncate(cache, 2)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("missing", [0, 3])
def test_a_filled_sliding_window_becomes_a_full_layer(missing):
    """Slots that have left the window become zeros; slots inside it keep their values."""
    window = 7
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=window), DynamicLayer()]
    keys, values = states(window - 1 + missing)
    for layer_idx in range(2):
        cache.update(keys, values, layer_idx)
    make_in_place(cache, 40)
    for layer in cache.layers:
        assert type(layer) is InPlaceLayer and layer.get_seq_length() == window - 1 + missing
    assert torch.equal(cache.layers[0].keys[:, :, missing:], keys[:, :, missing:])
    assert not cache.layers[0].values[:, :, :missing].any()
    new = states(2)
    cache.update(*new, 0)
    assert torch.equal(cache.layers[0].keys[:, :, -2:], new[0])


def test_rows_that_accept_different_numbers_of_slots():
    """Accepted slots follow the row's own context. A row may leave the cache and come back later."""
    torch.manual_seed(0)
    cache = DynamicCache()
    make_in_place(cache, 40)
    keys, values = states(9, batch_size=3)
    cache.update(keys[:, :, :4], values[:, :, :4], 0)
    cache.update(keys[:, :, 4:], values[:, :, 4:], 0)
    transaction = CacheTransaction(cache, ContextSlots([4, 4, 4]))
    transaction.commit([3, 1, 2], torch.tensor([[0, 2, 4], [1, 0, 0], [0, 3, 0]]))
    assert transaction.context.lengths == [7, 5, 6] and cache.get_seq_length() == 7
    expected = [[0, 1, 2, 3, 4, 6, 8], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 7]]
    for row, slots in enumerate(expected):
        assert torch.equal(cache.layers[0].keys[row, :, : len(slots)], keys[row, :, slots])
        assert torch.equal(cache.layers[0].values[row, :, : len(slots)], values[row, :, slots])
    assert transaction.context.mask(torch.device("cpu")).sum(1).tolist() == [7, 5, 6]
    transaction.keep_rows([1, 2], store_others=True)
    assert transaction.context.lengths == [5, 6] and cache.get_seq_length() == 6 and transaction.rows == [1, 2]
    # New nodes are appended after the longest row; accepted ones move to the end of their own row.
    new = states(3)
    cache.update(*new, 0)
    transaction.commit([2, 1], torch.tensor([[0, 2], [0, 1]]))
    assert transaction.context.lengths == [7, 7]
    assert torch.equal(cache.layers[0].keys[0, :, 5:7], new[0][0][:, [0, 2]])
    assert torch.equal(cache.layers[0].keys[1, :, 6:7], new[0][1][:, [0]])
    transaction.restore_rows()
    assert transaction.context.lengths == [7, 7, 7] and transaction.rows == [0, 1, 2]
    assert cache.layers[0].keys.shape == (3, 3, 7, 4)
    for row, slots in enumerate(expected):
        assert torch.equal(cache.layers[0].keys[row, :, : len(slots)], keys[row, :, slots])
