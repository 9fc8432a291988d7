"""What is kept between calls goes with the models, or with `msd_hf.release`."""

from __future__ import annotations

import copy
import gc
import weakref

import peft
import pytest
import tiny
import torch

import msd_hf
from msd_hf.compiled import compile as compiled
from msd_hf.decoding.pair import state_of
from msd_hf.evaluation.methods import random_draft


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Functions that would be compiled run as they are, but are kept in the same way."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)


def used_pair(**settings):
    """A pair of its own after a call, with all that the call left."""
    pair = tiny.pair(1)
    target, draft = copy.deepcopy((pair.target, pair.with_tree(12, 3, 4)))
    for name, value in settings.items():
        setattr(draft.generation_config, name, value)
    target.generate(**tiny.make_prompt(0, 8), max_new_tokens=12, assistant_model=draft)
    return target, draft


def test_the_state_holds_what_the_last_call_left():
    target, draft = used_pair(compile=True)
    state = state_of(target, draft)
    assert state.compiled._functions and state.target_buffers._buffers and state.draft_buffers._buffers
    target, draft = used_pair(num_assistant_tokens="auto")
    assert state_of(target, draft).experiences


@pytest.mark.parametrize("settings", [{"compile": True}, {"num_assistant_tokens": "auto"}, {}])
@pytest.mark.parametrize("gone", ["target", "draft", "both"])
def test_the_state_goes_with_a_model(gone, settings):
    """At once: no cycle of references keeps a model until the next garbage collection."""
    gc.collect()
    gc.disable()
    try:
        check_that_the_state_goes(gone, settings)
    finally:
        gc.enable()


def check_that_the_state_goes(gone, settings):
    target, draft = used_pair(**settings)
    state = weakref.ref(state_of(target, draft))
    models = [weakref.ref(model) for model, name in ((target, "target"), (draft, "draft")) if gone in (name, "both")]
    if gone in ("target", "both"):
        del target
    if gone in ("draft", "both"):
        del draft
    assert state() is None and [model() for model in models] == [None] * len(models)


@pytest.mark.slow
def test_compiled_code_does_not_keep_the_models(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    target, draft = used_pair(compile=True)
    left = [weakref.ref(part) for part in (target, draft, state_of(target, draft))]
    del target, draft
    torch._dynamo.reset()  # Dynamo keeps the modules of compiled code until then
    gc.collect()
    assert [part() for part in left] == [None] * 3


@pytest.mark.parametrize("released", ["target", "draft"])
def test_release_frees_the_pairs_of_a_model_and_no_others(released):
    target, draft = used_pair(compile=True)
    other_target, other_draft = used_pair()
    inputs = tiny.make_prompt(0, 8)
    expected = target.generate(**inputs, max_new_tokens=12)
    state, kept = weakref.ref(state_of(target, draft)), state_of(other_target, other_draft)
    buffer = weakref.ref(state().target_buffers._buffers[0][0])
    msd_hf.release(target if released == "target" else draft)
    gc.collect()
    assert state() is None and buffer() is None
    assert state_of(other_target, other_draft) is kept
    assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), expected)


def test_release_of_a_model_of_peft_frees_the_pairs_of_its_base_model():
    """Inside `generate`, the target is the base model."""
    target, draft = copy.deepcopy((tiny.pair(1).target, tiny.pair(1).draft))
    model = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.generate(**tiny.make_prompt(0, 8), max_new_tokens=4, assistant_model=draft)
    state = weakref.ref(state_of(model.get_base_model(), draft))
    msd_hf.release(model)
    assert state() is None


def test_release_of_a_model_that_was_never_used_does_nothing():
    target, draft = used_pair()
    kept = state_of(target, draft)
    msd_hf.release(tiny.build_target())
    assert state_of(target, draft) is kept


def test_a_draft_that_a_measurement_made_goes_with_its_target():
    target = tiny.build_target()
    draft = weakref.ref(random_draft(target))
    assert random_draft(target) is draft()
    msd_hf.release(target)
    gc.collect()
    assert draft() is None
