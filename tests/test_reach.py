"""How far back each kind of layer sees: masks of trees against transformers' own masks, and places against slots."""

from __future__ import annotations

import random

import pytest
import torch
from families import FAMILIES
from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask

from msd_hf.attention.masks import Reach, buffer_attention_mask, tree_attention_mask
from msd_hf.compat import CACHE_NAME
from msd_hf.kv.slots import ContextSlots
from msd_hf.target.layer_kinds import attention_reaches, layer_reaches
from msd_hf.target.query_scales import QueryScales
from msd_hf.tree.candidate import CandidateTree


REACHES = [Reach(window=3), Reach(window=6), Reach(chunk=3), Reach(chunk=4), Reach(chunk=7)]
OWN_MASKS = {"window": create_sliding_window_causal_mask, "chunk": create_chunked_causal_mask}


def random_tree(rng: random.Random, num_nodes: int, rows: int) -> CandidateTree:
    parents = [[0, *[rng.randrange(node) for node in range(1, num_nodes)]] for _ in range(rows)]
    return CandidateTree.from_parents(
        torch.zeros(rows, num_nodes, dtype=torch.long), torch.tensor(parents), max_depth=num_nodes - 1
    )


def own_mask(reach: Reach, length: int, prompt_mask: torch.Tensor) -> torch.Tensor:
    """Which of `length` tokens each of them sees by transformers' own mask, `[B, length, length]`."""
    config = FAMILIES["llama4_text"].config()
    config._attn_implementation = "eager"
    config.sliding_window, config.attention_chunk_size = reach.window, reach.chunk
    mask = torch.ones(len(prompt_mask), length, dtype=torch.bool)
    mask[:, : prompt_mask.shape[1]] = prompt_mask
    create = OWN_MASKS["window" if reach.chunk is None else "chunk"]
    embeds = torch.zeros(len(mask), length, 4)
    return create(config, embeds, attention_mask=mask.long(), **{CACHE_NAME: None})[:, 0] == 0


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("padding", [[[], []], [[], [0, 1, 2]], [[0, 1, 2, 3, 4], [0]], [[0, 3], [2]]], ids=str)
def test_each_branch_of_a_tree_has_the_mask_that_transformers_gives_a_text(reach, padding):
    """Rows have other lengths and other hidden slots. A path of a tree is compared with a text of as many tokens."""
    rng = random.Random(str(reach))
    for lengths in ([9, 9], [11, 8], [7, 12]):
        tree, num_slots = random_tree(rng, 12, 2), max(lengths)
        prompt_mask = torch.ones(2, 6, dtype=torch.bool)
        for row, hidden in enumerate(padding):
            prompt_mask[row, hidden] = False
        context = ContextSlots(lengths, prompt_mask if any(padding) else None)
        seen = tree_attention_mask(tree.ancestors, context, torch.float64, reach, tree.depths)[:, 0] == 0
        first_slot = torch.tensor([num_slots])
        buffer = buffer_attention_mask(tree.ancestors, tree.depths, first_slot, context, 40, torch.float64, reach)
        assert torch.equal(buffer[:, 0, :, : num_slots + 12] == 0, seen)
        for row, length in enumerate(lengths):
            for node in range(12):
                path = tree.ancestors[row, node].nonzero()[:, 0].tolist()
                expected = own_mask(reach, length + len(path), prompt_mask)[row, -1]
                columns = [*range(length), *[num_slots + place for place in path]]
                assert torch.equal(seen[row, node, columns], expected)
                hidden = set(range(num_slots + 12)) - set(columns)
                assert not seen[row, node, sorted(hidden)].any()


def test_kinds_of_layers_and_how_far_they_see():
    config = FAMILIES["llama4_text"].config()
    assert attention_reaches(config) == {"full_attention": Reach(), "chunked_attention": Reach(chunk=6)}
    assert [reach.most for reach in layer_reaches(config)] == [6, None, 6, None]
    config.layer_types = None
    assert layer_reaches(config) == [Reach(chunk=6)] * 4


def test_queries_are_scaled_by_places_not_by_slots():
    """A row of 3 tokens beside one of 7: layers count from 7 on."""
    decoder = FAMILIES["llama4_text"].build().model
    scales = QueryScales(decoder)
    assert [projection is decoder.layers[1].self_attn.q_proj for projection in scales.projections] == [True]
    tree = CandidateTree.from_parents(torch.zeros(2, 4).long(), torch.tensor([[0, 0, 0, 1]] * 2), max_depth=3)

    def scale(place: int) -> float:
        return 1.0 + float(torch.log1p(torch.tensor(float((place + 1) // 5))))

    factors = scales.corrections(tree, ContextSlots([3, 7]))
    for row, length in enumerate((3, 7)):
        for node, depth in enumerate((0, 1, 1, 2)):
            assert float(factors[row, node, 0]) == pytest.approx(scale(length + depth) / scale(7 + node), abs=1e-6)
    assert scales.corrections(tree, ContextSlots([4, 5])) is None  # places 4 to 8 have the same scale
    assert QueryScales(FAMILIES["llama"].build().model).projections == []
