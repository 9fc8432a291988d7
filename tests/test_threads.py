"""Calls that share a target, in threads or nested in hooks, see nothing of each other."""

from __future__ import annotations

import copy
import gc
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch._dynamo import eval_frame
from transformers import AttentionInterface, LogitsProcessor, LogitsProcessorList
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import msd_hf
from msd_hf.attention import substitution
from msd_hf.compiled import compile as compiled
from msd_hf.compiled import cuda_graphs
from msd_hf.decoding.pair import companion_of, state_of
from msd_hf.draft.evaluation_mode import evaluating
from msd_hf.target import stand_in
from msd_hf.tree.candidate import CandidateTree
from msd_hf.tree.experience import Experience
from msd_hf.tree.policy import AdaptiveTreePolicy
from msd_hf.tree.settings import TreeSettings


STUDIES = Path(__file__).parents[1] / "examples" / "studies"
OPTIONS = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDIES))
    try:
        yield runpy.run_path(str(STUDIES / "threads.py"))
    finally:
        sys.path.remove(str(STUDIES))


@pytest.mark.parametrize(
    "variant, num_calls",
    [
        ("sdpa", 64),
        ("no tree mask", 64),
        # Each new shape is traced.
        pytest.param("compiled target", 64, marks=pytest.mark.slow),
        pytest.param("compile=True", 64, marks=pytest.mark.slow),
    ],
)
def test_threads_share_a_target(study, variant, num_calls):
    """The short form of the study: drafts of their own, a shared draft, no draft, streamers, batches, errors."""
    torch._dynamo.reset()
    seen, changed = study["run_variant"](variant, num_calls)
    outcomes = {outcome for _, outcome in seen}
    assert outcomes <= {"identical", "stopped"}, seen
    assert ("without a draft", "identical") in seen and ("shared draft", "identical") in seen
    assert not changed


def run_together(work, num_threads):
    """Runs `work` in several threads that switch often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_a_compiled_target_leaves_the_stance_of_the_process(pair):
    target, draft = pair
    inputs = tiny.make_prompt(1, 8)
    expected = target.generate(**inputs, **OPTIONS)
    graphs, got = [], []
    target.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def work():
        for _ in range(4):
            got.append(target.generate(**inputs, **OPTIONS, assistant_model=draft))

    run_together(work, 3)
    assert len(got) == 12 and all(torch.equal(tokens, expected) for tokens in got)
    assert eval_frame._stance.stance == "default" and not graphs
    torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)(torch.ones(2))
    assert graphs  # the process can still compile


def test_a_compilation_of_ours_is_not_noticed_by_other_threads():
    """torch lets `torch.compiler.is_compiling()` be true in all threads meanwhile, and transformers then keeps the
    hidden states of other calls in a global variable."""
    seen = []

    def backend(graph, example_inputs):
        seen.append(torch.compiler.is_compiling())
        return graph.forward

    before, compiled.BACKEND = compiled.BACKEND, backend
    try:
        result = compiled.CompiledFunctions().run(add_one, (2,), torch.device("cpu"), torch.ones(2))
    finally:
        compiled.BACKEND = before
    assert torch.equal(result, torch.full((2,), 2.0)) and seen == [False]


def test_a_compilation_of_the_user_does_not_switch_a_call_off(pair):
    """While one thread compiles, `torch.compiler.is_compiling()` is true in the others too (torch 2.13)."""
    target, draft = pair
    inputs = tiny.make_prompt(1, 8)
    expected = target.generate(**inputs, **OPTIONS)
    got = []

    def work():
        got.append(target.generate(**inputs, **OPTIONS, assistant_model=draft))

    def backend(graph, example_inputs):
        run_together(work, 1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert torch.equal(got[0], expected)


def add_one(states):
    return states + 1


@pytest.fixture
def pair():
    pair = tiny.pair(0)
    return copy.deepcopy(pair.target), copy.deepcopy(pair.with_tree(8, 3, 3))


@pytest.mark.parametrize("place", ["target", "decoder", "layer", "vision"])
@pytest.mark.parametrize("with_draft", [True, False])
def test_calls_nested_in_hooks(pair, place, with_draft):
    """A hook of the user generates with the same target, in the middle of a forward of an outer call."""
    target, draft = pair
    modules = {
        "target": target,
        "decoder": target.get_decoder(),
        "layer": target.get_decoder().layers[0],
        "vision": target.model.vision_tower,
    }
    outer, inner = tiny.make_prompt(1, 8, (2,)), tiny.make_prompt(2, 5)
    expected_outer = target.generate(**outer, **OPTIONS)
    expected_inner = target.generate(**inner, **OPTIONS)
    got, inside = [], []

    def hook(module, args, kwargs):
        if not inside and len(got) < 3:
            inside.append(True)
            got.append(target.generate(**inner, **OPTIONS, assistant_model=draft if with_draft else None))
            inside.clear()

    handle = modules[place].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        assert torch.equal(target.generate(**outer, **OPTIONS, assistant_model=draft), expected_outer)
    finally:
        handle.remove()
    assert got and all(torch.equal(tokens, expected_inner) for tokens in got)


def test_a_nested_forward_leaves_the_layers_that_the_draft_reads(pair):
    """The hook runs after a layer whose output the draft reads, and before the end of the decoder."""
    target, _ = pair
    draft = tiny.build_draft(target, target_layers=[0])
    outer, inner = tiny.make_prompt(1, 8, (2,)), tiny.make_prompt(2, 5)
    outputs = []
    for is_nested in (False, True):
        inside = []

        def hook(*_, inside=inside):
            if not inside:
                inside.append(True)
                target(**inner)
                inside.clear()

        handle = target.get_decoder().layers[1].register_forward_pre_hook(hook) if is_nested else None
        outputs.append(target.generate(**outer, **OPTIONS, assistant_model=draft, return_dict_in_generate=True))
        if handle is not None:
            handle.remove()
    alone, nested = outputs
    assert torch.equal(alone.sequences, nested.sequences)
    assert alone.acceptance_lengths == nested.acceptance_lengths


def test_calls_nested_in_a_processor(pair):
    target, draft = pair
    outer, inner = tiny.make_prompt(1, 8, (2,)), tiny.make_prompt(2, 5)
    expected_outer = target.generate(**outer, **OPTIONS)
    expected_inner = target.generate(**inner, **OPTIONS)
    got = []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if len(got) < 3:
                got.append(None)
                got[-1] = target.generate(**inner, **OPTIONS, assistant_model=draft)
            return scores

    processors = LogitsProcessorList([Nested()])
    tokens = target.generate(**outer, **OPTIONS, assistant_model=draft, logits_processor=processors)
    assert torch.equal(tokens, expected_outer)
    assert all(torch.equal(tokens, expected_inner) for tokens in got)


def test_a_copy_that_is_made_during_a_call_has_no_part_in_it(pair):
    target, draft = pair
    inputs = tiny.make_prompt(1, 8)
    expected = target.generate(**inputs, **OPTIONS)
    copies = []

    def make_copy(*_):
        if not copies:
            assert "_call_impl" in vars(target.get_decoder())  # the stand-in is in place
            copies.append(copy.deepcopy(target))

    handle = target.get_decoder().layers[0].register_forward_hook(make_copy)
    target.generate(**inputs, **OPTIONS, assistant_model=draft)
    handle.remove()
    (copied,) = copies
    copied.get_decoder().layers[0]._forward_hooks.clear()
    with torch.no_grad():
        for weight in target.parameters():
            weight.zero_()
    assert torch.equal(copied.generate(**inputs, **OPTIONS), expected)


class TestStandIn:
    def test_blocks_share_it_and_the_last_removes_it(self):
        module = torch.nn.Linear(2, 2)
        seen = []

        def handle(module, method, args, kwargs):
            seen.append(args)
            return method(*args, **kwargs)

        with stand_in.standing_in(module, "_call_impl", handle):
            with stand_in.standing_in(module, "_call_impl", handle):
                module(torch.ones(1, 2))
            module(torch.ones(1, 2))
            assert stand_in.own_method(module, "_call_impl") is None
        module(torch.ones(1, 2))
        assert len(seen) == 2 and "_call_impl" not in vars(module)

    def test_a_method_of_the_users_own_comes_back(self):
        module = torch.nn.Linear(2, 2)
        own = module.forward = lambda states: states
        with stand_in.standing_in(module, "forward", lambda module, method, args, kwargs: method(*args) + 1):
            assert module(torch.zeros(1)).item() == 1 and stand_in.own_method(module, "forward") is own
        assert module.forward is own

    def test_code_that_wraps_it_keeps_working(self):
        module = torch.nn.Linear(2, 2)
        calls = []

        def handle(module, method, args, kwargs):
            calls.append(args)
            return method(*args, **kwargs)

        with stand_in.standing_in(module, "forward", handle):
            inner = module.forward
            module.forward = lambda states: inner(states)
        expected = torch.nn.functional.linear(torch.ones(1, 2), module.weight, module.bias)
        assert torch.equal(module(torch.ones(1, 2)), expected) and not calls
        with stand_in.standing_in(module, "forward", handle):
            assert torch.equal(module(torch.ones(1, 2)), expected) and len(calls) == 1


@pytest.fixture
def causal_pair(pair):
    """A target whose attention function takes no tree mask."""
    AttentionInterface.register("of_a_user", TestAttention.other)
    pair[0].set_attn_implementation({"text_config": "of_a_user"})
    return pair


class TestAttention:
    @staticmethod
    def other(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=query.shape[2] > 1, **kwargs)

    def test_unregister_puts_the_function_back(self, causal_pair):
        target, draft = causal_pair
        target.generate(**tiny.make_prompt(1, 8), **OPTIONS, assistant_model=draft)
        try:
            assert AttentionInterface()["of_a_user"] != self.other
            msd_hf.unregister()
            assert AttentionInterface()["of_a_user"] == self.other
        finally:
            msd_hf.register()

    def test_an_error_ends_the_substitution(self, causal_pair):
        """The next call without a draft gets the function of the user again."""
        target, draft = causal_pair

        def fail(module, args, kwargs):
            if fail.armed:
                raise RuntimeError("of a layer")

        fail.armed = False
        inputs = tiny.make_prompt(1, 8)
        handle = target.get_decoder().layers[1].register_forward_pre_hook(fail, with_kwargs=True)
        prefill = target.get_decoder().norm.register_forward_hook(lambda *_: setattr(fail, "armed", True))
        with pytest.raises(RuntimeError, match="of a layer"):
            target.generate(**inputs, **OPTIONS, assistant_model=draft)
        handle.remove()
        prefill.remove()
        assert substitution._current.get() is None

    def test_the_substitute_may_be_replaced_itself(self, causal_pair):
        """A call with `compile=True` on another target has wrapped sdpa before."""
        target, draft = causal_pair
        inputs = tiny.make_prompt(1, 8)
        expected = target.generate(**inputs, **OPTIONS)
        substitution.allow_substitutes("sdpa")
        try:
            assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=draft), expected)
        finally:
            substitution.restore_attention()

    def test_other_models_keep_their_function(self, pair):
        """A hook in a layer runs another model, whose attention has the same name."""
        calls = []

        def other(module, *args, **kwargs):
            calls.append(module.config)
            return self.other(module, *args, **kwargs)

        AttentionInterface.register("of_a_user", other)
        target, draft = pair
        model = copy.deepcopy(target)
        for owner in (target, model):
            owner.set_attn_implementation({"text_config": "of_a_user"})
        inputs = tiny.make_prompt(1, 8)
        nested = []

        def hook(*_):
            before = len(calls)
            model(**tiny.make_prompt(2, 5))
            nested.append(calls[before:])

        handle = target.get_decoder().layers[0].register_forward_hook(hook)
        target.generate(**inputs, **OPTIONS, assistant_model=draft)
        handle.remove()
        own = model.get_decoder().config
        assert len(nested) > 1 and all(len(seen) == 2 and seen[0] is own for seen in nested)

    def test_a_function_that_is_registered_anew_is_replaced_anew(self):
        AttentionInterface.register("of_a_user", self.other)
        substitution.allow_substitutes("of_a_user")
        ours = AttentionInterface()["of_a_user"]
        substitution.allow_substitutes("of_a_user")
        assert AttentionInterface()["of_a_user"] is ours
        AttentionInterface.register("of_a_user", self.other)
        substitution.allow_substitutes("of_a_user")
        assert AttentionInterface()["of_a_user"] not in (ours, self.other)

    def test_layers_that_look_up_no_function_are_refused(self, causal_pair, monkeypatch):
        """A model with its own table of functions would ignore the substitute, and so the tree mask."""
        target, draft = causal_pair
        monkeypatch.setattr(substitution, "_substitutable", lambda function: function)
        monkeypatch.setattr(substitution, "_replaced", {})
        with pytest.raises(msd_hf.MSDUnsupportedError, match=r"'of_a_user'.*takes no tree mask"):
            target.generate(**tiny.make_prompt(1, 8), **OPTIONS, assistant_model=draft)


def test_the_draft_stays_in_evaluation_mode_until_the_last_call_ends(pair):
    _, draft = pair
    draft.train()
    draft.fc.eval()
    before = [module.training for module in draft.modules()]
    first, second = evaluating(draft), evaluating(draft)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in draft.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in draft.modules()] == before


class Model:
    """A key of the tables of pairs."""


def test_threads_share_the_tables_of_pairs():
    """One thread goes through all targets for `release` while others add theirs."""
    errors = []

    def work():
        draft = Model()
        try:
            for _ in range(300):
                kept = [Model() for _ in range(5)]
                assert all(state_of(target, draft) is state_of(target, draft) for target in kept)
                msd_hf.release(draft)
        except Exception as error:
            errors.append(error)

    run_together(work, 4)
    assert not errors


def test_threads_have_one_state_of_a_pair_and_one_companion_of_a_target():
    target, draft, made, got, states = Model(), Model(), [], [], []
    barrier = threading.Barrier(3)

    def make(_):
        time.sleep(0.05)
        made.append(Model())
        return made[-1]

    def work():
        barrier.wait()
        states.append(state_of(target, draft))
        got.append(companion_of(target, make))

    run_together(work, 3)
    assert len(made) == 1 and len(set(map(id, got))) == 1
    assert len(set(map(id, states))) == 1


def test_threads_compile_a_function_once(monkeypatch):
    compilations = []

    def compile_slowly(function, mode):
        time.sleep(0.05)
        compilations.append(function)
        return function

    monkeypatch.setattr(compiled, "_compile", compile_slowly)
    functions, barrier = compiled.CompiledFunctions(), threading.Barrier(3)

    def work():
        barrier.wait()
        functions.run(add_one, (2,), torch.device("cpu"), torch.ones(2))

    run_together(work, 3)
    assert len(compilations) == 1


def test_garbage_collection_stands_still_until_the_last_recording_ends():
    first, second = cuda_graphs._garbage_collection.stopped(), cuda_graphs._garbage_collection.stopped()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_threads_measure_in_their_own_range_of_contexts():
    """The range of one call must not become that of another between two of its measurements."""
    experience = Experience(32)
    short, long = (AdaptiveTreePolicy(TreeSettings(32, 3, 4), experience) for _ in range(2))
    short.begin_round(None, 10)
    long.begin_round(None, 5000)
    tree = tiny_tree()
    for policy in (short, long):
        policy.begin_verification()
        policy.end_round(tree, [[0]])
    assert len(experience._plain_costs) == 2


def tiny_tree():
    return CandidateTree.from_parents(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 0)
