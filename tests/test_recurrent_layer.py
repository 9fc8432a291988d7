"""The cache layer of recurrent layers: states follow accepted paths, and exceptions leave them whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from msd_hf.errors import MSDUnsupportedError
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, can_commit, make_in_place, recurrent_layers
from msd_hf.recurrent.layer import RecurrentLayer, copy_states
from msd_hf.recurrent.nodes import TreeNodes
from msd_hf.target.layer_kinds import KEEPS_STATES
from msd_hf.tree.candidate import CandidateTree


pytestmark = pytest.mark.skipif(not KEEPS_STATES, reason="transformers 5.17 is the first whose layers keep states so")

CHANNELS, WIDTH, HEADS, SIZE = 3, 4, 2, 2
PARENTS = [0, 0, 1, 1, 2]


class Sum:
    """What a recurrence without decay keeps: each node adds its number plus one to the state."""

    def __init__(self, state: torch.Tensor):
        self.state = state

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        added = torch.tensor(
            [sum(node + 1 for node in path[:n]) for path, n in zip(paths.tolist(), counts, strict=True)]
        )
        return self.state + added.view(-1, 1, 1)


def filled_cache(rows: int = 2, prompt: int = 6, num_layers: int = 2) -> DynamicCache:
    """A cache with layers of attention and of recurrences in turn, after a prompt."""
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(rows, HEADS, prompt, SIZE, generator=generator)
    cache.update(keys, -keys, 0)
    for _ in range(num_layers):
        layer = LinearAttentionLayer()
        layer.update_conv_state(torch.randn(rows, CHANNELS, prompt, generator=generator), conv_kernel_size=WIDTH)
        layer.update_recurrent_state(torch.randn(rows, SIZE, SIZE, generator=generator))
        cache.layers.append(layer)
    cache.layer_class_to_replicate = None
    make_in_place(cache, 64)
    return cache


def run_tree(slots: CacheTransaction, rows: int) -> torch.Tensor:
    """What a forward over five nodes does to the cache. Returns the columns of its convolutions, `[B, C, N]`."""
    tree = CandidateTree.from_parents(
        torch.zeros(rows, 5, dtype=torch.long), torch.tensor([PARENTS] * rows), max_depth=3
    )
    nodes = TreeNodes(tree.parents, tree.ancestors)
    columns = torch.arange(rows * CHANNELS * 5, dtype=torch.float32).view(rows, CHANNELS, 5)
    slots.begin()
    keys = torch.randn(rows, HEADS, 5, SIZE)
    slots.cache.update(keys, -keys, 0)
    for layer in recurrent_layers(slots.cache):
        layer.expect(nodes)
        layer.update_conv_state(columns)
        nodes.convolved = None  # the convolution has run
        nodes.kept = Sum(layer.recurrent_states[0])
        layer.update_recurrent_state(layer.recurrent_states[0])
        assert layer.has_kept_nodes()
    return columns


def states_of(cache: DynamicCache) -> list[torch.Tensor]:
    return [
        part[0].clone() for layer in recurrent_layers(cache) for part in (layer.conv_states, layer.recurrent_states)
    ]


def equal(states: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(state, other) for state, other in zip(states, others, strict=True))


def transaction(cache: DynamicCache, rows: int = 2) -> CacheTransaction:
    return CacheTransaction(cache, ContextSlots([cache.get_seq_length()] * rows))


def test_states_follow_the_accepted_paths():
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    columns = run_tree(slots, rows=2)
    assert equal(states_of(cache), before)  # the forward itself leaves them
    slots.commit([3, 2], torch.tensor([[0, 1, 3], [0, 1, 0]]))
    for number, path in enumerate(([0, 1, 3], [0, 1])):
        expected = torch.cat([before[0][number], columns[number][:, path]], dim=1)[:, -WIDTH:]
        assert torch.equal(recurrent_layers(cache)[0].conv_states[0][number], expected)
        added = sum(node + 1 for node in path)
        assert torch.allclose(recurrent_layers(cache)[1].recurrent_states[0][number], before[3][number] + added)


def test_a_row_that_accepts_nothing_and_a_path_from_the_front():
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    run_tree(slots, rows=2)
    slots.commit([0, 2])
    assert equal([state[0] for state in states_of(cache)], [state[0] for state in before])
    assert not equal([state[1] for state in states_of(cache)], [state[1] for state in before])


def test_an_aborted_block_leaves_nothing():
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    run_tree(slots, rows=2)
    slots.abort()
    assert equal(states_of(cache), before) and cache.get_seq_length() == 6


@pytest.mark.parametrize("counts", [[1, 1], [0, 1]])
def test_a_step_of_plain_decoding_changes_copies(counts):
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    for ends in ("abort", "commit"):
        slots.begin()
        keys = torch.randn(2, HEADS, 1, SIZE)
        cache.update(keys, keys, 0)
        for layer in recurrent_layers(cache):
            layer.hold()
            layer.conv_states[0].add_(1)
            layer.recurrent_states[0].mul_(2)
        if ends == "abort":
            slots.abort()
            assert equal(states_of(cache), before)
    slots.commit(counts)
    for row, count in enumerate(counts):
        assert torch.equal(recurrent_layers(cache)[1].recurrent_states[0][row], before[3][row] * (1 + count))
        assert torch.equal(recurrent_layers(cache)[1].conv_states[0][row], before[2][row] + count)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("method, is_committed", [("advance", False), ("settle", True)])
@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_commit_is_whole_or_not_there(method, is_committed, number):
    cache = filled_cache()
    slots = transaction(cache)
    run_tree(slots, rows=2)
    slots.commit([1, 1])  # else the cache would go back to where the transaction began
    before = states_of(cache)
    run_tree(slots, rows=2)
    layer = recurrent_layers(cache)[number]
    original, calls = getattr(layer, method), []

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise Interrupted
        original(*args)

    setattr(layer, method, once)
    with pytest.raises(Interrupted), slots.undone_on_error():
        slots.commit([2, 2], torch.tensor([[0, 2], [0, 2]]))
    if is_committed:
        assert cache.get_seq_length() == 9
        assert torch.allclose(states_of(cache)[1], before[1] + 4) and torch.allclose(
            states_of(cache)[3], before[3] + 4
        )
    else:
        assert cache.get_seq_length() == 7 and equal(states_of(cache), before)


def test_rows_of_different_lengths_go_back_to_the_beginning():
    """Slots can be cut to the shortest row, states cannot."""
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    with pytest.raises(Interrupted), slots.undone_on_error():
        run_tree(slots, rows=2)
        slots.commit([1, 3], torch.tensor([[0, 0, 0], [0, 1, 2]]))
        raise Interrupted
    assert equal(states_of(cache), before) and cache.get_seq_length() == 6


def test_a_refusal_returns_to_the_beginning():
    """Also where a kernel that is not known has changed states in place."""
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    with pytest.raises(MSDUnsupportedError), slots.undone_on_error():
        run_tree(slots, rows=2)
        slots.commit([1, 1])
        run_tree(slots, rows=2)
        recurrent_layers(cache)[0].recurrent_states[0].add_(1)
        raise MSDUnsupportedError("refused")
    assert equal(states_of(cache), before) and cache.get_seq_length() == 6


def test_rows_leave_and_come_back():
    cache = filled_cache(rows=3)
    slots = transaction(cache, rows=3)
    run_tree(slots, rows=3)
    slots.commit([1, 1, 1])
    first = states_of(cache)
    slots.keep_rows([0, 2], store_others=True)
    assert equal(states_of(cache), [state[[0, 2]] for state in first])
    run_tree(slots, rows=2)
    slots.commit([2, 2])
    second = states_of(cache)
    slots.restore_rows()
    assert equal([state[1] for state in states_of(cache)], [state[1] for state in first])
    assert equal([state[[0, 2]] for state in states_of(cache)], second)


def test_what_was_tried_can_be_taken_back():
    cache = filled_cache()
    slots, before = transaction(cache), states_of(cache)
    with slots.restored():
        run_tree(slots, rows=2)
        slots.commit([2, 2])
        run_tree(slots, rows=2)
        slots.commit([1, 1])
    assert equal(states_of(cache), before) and slots.context.lengths == [6, 6]


def test_a_convolution_that_ran_in_another_way_counts_in_chains_alone():
    for parents, serves in ((PARENTS, False), ([0, 0, 1, 2, 3], True)):
        layer = recurrent_layers(filled_cache(rows=1))[0]
        tree = CandidateTree.from_parents(torch.zeros(1, 5, dtype=torch.long), torch.tensor([parents]), max_depth=4)
        nodes = TreeNodes(tree.parents, tree.ancestors)
        layer.expect(nodes)
        layer.update_conv_state(torch.zeros(1, CHANNELS, 5))  # what it returns goes to no function that is known
        nodes.kept = Sum(layer.recurrent_states[0])
        layer.update_recurrent_state(layer.recurrent_states[0])
        assert layer.has_kept_nodes() == serves


def test_a_layer_without_any_state_has_kept_nothing():
    layer = RecurrentLayer()
    tree = CandidateTree.from_parents(torch.zeros(1, 5, dtype=torch.long), torch.tensor([PARENTS]), max_depth=3)
    layer.expect(TreeNodes(tree.parents, tree.ancestors))
    assert not layer.has_kept_nodes()


def test_copies_share_nothing_and_go_on_as_the_layer_of_transformers():
    cache = filled_cache()
    layer, copy = recurrent_layers(cache)[0], LinearAttentionLayer()
    copy_states(layer, copy)
    copy.update_conv_state(torch.ones(2, CHANNELS, 1))
    assert not torch.equal(copy.conv_states[0], layer.conv_states[0])
    layer.update_conv_state(torch.ones(2, CHANNELS, 1))
    assert torch.equal(copy.conv_states[0], layer.conv_states[0])
    assert can_commit(layer) and can_commit(copy)
