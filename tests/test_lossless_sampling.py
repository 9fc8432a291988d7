"""From the same seed, sampling with a draft gives the tokens of sampling without one, and the right distribution."""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)

from msd_hf.compat import CACHE_NAME
from msd_hf.decoding.batch_selection import BatchSelector
from msd_hf.decoding.result import MSDGenerateOutput
from msd_hf.decoding.verification import verify
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.evaluation.methods import ASSISTED_CHAIN, TREE, Method
from msd_hf.target.adapter import TargetAdapter
from msd_hf.tree.settings import TreeSettings


class CountingProcessor(LogitsProcessor):
    """Has state: its changes depend on the number of calls and on how often each token occurred."""

    def __init__(self):
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.prefixes.append(input_ids[0].tolist())
        counts = torch.bincount(input_ids[0], minlength=scores.shape[1])
        weights = torch.arange(scores.shape[1]) * len(self.prefixes) % 7
        return scores - 0.3 * counts - 0.1 * weights


class WholePrefixProcessor(LogitsProcessor):
    """Changes scores in place. The token that it excludes depends on the whole prefix."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        places = torch.arange(1, input_ids.shape[1] + 1)
        excluded = (input_ids[0] * places).sum().item() % scores.shape[1]
        scores[:, excluded] = -torch.inf
        return scores


def allow_by_prefix(batch_id: int, input_ids: torch.Tensor) -> list[int]:
    """A `prefix_allowed_tokens_fn` that forbids every third token; the last token decides which third."""
    return [token for token in range(3, tiny.VOCAB_SIZE) if (token + int(input_ids[-1])) % 3]


PROCESSORS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.6": {"temperature": 1.6},
    "top_k 4": {"top_k": 4, "temperature": 0.8},
    "top_k 1": {"top_k": 1},
    "top_p 0.6": {"top_p": 0.6},
    "top_p 0.9": {"top_p": 0.9, "temperature": 0.6, "top_k": 0},
    "min_p 0.15": {"min_p": 0.15, "temperature": 0.7},
    "typical_p": {"typical_p": 0.8},
    "epsilon and eta": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.01},
    "repetition_penalty 1.4": {"repetition_penalty": 1.4, "temperature": 0.5},
    "repetition_penalty 0.8": {"repetition_penalty": 0.8},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, "temperature": 0.5},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1, "top_p": 0.8},
    "bad words": {"bad_words_ids": [*([token] for token in range(3, 30)), [31, 33], [40, 41, 42]], "temperature": 0.5},
    "sequence bias": {"sequence_bias": [[[7], 2.0], [[20, 21], 4.0]], "renormalize_logits": True},
    "minimum": {"min_new_tokens": 9, "eos_token_id": [5, 8, 13, 21, 34, 55]},
    "forced and suppressed": {"suppress_tokens": [4, 5], "begin_suppress_tokens": [6], "forced_eos_token_id": 10},
    "length decay": {"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": 12},
    "watermark": {"watermarking_config": WatermarkingConfig(0.3, bias=2.5), "temperature": 0.7},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allow_by_prefix, "temperature": 0.6},
    "counting": {"logits_processor": CountingProcessor, "temperature": 0.6},
    "whole prefix": {"logits_processor": WholePrefixProcessor, "repetition_penalty": 1.2},
}
# The processors that also change greedy decoding.
GREEDY_PROCESSORS = [
    name
    for name in PROCESSORS
    if name.split()[0] not in ("none", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon")
]
SAMPLING_PAIRS = [0, 1, 2, 4, 5, 7]
TREES = [(59, 5, 10), (24, 3, 6), (12, 4, 3), (7, 5, 1), (8, 0, 10), (1, 5, 10), (40, 7, 5)]


def options_of(name: str) -> dict[str, Any]:
    """Arguments of `generate`. Processors with state are made anew for each call."""
    options = dict(PROCESSORS[name])
    if "logits_processor" in options:
        options["logits_processor"] = LogitsProcessorList([options["logits_processor"]()])
    return options


@dataclass
class Case:
    """One generation without a draft and the same with one, from the same seed."""

    description: str
    expected: torch.Tensor
    output: MSDGenerateOutput
    rng_states_equal: bool
    num_tokens: int
    num_nodes: int


def generate_both(
    pair: tiny.Pair, inputs: dict, name: str, tree: tuple[int, int, int], seed: int, **options: Any
) -> Case:
    torch.manual_seed(seed)
    expected = pair.target.generate(**inputs, **options_of(name), **options)
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    output = pair.target.generate(
        **inputs,
        **options_of(name),
        **options,
        assistant_model=pair.with_tree(*tree),
        return_dict_in_generate=True,
    )
    return Case(
        description=f"{name}, tree {tree}, seed {seed}, {options}",
        expected=expected,
        output=output,
        rng_states_equal=torch.equal(rng_state, torch.get_rng_state()),
        num_tokens=expected.shape[1] - inputs["input_ids"].shape[1],
        num_nodes=tree[0],
    )


@functools.cache
def run_cases(name: str) -> list[Case]:
    """One case for each of the pairs."""
    rng, cases = random.Random(name), []
    for number in SAMPLING_PAIRS:
        pair = tiny.pair(number)
        options: dict[str, Any] = {"do_sample": True, "max_new_tokens": rng.choice([12, 18, 24])}
        if "eos_token_id" not in PROCESSORS[name] and rng.random() < 0.3:
            options["eos_token_id"] = rng.sample(range(3, 58), 2)
        inputs = tiny.random_prompt(rng)
        # Eager attention of transformers gives NaN at padding in float64.
        pair.set_attention("sdpa" if "attention_mask" in inputs else rng.choice(["sdpa", "eager"]))
        cases.append(generate_both(pair, inputs, name, rng.choice(TREES), rng.randrange(1000), **options))
        pair.set_attention("sdpa")
    return cases


@pytest.mark.parametrize("name", PROCESSORS)
def test_same_seed_gives_the_same_tokens(name):
    for case in run_cases(name):
        assert torch.equal(case.output.sequences, case.expected), case.description
        assert case.rng_states_equal, case.description
        assert sum(case.output.acceptance_lengths[0]) == case.num_tokens - 1, case.description


def test_the_cases_are_many_and_candidates_are_accepted():
    cases = [case for name in PROCESSORS for case in run_cases(name)]
    lengths = [length for case in cases if case.num_nodes > 2 for length in case.output.acceptance_lengths[0]]
    tau, tokens = sum(lengths) / len(lengths), sum(case.num_tokens for case in cases)
    print(f"{len(cases)} cases, {tokens} tokens, mean tau {tau:.2f}")
    assert len(cases) >= 140
    assert tau > 1.5
    assert tokens > 12 * len(cases)


@pytest.mark.parametrize("name", GREEDY_PROCESSORS)
def test_greedy_with_processors(name):
    """Random weights differ between releases, so more cases are tried until the processor changes an output."""
    rng, changed = random.Random(name), False
    for number in range(20):
        pair, inputs = tiny.pair(number % 2), tiny.random_prompt(rng)
        case = generate_both(pair, inputs, name, rng.choice(TREES[:4]), 0, max_new_tokens=24)
        assert torch.equal(case.output.sequences, case.expected), case.description
        assert case.rng_states_equal
        plain = pair.target.generate(**inputs, max_new_tokens=24)
        changed = changed or plain.tolist() != case.expected.tolist()
        if changed and number >= 1:
            break
    assert changed


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_see_true_prefixes_and_only_those(do_sample):
    """Processors get the same calls as without a draft, never a prefix with rejected tokens."""
    pair, inputs, calls = tiny.pair(0), tiny.make_prompt(1, 7, (3,)), []
    for draft in (None, pair.with_tree(59, 5, 10)):
        processor = CountingProcessor()
        torch.manual_seed(3)
        pair.target.generate(
            **inputs,
            max_new_tokens=22,
            do_sample=do_sample,
            logits_processor=LogitsProcessorList([processor]),
            assistant_model=draft,
        )
        calls.append(processor.prefixes)
    assert len(calls[0]) == 22
    assert calls[0] == calls[1]


def test_different_seeds_give_different_tokens():
    pair, inputs, outputs = tiny.pair(0), tiny.make_prompt(1, 7), set()
    for seed in range(5):
        torch.manual_seed(seed)
        output = pair.target.generate(
            **inputs, max_new_tokens=12, do_sample=True, assistant_model=pair.with_tree(24, 3, 6)
        )
        outputs.add(tuple(output[0].tolist()))
    assert len(outputs) == 5


# These tests compare the distribution of the three tokens after a prompt with exact probabilities. The target
# has few tokens. The first of the three comes from the prefill, the second may be accepted from the tree, and the
# third is then the bonus token.
SMALL_VOCAB = 5
SMALL_TREE = (8, 1, 3)
TEMPERATURE = 0.6


@functools.cache
def small_pair() -> tiny.Pair:
    """The first pair whose walks end at the root with an exact probability of 15% to 85%. It is searched for because
    random weights differ between releases."""
    for seed in range(3, 50):
        target = tiny.build_target(seed, vocab_size=SMALL_VOCAB, initializer_range=0.3, hidden_size=16)
        # The distribution is flat enough that a missing temperature would show.
        target.get_output_embeddings().weight.data.mul_(0.5)
        pair = tiny.Pair(target, tiny.build_draft(target, seed), fitted=False)
        if 0.15 < probability_of_rejection(pair) < 0.85:
            return pair
    raise AssertionError("no pair with walks of several lengths")


@torch.no_grad()
def likeliest_first(target) -> int:
    return int(target(**small_prompt()).logits[0, -1].argmax())


@torch.no_grad()
def probability_of_rejection(pair: tiny.Pair) -> float:
    """The probability that the tree lacks the token that the target chooses after the likeliest first token."""
    first = likeliest_first(pair.target)
    tree = propose_tree(pair, TargetAdapter(pair.target), first)
    held = [path[1] for path in paths_of(tree) if len(path) == 2]
    ids = torch.tensor([[*small_prompt()["input_ids"][0].tolist(), first]])
    probs = (pair.target(input_ids=ids).logits[0, -1] / TEMPERATURE).softmax(-1)
    return 1 - probs[held].sum().item()


def small_prompt() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[3, 1, 2, 3, 2, 1]])}


@torch.no_grad()
def exact_probabilities(num_tokens: int) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of new tokens, from the target's logits without a cache."""
    target, prompt = small_pair().target, small_prompt()["input_ids"]
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        prefixes = torch.tensor([[*prompt[0].tolist(), *tokens] for tokens in probabilities])
        rows = (target(input_ids=prefixes).logits[:, -1] / TEMPERATURE).softmax(-1).tolist()
        probabilities = {
            (*tokens, token): probability * row[token]
            for (tokens, probability), row in zip(probabilities.items(), rows, strict=True)
            for token in range(SMALL_VOCAB)
        }
    return probabilities


def chi_square_p_value(counts: Counter, probabilities: dict[tuple[int, ...], float]) -> float:
    """The p-value of Pearson's test. Outcomes that are expected less than eight times count as one."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    expected, observed, rest_expected, rest_observed = [], [], 0.0, 0
    for outcome, probability in probabilities.items():
        if total * probability >= 8:
            expected.append(total * probability)
            observed.append(counts[outcome])
        else:
            rest_expected += total * probability
            rest_observed += counts[outcome]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    if rest_expected > 0:
        statistic += (rest_observed - rest_expected) ** 2 / rest_expected
    freedom = len(expected) - 1 + (rest_expected > 0)
    return torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)).item()


def sample_through_generate(num_samples: int, method: Method = TREE) -> Counter:
    pair, inputs, counts = small_pair(), small_prompt(), Counter()
    draft = pair.with_tree(*SMALL_TREE)
    torch.manual_seed(11)
    with method.prepared(pair.target, draft) as arguments:
        for _ in range(num_samples):
            output = pair.target.generate(
                **inputs, max_new_tokens=3, do_sample=True, temperature=TEMPERATURE, top_k=0, **arguments
            )
            counts[tuple(output[0, inputs["input_ids"].shape[1] :].tolist())] += 1
    return counts


def test_distribution_of_whole_generations():
    counts = sample_through_generate(500)
    assert chi_square_p_value(counts, exact_probabilities(3)) > 1e-3


def test_distribution_in_the_loop_of_transformers():
    counts = sample_through_generate(300, ASSISTED_CHAIN)
    assert chi_square_p_value(counts, exact_probabilities(3)) > 1e-3


@pytest.mark.slow
def test_distribution_of_many_whole_generations():
    counts = sample_through_generate(20_000)
    assert chi_square_p_value(counts, exact_probabilities(3)) > 1e-3


def test_distribution_of_many_walks():
    """Thousands of walks through one tree emit tokens with the target's distribution. A walk that ends early is
    continued by draws from the target's logits."""
    pair, inputs = small_pair(), small_prompt()
    prompt = inputs["input_ids"]
    config = GenerationConfig(do_sample=True)
    processors = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(prompt.shape[1] + 3)])
    adapter = TargetAdapter(pair.target)
    probabilities = exact_probabilities(3)
    first = likeliest_first(pair.target)
    conditional = {tokens: p for tokens, p in probabilities.items() if tokens[0] == first}
    conditional = {tokens: p / sum(conditional.values()) for tokens, p in conditional.items()}

    counts, lengths = Counter(), Counter()
    with torch.no_grad():
        logits = logits_by_prefix(first)
        tree = propose_tree(pair, adapter, first)
        at_nodes = torch.stack([logits[path] for path in paths_of(tree)]).unsqueeze(0)
        torch.manual_seed(5)
        for _ in range(5000):
            selector = BatchSelector(torch.cat([prompt, torch.tensor([[first]])], dim=1), processors, criteria, config)
            tokens = [first, *verify(tree, at_nodes, selector).tokens[0]]
            lengths[len(tokens) - 1] += 1
            while len(tokens) < 3:
                tokens += selector.select(logits[tuple(tokens)].unsqueeze(0))
            counts[tuple(tokens)] += 1
    assert lengths[1] > 400 and lengths[2] > 400  # both rejections and acceptances occur
    assert chi_square_p_value(counts, conditional) > 1e-3


def logits_by_prefix(first: int) -> dict[tuple[int, ...], torch.Tensor]:
    """The target's logits after the prompt, `first`, and up to two more tokens."""
    prompt = small_prompt()["input_ids"][0].tolist()
    prefixes = [(first,)]
    for _ in range(2):
        prefixes += [(*prefix, token) for prefix in prefixes if len(prefix) < 3 for token in range(SMALL_VOCAB)]
    return {
        prefix: small_pair().target(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1]
        for prefix in dict.fromkeys(prefixes)
    }


def propose_tree(pair: tiny.Pair, adapter: TargetAdapter, first: int):
    """The tree that the draft grows after the prompt and `first`."""
    prompt, target = small_prompt()["input_ids"], pair.target
    config = target._prepare_generation_config(None)[0]
    prefill = adapter.prefill(prompt, config, {CACHE_NAME: DynamicCache(), "use_cache": True, "attention_mask": None})
    generator = GrowingDrafter(pair.draft, adapter)
    generator.prefill(prefill, torch.tensor([first]))
    return generator.propose(torch.tensor([first]), TreeSettings(*SMALL_TREE))


def paths_of(tree) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    paths: list[tuple[int, ...]] = [(int(tree.tokens[0, 0]),)]
    for node in range(1, tree.tokens.shape[1]):
        paths.append((*paths[int(tree.parents[0, node])], int(tree.tokens[0, node])))
    return paths
