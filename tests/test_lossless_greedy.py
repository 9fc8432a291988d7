"""Greedy generation with a draft gives the tokens of greedy generation without one, exactly in float64."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch

from msd_hf import MSDGenerateOutput


# Nodes including the root, levels after the first, candidates per node.
LARGE_TREES = [(59, 5, 10), (40, 7, 6), (24, 3, 6), (12, 4, 3), (500, 3, 4), (30, 5, 8)]
CHAINS = [(7, 5, 1), (12, 9, 1)]
SMALL_TREES = [(8, 0, 10), (3, 0, 2), (3, 9, 1), (1, 5, 10), (2, 0, 1)]
TREES = 2 * LARGE_TREES + CHAINS + SMALL_TREES
PROMPTS_PER_PAIR = 17
# The default run takes about half of them, `-m slow` all.
PARTS = {"half": range(8, PROMPTS_PER_PAIR), "all": range(PROMPTS_PER_PAIR)}
TREES_PER_PROMPT = 2
EOS_KINDS = [*8 * ["none"], "first", "early", "late", "late", "last", "several", "never"]


@dataclass
class Case:
    """One generation without a draft and the same with one."""

    description: str
    prompt_length: int
    expected: torch.Tensor
    output: MSDGenerateOutput
    num_nodes: int
    depth: int
    has_image: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.expected.shape[1] - self.prompt_length


def choose_eos(rng: random.Random, kind: str, tokens: list[int]) -> int | list[int] | None:
    """EOS ids that end generation at the place that `kind` names; `tokens` are generated without EOS."""
    absent = [token for token in range(3, tiny.VOCAB_SIZE) if token not in tokens]
    if kind == "none":
        return None
    if kind == "never":
        return absent[:2]
    if kind == "several":
        return [absent[0], tokens[len(tokens) // 2], tokens[-1]]
    # The token must not occur before its place; otherwise the nearest earlier place is taken.
    place = {"first": 0, "early": min(3, len(tokens) - 1), "late": 3 * len(tokens) // 4, "last": len(tokens) - 1}[kind]
    while tokens.index(tokens[place]) < place and place > 0:
        place -= 1
    return tokens[place]


by_parts = pytest.mark.parametrize("part", ["half", pytest.param("all", marks=pytest.mark.slow)])


@functools.cache
def run_cases(number: int, part: str = "half") -> list[Case]:
    """Random cases with one pair: `TREES_PER_PROMPT` for each prompt of the part."""
    pair, rng, cases = tiny.pair(number), random.Random(number), []
    trees = rng.sample(TREES, len(TREES)) * 2
    for index in range(PROMPTS_PER_PAIR):
        inputs = tiny.random_prompt(rng)
        # Eager attention of transformers gives NaN at padding in float64, with or without a draft: its softmax is
        # float32, in which the mask becomes -inf. Eager attention with padding has its own test below.
        attention = "sdpa" if "attention_mask" in inputs else ("sdpa", "eager")[index % 2]
        draft_attention = attention if "attention_mask" in inputs else rng.choice(["sdpa", "eager"])
        length = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"max_new_tokens": rng.choice([1, 3, 18, 22, 26, 26, 29, 29, 34, 34])}
        eos_kind = rng.choice(EOS_KINDS)
        trees_of_prompt = [trees.pop() for _ in range(TREES_PER_PROMPT)]
        if index not in PARTS[part]:
            continue
        pair.set_attention(attention, draft_attention)
        expected = pair.target.generate(**inputs, **options)
        eos = choose_eos(rng, eos_kind, expected[0, length:].tolist())
        if eos is not None:
            options["eos_token_id"] = eos
            expected = pair.target.generate(**inputs, **options)
        for tree in trees_of_prompt:
            output = pair.target.generate(
                **inputs, **options, assistant_model=pair.with_tree(*tree), return_dict_in_generate=True
            )
            cases.append(
                Case(
                    description=f"pair {number}, prompt {index}, tree {tree}, {attention}, eos {eos_kind}, {options}",
                    prompt_length=length,
                    expected=expected,
                    output=output,
                    num_nodes=tree[0],
                    depth=tree[1],
                    has_image="pixel_values" in inputs,
                )
            )
    pair.set_attention("sdpa")
    return cases


def mean_tau(cases: list[Case]) -> float:
    """Tokens emitted per verification."""
    lengths = [length for case in cases for length in case.output.acceptance_lengths[0]]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("number", range(tiny.NUM_PAIRS))
@by_parts
def test_tokens_are_those_without_a_draft(part, number):
    for case in run_cases(number, part):
        assert torch.equal(case.output.sequences, case.expected), case.description
        lengths = case.output.acceptance_lengths[0]
        assert sum(lengths) == case.num_tokens - 1, case.description
        assert max(lengths, default=1) <= min(case.depth + 2, case.num_nodes), case.description


@pytest.mark.parametrize("number", [number for number in range(tiny.NUM_PAIRS) if tiny.is_fitted(number)])
def test_drafts_are_accepted_in_part(number):
    tau = mean_tau([case for case in run_cases(number) if case.num_nodes > 2])
    assert 1.8 < tau < 6, tau


def test_a_very_long_chain():
    """The chain has more nodes than the 64 spare slots that a cache allocates at a time."""
    pair = tiny.pair(0)
    inputs = tiny.make_prompt(3, 9)
    expected = pair.target.generate(**inputs, max_new_tokens=80, eos_token_id=None)
    draft = pair.with_tree(75, 73, 1)
    assert torch.equal(
        pair.target.generate(**inputs, max_new_tokens=80, eos_token_id=None, assistant_model=draft), expected
    )


@by_parts
def test_the_cases_are_many_and_varied(part):
    """Equal tokens prove little unless cases are many, mostly long and of every kind, and candidates are accepted."""
    cases = [case for number in range(tiny.NUM_PAIRS) for case in run_cases(number, part)]
    assert len(cases) >= (300 if part == "all" else 150)
    tau, tokens = mean_tau(cases), [case.num_tokens for case in cases]
    print(f"{len(cases)} cases, {sum(tokens)} tokens, mean tau {tau:.2f}")
    assert tau > 1.8
    assert sum(tokens) / len(cases) > 12
    assert sum(count >= 10 for count in tokens) > 0.55 * len(cases)
    assert 0.3 < sum(case.has_image for case in cases) / len(cases) < 0.8
    # The targets do not only repeat one token.
    distinct = [len(set(case.expected[0, case.prompt_length :].tolist())) for case in cases if case.num_tokens >= 20]
    assert sum(distinct) / len(distinct) > 8


@pytest.mark.parametrize("max_new_tokens", [1, 2, 8])
def test_eos_at_every_place_of_a_tree(max_new_tokens):
    """Generation may end at any token of a round, wherever it lies in the tree."""
    pair = tiny.pair(0)
    inputs = tiny.make_prompt(5, 6, (2,))
    tokens = pair.target.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :].tolist()
    for eos in dict.fromkeys(tokens):
        expected = pair.target.generate(**inputs, max_new_tokens=max_new_tokens, eos_token_id=eos)
        for tree in ((59, 5, 10), (6, 5, 1)):
            output = pair.target.generate(
                **inputs, max_new_tokens=max_new_tokens, eos_token_id=eos, assistant_model=pair.with_tree(*tree)
            )
            assert torch.equal(output, expected), (eos, tree)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_mask_with_a_hole(dtype, attention):
    """The mask hides parts of the text and of an image; in float32 (see `run_cases`) also the first two tokens."""
    pair = tiny.pair(1)
    target, draft = copy.deepcopy(pair.target).to(dtype), copy.deepcopy(pair.with_tree(24, 5, 4)).to(dtype)
    target.set_attn_implementation(attention)
    draft.set_attn_implementation(attention)
    inputs = tiny.make_prompt(9, 9, (3,), dtype=dtype)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, [5, 6, 8, 9] if dtype == torch.float64 else [0, 1, 5, 6, 8, 9]] = 0
    expected = target.generate(**inputs, attention_mask=mask, max_new_tokens=24)
    assert not torch.equal(expected, target.generate(**inputs, max_new_tokens=24))
    output = target.generate(
        **inputs, attention_mask=mask, max_new_tokens=24, assistant_model=draft, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, expected)
    assert len(output.acceptance_lengths[0]) < 20


@pytest.mark.parametrize("number", [0, 1, 6])
@pytest.mark.parametrize("draft_attention", ["sdpa", "eager"])
def test_left_padding_with_eager_attention(number, draft_attention):
    """In float32, because eager attention gives NaN at padding in float64 (see `run_cases`)."""
    pair = tiny.pair(number)
    target, draft = copy.deepcopy(pair.target).float(), copy.deepcopy(pair.with_tree(24, 5, 4)).float()
    target.set_attn_implementation("eager")
    draft.set_attn_implementation(draft_attention)
    for seed in range(4):
        inputs = tiny.make_prompt(seed, 8, (3,), padding=1 + 3 * (seed % 2), dtype=torch.float32)
        expected = target.generate(**inputs, max_new_tokens=24)
        output = target.generate(**inputs, max_new_tokens=24, assistant_model=draft)
        assert torch.equal(output, expected), seed


@pytest.mark.parametrize("where", ["everywhere", "in some channels", "below the last of a level"])
def test_a_draft_that_overflows_changes_nothing(where):
    """A half-precision draft may give NaN and infinity. They make drafting useless, but the tokens stay right."""
    pair = tiny.pair(0)
    for tree in ((59, 5, 10), (12, 3, 10), (8, 4, 3), (7, 5, 1)):
        draft = copy.deepcopy(pair.with_tree(*tree))
        with torch.no_grad():
            if where == "everywhere":
                draft.fc.bias.fill_(torch.nan)
            elif where == "in some channels":
                draft.layers[0].mlp.down_proj.weight[3:5].fill_(torch.inf)

        def overflow(module, args, output, tree=tree):
            # Changes levels of the tree and not prompts: only the least likely node of a level overflows.
            level = output.shape[-2] == tree[2]
            return output.index_fill(-2, torch.tensor([tree[2] - 1]), torch.nan) if level else None

        if where == "below the last of a level":
            draft.fc.register_forward_hook(overflow)
        for seed in range(3):
            inputs = tiny.make_prompt(seed, 7, (2,) if seed % 2 else ())
            expected = pair.target.generate(**inputs, max_new_tokens=20)
            output = pair.target.generate(**inputs, max_new_tokens=20, assistant_model=draft)
            assert torch.equal(output, expected), (tree, seed)


@pytest.mark.slow
def test_long_generations():
    """The caches outgrow their allocated slots several times."""
    for number in range(4):
        pair = tiny.pair(number)
        for seed in range(3):
            inputs = tiny.make_prompt(seed, 30, (4,))
            expected = pair.target.generate(**inputs, max_new_tokens=400)
            output = pair.target.generate(**inputs, max_new_tokens=400, assistant_model=pair.with_tree(59, 5, 10))
            assert torch.equal(output, expected), (number, seed)
