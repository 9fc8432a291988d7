"""The benchmark of a pair runs every method on the same prompts."""

import copy
import functools
import itertools
import json
import random
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCAB_SIZE, build_draft, build_target, make_prompt, pair
from transformers import BatchFeature

from msd_hf.compiled import compile as compiled
from msd_hf.decoding.device_rounds import DeviceRounds
from msd_hf.errors import MSDDataError, MSDError
from msd_hf.evaluation import bench as bench_module
from msd_hf.evaluation import comparison as comparison_module
from msd_hf.evaluation import methods as methods_module
from msd_hf.evaluation.bench import run_bench
from msd_hf.evaluation.bench_prompts import BenchPrompt, first_questions
from msd_hf.evaluation.make_report import report_pair
from msd_hf.evaluation.methods import (
    ASSISTED_CHAIN,
    AUTO,
    CHAIN,
    COMPILED,
    COMPILED_GENERATE,
    METHODS,
    PROMPT_LOOKUP,
    TREE,
    USELESS_DRAFT,
    VANILLA,
    Method,
    choose_methods,
)
from msd_hf.evaluation.report_tables import report_tables
from msd_hf.evaluation.summary import find_warnings, summarize
from msd_hf.evaluation.timed_run import TimedRun, timed_generate
from msd_hf.toy import make_scene, render
from msd_hf.training import load_conversations


# The EOS token never comes; prompt lookup needs one before transformers 5.13.
ARGUMENTS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": VOCAB_SIZE}


# The target answers these prompts without an image token; prompt lookup suppresses that token.
TEXT, IMAGE, TWO_IMAGES = (5, ()), (1, (2,)), (2, (0, 5))


def prompt(seed, images_at):
    return BatchFeature(make_prompt(seed, 8, images_at))


def prompts(*kinds):
    return [BenchPrompt(f"{kind}", "visual" if kind[1] else "text", partial(prompt, *kind)) for kind in kinds]


@pytest.fixture(scope="module")
def result():
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    methods = [VANILLA, PROMPT_LOOKUP, ASSISTED_CHAIN, CHAIN, TREE]
    return run_bench(target, draft, prompts(TEXT, IMAGE, TWO_IMAGES), methods, repeats=2, **ARGUMENTS)


def test_every_method_gives_the_tokens_of_the_target_alone(result):
    target = pair(0).target
    for number, found in enumerate(result.prompts):
        inputs = found.prompt.make_inputs()
        expected = target.generate(**inputs, **ARGUMENTS)[0, inputs["input_ids"].shape[1] :].tolist()
        for method in result.methods:
            assert [run.tokens for run in found.comparison.runs[method.name]] == [expected] * 2, (number, method.name)
        assert found.differences == {}


def test_observed_rounds_add_up_to_the_answer(result):
    for found in result.prompts:
        for name, observation in found.observations.items():
            # Only the first round of prompt lookup, which is also its prefill, may give more than one token.
            total = sum(observation.acceptance_lengths)
            assert total == 15 if name != "prompt-lookup" else 0 < total <= 15
        tree = found.comparison.runs["tree"][0]
        assert found.observations["tree"].acceptance_lengths == tree.acceptance_lengths
        assert found.observations["vanilla"].acceptance_lengths == [1] * 15


def test_summary_of_a_pair(result):
    summary = summarize(result)
    methods = summary["methods"]
    assert methods["vanilla"]["tau"] == 1 and methods["vanilla"]["speedup"]["median"] == 1
    assert 1 < methods["chain"]["tau"] < methods["tree"]["tau"] <= 5
    assert methods["tree"]["mean_accepted_draft_tokens"] == pytest.approx(methods["tree"]["tau"] - 1)
    rounds = sum(methods["tree"]["acceptance_histogram"].values())
    assert methods["tree"]["num_rounds"] == rounds
    assert methods["tree"]["tau"] == pytest.approx(3 * 15 / rounds)
    assert 0 < methods["tree"]["round_efficiency"] < 1
    assert methods["assisted-chain"]["tau"] > 1 and sum(methods["assisted-chain"]["acceptance_histogram"].values()) > 1
    for name in (
        "prompt-lookup",
        "assisted-chain",
    ):  # transformers' loop runs these methods, and its phases are not timed
        assert "round_efficiency" not in methods[name]
    assert [group["num_prompts"] for group in summary["groups"].values()] == [1, 2]
    assert all(
        figures["agreement"] == {"identical": 3, "share": 1.0, "differences": []} for figures in methods.values()
    )
    assert summary["warnings"] == []
    json.dumps(summary)


def test_methods_are_compared_with_the_fastest_that_needs_no_package(result):
    summary = summarize(result)
    medians = {
        name: summary["methods"][name]["speedup"]["median"] for name in ("vanilla", "prompt-lookup", "assisted-chain")
    }
    fastest = summary["fastest_other"]
    assert medians[fastest] == max(medians.values())
    ratios = [prompt.comparison.speedup("tree") / prompt.comparison.speedup(fastest) for prompt in result.prompts]
    assert summary["methods"]["tree"]["over_fastest_other"]["median"] == pytest.approx(statistics.median(ratios))
    assert "over_fastest_other" not in summary["methods"]["vanilla"]
    titles = [table.title for table in report_tables({"kind": "pair", **summary, "fastest_other": "vanilla"})]
    tables = report_tables({"kind": "pair", **summary, "fastest_other": "prompt-lookup"})
    (table,) = [table for table in tables if table.title not in titles]
    assert "prompt-lookup, the fastest other" in table.title
    assert [row[0] for row in table.rows] == ["chain", "tree"]


def test_the_chain_is_a_chain(monkeypatch):
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    widths = []
    forward = type(target).forward

    @functools.wraps(forward)  # `generate` reads its signature
    def record_width(self, *args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "forward", record_width)
    timed_generate(target, prompt(*TEXT), draft, CHAIN, **ARGUMENTS)
    assert set(widths[1:-2]) == {5}  # the root and four levels


def test_a_method_changes_the_draft_only_while_it_runs():
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    before = draft.generation_config
    with CHAIN.prepared(target, draft) as arguments:
        assert arguments["assistant_model"] is draft
        assert draft.generation_config.tree_top_k == 1 and draft.generation_config.tree_depth == 3
    with pytest.raises(KeyError), AUTO.prepared(target, draft):
        assert draft.generation_config.num_assistant_tokens == "auto"
        raise KeyError
    assert draft.generation_config is before and before.tree_top_k == 3 and before.num_assistant_tokens == 12
    with pytest.raises(MSDError, match="'tree' needs a draft"), TREE.prepared(target, None):
        pass


@pytest.mark.parametrize(("own", "depth", "used"), [(12, 3, (12, 3)), ("auto", 40, (None, None))])
def test_compiled_trees_are_of_one_shape(own, depth, used, monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    served = []
    serve = DeviceRounds.run
    monkeypatch.setattr(DeviceRounds, "run", lambda self: served.append(serve(self)))
    target, draft = pair(0).target, pair(0).with_tree(own, depth, 3)
    with COMPILED.prepared(target, draft) as arguments:
        settings = arguments["assistant_model"].generation_config
        assert settings.compile and (settings.num_assistant_tokens, settings.tree_depth) == used
    alone, run = (timed_generate(target, prompt(*TEXT), draft, method, **ARGUMENTS) for method in (VANILLA, COMPILED))
    assert run.tokens == alone.tokens and len(served) == 1
    assert draft.generation_config.num_assistant_tokens == own


def test_compiled_generate_asks_for_a_static_cache_and_is_answered_before_it_is_timed(monkeypatch):
    target = pair(0).target
    with COMPILED_GENERATE.prepared(target, None) as arguments:
        assert arguments["cache_implementation"] == "static"
        assert arguments["compile_config"]._compile_all_devices  # else `generate` compiles on a GPU alone
    calls = []
    own = bench_module.timed_generate
    monkeypatch.setattr(
        bench_module, "timed_generate", lambda *args, **kwargs: calls.append(args[3]) or own(*args, **kwargs)
    )
    monkeypatch.setattr(
        target, "_valid_auto_compile_criteria", lambda *args: False
    )  # a compilation takes half a minute
    report = report_pair(target, pair(0).draft, prompts(TEXT), [VANILLA, COMPILED_GENERATE], 1, max_new_tokens=8)
    assert calls == [COMPILED_GENERATE]
    assert report["methods"]["compiled-generate"]["agreement"]["share"] == 1.0


@pytest.mark.slow
def test_compiled_generate_gives_the_same_tokens():
    target = copy.deepcopy(pair(0).target)
    alone, run = (
        timed_generate(target, prompt(*TEXT), None, method, **ARGUMENTS) for method in (VANILLA, COMPILED_GENERATE)
    )
    assert run.tokens == alone.tokens and hasattr(target, "_compiled_call")


def test_a_useless_draft_is_the_same_one_in_all_runs():
    """The statistics that show that the draft does not pay are kept with it, so every run needs the same draft."""
    target = build_target()
    state = torch.get_rng_state()
    with USELESS_DRAFT.prepared(target, None) as arguments:
        draft = arguments["assistant_model"]
        assert draft.generation_config.num_assistant_tokens == "auto" and draft.generation_config.tree_depth is None
    with USELESS_DRAFT.prepared(target, pair(0).draft) as arguments:
        assert arguments["assistant_model"] is draft
    assert torch.equal(torch.get_rng_state(), state)  # sampling is not disturbed
    with USELESS_DRAFT.prepared(build_target(), None) as arguments:
        other = arguments["assistant_model"]
        assert other is not draft and torch.equal(other.fc.weight, draft.fc.weight)


def test_ignore_eos_continues_answers_after_their_end(monkeypatch):
    # A fake clock: the useless draft's tree sizes, and so its chance hits, must not depend on the machine.
    clock = itertools.count()
    monkeypatch.setattr("msd_hf.tree.policy.time", SimpleNamespace(perf_counter=lambda: 1e-3 * next(clock)))
    target, draft = copy.deepcopy(pair(0).target), pair(0).with_tree(12, 3, 3)
    answer = timed_generate(target, prompt(*TEXT), **ARGUMENTS).tokens
    own, target.generation_config.eos_token_id = target.generation_config.eos_token_id, answer[3]
    try:
        methods, numbers = [VANILLA, TREE, USELESS_DRAFT], {"repeats": 1, "max_new_tokens": 16}
        short, long = (
            report_pair(target, draft, prompts(TEXT), methods, **numbers, ignore_eos=ignore_eos)
            for ignore_eos in (False, True)
        )
    finally:
        target.generation_config.eos_token_id = own
    assert short["prompts"][0]["new_tokens"] <= 4 and "ignore_eos" not in short["settings"]
    assert long["prompts"][0]["new_tokens"] == 16 and long["settings"]["ignore_eos"] is True
    assert {figures["agreement"]["share"] for figures in long["methods"].values()} == {1.0}
    assert long["methods"]["useless-draft"]["tau"] < 1.5 < long["methods"]["tree"]["tau"]


def test_vanilla_and_the_tree_are_always_measured():
    assert [method.name for method in choose_methods([])] == ["vanilla", "tree"]
    assert [method.name for method in choose_methods(["chain", "vanilla"])] == ["vanilla", "chain", "tree"]
    with pytest.raises(MSDError, match=f"Unknown baseline 'beam': choose from {', '.join(METHODS)}"):
        choose_methods(["beam"])


def test_prompt_lookup_does_not_copy_images():
    """The prompt's last tokens also stand before its image. The image tokens that follow there are not proposed."""
    target = pair(0).target
    inputs = make_prompt(3, 6, images_at=(6,))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, 4:6]], dim=1)
    with pytest.raises(ValueError):
        target.generate(**inputs, **PROMPT_LOOKUP.arguments, **ARGUMENTS)
    run = timed_generate(target, inputs, None, PROMPT_LOOKUP, **ARGUMENTS)
    assert run.tokens == timed_generate(target, inputs, **ARGUMENTS).tokens


def test_prompt_lookup_needs_an_eos_token_in_older_releases(monkeypatch):
    target, arguments = pair(0).target, {**ARGUMENTS, "eos_token_id": None}
    methods = [VANILLA, PROMPT_LOOKUP]
    if not methods_module.PROMPT_LOOKUP_NEEDS_EOS:
        (found,) = run_bench(target, None, prompts(TEXT), methods, repeats=1, **arguments).prompts
        assert found.differences == {}
    monkeypatch.setattr(methods_module, "PROMPT_LOOKUP_NEEDS_EOS", True)
    monkeypatch.setattr(type(target), "forward", None)  # the error comes before the first forward
    with pytest.raises(MSDError, match="'prompt-lookup' needs a target with an EOS token in transformers"):
        run_bench(target, None, prompts(TEXT), methods, repeats=1, **arguments)


def test_methods_take_turns_in_going_first(monkeypatch):
    order = []

    def fake(target, inputs, draft, method, seed, **arguments):
        order.append(method.name)
        return TimedRun([1], 1.0, 0.5, [])

    monkeypatch.setattr(comparison_module, "timed_generate", fake)
    comparison_module.compare(None, None, {}, repeats=3, methods=[VANILLA, CHAIN, TREE])
    assert order == ["vanilla", "chain", "tree", "chain", "tree", "vanilla", "tree", "vanilla", "chain"]


@pytest.mark.parametrize("fails", [False, True])
def test_timing_leaves_no_hook(fails):
    target = pair(0).target
    inputs = prompt(*TEXT)
    if fails:
        with pytest.raises(ValueError):
            timed_generate(target, inputs, max_new_tokens=-1)
    else:
        run = timed_generate(target, inputs, **ARGUMENTS)
        assert 0 < run.prefill_seconds < run.seconds
    assert not target._forward_hooks


def test_short_answers_are_left_out(monkeypatch):
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    first = timed_generate(target, prompt(*TEXT), **ARGUMENTS).tokens
    second = timed_generate(target, prompt(*IMAGE), **ARGUMENTS).tokens
    end = next(token for token in first[:10] if token not in second)
    arguments = {**ARGUMENTS, "eos_token_id": end, "methods": [VANILLA, TREE], "repeats": 1}
    result = run_bench(target, draft, prompts(TEXT, IMAGE), min_answer_tokens=12, **arguments)
    assert [found.prompt.name for found in result.prompts] == [f"{IMAGE}"] and result.num_short == 1
    with pytest.raises(MSDError, match="None of 1 answers has 12 tokens"):
        run_bench(target, draft, prompts(TEXT), min_answer_tokens=12, **arguments)


def test_a_difference_has_its_position_and_the_targets_logit_gap():
    """The method `other` is not lossless: it forbids a token of the answer."""
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    inputs = prompt(*TEXT)
    answer = timed_generate(target, inputs, **ARGUMENTS).tokens
    place = next(number for number, token in enumerate(answer) if number >= 2 and token not in answer[:number])
    other = Method("other", "forbids a token", arguments={"suppress_tokens": [answer[place]]})
    result = run_bench(target, draft, prompts(TEXT), [VANILLA, other, TREE], repeats=1, **ARGUMENTS)
    assert set(result.prompts[0].differences) == {"other"}
    difference = result.prompts[0].differences["other"]
    text = torch.cat([inputs["input_ids"], torch.tensor([answer[:place]])], dim=1)
    largest, second = target(input_ids=text).logits[0, -1].topk(2).values.tolist()
    assert difference.position == place
    assert difference.gap == pytest.approx(largest - second, rel=1e-4)
    summary = summarize(result)
    assert summary["methods"]["other"]["agreement"]["identical"] == 0
    assert [warning for warning in summary["warnings"] if warning.startswith("other: 1 outputs differ")]


def test_a_useless_draft_gives_a_warning():
    target = build_target()
    draft = build_draft(target)
    draft.generation_config.update(num_assistant_tokens=4, tree_depth=1, tree_top_k=2)
    result = run_bench(target, draft, prompts(TEXT, IMAGE), [VANILLA, TREE], repeats=1, **ARGUMENTS)
    (warning,) = summarize(result)["warnings"]
    assert "hardly any candidate is accepted" in warning
    for cause in ("another target", "chat template", "images do not reach the draft"):
        assert cause in warning


def test_images_that_do_not_reach_the_draft_give_a_warning(result):
    summary = summarize(result)
    summary["groups"]["visual"]["methods"]["tree"]["tau"] = 1.1
    (warning,) = find_warnings(summary)
    assert "1.10 on prompts with images" in warning


def test_the_first_question_of_each_conversation_is_asked(toy_processor):
    picture = render(make_scene(random.Random(0), "test"))
    conversations = load_conversations(
        [
            {
                "id": "a",
                "image": [picture, picture],
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is there?"},
                    {"from": "gpt", "value": "A circle."},
                    {"from": "human", "value": "<image>\nAnd there?"},
                    {"from": "gpt", "value": "A square."},
                ],
            },
            {"conversations": [{"from": "human", "value": "Count."}, {"from": "gpt", "value": "One."}]},
            {"conversations": []},
        ]
    )
    first, second = first_questions(conversations, toy_processor, 2)
    assert (first.name, first.group, second.name, second.group) == ("a", "visual", "1", "text")
    inputs = first.make_inputs()
    assert inputs["pixel_values"].shape[0] == 1
    text = toy_processor.decode(inputs["input_ids"][0])
    assert "What is there?" in text and "And there?" not in text and "A circle." not in text
    assert "pixel_values" not in second.make_inputs()
    with pytest.raises(MSDDataError):
        first_questions(conversations, toy_processor, 3)
    with pytest.raises(MSDError, match="no conversations"):
        first_questions(load_conversations([]), toy_processor, 3)
