"""Every argument of `generate` works with a draft as it does without one, or is refused by name."""

from __future__ import annotations

import asyncio
import copy
import functools
import threading
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from msd_hf import MSDDraftModel, MSDError, MSDGenerateOutput, MSDPairingError
from msd_hf.compat import CACHE_NAME


TREES = [(59, 5, 10), (7, 5, 1), (1, 0, 1)]


@pytest.fixture(params=TREES, ids=str)
def pair(request) -> tiny.Pair:
    pair = tiny.pair(0)
    pair.with_tree(*request.param)
    return pair


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return tiny.make_prompt(4, 7, (3,))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def new_tokens(sequences: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[int]:
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


# Length and stopping.


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_max_new_tokens(pair, inputs, max_new_tokens):
    expected = pair.target.generate(**inputs, max_new_tokens=max_new_tokens)
    output = pair.target.generate(**inputs, max_new_tokens=max_new_tokens, assistant_model=pair.draft)
    assert torch.equal(output, expected)
    assert len(new_tokens(output, inputs)) == max_new_tokens


@pytest.mark.parametrize("extra", [1, 2, 11])
def test_max_length(pair, inputs, extra):
    options = {"max_length": inputs["input_ids"].shape[1] + extra}
    expected = pair.target.generate(**inputs, **options)
    output = pair.target.generate(**inputs, **options, assistant_model=pair.draft)
    assert torch.equal(output, expected)
    assert len(new_tokens(output, inputs)) == extra


def test_default_length(pair, inputs):
    with pytest.warns(UserWarning, match="max_length"):
        output = pair.target.generate(**inputs, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**inputs))
    assert len(new_tokens(output, inputs)) == 20


@pytest.mark.parametrize("limit", [3, 11, 16, 20])
def test_length_criterion_of_the_user(pair, inputs, limit):
    """The limit may be shorter than the prompt; then one token is generated."""
    options = {"max_new_tokens": 30, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(limit)])}
    expected = pair.target.generate(**inputs, **options)
    output = pair.target.generate(**inputs, **options, assistant_model=pair.draft, streamer=LimitedStreamer(40))
    assert torch.equal(output, expected)
    assert len(new_tokens(output, inputs)) == max(1, limit - inputs["input_ids"].shape[1])


def test_generation_config_object(pair, inputs):
    tokens = new_tokens(pair.target.generate(**inputs, max_new_tokens=20), inputs)
    config = GenerationConfig(max_new_tokens=15, eos_token_id=[tokens[9], 2], pad_token_id=0, repetition_penalty=1.05)
    before = config.to_dict()
    expected = pair.target.generate(**inputs, generation_config=config)
    output = pair.target.generate(**inputs, generation_config=config, assistant_model=pair.draft)
    assert torch.equal(output, expected)
    assert config.to_dict() == before


def test_defaults_of_the_target_apply(pair, inputs):
    target = copy.deepcopy(pair.target)
    target.generation_config.max_new_tokens = 13
    target.generation_config.do_sample = True
    target.generation_config.temperature = 0.5
    outputs = []
    for draft in (None, pair.draft):
        torch.manual_seed(1)
        outputs.append(target.generate(**inputs, assistant_model=draft).tolist())
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]) == inputs["input_ids"].shape[1] + 13


@pytest.mark.parametrize("place", [1, 5, 12, 18])
@pytest.mark.parametrize("shift", [0, 1])
def test_stop_strings(pair, inputs, tokenizer, place, shift):
    """The string spans two tokens and ends with a token (`shift=0`) or inside one (`shift=1`)."""
    tokens = new_tokens(pair.target.generate(**inputs, max_new_tokens=20), inputs)
    text = tokenizer.decode(tokens[place - 1 : place + 1])
    stop = text[shift : len(text) - shift]
    options = {"max_new_tokens": 20, "stop_strings": ["never comes", stop], "tokenizer": tokenizer}
    expected = pair.target.generate(**inputs, **options)
    output = pair.target.generate(**inputs, **options, assistant_model=pair.draft)
    assert torch.equal(output, expected)
    assert len(new_tokens(output, inputs)) <= place + 1
    assert stop in tokenizer.decode(new_tokens(output, inputs))


class RecordingCriterion(StoppingCriteria):
    """Records its calls, and stops at a length if one is given."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at
        self.calls: list[tuple] = []

    def __call__(self, input_ids, scores, **kwargs):
        last = None if scores is None else scores[-1].argmax().item()
        self.calls.append((input_ids.shape, input_ids[0, -1].item(), None if scores is None else len(scores), last))
        done = self.stop_at is not None and input_ids.shape[1] >= self.stop_at
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("stop_after", [None, 1, 2, 8, 13])
def test_stopping_criteria_are_called_as_without_a_draft(pair, inputs, stop_after, with_scores):
    stop_at = None if stop_after is None else inputs["input_ids"].shape[1] + stop_after
    criteria, outputs = [], []
    for draft in (None, pair.draft):
        criteria.append(RecordingCriterion(stop_at))
        outputs.append(
            pair.target.generate(
                **inputs,
                max_new_tokens=15,
                stopping_criteria=StoppingCriteriaList([criteria[-1]]),
                return_dict_in_generate=with_scores,
                output_scores=with_scores,
                assistant_model=draft,
            )
        )
    assert criteria[0].calls == criteria[1].calls
    assert len(criteria[0].calls) == (stop_after or 15)
    first, second = ((o.sequences if with_scores else o) for o in outputs)
    assert torch.equal(first, second)


def test_max_time_ends_generation(pair, inputs):
    output = pair.target.generate(**inputs, max_new_tokens=400, max_time=0.0, assistant_model=pair.draft)
    assert len(new_tokens(output, inputs)) == 1


def test_tokenizer_without_stop_strings_is_harmless(pair, inputs, tokenizer):
    output = pair.target.generate(**inputs, max_new_tokens=6, tokenizer=tokenizer, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=6))


# Streamers.


class RecordingStreamer(BaseStreamer):
    def __init__(self):
        self.events: list[Any] = []

    def put(self, value):
        self.events.append((tuple(value.shape), value.tolist(), value.dtype, value.device.type))

    def end(self):
        self.events.append("end")


class LimitedStreamer(BaseStreamer):
    """Fails a generation that does not end by itself."""

    def __init__(self, max_tokens: int):
        self.tokens_left = max_tokens

    def put(self, value):
        self.tokens_left -= value.numel()
        assert self.tokens_left >= 0, "generation does not end"

    def end(self):
        pass


class VerificationStreamer(RecordingStreamer):
    """Takes the tokens of one verification at once."""

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        self.events.append((tokens.tolist(), num_draft_tokens))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_streamer_receives_the_same_events(pair, inputs, eos, do_sample):
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": do_sample}
    if eos:
        torch.manual_seed(2)
        options["eos_token_id"] = new_tokens(pair.target.generate(**inputs, **options), inputs)[9]
    streamers = []
    for draft in (None, pair.draft):
        torch.manual_seed(2)
        streamers.append(RecordingStreamer())
        pair.target.generate(**inputs, **options, streamer=streamers[-1], assistant_model=draft)
    assert streamers[0].events == streamers[1].events
    assert streamers[1].events.count("end") == 1 and streamers[1].events[-1] == "end"


def test_streamer_that_asks_for_verifications(inputs):
    pair = tiny.pair(0)
    streamer = VerificationStreamer()
    output = pair.target.generate(
        **inputs,
        max_new_tokens=20,
        streamer=streamer,
        assistant_model=pair.with_tree(59, 5, 10),
        return_dict_in_generate=True,
    )
    prompt, first, *rounds, end = streamer.events
    assert prompt[1] == inputs["input_ids"].tolist() and end == "end"
    assert [len(first[0]), first[1]] == [1, 0]
    tokens = first[0] + [token for emitted, _ in rounds for token in emitted]
    assert tokens == new_tokens(output.sequences, inputs)
    assert [len(emitted) for emitted, _ in rounds] == output.acceptance_lengths[0]
    for emitted, num_draft_tokens in rounds[:-1]:
        assert num_draft_tokens == len(emitted) - 1  # the bonus token is the target's
    assert len(rounds[-1][0]) - 1 <= rounds[-1][1] <= len(rounds[-1][0])


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(pair, inputs, tokenizer, skip_prompt):
    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append((text, stream_end))

    written = []
    for draft in (None, pair.draft):
        pieces: list = []
        streamer = Recorder(tokenizer, skip_prompt=skip_prompt)
        pair.target.generate(**inputs, max_new_tokens=18, streamer=streamer, assistant_model=draft)
        written.append(pieces)
    assert written[0] == written[1]
    assert len([text for text, _ in written[0] if text]) > 2


def test_text_iterator_streamer_in_a_thread(inputs, tokenizer):
    pair = tiny.pair(0)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 18, "streamer": streamer, "assistant_model": pair.with_tree(24, 4, 4)}
    thread = threading.Thread(target=pair.target.generate, kwargs={**inputs, **options})
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=60)
    assert not thread.is_alive()
    expected = new_tokens(pair.target.generate(**inputs, max_new_tokens=18), inputs)
    assert text == tokenizer.decode(expected)


def test_async_text_iterator_streamer(inputs, tokenizer):
    pair = tiny.pair(0)

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"max_new_tokens": 18, "streamer": streamer, "assistant_model": pair.with_tree(24, 4, 4)}
        thread = threading.Thread(target=pair.target.generate, kwargs={**inputs, **options})
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join(timeout=60)
        return text

    text = asyncio.run(read())
    expected = new_tokens(pair.target.generate(**inputs, max_new_tokens=18), inputs)
    assert text == tokenizer.decode(expected)


# Outputs.


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("eos", [False, True])
def test_scores_and_logits(pair, inputs, options, eos):
    options = {
        "max_new_tokens": 14,
        **options,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    if eos:
        torch.manual_seed(0)
        options["eos_token_id"] = new_tokens(pair.target.generate(**inputs, **options).sequences, inputs)[8]
    outputs = []
    for draft in (None, pair.draft):
        torch.manual_seed(0)
        outputs.append(pair.target.generate(**inputs, **options, assistant_model=draft))
    expected, output = outputs
    assert type(output) is MSDGenerateOutput
    assert torch.equal(output.sequences, expected.sequences)
    num_tokens = len(new_tokens(output.sequences, inputs))
    assert len(output.acceptance_lengths) == 1 and sum(output.acceptance_lengths[0]) == num_tokens - 1
    for got, wanted in ((output.scores, expected.scores), (output.logits, expected.logits)):
        assert isinstance(got, tuple) and len(got) == len(wanted) == num_tokens
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    transitions = [
        pair.target.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in outputs
    ]
    torch.testing.assert_close(*transitions, atol=1e-5, rtol=0)
    assert output.attentions is None and output.hidden_states is None


def test_without_the_output_flags_there_are_none(pair, inputs):
    output = pair.target.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, assistant_model=pair.draft)
    assert output.scores is None and output.logits is None
    flags = {"output_scores": True, "output_logits": True}
    output = pair.target.generate(**inputs, max_new_tokens=5, **flags, assistant_model=pair.draft)
    assert isinstance(output, torch.Tensor)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_returned_cache(pair, inputs, max_new_tokens):
    """The cache equals the one without a draft, and a second turn can continue from it."""
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    expected = pair.target.generate(**inputs, **options)
    output = pair.target.generate(**inputs, **options, assistant_model=pair.draft)
    cache, expected_cache = output[CACHE_NAME], expected[CACHE_NAME]
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1 == expected_cache.get_seq_length()
    for one, other in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=0)

    question = torch.tensor([[11, 12, 13]])
    second = {"input_ids": torch.cat([output.sequences, question], dim=1), "max_new_tokens": 10}
    others = [copy.deepcopy(expected_cache), copy.deepcopy(cache)]
    turns = [pair.target.generate(**second, **{CACHE_NAME: past}) for past in (expected_cache, cache)]
    assert turns[0].tolist() == turns[1].tolist()
    for past in others:  # the second turn uses the draft; the first one may have run without it
        assert pair.target.generate(**second, **{CACHE_NAME: past}, assistant_model=pair.draft).equal(turns[0])
    whole = pair.target.generate(**second, pixel_values=inputs["pixel_values"])
    assert turns[1].tolist() == whole.tolist()


@pytest.mark.parametrize("with_config", [False, True])
def test_empty_cache_of_the_user(pair, inputs, with_config):
    cache = DynamicCache(config=pair.target.config) if with_config else DynamicCache()
    output = pair.target.generate(**inputs, max_new_tokens=12, **{CACHE_NAME: cache}, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=12))
    assert cache.get_seq_length() == output.shape[1] - 1


# Prompts.


def test_prompt_of_one_token(pair):
    inputs = tiny.make_prompt(0, 1)
    output = pair.target.generate(**inputs, max_new_tokens=12, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=12))


def test_position_ids_of_the_user(pair, inputs):
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0) + 5
    expected = pair.target.generate(**inputs, max_new_tokens=12)
    assert torch.equal(pair.target.generate(**inputs, max_new_tokens=12, assistant_model=pair.draft), expected)


def test_positional_prompt_and_attention_mask_of_ones(pair, inputs):
    ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
    options = {"pixel_values": pixel_values, "attention_mask": torch.ones_like(ids), "max_new_tokens": 9}
    output = pair.target.generate(ids, **options, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(ids, **options))


@pytest.mark.parametrize("vocab_size", [32, 58, 64, 32000])
def test_vocabulary_of_the_draft_may_differ(inputs, vocab_size):
    """The size is only a number in the draft's configuration, so `generate` must not demand tokenizers."""
    pair = tiny.pair(0)
    draft = copy.deepcopy(pair.with_tree(24, 4, 4))
    draft.config.vocab_size = vocab_size
    output = pair.target.generate(**inputs, max_new_tokens=12, assistant_model=draft)
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=12))


def test_prompts_of_equal_length(pair):
    """The batch has neither padding nor an attention mask."""
    ids = torch.cat([tiny.make_prompt(seed, 6)["input_ids"] for seed in range(3)])
    expected = pair.target.generate(ids, max_new_tokens=12)
    assert torch.equal(pair.target.generate(ids, max_new_tokens=12, assistant_model=pair.draft), expected)


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_of_a_prompt_with_image(pair, inputs, with_ids):
    """The decoder's own inputs are passed as `inputs_embeds` and give the output of the prompt with its image."""
    seen = {}

    def record_embeds(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = pair.target.get_decoder().register_forward_pre_hook(record_embeds, with_kwargs=True)
    whole = pair.target.generate(**inputs, max_new_tokens=1)
    handle.remove()
    prompt = {"inputs_embeds": seen["embeds"][:, : inputs["input_ids"].shape[1]]}
    prompt |= {"input_ids": inputs["input_ids"]} if with_ids else {}
    whole = pair.target.generate(**inputs, max_new_tokens=12)
    output = pair.target.generate(**prompt, max_new_tokens=12, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**prompt, max_new_tokens=12))
    assert output[0, -12:].tolist() == whole[0, -12:].tolist()


# Targets.


def test_attention_implementation_of_the_user(inputs):
    """A function that is not known to take a tree mask reads the prompt but never a tree."""
    lengths = []

    def own_attention(module, query, key, value, attention_mask, **kwargs):
        lengths.append((query.shape[2], key.shape[2]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("own_attention", own_attention)
    AttentionMaskInterface.register("own_attention", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    pair = tiny.pair(0)
    expected = pair.target.generate(**inputs, max_new_tokens=12)
    target = copy.deepcopy(pair.target)
    target.set_attn_implementation("own_attention")
    output = target.generate(**inputs, max_new_tokens=12, assistant_model=pair.with_tree(24, 4, 4))
    assert torch.equal(output, expected)
    length = inputs["input_ids"].shape[1]
    assert (length, length) in lengths
    assert not any(queries > 1 and keys > length for queries, keys in lengths)
    assert target.get_decoder().config._attn_implementation == "own_attention"


@pytest.mark.parametrize("layer_types", [("full",), ("sliding",), ("sliding", "full", "sliding")], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_text_target_with_windows(layer_types, size):
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=[f"{kind}_attention" for kind in layer_types],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = Qwen2ForCausalLM(config).double().eval()
        torch.nn.init.normal_(target.get_input_embeddings().weight)
        draft = tiny.sized(MSDDraftModel.from_target(target))
    inputs = tiny.left_padded([tiny.make_prompt(seed, 3 + 3 * seed) for seed in range(size)])
    options = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    expected = target.generate(**inputs, **options)
    assert len(set(expected[0, -20:].tolist())) > 5
    assert torch.equal(target.generate(**inputs, **options, assistant_model=draft), expected)


# Refusals because of the draft; test_refusals.py has those of arguments.


@pytest.fixture
def never_run(monkeypatch):
    """A target whose forward fails the test."""
    target = copy.deepcopy(tiny.pair(0).target)

    @functools.wraps(target.forward)  # `generate` reads its signature
    def fail(*args, **kwargs):
        raise AssertionError("the target was run")

    monkeypatch.setattr(target, "forward", fail)
    return target


@pytest.mark.parametrize(
    "name, value", [("num_assistant_tokens", 0), ("tree_depth", -1), ("tree_top_k", 0), ("tree_top_k", "many")]
)
def test_refused_tree_settings(never_run, inputs, name, value):
    draft = copy.deepcopy(tiny.pair(0).draft)
    setattr(draft.generation_config, name, value)
    with pytest.raises(MSDError, match=name):
        never_run.generate(**inputs, max_new_tokens=3, assistant_model=draft)


def test_refused_pairs(never_run, inputs):
    wide = tiny.build_draft(tiny.build_target(0, hidden_size=64))
    with pytest.raises(MSDPairingError, match=r"64.*32"):
        never_run.generate(**inputs, max_new_tokens=3, assistant_model=wide)
    for field, value in (("target_model_type", "qwen2_vl"), ("target_text_model_type", "qwen2")):
        draft = tiny.build_draft(tiny.pair(0).target, **{field: value})
        with pytest.raises(MSDPairingError, match=value):
            never_run.generate(**inputs, max_new_tokens=3, assistant_model=draft)
    unknown = tiny.build_draft(tiny.pair(0).target, target_model_type=None, target_text_model_type=None)
    output = tiny.pair(0).target.generate(**inputs, max_new_tokens=3, assistant_model=unknown)
    assert torch.equal(output, tiny.pair(0).target.generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False},
        {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()},
        {"num_assistant_tokens": None, "assistant_confidence_threshold": None},
    ],
    ids=str,
)
def test_values_that_switch_an_argument_off_are_accepted(pair, inputs, options):
    output = pair.target.generate(**inputs, max_new_tokens=6, **options, assistant_model=pair.draft)
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=6))


@pytest.mark.parametrize("options", [{"not_an_argument": 1}, {"max_new_tokens": -1}], ids=str)
def test_errors_of_generate_itself_are_unchanged(never_run, inputs, options):
    def message(**more) -> str:
        with pytest.raises(ValueError) as caught:
            never_run.generate(**{**inputs, "max_new_tokens": 3, **options}, **more)
        return str(caught.value)

    assert message(assistant_model=tiny.pair(0).draft) == message()
