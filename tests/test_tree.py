"""The candidate tree grows as in the original implementation, and stays well formed in edge cases."""

from itertools import product
from types import SimpleNamespace

import golden_sets
import pytest
import tiny
import torch
from thinning import thinned
from torch import nn

from msd_hf import MSDError
from msd_hf.attention.masks import tree_attention_mask
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.kv.slots import ContextSlots
from msd_hf.target.adapter import TargetAdapter, TargetPrefill
from msd_hf.tree.candidate import CandidateTree
from msd_hf.tree.growth import TreeGrowth
from msd_hf.tree.settings import TreeSettings


TREES = [
    "tree_llava_total59",
    "tree_llava_total60",
    "tree_qwen2vl_total59",
    "tree_qwen2vl_total60",
    "tree_text_total59",
    "tree_text_total8_k3_d2",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TREES)
def test_trees_of_three_rounds_reproduce_the_original(name, dtype, tmp_path):
    values, info = golden_sets.load(name)
    weights_name = info["weights"].removesuffix(".safetensors")
    draft = golden_sets.load_draft(weights_name, tmp_path, dtype)
    table = golden_sets.load(weights_name)[0]["embed_tokens.weight"].to(dtype)
    head = golden_sets.load("lm_head")[0]["lm_head.weight"].to(dtype) * info["head_scale"]
    head_module = nn.Linear(*head.T.shape, bias=False, dtype=dtype)
    head_module.weight.data = head
    target = SimpleNamespace(
        embedding=nn.Embedding.from_pretrained(table),
        embed=lambda tokens: table[tokens],
        head_module=head_module,
        logit_cap=None,
    )
    generator = GrowingDrafter(draft, target)
    settings = TreeSettings(info["total_tokens_arg"], info["depth"], info["top_k"])

    token = torch.tensor([info["sample_token"]])
    visual_mask = golden_sets.shifted_visual_mask(values, 315 if "qwen2vl" in name else None, info["N_image"] or 0)
    prefill = TargetPrefill(
        logits=None,
        inputs_embeds=values["target_inputs_embeds"].to(dtype),
        hidden_states=values["r1.hidden_states"].to(dtype),
        visual_mask=torch.cat([visual_mask[:, :1] & False, visual_mask[:, :-1]], dim=1),  # undoes the shift
        prompt_mask=None,
        next_position=None,
        num_slots=visual_mask.shape[1],
        outputs=None,
    )
    with torch.no_grad():
        generator.prefill(prefill, token)
        for number in (1, 2, 3):
            if number > 1:
                hidden_states = values[f"r{number}.hidden_states"].to(dtype)
                tokens = values[f"r{number}.input_ids"][:, -hidden_states.shape[1] :]
                generator.accept(tokens, hidden_states, [tokens.shape[1]])
                token = tokens[:, -1]
            tree = generator.propose(token, settings)
            assert tree.tokens.tolist() == values[f"r{number}.draft_tokens"].tolist()
            assert tree.parents[0, 1:].tolist() == values[f"r{number}.parent"].tolist()[1:]
            assert tree.depths[0].tolist() == values[f"r{number}.tree_position_ids"].tolist()
            assert torch.equal(tree.ancestors[0], values[f"r{number}.tree_mask"].bool())


def random_growth(
    settings: TreeSettings, batch_size: int, sharpness: float = 1.0, widths=(10,), vocab_size: int = 30, tables=None
) -> TreeGrowth:
    growth = TreeGrowth(torch.arange(batch_size), settings, tables)
    frontier = 1
    for level in range(settings.depth + 1):
        if level:
            frontier = min(settings.top_k, widths[level % len(widths)])
            growth.narrow(frontier)
        logits = sharpness * torch.randn(batch_size, frontier, vocab_size)
        growth.expand(*logits.log_softmax(-1).topk(settings.top_k))
    return growth


@thinned(
    "settings,sharpness,widths",
    product(
        [(1, 5, 10), (2, 0, 3), (59, 5, 10), (8, 7, 1), (500, 2, 3), (16, 0, 10)],
        [0.0, 1.0, 1e4],
        [(10,), (1,), (2, 1, 3)],
    ),
)
def test_every_tree_is_well_formed(settings, sharpness, widths):
    """Log-probabilities may be exactly 0 (sharpness 1e4), so that a child ties with its parent; levels may differ in
    width."""
    torch.manual_seed(0)
    settings = TreeSettings(*settings)
    tree = random_growth(settings, batch_size=3, sharpness=sharpness, widths=widths).finish()
    expanded = [1] + [min(settings.top_k, widths[level % len(widths)]) for level in range(1, settings.depth + 1)]
    available = 1 + settings.top_k * sum(expanded)
    assert tree.tokens.shape == (3, min(settings.num_nodes, available))
    for row in range(3):
        parents, tokens, depths = tree.parents[row].tolist(), tree.tokens[row].tolist(), tree.depths[row].tolist()
        assert (parents[0], depths[0], tokens[0]) == (0, 0, row)
        siblings = set()
        for node in range(1, len(parents)):
            assert parents[node] < node  # flat order
            assert depths[node] == depths[parents[node]] + 1
            assert (parents[node], tokens[node]) not in siblings
            siblings.add((parents[node], tokens[node]))
            chain, current = {0}, node
            while current != 0:
                chain.add(current)
                current = parents[current]
            assert set(tree.ancestors[row, node].nonzero()[:, 0].tolist()) == chain
        assert max(depths) <= settings.depth + 1


def test_tables_of_an_earlier_tree_change_nothing():
    tables = None
    for settings, batch_size in [((30, 3, 4), 1), ((60, 6, 4), 1), ((30, 3, 4), 1), ((30, 3, 4), 3), ((9, 2, 2), 3)]:
        trees = []
        for kept in (None, tables):
            torch.manual_seed(batch_size)
            growth = random_growth(TreeSettings(*settings), batch_size, sharpness=8.0, tables=kept)
            trees.append(growth.finish())
        tables = growth.tables
        for part in ("tokens", "parents", "depths", "ancestors", "scores"):
            assert torch.equal(getattr(trees[0], part), getattr(trees[1], part))


def test_a_sure_draft_gives_a_chain_down_to_the_last_level():
    """If one token has probability 1 at every level, the tree must hold the whole path of these tokens."""
    settings = TreeSettings(num_nodes=7, depth=5, top_k=4)
    growth = TreeGrowth(torch.tensor([9]), settings)
    for level in range(6):
        if level:
            growth.narrow(4)
        log_probs = torch.full((1, 1 if level == 0 else 4, 4), -torch.inf)
        log_probs[..., 0] = 0.0
        growth.expand(log_probs, torch.arange(4).expand_as(log_probs).contiguous())
    tree = growth.finish()
    assert tree.depths.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert tree.parents.tolist() == [[0, 0, 1, 2, 3, 4, 5]]


def paths_with_scores(tree: CandidateTree, row: int) -> set[tuple]:
    """Every node as the tokens from the root down to it, and its score."""
    return {
        (tuple(tree.tokens[row, tree.ancestors[row, node]].tolist()), tree.scores[row, node].item())
        for node in range(tree.tokens.shape[1])
    }


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 1e4])
def test_with_the_best_path_first_a_tree_has_the_same_paths(sharpness):
    """The best of the deepest nodes and its ancestors come first, so that their slots need not move once accepted."""
    torch.manual_seed(1)
    grown = random_growth(TreeSettings(30, 6, 4), batch_size=3, sharpness=sharpness, widths=(4, 1, 2)).finish()
    tree = grown.with_best_path_first()
    rebuilt = CandidateTree.from_parents(tree.tokens, tree.parents, tree.max_depth)
    assert torch.equal(tree.ancestors, rebuilt.ancestors) and torch.equal(tree.depths, rebuilt.depths)
    for row in range(3):
        assert paths_with_scores(tree, row) == paths_with_scores(grown, row)
        assert all(parent < node for node, parent in enumerate(tree.parents[row].tolist()) if node)
        depth = grown.depths[row].max().item()
        deepest = grown.depths[row] == depth
        best = torch.where(deepest, grown.scores[row], -torch.inf).argmax()
        assert tree.tokens[row, : depth + 1].tolist() == grown.tokens[row, grown.ancestors[row, best]].tolist()
        assert tree.depths[row, : depth + 1].tolist() == list(range(depth + 1))


def test_mask_shows_the_context_and_the_ancestors():
    tree = CandidateTree.from_parents(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 2]]), max_depth=2)
    prompt_mask = torch.tensor([[False, True]])
    mask = tree_attention_mask(tree.ancestors, ContextSlots([3] * len(prompt_mask), prompt_mask), torch.float64)
    allowed = [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 1, 0],
        [0, 1, 1, 1, 0, 1, 1],
    ]
    assert mask.dtype == torch.float64 and mask.shape == (1, 1, 4, 7)
    assert (mask[0, 0] == 0).long().tolist() == allowed
    assert mask.min() == torch.finfo(torch.float64).min


@pytest.mark.parametrize(
    "name, value", [("num_assistant_tokens", 0), ("tree_depth", -1), ("tree_top_k", 0), ("tree_top_k", 2.5)]
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(MSDError, match=f"{name}.*got {value}"):
        TreeSettings.from_generation_config(SimpleNamespace(**{name: value}))


def test_levels_that_could_not_be_emitted_are_not_drafted():
    settings = TreeSettings(20, 5, 4)
    assert settings.limited_to(7) == settings == settings.limited_to(None)
    assert settings.limited_to(3) == TreeSettings(20, 1, 4)
    assert settings.limited_to(1).num_nodes == 1


def prefill_of_text(embeds, states):
    return TargetPrefill(
        logits=None,
        inputs_embeds=embeds,
        hidden_states=states,
        visual_mask=torch.zeros(embeds.shape[:2], dtype=torch.bool),
        prompt_mask=None,
        next_position=None,
        num_slots=embeds.shape[1],
        outputs=None,
    )


def test_tokens_that_are_fed_together_see_those_before_them():
    """The draft has two layers, so the second layer's keys of a token depend on the tokens that it attended to."""
    pair = next(pair for pair in map(tiny.pair, range(tiny.NUM_PAIRS)) if len(pair.draft.layers) > 1)
    adapter, length, num_tokens = TargetAdapter(pair.target), 7, 4
    size = pair.draft.config.hidden_size
    torch.manual_seed(0)
    embeds, states, new_states = (
        torch.randn(1, rows, size, dtype=pair.draft.dtype) for rows in (length, length, num_tokens)
    )
    tokens = torch.randint(3, 40, (1, num_tokens))
    trees, keys = [], []
    for parts in ([num_tokens], [1] * num_tokens):
        generator = GrowingDrafter(pair.draft, adapter)
        with torch.no_grad():
            generator.prefill(prefill_of_text(embeds, states), torch.tensor([5]))
            for part, part_states in zip(tokens.split(parts, 1), new_states.split(parts, 1), strict=True):
                generator.accept(part, part_states, [part.shape[1]])
                generator.feed_pending()
            keys.append([layer.keys.clone() for layer in generator.cache.layers])
            trees.append(generator.propose(tokens[:, -1], TreeSettings(12, 2, 3)))
    torch.testing.assert_close(*keys)
    torch.testing.assert_close(trees[0].scores, trees[1].scores)
    assert torch.equal(trees[0].tokens, trees[1].tokens)


def test_each_row_of_a_batch_gets_the_tree_that_it_gets_alone():
    """Scores are compared to their last digits, which a mask or state of another row would change."""
    pair = next(pair for pair in map(tiny.pair, range(tiny.NUM_PAIRS)) if len(pair.draft.layers) > 1)
    adapter, length, batch_size = TargetAdapter(pair.target), 7, 3
    size = pair.draft.config.hidden_size
    torch.manual_seed(0)
    embeds, states = (torch.randn(batch_size, length, size, dtype=pair.draft.dtype) for _ in range(2))
    tokens = torch.tensor([5, 9, 23])

    def draft(rows):
        generator = GrowingDrafter(pair.draft, adapter)
        with torch.no_grad():
            generator.prefill(prefill_of_text(embeds[rows], states[rows]), tokens[rows])
            return generator.propose(tokens[rows], TreeSettings(25, 4, 3))

    together = draft(slice(None))
    for row in range(batch_size):
        alone = draft(slice(row, row + 1))
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert torch.equal(together.parents[row], alone.parents[0])
        torch.testing.assert_close(together.scores[row], alone.scores[0])
