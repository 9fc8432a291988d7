"""`compile=True` gives the same tokens and caches as without, compiles rarely, and leaves the target unchanged."""

from __future__ import annotations

import copy
import functools
from itertools import product

import pytest
import tiny
import torch
from thinning import thinned
from torch._dynamo.utils import counters
from transformers import DynamicCache

from msd_hf import MSDDraftModel, MSDUnsupportedError
from msd_hf.attention.masks import Reach, buffer_attention_mask, tree_attention_mask
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding.pair import state_of
from msd_hf.drafting.head import DraftHead
from msd_hf.kv import fixed as static_cache
from msd_hf.kv.fixed import (
    FixedLayer,
    SpareBuffers,
    close_slots,
    make_fixed,
    move_slots,
    parts_of,
    reserve,
    whole_buffers,
)
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction
from msd_hf.target.adapter import TargetAdapter
from msd_hf.tree.candidate import CandidateTree


PAIR = 3  # the draft has two layers
TREE = (12, 3, 4)
# Compiled functions of a round: verification, the draft's levels, and the draft's pass over accepted tokens.
NUM_GRAPHS = 3


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """Uses Dynamo without a compiler: errors would come from what is traced and from its inputs. Tests of buffers and
    of values run the functions as they are; tracing takes most of the time."""
    if getattr(request, "param", "traced") == "traced":
        monkeypatch.setattr(compiled, "BACKEND", "eager")
    else:
        monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)


traced_if_slow = pytest.mark.parametrize(
    "backend", ["as it is", pytest.param("traced", marks=pytest.mark.slow)], indirect=True
)


def build_pair():
    pair = tiny.pair(PAIR)
    draft = copy.copy(pair.with_tree(*TREE))
    draft.generation_config = copy.deepcopy(draft.generation_config)
    return pair.target, draft


def generate(target, draft, inputs, compile: bool = True, **options):
    draft.generation_config.compile = compile
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, **options}
    return target.generate(**inputs, **options, assistant_model=draft)


def warm_up(target, draft) -> None:
    """Runs calls until every shape is compiled: a round emits at least one token, and at most five with this tree."""
    prompts = [tiny.make_prompt(seed, 8) for seed in range(4)]
    outputs = [generate(target, draft, inputs, max_new_tokens=20) for inputs in prompts]
    assert {1, 5} <= {length for output in outputs for length in output.acceptance_lengths[0]}


def spare_buffers(target, draft):
    """The buffers of target and draft that the last call left for reuse."""
    pair = state_of(target, draft)
    return pair.target_buffers._buffers, pair.draft_buffers._buffers


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_tokens_rounds_and_caches_are_those_without_compilation():
    target, draft = build_pair()
    for inputs in (
        tiny.make_prompt(0, 8, (2,)),
        tiny.make_prompt(1, 5),
        tiny.make_prompt(2, 14, (0, 7), padding=3),
    ):
        got = generate(target, draft, inputs)
        expected = generate(target, draft, inputs, compile=False)
        assert torch.equal(got.sequences, target.generate(**inputs, max_new_tokens=30))
        assert got.acceptance_lengths == expected.acceptance_lengths
        for layer, reference in zip(got[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
            torch.testing.assert_close(layer.keys, reference.keys)
            torch.testing.assert_close(layer.values, reference.values)


def test_eager_attention_and_sampling():
    target, draft = build_pair()
    inputs = tiny.make_prompt(3, 7, (1,))
    options = {"do_sample": True, "temperature": 0.7}
    tiny.pair(PAIR).set_attention("eager", "sdpa")
    try:
        torch.manual_seed(5)
        got = generate(target, draft, inputs, **options).sequences
        torch.manual_seed(5)
        assert torch.equal(got, target.generate(**inputs, max_new_tokens=30, **options))
    finally:
        tiny.pair(PAIR).set_attention("sdpa")


def with_draft_vocabulary(draft):
    draft.set_draft_vocab(range(2, 60, 2))


def with_suffix_branch(draft):
    draft.generation_config.suffix_nodes = 4


def with_chain(draft):
    draft.generation_config.tree_top_k = 1


def with_all_candidates(draft):
    draft.generation_config.num_assistant_tokens = 1000


def with_root_only(draft):
    draft.generation_config.num_assistant_tokens = 1


PROMPTS = {
    "one prompt": tiny.make_prompt(0, 8, (2,)),
    "two rows": tiny.left_padded([tiny.make_prompt(seed, 9 - seed) for seed in (1, 2)]),
}
CHANGES = [with_draft_vocabulary, with_suffix_branch, with_chain, with_all_candidates, with_root_only]


@thinned("change,prompt", product(CHANGES, PROMPTS), strength=1)
def test_other_drafts_and_trees(change, prompt):
    target, draft = copy.deepcopy(build_pair())
    change(draft)
    inputs = PROMPTS[prompt]
    got = generate(target, draft, inputs)
    expected = generate(target, draft, inputs, compile=False)
    assert torch.equal(got.sequences, target.generate(**inputs, max_new_tokens=30))
    assert [rounds[:-1] for rounds in got.acceptance_lengths] == [
        rounds[:-1] for rounds in expected.acceptance_lengths
    ]


@traced_if_slow
@pytest.mark.parametrize("channels", [slice(None), slice(0, 1)], ids=["all channels", "one channel"])
def test_candidates_that_overflow_harm_no_others(channels):
    """Slots of rejected candidates stay in the buffers. Attention gives them weight 0, and 0 times infinity is NaN.

    Keys and values of a token with one infinite channel are infinities of both signs; with more of them they are NaN.
    """
    target, draft = copy.deepcopy(build_pair())
    inputs = tiny.make_prompt(0, 8)
    expected = target.generate(**inputs, max_new_tokens=30)
    undisturbed = generate(target, draft, inputs, compile=False).acceptance_lengths
    fuse = MSDDraftModel.fuse
    disturbed = 0
    for token in set(range(3, 60)) - set(expected[0].tolist()):
        embedding = target.get_input_embeddings().weight[token].detach()

        def overflow(self, inputs_embeds, *args, embedding=embedding):
            is_token = (inputs_embeds == embedding).all(-1, keepdim=True)
            fused = fuse(self, inputs_embeds, *args).clone()
            fused[..., channels] = torch.where(is_token, torch.inf, fused[..., channels])
            return fused

        draft.__class__ = type("OverflowingDraft", (MSDDraftModel,), {"fuse": overflow})
        if generate(target, draft, inputs, compile=False).acceptance_lengths == undisturbed:
            continue
        got = generate(target, draft, inputs)
        assert torch.equal(got.sequences, expected)
        assert len(got.acceptance_lengths[0]) < len(undisturbed[0]) + 5
        disturbed += 1
        if disturbed == 3:
            return
    pytest.fail("No candidate overflowed.")


def test_batch_whose_rows_end_at_different_times():
    target, draft = build_pair()
    inputs = tiny.left_padded([tiny.make_prompt(seed, 4 + 3 * seed, (1,)) for seed in range(2)])
    plain = target.generate(**inputs, max_new_tokens=30)
    length = inputs["input_ids"].shape[1]
    eos = int(plain[0, length + 6])
    expected = target.generate(**inputs, max_new_tokens=30, eos_token_id=eos)
    assert torch.equal(generate(target, draft, inputs, eos_token_id=eos).sequences, expected)


@traced_if_slow
def test_the_draft_does_not_see_padding():
    target, draft = build_pair()
    for seed in range(3):
        inputs = tiny.left_padded([tiny.make_prompt(seed, 24), tiny.make_prompt(seed + 7, 3)])
        got, expected = (generate(target, draft, inputs, is_compiled) for is_compiled in (True, False))
        for rounds, wanted in zip(got.acceptance_lengths, expected.acceptance_lengths, strict=True):
            assert rounds[:-1] == wanted[:-1]


def test_compiles_again_only_when_the_context_outgrows_the_buffers(monkeypatch):
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 64)
    target, draft = build_pair()
    warm_up(target, draft)
    before = num_graphs()
    for seed, num_text in ((1, 3), (2, 15), (3, 9)):
        for count in (1, 2, 3, 4, 7, 20):
            inputs = tiny.make_prompt(seed, num_text, (1,))
            got = generate(target, draft, inputs, max_new_tokens=count).sequences
            assert torch.equal(got, target.generate(**inputs, max_new_tokens=count))
    assert num_graphs() == before
    inputs = tiny.make_prompt(0, 8)
    got = generate(target, draft, inputs, max_new_tokens=70).sequences
    assert torch.equal(got, target.generate(**inputs, max_new_tokens=70))
    assert before < num_graphs() <= before + NUM_GRAPHS
    assert not counters["graph_break"]


@traced_if_slow
def test_conversation_with_compiled_turns_and_others():
    target, draft = build_pair()
    for turns in ((True, True, True), (True, False, True), (False, True, False)):
        caches = {name: DynamicCache(config=target.config.get_text_config()) for name in ("ours", "theirs")}
        ids = tiny.make_prompt(4, 6)["input_ids"]
        for turn, is_compiled in enumerate(turns):
            inputs = {"input_ids": ids, CACHE_NAME: caches["ours"]}
            got = generate(target, draft, inputs, is_compiled, max_new_tokens=12).sequences
            expected = target.generate(ids, max_new_tokens=12, **{CACHE_NAME: caches["theirs"]})
            assert torch.equal(got, expected)
            ids = torch.cat([got, tiny.make_prompt(10 + turn, 5)["input_ids"]], dim=1)


@traced_if_slow
@pytest.mark.parametrize("capacity", [16, 64])
def test_a_draft_that_joins_late(capacity, monkeypatch):
    """
    A draft that joins after the first turn holds fewer slots than there are positions, so its rotary tables may have
    to grow while its buffers still have room.
    """
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", capacity)
    target, draft = build_pair()
    caches = [DynamicCache(config=target.config.get_text_config()) for _ in range(2)]
    ids = tiny.make_prompt(0, 40)["input_ids"]
    for cache in caches:
        first = target.generate(ids, max_new_tokens=4, **{CACHE_NAME: cache})
    ids = torch.cat([first, tiny.make_prompt(1, 5)["input_ids"]], dim=1)
    got = generate(target, draft, {"input_ids": ids, CACHE_NAME: caches[0]}).sequences
    assert torch.equal(got, target.generate(ids, max_new_tokens=30, **{CACHE_NAME: caches[1]}))


@traced_if_slow
def test_buffers_are_kept_for_reuse_when_a_call_fails():
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    generate(target, draft, inputs, return_dict_in_generate=False)

    def fail(input_ids, scores):
        if input_ids.shape[1] > inputs["input_ids"].shape[1] + 5:
            raise RuntimeError("of the user")
        return scores

    with pytest.raises(RuntimeError, match="of the user"):
        generate(target, draft, inputs, logits_processor=[fail], return_dict_in_generate=False)
    assert all(spare_buffers(target, draft))


@traced_if_slow
def test_buffers_are_kept_for_reuse_when_a_prefill_fails():
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    generate(target, draft, inputs, return_dict_in_generate=False)
    before = [buffer.data_ptr() for pair in spare_buffers(target, draft)[0] for buffer in pair]

    def fail(module, args, output):
        raise RuntimeError("of the user")

    handle = target.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="of the user"):
        generate(target, draft, inputs, return_dict_in_generate=False)
    handle.remove()
    assert [buffer.data_ptr() for pair in spare_buffers(target, draft)[0] for buffer in pair] == before
    assert all(spare_buffers(target, draft))


def test_two_calls_never_get_the_same_spare_buffers():
    """One call may begin inside of another, or in another thread."""
    target, draft = build_pair()
    generate(target, draft, tiny.make_prompt(0, 8), return_dict_in_generate=False)
    spare = state_of(target, draft).target_buffers
    num_layers = target.config.text_config.num_hidden_layers
    assert all(spare.take(num_layers)) and not any(spare.take(num_layers))


@traced_if_slow
def test_a_prompt_is_prefilled_into_existing_buffers():
    target, draft = build_pair()
    generate(target, draft, tiny.make_prompt(0, 8), return_dict_in_generate=False)
    buffers, _ = spare_buffers(target, draft)
    seen = []
    prefill = TargetAdapter.prefill

    def record_addresses(self, input_ids, generation_config, model_kwargs):
        result = prefill(self, input_ids, generation_config, model_kwargs)
        seen.extend(layer.keys.data_ptr() for layer in model_kwargs[CACHE_NAME].layers)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TargetAdapter, "prefill", record_addresses)
        generate(target, draft, tiny.make_prompt(1, 8), return_dict_in_generate=False)
    assert seen == [keys.data_ptr() for keys, _ in buffers]


@traced_if_slow
def test_returned_caches_are_not_used_again():
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    first = generate(target, draft, inputs)
    keys = [layer.keys.clone() for layer in first[CACHE_NAME].layers]
    generate(target, draft, tiny.make_prompt(1, 9), return_dict_in_generate=False)
    generate(target, draft, tiny.make_prompt(2, 9))
    assert all(torch.equal(layer.keys, old) for layer, old in zip(first[CACHE_NAME].layers, keys, strict=True))


@traced_if_slow
def test_reused_buffers_keep_their_addresses_but_not_their_contents(monkeypatch):
    """CUDA graphs need fixed addresses, so buffers keep theirs. Their old contents (here NaN) must not be read."""
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    expected = generate(target, draft, inputs, return_dict_in_generate=False)
    for number in range(2):
        spare = spare_buffers(target, draft)[number]
        addresses = [buffer.data_ptr() for pair in spare for buffer in pair]
        for buffer in (buffer for pair in spare for buffer in pair):
            buffer.fill_(float("nan"))
        assert torch.equal(generate(target, draft, inputs, return_dict_in_generate=False), expected)
        spare = spare_buffers(target, draft)[number]
        assert [buffer.data_ptr() for pair in spare for buffer in pair] == addresses


def test_calls_in_and_out_of_inference_mode():
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    for is_inference in (True, False):
        with torch.inference_mode(is_inference):
            got = generate(target, draft, inputs, return_dict_in_generate=False)
        assert torch.equal(got, target.generate(**inputs, max_new_tokens=30))


def test_hidden_states_are_returned():
    target, draft = build_pair()
    inputs = tiny.make_prompt(0, 8)
    got = generate(target, draft, inputs, output_hidden_states=True).hidden_states
    expected = generate(target, draft, inputs, compile=False, output_hidden_states=True).hidden_states
    for step, reference in zip(got, expected, strict=True):
        for states, wanted in zip(step, reference, strict=True):
            torch.testing.assert_close(states, wanted)


@traced_if_slow
@pytest.mark.parametrize("fails", [False, True])
def test_target_is_left_as_it_was(fails, monkeypatch):
    target, draft = build_pair()
    decoder = target.get_decoder()
    generate(target, draft, tiny.make_prompt(0, 8))  # transformers adds attributes of its own in the first call
    attributes, hooks = set(vars(decoder)), len(decoder._forward_pre_hooks)
    if fails:

        def fail(*args):
            assert "forward" in vars(decoder)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(compiled, "_decoder_forward", fail)
        monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(target, draft, tiny.make_prompt(0, 8))
    else:
        generate(target, draft, tiny.make_prompt(0, 8))
    assert set(vars(decoder)) == attributes and len(decoder._forward_pre_hooks) == hooks


def with_auto_tree(target, draft):
    draft.generation_config.num_assistant_tokens = "auto"


def with_offloaded_layer(target, draft):
    target.get_decoder().layers[1]._hf_hook = object()


def with_compiled_decoder(target, draft):
    target.get_decoder().compile(backend="eager")


def on_another_device(target, draft):
    draft.to("meta")


def with_replaced_forward(target, draft):
    decoder = target.get_decoder()
    decoder.forward = functools.partial(type(decoder).forward, decoder)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (with_auto_tree, "another shape"),
        (with_offloaded_layer, "accelerate"),
        (with_compiled_decoder, "compiled already"),
        (on_another_device, "on meta"),
        (with_replaced_forward, "was replaced"),
    ],
)
def test_refusals(change, sentence):
    target, draft = copy.deepcopy(build_pair())
    change(target, draft)
    with pytest.raises(MSDUnsupportedError, match=sentence):
        generate(target, draft, tiny.make_prompt(0, 8))


def test_slots_are_kept_within_the_buffers(monkeypatch):
    """After every round the layers hold exactly the accepted slots."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 8)
    torch.manual_seed(0)
    cache = DynamicCache()
    make_fixed(cache, SpareBuffers(), 2)
    assert all(isinstance(layer, FixedLayer) for layer in cache.layers)
    prompt = torch.randn(1, 2, 5, 4)
    for layer in range(2):
        cache.update(prompt, prompt, layer)
    expected, transaction = prompt, CacheTransaction(cache, ContextSlots([5]))
    for number in range(6):
        nodes = torch.randn(1, 2, 4, 4)
        start = cache.get_seq_length()
        whole = whole_buffers(cache, reserve(cache, 4), torch.arange(start, start + 4))
        slots = [whole.update(nodes, nodes, layer)[0].shape[2] for layer in range(2)]
        assert slots == 2 * [max(8, 1 << (expected.shape[2] + 3).bit_length())]
        close_slots(cache, expected.shape[2] + 3)
        path = [0, 2] if number % 2 else [0, 1, 2]
        transaction.commit([len(path)], torch.tensor([path]))
        expected = torch.cat([expected, nodes[:, :, path]], dim=2)
        for layer in cache.layers:
            assert torch.equal(layer.keys, expected) and torch.equal(layer.values, expected)


@pytest.mark.parametrize(
    "reach", [Reach(), *[Reach(window=most) for most in (2, 4, 9, 30)], *[Reach(chunk=most) for most in (2, 3, 4, 9)]]
)
@pytest.mark.parametrize("lengths", [[12], [12, 12], [9, 12]])
@pytest.mark.parametrize("is_padded", [False, True])
def test_buffer_masks_equal_tree_masks_and_hide_empty_slots(reach, lengths, is_padded):
    parents = torch.tensor([[0, 0, 0, 1, 3, 4, 5]]).expand(len(lengths), -1)
    tree = CandidateTree.from_parents(parents, parents, max_depth=5)
    prompt_mask = torch.ones(len(lengths), 6, dtype=torch.bool)
    prompt_mask[0, :2] = False
    context = ContextSlots(lengths, prompt_mask if is_padded else None)
    dtype = torch.float32
    expected = tree_attention_mask(tree.ancestors, context, dtype, reach, tree.depths)
    first_slot = torch.tensor([context.num_slots])
    mask = buffer_attention_mask(tree.ancestors, tree.depths, first_slot, context, 32, dtype, reach)
    assert torch.equal(mask[..., : expected.shape[3]], expected)
    assert (mask[..., expected.shape[3] :] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("vocab_size", [32_000, 32_064, 4_000, 997, 60])
@pytest.mark.parametrize("top_k", [1, 10])
def test_the_best_candidates_are_found_block_by_block(vocab_size, top_k):
    """Vocabulary sizes that divide into blocks, and sizes that do not."""
    torch.manual_seed(0)
    target = tiny.build_target(vocab_size=vocab_size)
    head = DraftHead(tiny.build_draft(target), TargetAdapter(target))
    states = 3 * torch.randn(2, 5, 32, dtype=torch.float64)
    scores, tokens = head.compiled_top_k(states, top_k)
    expected = head.top_k(states, top_k)
    assert torch.equal(tokens, expected[1])
    torch.testing.assert_close(scores, expected[0])


@pytest.mark.parametrize("is_joined", [True, False])
def test_slots_of_all_layers_move(is_joined, monkeypatch):
    """New buffers are parts of one tensor and move together; separate buffers move one by one."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 8)
    torch.manual_seed(0)
    cache = DynamicCache()
    make_fixed(cache, SpareBuffers(), 2)
    prompt = torch.randn(1, 2, 5, 4)
    for layer in range(2):
        cache.update(prompt + layer, prompt - layer, layer)
    for count in (3, 20):  # each count needs larger buffers
        buffers = reserve(cache, count)
        (together,) = parts_of(buffers)
        assert together.shape == (4, 1, 2, 8 if count == 3 else 32, 4)
    for number, layer in enumerate(cache.layers):
        assert torch.equal(layer.keys, prompt + number) and torch.equal(layer.values, prompt - number)
    if not is_joined:
        buffers = [tuple(part.clone() for part in pair) for pair in buffers]
        assert len(parts_of(buffers)) == 4
    for part in (part for pair in buffers for part in pair):
        part.normal_()
    expected = [[part.clone() for part in pair] for pair in buffers]
    for part in (part for pair in expected for part in pair):
        part[:, :, [4, 5, 6]] = part[:, :, [6, 9, 4]]
    move_slots(parts_of(buffers), torch.tensor([6, 9, 4]), torch.tensor([4, 5, 6]))
    for pair, wanted in zip(buffers, expected, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(pair, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends(backend, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    target, draft = build_pair()
    for seed in range(3):
        inputs = tiny.make_prompt(seed, 8, (2,))
        assert torch.equal(generate(target, draft, inputs).sequences, target.generate(**inputs, max_new_tokens=30))
