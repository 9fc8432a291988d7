"""What a call says of itself: `out.tau`, `last_run`, a line in the log; and one warning for a draft of no use."""

from __future__ import annotations

import copy
import gc
import logging
import math
import threading
import weakref

import pytest
import tiny
import torch
from training_runs import build_small_target

import msd_hf
from msd_hf.compiled import compile as compiled
from msd_hf.decoding.notice import NUM_ROUNDS, AcceptanceNotice
from msd_hf.observer import observing
from msd_hf.training import acceptance_lengths
from msd_hf.tree.policy import AdaptiveTreePolicy


OPTIONS = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
TREES = {
    "tree": {"num_assistant_tokens": 12, "tree_depth": 3, "tree_top_k": 3},
    "chain": {"num_assistant_tokens": 5, "tree_depth": 3, "tree_top_k": 1},
    "auto": {"tree_top_k": 3},
    "compiled": {"num_assistant_tokens": 12, "tree_depth": 3, "tree_top_k": 3, "compile": True},
    "nothing to draft": {"num_assistant_tokens": 1},
}


@pytest.fixture
def pair(request, monkeypatch):
    """A fitted pair; its draft gets the settings of the test."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    target, draft = tiny.pair(0).target, tiny.pair(0).draft
    own = draft.generation_config
    draft.generation_config = type(own)(**getattr(request, "param", TREES["tree"]))
    yield target, draft
    draft.generation_config = own
    msd_hf.release(target)


def batch(rows):
    prompts = [tiny.make_prompt(row, 8) for row in range(rows)]
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}


@pytest.mark.parametrize(
    "pair, rows, sampled",
    [
        pytest.param(TREES["tree"], 1, True, id="sampled"),
        pytest.param(TREES["chain"], 1, False, id="chain"),
        pytest.param(TREES["auto"], 3, False, id="automatic, a batch"),
        pytest.param(TREES["compiled"], 1, False, id="compiled"),
        pytest.param(TREES["nothing to draft"], 1, False, id="nothing to draft"),
    ],
    indirect=["pair"],
)
def test_last_run_says_what_the_call_did(pair, rows, sampled):
    target, draft = pair
    inputs = batch(rows)
    out = target.generate(**inputs, assistant_model=draft, **{**OPTIONS, "do_sample": sampled})
    stats = msd_hf.last_run(target)
    lengths = [length for row in out.acceptance_lengths for length in row]
    assert stats.tau == out.tau == pytest.approx(sum(lengths) / len(lengths))
    assert stats.rounds == max(map(len, out.acceptance_lengths))
    assert stats.tokens == rows * 24
    assert 0 < stats.drafting_share < 1
    if draft.generation_config.num_assistant_tokens == 1:
        assert stats.drafted_rounds == 0 and stats.tau == 1
    else:
        assert 0 < stats.drafted_rounds <= stats.rounds


@pytest.mark.parametrize("processor", [True, False], ids=["in step", "at their own pace"])
def test_tokens_are_counted_without_padding(pair, processor):
    target, draft = pair
    inputs = batch(2)
    ends = target.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -1].item()
    options = {
        "eos_token_id": ends,
        "pad_token_id": 0,
        **({"encoder_repetition_penalty": 1.0001} if processor else {}),
    }
    out = target.generate(**inputs, assistant_model=draft, **OPTIONS, **options)
    new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    expected = sum(row.index(ends) + 1 if ends in row else len(row) for row in new)
    assert msd_hf.last_run(target).tokens == expected < sum(map(len, new))


def test_a_call_without_a_round(pair):
    target, draft = pair
    out = target.generate(**batch(1), assistant_model=draft, **{**OPTIONS, "max_new_tokens": 1})
    stats = msd_hf.last_run(target)
    assert (stats.tokens, stats.rounds, stats.drafting_share) == (1, 0, None)
    assert math.isnan(stats.tau) and math.isnan(out.tau)


def test_calls_without_a_draft_and_failed_calls_do_not_count(pair):
    target, draft = pair
    other = tiny.build_target(seed=5)
    assert msd_hf.last_run(other) is None
    target.generate(**batch(1), assistant_model=draft, **OPTIONS)
    before = msd_hf.last_run(target)
    target.generate(**batch(1), **OPTIONS)
    with pytest.raises(msd_hf.MSDUnsupportedError):
        target.generate(**batch(1), assistant_model=draft, **OPTIONS, num_beams=2)
    assert msd_hf.last_run(target) is before and msd_hf.last_run(torch.compile(target)) is before
    assert msd_hf.last_run(other) is None


def test_each_thread_has_its_last_run(pair):
    target, draft = copy.deepcopy(pair[0]), pair[1]
    seen, both_ran = {}, threading.Barrier(2)

    def work(num_tokens):
        target.generate(**batch(1), assistant_model=draft, **{**OPTIONS, "max_new_tokens": num_tokens})
        both_ran.wait()
        seen[num_tokens] = msd_hf.last_run(target).tokens

    threads = [threading.Thread(target=work, args=(num_tokens,)) for num_tokens in (5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {5: 5, 9: 9}
    assert msd_hf.last_run(target).tokens in (5, 9)  # this thread, which may have read their streamers, made none


def test_last_run_keeps_no_target_alive():
    target = tiny.build_target(seed=6)
    draft = tiny.build_draft(target)
    target.generate(**batch(1), assistant_model=draft, **{**OPTIONS, "max_new_tokens": 4})
    assert msd_hf.last_run(target).tokens == 4
    gone = weakref.ref(target)
    del target, draft
    gc.collect()
    assert gone() is None


def test_the_log_has_a_line_for_each_call(pair, caplog):
    target, draft = pair
    with caplog.at_level(logging.INFO, "msd_hf"):
        target.generate(**batch(1), assistant_model=draft, **OPTIONS)
    lines = [record.getMessage() for record in caplog.records if "rounds" in record.getMessage()]
    assert lines == [f"Generated {msd_hf.last_run(target)}."]
    assert lines[0].startswith("Generated 24 tokens in ") and "% of the time in drafting" in lines[0]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "little use" in record.getMessage()]


@pytest.mark.parametrize("settings", [TREES["tree"], TREES["auto"]], ids=["tree", "auto"])
def test_a_draft_of_no_use_is_warned_about_once(settings, caplog):
    """Automatic trees pause such a draft, so most of their rounds draft nothing."""
    target = tiny.build_target(seed=7, vocab_size=512)
    measured, first, second = (tiny.build_draft(target, seed=seed) for seed in range(3))
    for draft in (measured, first, second):
        draft.generation_config.update(**settings)
    options = {**OPTIONS, "max_new_tokens": NUM_ROUNDS - 10}
    with observing(notices=False):
        for _ in range(2):
            target.generate(**batch(1), assistant_model=measured, **options)
    target.generate(**batch(1), assistant_model=first, **options)
    assert not warnings_of(caplog)  # not yet 50 rounds
    for _ in range(3):
        target.generate(**batch(1), assistant_model=first, **options)
    (text,) = warnings_of(caplog)
    causes = ("another target", "chat template", "images", "fine-tuned", "high temperature", "What to do")
    assert sorted(causes, key=text.index) == list(causes)
    for _ in range(2):
        target.generate(**batch(1), assistant_model=second, **options)
    assert len(warnings_of(caplog)) == 2  # another pair


def test_a_useful_draft_is_not_warned_about(pair, caplog):
    target, draft = pair
    for seed in range(8):
        out = target.generate(**tiny.make_prompt(seed, 8), assistant_model=draft, **{**OPTIONS, "max_new_tokens": 60})
    assert out.tau > 1.2 and not warnings_of(caplog)


def test_tau_of_a_training_does_not_depend_on_the_machine(toy_processor, training_data, monkeypatch):
    """It is measured with trees of a set size, and the notice does not count: at first every draft is of no use."""
    target = build_small_target(toy_processor)
    draft = msd_hf.MSDDraftModel.from_target(target)
    draft.generation_config.tree_depth = 40
    monkeypatch.setattr(AdaptiveTreePolicy, "begin_round", lambda *_: pytest.fail("an automatic tree"))
    monkeypatch.setattr(AcceptanceNotice, "add", lambda *_: pytest.fail("the notice counts"))
    data = [training_data["text"][0]] * 2
    lengths = acceptance_lengths(target, draft, toy_processor, data, max_new_tokens=20)
    assert len(lengths["text"]) == 2
    settings = draft.generation_config
    assert (settings.num_assistant_tokens, settings.tree_depth) == (None, 40)


def test_answers_of_one_token_say_nothing_about_the_draft(pair, caplog):
    """The only round of such a call emits the token that ends the answer."""
    target, draft = pair
    prompt = batch(1)
    second = target.generate(**prompt, max_new_tokens=2, do_sample=False)[0, -1].item()
    for _ in range(NUM_ROUNDS + 5):
        out = target.generate(**prompt, assistant_model=draft, **OPTIONS, eos_token_id=second, pad_token_id=0)
    assert out.acceptance_lengths == [[1]] and not warnings_of(caplog)


def test_the_notice_looks_at_the_last_rounds(caplog):
    notice = AcceptanceNotice()
    notice.add(NUM_ROUNDS, [4] * NUM_ROUNDS)
    notice.add(NUM_ROUNDS, [1] * 4)  # too few of them drafted
    assert not warnings_of(caplog)
    notice.add(NUM_ROUNDS, [1] * 8)
    assert "in the last 100 rounds, a round that drafted emitted 1.00 tokens" in warnings_of(caplog)[0]
