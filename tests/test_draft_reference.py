"""
What a draft reads and proposes in generation, compared with a plain computation over the whole text.

A fault here changes no token of the output: it would only show by fewer accepted ones.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from dataclasses import dataclass

import pytest
import tiny
import torch
from transformers import DynamicCache

from msd_hf import Eagle3DraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import pair as pair_states
from msd_hf.observer import observing


NUM_NODES, DEPTH, TOP_K = 12, 3, 3
MAX_NEW_TOKENS = 14
KINDS = {
    "plain": {},
    "two layers": {"num_hidden_layers": 2, "input_layernorm": True, "attention_bias": True},
    "reads a layer": {"target_layers": [0]},
    "visual rows fused": {"decouple_visual_tokens": False},
    "own vocabulary": {},
}
# EAGLE-3 drafts, each with another way of feeding visual positions.
EAGLE3_KINDS = {
    "eagle3": {"draft_vocab_size": 40},
    "eagle3 placeholder": {
        "visual_positions": "placeholder",
        "has_own_embedding": True,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "eagle_aux_hidden_state_layer_ids": [0, 4],
    },
    "eagle3 pooled": {"visual_positions": "pooled", "norm_output": True, "fc_norm": True, "num_hidden_layers": 2},
    "eagle3 dropped": {"visual_positions": "dropped", "qk_norm": True},
    "eagle3 wide": {"hidden_size": 48, "has_own_embedding": True, "visual_positions": "pooled"},
}
PROMPTS = {
    "text": {},
    "image first": {"images_at": (0,)},
    "two images": {"images_at": (2, 5)},
    "padded": {"images_at": (3,), "padding": 3},
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiled functions run as they are: the tests are about what goes in and out."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())  # nothing compiled is kept


# The norms and the rotations of a draft are computed in float32.
ATOL = 2e-5
CASES = [
    *((kind, "two images") for kind in KINDS),
    *(("plain", prompt) for prompt in PROMPTS if prompt != "two images"),
    *((kind, "two images") for kind in EAGLE3_KINDS),
]
NOT_COMPILED = ("reads a layer", *EAGLE3_KINDS)
WAYS = [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[0] not in NOT_COMPILED]


@functools.cache
def _pair(kind: str) -> tiny.Pair:
    target = tiny.build_target(seed=5, **({"num_layers": 7} if kind in EAGLE3_KINDS else {}))
    with torch.no_grad():  # the image token is never the best one: in a text it would stand for an image
        weight = target.get_output_embeddings().weight
        weight[tiny.IMAGE_TOKEN_ID] = weight[tiny.IMAGE_TOKEN_ID - 1] / 2
    if kind in EAGLE3_KINDS:
        draft = eagle3_draft(target, **EAGLE3_KINDS[kind])
        return tiny.Pair(target, draft, fitted=False)
    draft = tiny.build_draft(target, seed=5, **KINDS[kind])
    if draft.config.target_layers:
        torch.nn.init.normal_(draft.feature_proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    else:
        tiny.fit_draft(draft, target, steps=30)
    if kind == "own vocabulary":
        draft.set_draft_vocab(range(3, tiny.VOCAB_SIZE, 2))
    return tiny.Pair(target, draft, fitted=True)


def eagle3_draft(target, **fields) -> Eagle3DraftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        draft = Eagle3DraftModel.from_target(target, **fields).eval()
        for parameter in draft.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
        if draft.d2t is not None:
            draft.set_draft_vocab(torch.randperm(tiny.VOCAB_SIZE - 1)[: len(draft.d2t)])
    return draft


def pair_of(kind: str, is_compiled: bool) -> tiny.Pair:
    pair = _pair(kind)
    pair.with_tree(NUM_NODES, DEPTH, TOP_K)
    pair.draft.generation_config.compile = is_compiled or None
    return pair


@dataclass
class Rows:
    """
    The rows of a text of L tokens: row j holds the token at j + 1 and the target's states at j.

    Args:
        embeds: `[1, L - 1, H]`.
        states: all states that the draft reads, side by side, `[1, L - 1, W]`.
        visual: which tokens are visual, `[1, L - 1]`.
        kept: the rows that the draft is fed, in order.
    """

    embeds: torch.Tensor
    states: torch.Tensor
    visual: torch.Tensor
    kept: list[int]

    def first(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings, states, mask and positions of those of the first rows that are fed."""
        kept = torch.tensor([row for row in self.kept if row < num_rows])
        return self.embeds[:, kept], self.states[:, kept], self.visual[:, kept], kept.unsqueeze(0)


@torch.no_grad()
def rows_of(pair: tiny.Pair, ids: torch.Tensor, pixels: torch.Tensor | None) -> Rows:
    """From the target's own outputs for a text `[1, L]` without padding."""
    # The input of the decoder, the output of each layer, that of the last one after the final norm.
    states = pair.target(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
    reads = pair.draft.reads_of(pair.target.get_decoder())
    parts = [states[layer + 1] for layer in reads.layers] + [states[-1]] * reads.with_last
    embeds, read, visual = states[0][:, 1:], torch.cat(parts, dim=-1)[:, :-1], ids[:, 1:] == tiny.IMAGE_TOKEN_ID
    policy, own = pair.draft.visual_positions, pair.draft.own_embedding
    if own is not None or policy == "placeholder":
        embeds = (own or pair.target.get_input_embeddings())(ids[:, 1:])
        if policy != "placeholder" and own is not None and own.embedding_dim == states[0].shape[-1]:
            embeds = torch.where(visual.unsqueeze(2), states[0][:, 1:], embeds)
    kept = list(range(visual.shape[1]))
    if policy in ("pooled", "dropped"):
        embeds, read = embeds.clone(), read.clone()
        for is_visual, group in itertools.groupby(range(visual.shape[1]), key=visual[0].__getitem__):
            run = list(group)
            if is_visual:
                kept = [row for row in kept if row not in run[: -1 if policy == "pooled" else None]]
                embeds[:, run[-1]], read[:, run[-1]] = embeds[:, run].mean(1), read[:, run].mean(1)
    return Rows(embeds, read, visual, kept)


@torch.no_grad()
def run_draft(pair: tiny.Pair, rows: Rows, num_rows: int, tokens: list[int], own: list[torch.Tensor], cache=None):
    """
    The draft's outputs `[1, num_rows + len(tokens), H]` over the first rows of a text and over drafted tokens.

    Args:
        own: the draft's own outputs, which rows of drafted tokens hold in place of the target's states.
    """
    embeds, states, visual, positions = rows.first(num_rows)
    states = pair.draft.read_target(states)
    if tokens:
        table = pair.draft.own_embedding or pair.target.get_input_embeddings()
        embeds = torch.cat([embeds, table(torch.tensor([tokens]))], dim=1)
        states = torch.cat([states, *own], dim=1)
        visual = torch.cat([visual, torch.zeros(1, len(tokens), dtype=torch.bool)], dim=1)
        positions = torch.cat([positions, num_rows + torch.arange(len(tokens)).unsqueeze(0)], dim=1)
    # Without a cache transformers would take a gap between positions for the border of two texts.
    cache = DynamicCache(config=pair.draft.config) if cache is None else cache
    return pair.draft(embeds, states, visual, position_ids=positions, past_key_values=cache).last_hidden_state


def expected_tree(pair: tiny.Pair, rows: Rows, num_rows: int) -> dict[tuple[int, ...], float]:
    """The nodes below the root, as paths of tokens with the sums of their log-probabilities."""
    vocabulary = pair.draft.draft_vocab
    scores: dict[tuple[int, ...], float] = {}
    outputs: dict[tuple[int, ...], list[torch.Tensor]] = {(): []}
    level: list[tuple[int, ...]] = [()]
    for _ in range(DEPTH + 1):
        candidates = {}
        for path in level:
            states = run_draft(pair, rows, num_rows, list(path), outputs[path])[:, -1:]
            normed = states if pair.draft.head_norm is None else pair.draft.head_norm(states)
            logits = (pair.draft.own_head or pair.target.get_output_embeddings())(normed)[0, 0].detach()
            ids = torch.arange(len(logits)) if vocabulary is None else vocabulary
            if pair.draft.own_head is None:
                logits = logits[ids]
            best = logits.log_softmax(-1).topk(TOP_K)
            for log_prob, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                child = (*path, int(ids[index]))
                candidates[child] = scores.get(path, 0.0) + log_prob
                outputs[child] = [*outputs[path], states]
        scores |= candidates
        level = sorted(candidates, key=candidates.__getitem__, reverse=True)[:TOP_K]
    return dict(sorted(scores.items(), key=lambda item: -item[1])[: NUM_NODES - 1])


def paths_of(tree, row: int) -> dict[tuple[int, ...], float]:
    """The nodes of a drafted tree in the same form."""
    tokens, parents, scores = tree.tokens[row].tolist(), tree.parents[row].tolist(), tree.scores[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, NUM_NODES):
        paths.append((*paths[parents[node]], tokens[node]))
    return dict(zip(paths[1:], scores[1:], strict=True))


def assert_trees(pair: tiny.Pair, prompts: list[dict[str, torch.Tensor]]) -> None:
    """Each tree of each row is the one that a plain search over the row's text finds."""
    inputs = prompts[0] if len(prompts) == 1 else tiny.left_padded(prompts)
    trees = []
    with observing(on_logits=lambda tree, logits: trees.append(copy.copy(tree))):
        output = pair.target.generate(
            **inputs, assistant_model=pair.draft, max_new_tokens=MAX_NEW_TOKENS, return_dict_in_generate=True
        )
    texts, lengths, compared = [], [], 0
    for prompt, sequence in zip(prompts, output.sequences, strict=True):
        prompt_ids = prompt["input_ids"][prompt["input_ids"] != tiny.PAD_TOKEN_ID]
        texts.append(torch.cat([prompt_ids, sequence[inputs["input_ids"].shape[1] :]]).unsqueeze(0))
        lengths.append(len(prompt_ids) + 1)
    rows = [rows_of(pair, text, prompt.get("pixel_values")) for text, prompt in zip(texts, prompts, strict=True)]
    for number, tree in enumerate(trees):
        running = [row for row, text in enumerate(texts) if lengths[row] < text.shape[1]]
        for place, row in enumerate(running):
            assert tree.tokens[place, 0] == texts[row][0, lengths[row] - 1]
            if texts[row].shape[1] - lengths[row] > DEPTH + 2:  # no limit makes the tree smaller
                expected = expected_tree(pair, rows[row], lengths[row] - 1)
                assert paths_of(tree, place) == pytest.approx(expected, abs=ATOL)
                compared += 1
            lengths[row] += output.acceptance_lengths[row][number]
    assert compared > 2


@pytest.mark.parametrize("kind, prompt, is_compiled", WAYS)
def test_trees_are_those_of_a_plain_search(kind, prompt, is_compiled):
    assert_trees(pair_of(kind, is_compiled), [tiny.make_prompt(3, 7, **PROMPTS[prompt])])


@pytest.mark.parametrize(
    "kind, is_compiled",
    [("plain", False), ("plain", True), ("reads a layer", False), *((kind, False) for kind in EAGLE3_KINDS)],
)
def test_trees_of_a_batch_are_those_of_each_row(kind, is_compiled):
    """Rows differ in padding, in images, and in the number of tokens that they accept."""
    prompts = [tiny.make_prompt(1, 4, (0,)), tiny.make_prompt(2, 9), tiny.make_prompt(3, 6, (2, 2))]
    assert_trees(pair_of(kind, is_compiled), prompts)


@pytest.mark.parametrize("kind, prompt, is_compiled", [way for way in WAYS if way[1] != "padded"])
def test_the_draft_remembers_the_rows_of_the_text(kind, prompt, is_compiled):
    """After a call, and after a next turn on the same cache, its cache is that of one pass over the whole text."""
    pair = pair_of(kind, is_compiled)
    inputs = tiny.make_prompt(3, 7, **PROMPTS[prompt])
    pixels = inputs.get("pixel_values")
    cache = DynamicCache(config=pair.target.config.get_text_config())
    options = {"assistant_model": pair.draft, "return_dict_in_generate": True, CACHE_NAME: cache}
    ids = pair.target.generate(**inputs, **options, max_new_tokens=11).sequences
    for turn in range(2):
        memory, plain = cache._msd_draft_memory, DynamicCache(config=pair.draft.config)
        num_slots = cache.get_seq_length()
        rows = rows_of(pair, ids[:, : num_slots + 1], pixels)
        assert memory.rows == rows.kept
        run_draft(pair, rows, num_slots, [], [], plain)
        for layer, expected in zip(memory.cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, atol=ATOL, rtol=0)
            torch.testing.assert_close(layer.values, expected.values, atol=ATOL, rtol=0)
        if turn == 0:
            ids = torch.cat([ids, torch.tensor([[7, 11, 5]])], dim=1)
            ids = pair.target.generate(input_ids=ids, **options, max_new_tokens=9).sequences


@pytest.mark.parametrize("images_at", [(), (0,), (2, 5), (7,)], ids=str)
def test_visual_rows_of_a_prompt_are_known_without_its_tokens(images_at):
    """A prompt may be given as embeddings alone. Those of an image are none of the target's table."""
    pair = pair_of("plain", False)
    inputs = tiny.make_prompt(3, 7, images_at)
    masks = []
    handle = pair.draft.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["visual_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        embeds = pair.target(**inputs, output_hidden_states=True).hidden_states[0]
    try:
        pair.target.generate(**inputs, assistant_model=pair.draft, max_new_tokens=3)
        pair.target.generate(inputs_embeds=embeds, assistant_model=pair.draft, max_new_tokens=3)
    finally:
        handle.remove()
    visual = inputs["input_ids"][0, 1:] == tiny.IMAGE_TOKEN_ID
    expected = [*visual.tolist(), False]  # the last row holds the first new token
    assert [mask[0].tolist() for mask in masks] == [expected] * 2
