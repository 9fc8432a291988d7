"""Several sequences in a call: each row gets the tokens of the target alone on the same batch, exactly in float64."""

from __future__ import annotations

import copy
import random
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from thinning import thinned
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from msd_hf.compat import CACHE_NAME
from msd_hf.tree.policy import TreePolicy


TREES = [(59, 5, 10), (24, 4, 4), (12, 6, 2), (7, 5, 1), (1, 0, 1)]


def random_batch(rng: random.Random, size: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths, each with no, one or two images at random places."""
    prompts = []
    for _ in range(size):
        num_text = rng.choice([1, 2, 5, 9, 14])
        images_at = rng.choice([(), (), (0,), (num_text // 2,), (num_text,), (0, num_text // 2 + 1)])
        prompts.append(tiny.make_prompt(rng.randrange(10**6), num_text, images_at))
    return tiny.left_padded(prompts)


def generate(pair: tiny.Pair, inputs: dict[str, torch.Tensor], draft: Any = None, seed: int = 0, **options: Any):
    torch.manual_seed(seed)
    output = pair.target.generate(**inputs, assistant_model=draft, return_dict_in_generate=True, **options)
    return output, torch.rand(1).item()


def choose_distant_eos(rng: random.Random, sequences: torch.Tensor, length: int) -> list[int]:
    """EOS ids that end some rows early and others late."""
    rows = [row[length:].tolist() for row in sequences]
    return [rows[0][:3][rng.randrange(2)], rows[-1][-4:][rng.randrange(2)]]


@pytest.mark.parametrize("number", range(tiny.NUM_PAIRS))
def test_rows_get_the_tokens_of_the_target_alone(number):
    """12 cases per pair, greedy or sampled, with or without EOS: 108 in all."""
    pair, rng = tiny.pair(number), random.Random(number)
    pair.set_attention("sdpa")
    rounds = tokens = 0
    for case in range(12):
        inputs = random_batch(rng, rng.randint(2, 8))
        length = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"max_new_tokens": rng.choice([2, 17, 23, 31])}
        options |= {"do_sample": True, "temperature": 0.6} if case % 3 == 2 else {}
        options |= {"repetition_penalty": 1.2} if case % 4 == 1 else {}
        expected, after = generate(pair, inputs, seed=case, **options)
        if case % 2:
            options |= {"eos_token_id": choose_distant_eos(rng, expected.sequences, length), "pad_token_id": 0}
            expected, after = generate(pair, inputs, seed=case, **options)
        draft = pair.with_tree(*TREES[case % len(TREES)])
        output, after_drafted = generate(pair, inputs, draft, seed=case, **options)
        assert torch.equal(output.sequences, expected.sequences), (number, case, options)
        assert after_drafted == after
        for row, lengths in zip(output.sequences[:, length:], output.acceptance_lengths, strict=True):
            ended = [place for place, token in enumerate(row.tolist()) if token in options.get("eos_token_id", [])]
            assert sum(lengths) == (ended[0] if ended else len(row) - 1)
            rounds, tokens = rounds + len(lengths), tokens + sum(lengths)
    assert not tiny.is_fitted(number) or tokens / rounds > 1.4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_returned_fields_equal_those_without_a_draft(attention):
    """Compares scores, logits, hidden states, attentions and cache, also of rows that ended long before the others."""
    pair, rng = tiny.pair(1), random.Random(3)
    target, draft = pair.target, pair.with_tree(16, 4, 3)
    dtype = torch.float64 if attention == "sdpa" else torch.float32  # see test_left_padding_with_eager_attention
    target = copy.deepcopy(target).to(dtype)
    target.set_attn_implementation(attention)
    pair = tiny.Pair(target, copy.deepcopy(draft).to(dtype), True)
    for case in range(4):
        inputs = random_batch(rng, 4)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        length = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 20, "output_scores": True, "output_logits": True, "output_hidden_states": True}
        options |= {"output_attentions": attention == "eager", "repetition_penalty": 1.1, "do_sample": case % 2 == 1}
        first, _ = generate(pair, inputs, seed=case, **options)
        options |= {"eos_token_id": choose_distant_eos(rng, first.sequences, length), "pad_token_id": 0}
        expected, _ = generate(pair, inputs, seed=case, **options)
        output, _ = generate(pair, inputs, pair.draft, seed=case, **options)
        assert torch.equal(output.sequences, expected.sequences)
        tolerance = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}
        for name in ("scores", "logits", "hidden_states", "attentions"):
            if getattr(expected, name) is not None:
                torch.testing.assert_close(getattr(output, name), getattr(expected, name), **tolerance, msg=name)
        for ours, theirs in zip(output[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
            # Padding is not compared: no token attends to it, and eager attention in float32 may give NaN there.
            seen = inputs["attention_mask"].bool()
            for kind in ("keys", "values"):
                ours_, theirs_ = (getattr(layer, kind).transpose(1, 2) for layer in (ours, theirs))
                assert ours_.shape == theirs_.shape
                torch.testing.assert_close(ours_[:, :length][seen], theirs_[:, :length][seen], **tolerance)
                torch.testing.assert_close(ours_[:, length:], theirs_[:, length:], **tolerance)


@pytest.mark.parametrize("do_sample", [False, True])
def test_num_return_sequences(do_sample):
    pair = tiny.pair(0)
    draft = pair.with_tree(24, 4, 4)
    for seed in range(3):
        inputs = tiny.make_prompt(seed, 6, (2,))
        options = {"max_new_tokens": 20, "do_sample": do_sample, "temperature": 0.7 if do_sample else None}
        options["num_return_sequences"] = 3 if do_sample else 1
        if not do_sample:  # transformers allows several return sequences only with sampling
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected, _ = generate(pair, inputs, seed=seed, **options)
        output, _ = generate(pair, inputs, draft, seed=seed, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert len(output.acceptance_lengths) == len(output.sequences)


class CallCountingProcessor(LogitsProcessor):
    """Has state: the scores of a row depend on the number of calls and on the other rows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, (self.calls + int(input_ids[:, -1].sum())) % scores.shape[1]] += 3.0
        return scores


class EndsEverySecondRow(StoppingCriteria):
    """Ends every second row early."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row % 2 == 0 and input_ids.shape[1] > 30 for row in range(len(input_ids))])


@thinned(
    "what,with_eos,do_sample,return_dict",
    product(["processor", "criterion", "prefix function"], [False, True], [False, True], [False, True]),
)
def test_code_of_the_user_sees_the_whole_batch(what, with_eos, do_sample, return_dict):
    """Processors, criteria and prefix functions of the user are called in every step for all rows of the batch."""
    pair, rng = tiny.pair(3), random.Random(0)
    draft = pair.with_tree(24, 4, 4)
    allowed = [list(range(3 + row, 50)) for row in range(4)]

    def options() -> dict[str, Any]:
        own: dict[str, Any] = {"max_new_tokens": 18, "do_sample": do_sample, "return_dict_in_generate": return_dict}
        own |= {"output_scores": True}
        if what == "processor":
            own["logits_processor"] = LogitsProcessorList([CallCountingProcessor()])
        elif what == "criterion":
            own["stopping_criteria"] = StoppingCriteriaList([EndsEverySecondRow()])
        else:
            own["prefix_allowed_tokens_fn"] = lambda row, ids: allowed[row]
        return own

    for case in range(2):
        inputs = random_batch(rng, 4)
        torch.manual_seed(case)
        sequences = pair.target.generate(**inputs, **{**options(), "return_dict_in_generate": False})
        extra = {}
        if with_eos:
            rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
            extra = {"eos_token_id": [rows[0][4], rows[2][9]], "pad_token_id": 0}
        outputs = []
        for assistant in (None, draft):
            torch.manual_seed(case)
            outputs.append(pair.target.generate(**inputs, **options(), **extra, assistant_model=assistant))
        if return_dict:
            torch.testing.assert_close(outputs[1].scores, outputs[0].scores, atol=1e-6, rtol=1e-6)
            outputs = [output.sequences for output in outputs]
        assert torch.equal(*outputs), case


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_of_batches_gets_each_step():
    pair, rng = tiny.pair(2), random.Random(1)
    inputs = random_batch(rng, 3)
    first, _ = generate(pair, inputs, max_new_tokens=20)
    eos = choose_distant_eos(rng, first.sequences, inputs["input_ids"].shape[1])
    streamed = []
    for draft in (None, pair.with_tree(24, 4, 4)):
        recorder = Recorder()
        pair.target.generate(
            **inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0, streamer=recorder, assistant_model=draft
        )
        assert recorder.ended
        streamed.append(recorder.values)
    assert streamed[0] == streamed[1]


def test_rows_that_have_ended_cost_nothing_more():
    """The batch of the target's forwards shrinks as rows end."""
    pair = tiny.pair(0)
    tree = pair.with_tree(8, 3, 2)
    inputs = tiny.left_padded([tiny.make_prompt(seed, 6) for seed in range(8)])
    length = inputs["input_ids"].shape[1]
    rows = pair.target.generate(**inputs, max_new_tokens=30)[:, length:].tolist()
    # A round emits at most 4 tokens per row. The end-of-sequence token is chosen so that rows end far apart.
    vocabulary = sorted({token for row in rows for token in row})
    ends = {token: [row.index(token) if token in row else len(row) for row in rows] for token in vocabulary}
    eos, spread = max(ends.items(), key=lambda item: len({end // 8 for end in item[1]}))
    assert len({end // 8 for end in spread}) >= 3, "the random prompts all end together: choose others"
    sizes = []

    def record_size(module, args, kwargs, output):
        sizes.append(len(output[0]))

    handle = pair.target.get_decoder().register_forward_hook(record_size, with_kwargs=True)
    try:
        pair.target.generate(**inputs, max_new_tokens=30, eos_token_id=eos, pad_token_id=0, assistant_model=tree)
    finally:
        handle.remove()
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3


@pytest.mark.parametrize("widths", [(3, 3, 3, 3), (3, 2, 1, 2)])
def test_rows_of_a_batch_are_drafted_as_they_are_alone(widths, monkeypatch):
    """A tree grown from another row's states would change no token, but fewer candidates would be accepted."""
    sizes = set()

    def num_nodes(policy, growth):
        sizes.add(growth.num_nodes)
        return 12

    monkeypatch.setattr(TreePolicy, "width", lambda policy, growth: widths[len(growth._tokens) - 1])
    monkeypatch.setattr(TreePolicy, "num_nodes", num_nodes)
    pair = tiny.pair(0)
    tree = pair.with_tree(60, 4, 3)
    prompts = [tiny.make_prompt(seed, 6) for seed in range(4)]
    options = {"max_new_tokens": 30, "assistant_model": tree, "return_dict_in_generate": True}
    batch = pair.target.generate(**tiny.left_padded(prompts), **options).acceptance_lengths
    alone = [pair.target.generate(**prompt, **options).acceptance_lengths[0] for prompt in prompts]

    def with_full_trees(lengths):
        """The rounds with at least 6 tokens left. Near the limit trees shrink, in a batch with its slowest row."""
        return [length for number, length in enumerate(lengths) if sum(lengths[:number]) <= 30 - 1 - 6]

    assert [with_full_trees(lengths) for lengths in batch] == [with_full_trees(lengths) for lengths in alone]
    assert all(sum(with_full_trees(lengths)) > 20 for lengths in alone)
    assert max(max(lengths) for lengths in alone) > 2
    assert max(sizes) == 1 + 3 * (1 + sum(widths))
