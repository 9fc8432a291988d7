"""Calls that are interrupted, mix rows, reach a limit, or use a target that cannot verify a tree."""

import threading

import pytest
import tiny
import torch
from families import FAMILIES
from family_drafts import family_pair
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from msd_hf import MSDDraftConfig, MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding.self_check import NUM_SIBLINGS
from msd_hf.errors import MSDPairingError, MSDUnsupportedError


class MixRows(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 0.5 * scores.mean(0, keepdim=True)


class Interrupt(BaseStreamer):
    def __init__(self, after):
        self.tokens, self.after, self.is_prompt = [], after, True

    def put(self, value):
        self.tokens += [] if self.is_prompt else value.tolist()
        self.is_prompt = False
        if len(self.tokens) >= self.after:
            raise KeyboardInterrupt

    def end(self):
        pass


def batch(family, size):
    return family.collate([family.prompt(seed, num_text=8) for seed in range(size)])


def small_target(kind, **fields):
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **fields})).double().eval()


def small_draft():
    config = MSDDraftConfig(vocab_size=80, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    return tiny.sized(MSDDraftModel(config).double().eval())


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_that_mix_rows_see_those_that_have_ended(do_sample):
    pair = family_pair("llama")
    inputs = batch(pair.family, 3)
    for eos in range(3, 40, 3):
        outputs = []
        for draft in (None, pair.draft):
            torch.manual_seed(0)
            options = {"max_new_tokens": 20, "do_sample": do_sample, "eos_token_id": [eos, eos + 1]}
            outputs.append(
                pair.target.generate(**inputs, **options, logits_processor=[MixRows()], assistant_model=draft).tolist()
            )
        assert outputs[0] == outputs[1]


def test_impossible_probabilities_raise_in_a_batch_too():
    pair = family_pair("llama")
    options = {"max_new_tokens": 5, "do_sample": True, "suppress_tokens": list(range(80))}
    for draft in (None, pair.draft):
        with pytest.raises(RuntimeError, match="probability tensor"):
            pair.target.generate(**batch(pair.family, 2), **options, assistant_model=draft)


@pytest.mark.parametrize("new_tokens", [3, 25])
def test_the_cache_of_an_interrupted_call_can_be_used_again(new_tokens):
    pair = family_pair("llama")
    cache, streamer, inputs = DynamicCache(), Interrupt(after=9), pair.family.inputs(3, num_text=7)
    with pytest.raises(KeyboardInterrupt):
        pair.target.generate(
            **inputs, max_new_tokens=30, streamer=streamer, assistant_model=pair.draft, **{CACHE_NAME: cache}
        )
    tokens = [torch.tensor([streamer.tokens]), torch.arange(5, 5 + new_tokens).unsqueeze(0)]
    ids = torch.cat([inputs["input_ids"], *tokens], dim=1)
    assert 0 < cache.get_seq_length() < ids.shape[1] - new_tokens
    expected = pair.target.generate(input_ids=ids, max_new_tokens=12)
    got = pair.target.generate(input_ids=ids, max_new_tokens=12, assistant_model=pair.draft, **{CACHE_NAME: cache})
    assert got.tolist() == expected.tolist()


def test_the_cache_of_an_interrupted_batch_has_all_rows(monkeypatch):
    pair = family_pair("llama")
    monkeypatch.setattr(pair.draft.generation_config, "num_assistant_tokens", 2)  # rounds of one or two tokens
    inputs, cache = batch(pair.family, 3), DynamicCache()
    alone = pair.target.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True)
    start = inputs["input_ids"].shape[1]
    eos = int(alone.sequences[0, start + 2])
    assert eos not in alone.sequences[1:, start:]  # the first row ends long before the others
    with pytest.raises(KeyboardInterrupt):
        pair.target.generate(
            **inputs,
            max_new_tokens=20,
            eos_token_id=eos,
            streamer=Interrupt(after=3 * 10),
            assistant_model=pair.draft,
            **{CACHE_NAME: cache},
        )
    length = cache.get_seq_length()
    assert start <= length <= start + 3
    for layer, expected in zip(cache.layers, alone[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys[:, :, :length])


def test_a_draft_may_be_cast_between_turns():
    pair = family_pair("llama")
    draft = tiny.sized(MSDDraftModel.from_target(pair.target))
    cache, ids = DynamicCache(), pair.family.inputs(3)["input_ids"]
    for dtype in (torch.float64, torch.float32):
        draft.to(dtype)
        expected = pair.target.generate(input_ids=ids, max_new_tokens=8)
        ids = pair.target.generate(input_ids=ids, max_new_tokens=8, assistant_model=draft, **{CACHE_NAME: cache})
        assert ids.tolist() == expected.tolist()
        ids = torch.cat([ids, torch.tensor([[5, 6]])], dim=1)


def test_a_draft_in_training_mode_draws_no_random_numbers():
    pair = family_pair("llama")
    draft = tiny.sized(MSDDraftModel.from_target(pair.target, attention_dropout=0.5))
    assert draft.training
    outputs = []
    for assistant in (None, draft):
        torch.manual_seed(0)
        inputs = pair.family.inputs(1)
        outputs.append(
            pair.target.generate(**inputs, max_new_tokens=20, do_sample=True, assistant_model=assistant).tolist()
        )
    assert outputs[0] == outputs[1] and draft.training and draft.layers[0].training


def test_a_draft_vocabulary_beyond_the_head_is_refused_before_the_target_runs():
    pair = family_pair("llama")
    draft = tiny.sized(MSDDraftModel.from_target(pair.target))
    draft.set_draft_vocab([1, 500])
    forwards = []
    handle = pair.target.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with pytest.raises(MSDPairingError, match="token 500"):
        pair.target.generate(**pair.family.inputs(1), max_new_tokens=5, assistant_model=draft)
    handle.remove()
    assert not forwards


def test_threads_do_not_see_each_others_trees():
    pair = family_pair("llama")
    inputs = [pair.family.inputs(seed) for seed in range(2)]
    expected = [pair.target.generate(**one, max_new_tokens=40).tolist() for one in inputs]
    wrong = []

    def work(number, draft):
        for _ in range(4):
            try:
                got = pair.target.generate(**inputs[number], max_new_tokens=40, assistant_model=draft).tolist()
                wrong.extend([number] if got != expected[number] else [])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(0, pair.draft)), threading.Thread(target=work, args=(1, None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_decoders_that_are_called_by_position(kind):
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else {}
    target, ids = small_target(kind, **fields), torch.arange(3, 12).unsqueeze(0)
    expected = target.generate(ids, max_new_tokens=20)
    assert target.generate(ids, max_new_tokens=20, assistant_model=small_draft()).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("bloom", {}, "takes no `position_ids`"),
        ("rembert", {"is_decoder": True, "input_embedding_size": 16}, "embeddings of .* have 16 dimensions"),
        ("falcon", {"alibi": True}, "was tried and cannot run a candidate tree"),
    ],
)
def test_targets_that_cannot_verify_a_tree_are_refused(kind, fields, message):
    target = small_target(kind, **fields)
    with pytest.raises(MSDUnsupportedError, match=message):
        target.generate(torch.arange(3, 12).unsqueeze(0), max_new_tokens=5, assistant_model=small_draft())


@pytest.mark.parametrize("length", [12, 46, 47])
def test_learned_positions_may_be_filled_to_their_end(length):
    fields = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 48}
    target, draft = small_target("opt", **fields), small_draft()
    draft.generation_config.suffix_nodes = 8  # so that rows accept different numbers of tokens
    ids = torch.randint(3, 79, (3, length), generator=torch.Generator().manual_seed(1))
    expected = target.generate(ids, max_length=48)
    assert target.generate(ids, max_length=48, assistant_model=draft).tolist() == expected.tolist()


@pytest.mark.parametrize("length", range(30, 48))
def test_learned_positions_may_be_filled_to_their_end_by_compiled_rounds(length, monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    fields = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 48}
    target, draft = small_target("opt", **fields), small_draft()
    draft.generation_config.compile = True
    ids = torch.randint(3, 79, (1, length), generator=torch.Generator().manual_seed(1))
    expected = target.generate(ids, max_length=48)
    assert target.generate(ids, max_length=48, assistant_model=draft).tolist() == expected.tolist()


ROPES = {
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 24,
    },
    "dynamic": {"factor": 8.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_embeddings_that_change_with_the_length(rope_type):
    """A call within which the embedding may change is refused. Shorter calls are exact, and so are longer prompts with
    longrope."""
    family = FAMILIES["llama"]
    config = family.config()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **ROPES[rope_type]}
    config.max_position_embeddings = 96 if rope_type == "longrope" else 24
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).double().eval()
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    inputs = family.inputs(0, num_text=12)
    with pytest.raises(MSDUnsupportedError, match=f"{rope_type}.*longer than 24 tokens"):
        target.generate(**inputs, max_new_tokens=13, assistant_model=draft)
    lengths = [(inputs, 12)] + ([(family.inputs(0, num_text=30), 20)] if rope_type == "longrope" else [])
    for given, count in lengths:
        options = {"max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True}
        expected, got = target.generate(**given, **options), target.generate(**given, **options, assistant_model=draft)
        assert got.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_refused_call_leaves_the_memory_of_a_chat():
    """The user shortens the call, as the message says, and the draft still knows the earlier turns."""
    family = FAMILIES["llama"]
    config = family.config()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, **ROPES["dynamic"]}
    config.max_position_embeddings = 40
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).double().eval()
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    options = {"assistant_model": draft, CACHE_NAME: DynamicCache(), "return_dict_in_generate": True}
    first = target.generate(**family.inputs(0, num_text=8), max_new_tokens=6, **options)
    memory = first[CACHE_NAME]._msd_draft_memory
    ids = torch.cat([first.sequences, first.sequences[:, :4]], dim=1)
    with pytest.raises(MSDUnsupportedError, match="longer than 40 tokens"):
        target.generate(ids, max_new_tokens=60, **options)
    assert options[CACHE_NAME]._msd_draft_memory is memory
    num_rows = len(memory.rows)
    target.generate(ids, max_new_tokens=6, **options)
    assert len(options[CACHE_NAME]._msd_draft_memory.rows) > num_rows > 0


@pytest.mark.parametrize("num_filled", [0, 5])
def test_a_target_that_fails_its_check_leaves_the_cache_as_it_was(num_filled):
    """So that the same call can be made without the draft."""
    target = small_target("gpt_neox")
    ids = torch.arange(3, 14).expand(2, -1)  # a batch gets no chains in place of trees
    cache = DynamicCache()
    if num_filled:
        target(ids[:, :num_filled], **{CACHE_NAME: cache})
    handle = target.get_decoder().register_forward_hook(double_states_of_trees)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        target.generate(ids, max_new_tokens=8, assistant_model=small_draft(), **{CACHE_NAME: cache})
    handle.remove()
    assert cache.get_seq_length() == num_filled
    expected = target.generate(ids, max_new_tokens=8)
    assert torch.equal(target.generate(ids, max_new_tokens=8, **{CACHE_NAME: cache}), expected)


def double_states_of_trees(module, args, output):
    if output[0].shape[1] == NUM_SIBLINGS + 3:  # the nodes of the tree of the check
        output["last_hidden_state"] = 2 * output[0]
    return output
