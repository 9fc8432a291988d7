"""Adaptive trees (`num_assistant_tokens="auto"`): the statistics, the decisions, and the unchanged output."""

from __future__ import annotations

import copy
import math
from itertools import groupby

import pytest
import tiny
import torch

from msd_hf import MSDDraftModel
from msd_hf.decoding.pair import state_of
from msd_hf.tree.experience import Experience
from msd_hf.tree.growth import TreeGrowth
from msd_hf.tree.policy import AdaptiveTreePolicy
from msd_hf.tree.settings import AUTO_NUM_ASSISTANT_TOKENS, AUTO_TREE_DEPTH, TreeSettings


def with_auto_tree(draft: MSDDraftModel, **settings) -> MSDDraftModel:
    draft = copy.deepcopy(draft)
    draft.generation_config.num_assistant_tokens = "auto"
    draft.generation_config.tree_depth, draft.generation_config.tree_top_k = None, 4
    draft.generation_config.update(**settings)
    return draft


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("number", range(0, tiny.NUM_PAIRS, 2))
def test_output_is_that_of_the_target_alone(number, do_sample):
    pair = tiny.pair(number)
    pair.set_attention("sdpa")
    draft = with_auto_tree(pair.draft)
    for seed in range(6):
        inputs = tiny.make_prompt(seed, 7, (2,) if seed % 2 else ())
        outputs = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            outputs.append(
                pair.target.generate(**inputs, max_new_tokens=40, do_sample=do_sample, assistant_model=assistant)
            )
        assert torch.equal(*outputs), seed


def test_output_of_a_batch_is_that_of_the_target_alone():
    pair = tiny.pair(1)
    draft = with_auto_tree(pair.draft)
    inputs = tiny.left_padded([tiny.make_prompt(seed, 4 + seed, (1,) if seed else ()) for seed in range(4)])
    options = {"max_new_tokens": 40, "eos_token_id": [11, 23], "pad_token_id": 0}
    for _ in range(3):
        assert torch.equal(
            pair.target.generate(**inputs, **options, assistant_model=draft), pair.target.generate(**inputs, **options)
        )


def test_settings_of_auto_trees():
    settings = TreeSettings.from_generation_config(with_auto_tree(tiny.pair(0).draft).generation_config)
    assert settings == TreeSettings(AUTO_NUM_ASSISTANT_TOKENS, AUTO_TREE_DEPTH, 4, is_auto=True)
    assert settings.limited_to(3) == TreeSettings(AUTO_NUM_ASSISTANT_TOKENS, 1, 4, is_auto=True)


def make_experience(costs: dict[int, float], tokens_a_round: float = 3.0, level: float = 0.1) -> Experience:
    """An `Experience` in which verifying `n` nodes took `costs[n]` seconds and a draft level took `level` seconds."""
    experience = Experience(64)
    experience.enter_context(100)
    experience.add_round(True, tokens_a_round, 2 * level + costs[16])
    for _ in range(100):
        size = experience.next_to_explore()
        if size is not None:
            experience.add_verification(size, costs[size])
    for _ in range(10):
        experience.add_level(4, level)
        experience.add_level(1, level)
        experience.add_round(True, tokens_a_round, 2 * level + costs[16])
        experience.add_round(False, 1.0, costs[1])
    return experience


def grow_one_level(policy: AdaptiveTreePolicy, probabilities: list[float]) -> TreeGrowth:
    """A round's tree after its first level: the root's candidates have the given probabilities."""
    growth = TreeGrowth(torch.zeros(1, dtype=torch.long), policy.begin_round(None, 100))
    growth.expand(torch.tensor(probabilities).log().view(1, 1, 4), torch.arange(4).view(1, 1, 4))
    return growth


FLAT = dict.fromkeys((1, 4, 8, 16, 32, 64), 1.0)
STEEP = {size: 1.0 + 0.25 * (size - 1) for size in FLAT}


def test_costs_are_a_line_through_the_measurements():
    experience = make_experience(STEEP)
    for _ in range(20):
        for size, seconds in STEEP.items():
            experience.add_verification(size, seconds)
    for size in (1, 2, 5, 8, 12, 40, 64):
        assert experience.seconds_up_to(size)[-1] == pytest.approx(1.0 + 0.25 * (size - 1), abs=0.03)
    experience.enter_context(4000)  # another range of context lengths has its own statistics
    assert {experience.next_to_explore() for _ in range(40)} == {None, 1, 4, 8, 16, 32, 64}


def test_costs_follow_a_machine_that_becomes_slower():
    """Sizes that were not measured since must follow too; otherwise trees of such a size would seem cheap."""
    experience = make_experience(STEEP)
    for _ in range(60):
        for size in (12, 20, 32):
            experience.add_verification(size, 3 * (1.0 + 0.25 * (size - 1)))
    costs = experience.seconds_up_to(64)
    assert costs[31] == pytest.approx(3 * 8.75, rel=0.05) and costs[63] == pytest.approx(3 * 16.75, rel=0.05)


def test_a_single_slow_round_changes_little():
    experience = make_experience(STEEP)
    before = experience.seconds_up_to(64)
    experience.add_verification(4, 1000.0)
    for old, new in zip(before[1:], experience.seconds_up_to(64)[1:], strict=True):
        assert new == pytest.approx(old, rel=0.3)


def test_costs_of_warming_up_are_forgotten():
    experience = Experience(64)
    experience.enter_context(100)
    for size, seconds in ((16, 100.0), (64, 2.0), (16, 1.0), (32, 1.3), (8, 0.9)):
        experience.add_verification(size, seconds)
    assert experience.seconds_up_to(16)[-1] < 1.2 < experience.seconds_up_to(64)[-1] < 3.0


def test_large_trees_are_not_tried_before_draft_tokens_are_accepted():
    experience = Experience(64)
    experience.enter_context(100)
    experience.add_round(True, 1.0, 1.0)
    assert {experience.next_to_explore() for _ in range(60)} == {None, 1, 4, 8, 16}
    experience.add_round(True, 1.5, 1.0)
    assert {experience.next_to_explore() for _ in range(60)} == {None, 32, 64}


def test_costs_are_those_of_the_rows_that_still_run():
    """When most rows of a batch have ended, a round costs less, and larger trees pay for the others."""
    experience = Experience(64)
    policy = AdaptiveTreePolicy(TreeSettings(64, 15, 4, is_auto=True), experience.for_rows(32))
    for num_rows, seconds in ((32, 9.0), (1, 2.0)):
        policy.begin_round(None, 100, num_rows)
        policy.experience.add_verification(1, seconds)
        policy.experience.acceptance.add_step(0.5)
    assert [experience.for_rows(rows).seconds_up_to(1)[0] for rows in (32, 20, 1)] == [9.0, 9.0, 2.0]
    assert experience.acceptance.steps.weight > 1.9  # acceptance is that of the draft, whatever the rows


def test_a_batch_measures_small_trees_first():
    """A useless draft must not cost a forward of hundreds of nodes before that is known."""
    for num_rows, sizes in ((1, {1, 4, 8, 16}), (4, {1, 4}), (32, {1, 2})):
        experience = Experience(64).for_rows(num_rows)
        experience.enter_context(100)
        experience.add_round(True, 1.0, 1.0)
        assert {experience.next_to_explore() for _ in range(60)} == {None, *sizes}
        experience.add_round(True, 3.0, 1.0)
        larger = {experience.next_to_explore() for _ in range(60)} - {None}
        assert larger and max(larger) * num_rows <= 256


def test_levels_become_as_wide_as_pays():
    """If two candidates are likely, both are expanded unless that costs much more than expanding one."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    widths = []
    for cost_of_wider_level in (1.1, 3.0):
        experience = make_experience(FLAT, level=0.2)
        for _ in range(20):
            experience.add_level(1, 0.2)
            for width in (2, 4):
                experience.add_level(width, 0.2 * cost_of_wider_level * width / 2)
        policy = AdaptiveTreePolicy(settings, experience)
        growth = grow_one_level(policy, [0.5, 0.45, 0.04, 0.01])
        widths.append(policy.width(growth))
    assert widths == [2, 1]


def test_a_draft_that_overflows_still_gives_a_tree():
    settings = TreeSettings(16, 15, 4, is_auto=True)
    policy = AdaptiveTreePolicy(settings, make_experience(FLAT))
    growth = TreeGrowth(torch.zeros(1, dtype=torch.long), policy.begin_round(None, 100))
    growth.expand(torch.tensor([[[0.0, -1.0, -torch.inf, -torch.inf]]]), torch.arange(4).view(1, 1, 4))
    growth.narrow(2)
    growth.expand(torch.full((1, 2, 4), torch.nan), torch.arange(4).expand(1, 2, 4))
    assert policy.width(growth) == 0
    tree = growth.finish(policy.num_nodes(growth))
    assert all(parent < node for node, parent in enumerate(tree.parents[0].tolist()) if node)
    assert tree.tokens[0].tolist()[:3] == [0, 0, 1] and not tree.scores.isnan().any()


def test_a_tree_may_continue_after_an_unsure_token():
    """One unsure level says little about the next one: a draft that is usually sure will be sure again."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    experience = make_experience(FLAT, level=0.1)
    for _ in range(50):
        experience.acceptance.add_step(0.95)
    policy = AdaptiveTreePolicy(settings, experience)
    growth = TreeGrowth(torch.zeros(1, dtype=torch.long), policy.begin_round(None, 100))
    for level, probability in enumerate([0.99, 0.4]):
        if level:
            assert policy.width(growth) > 0
            growth.narrow(1)
        # The rest of the probability lies on tokens that are not candidates.
        growth.expand(torch.tensor([[[probability, 1e-3, 1e-3, 1e-3]]]).log(), torch.arange(4).view(1, 1, 4))
    assert policy.width(growth) > 0


def chance_of(experience, log_prob, is_best):
    (chance,) = experience.acceptance.chances([log_prob], {log_prob} if is_best else set())
    return chance


def test_acceptance_is_the_drafts_own_probability_until_it_is_measured():
    experience = Experience(64)
    assert chance_of(experience, math.log(0.4), is_best=False) == pytest.approx(0.4)
    for number in range(400):
        experience.acceptance.add_node(math.log(0.4), is_best=False, is_accepted=number % 10 == 0)
    assert chance_of(experience, math.log(0.4), is_best=False) == pytest.approx(0.12, abs=0.05)
    assert chance_of(experience, math.log(0.9), is_best=False) == pytest.approx(0.9)
    assert chance_of(experience, math.log(0.4), is_best=True) == pytest.approx(0.4)


def test_acceptance_of_best_nodes_is_learnt_separately():
    """A draft's first choice may be reliable while its other choices are not."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    experience = make_experience(FLAT)
    for _ in range(200):
        policy = AdaptiveTreePolicy(settings, experience)
        growth = grow_one_level(policy, [0.4, 0.35, 0.2, 0.05])
        policy.width(growth)
        tree = growth.finish(policy.num_nodes(growth))
        policy.begin_verification()
        policy.end_round(tree, [[0, 1]])  # only the best node is ever accepted
    assert chance_of(experience, math.log(0.4), is_best=True) > 0.9
    assert chance_of(experience, math.log(0.35), is_best=False) < 0.15


def grow(probabilities: list[float], policy: AdaptiveTreePolicy) -> tuple[int, int]:
    """Grows a tree whose best candidates have the given probability at each level; returns its levels and nodes."""
    settings = policy.begin_round(None, 100)
    growth = TreeGrowth(torch.zeros(1, dtype=torch.long), settings)
    width, num_levels = 1, 0
    for level, probability in enumerate(probabilities):
        if level:
            width = policy.width(growth)
            if width == 0:
                break
            growth.narrow(width)
        rest = (1 - probability) / 3
        log_probs = torch.tensor([probability, rest, rest, rest]).log().expand(1, width, 4)
        growth.expand(log_probs, torch.arange(4).expand(1, width, 4))
        num_levels += 1
    return num_levels, policy.num_nodes(growth)


def test_sure_drafts_get_deep_trees_and_unsure_ones_shallow_ones():
    settings = TreeSettings(64, 15, 4, is_auto=True)
    sure, _ = grow([0.99] * 10, AdaptiveTreePolicy(settings, make_experience(FLAT)))
    unsure, _ = grow([0.3] * 10, AdaptiveTreePolicy(settings, make_experience(FLAT, level=0.3)))
    assert sure == 10 and unsure <= 3


def test_nothing_is_drafted_after_the_end_of_an_answer():
    """A draft that expects the answer to end must stop there, however sure it is of the tokens after the end."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    for eos_token_ids, expected in (((), 10), ((7, 0), 1), ((7,), 10)):  # the best candidate is token 0
        policy = AdaptiveTreePolicy(settings, make_experience(FLAT), eos_token_ids=eos_token_ids)
        assert grow([0.999] * 10, policy)[0] == expected


def test_other_branches_continue_where_one_ends():
    settings = TreeSettings(64, 15, 4, is_auto=True)
    policy = AdaptiveTreePolicy(settings, make_experience(FLAT), eos_token_ids=(0,))
    growth = grow_one_level(policy, [0.5, 0.45, 0.04, 0.01])
    assert policy.width(growth) >= 2


def test_a_level_costs_no_more_than_a_wider_one():
    """A width's first measurement may be slow because nothing is warm; the cost of a wider level bounds it."""
    experience = Experience(64)
    experience.add_level(1, 0.2)
    experience.add_level(2, 5.0)
    for _ in range(20):
        experience.add_level(4, 0.3)
    costs = experience.seconds_of_levels([1, 2, 4])
    assert costs[1] == costs[2] > costs[0]


def test_the_cost_of_a_level_includes_verifying_its_nodes():
    prices = [make_experience(costs, level=0.2).seconds_of_levels((1, 4)) for costs in (FLAT, STEEP)]
    assert prices[0][1] == pytest.approx(prices[0][0], rel=0.05)
    assert prices[1][1] > 2 * prices[1][0]


def test_nodes_are_weighed_by_the_mean_rate_of_rounds():
    """The mean rate of all rounds decides whether a node pays: good and bad rounds keep equally many extra nodes."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    kept = []
    for probabilities in ([0.99] * 6 + [0.5], [0.5]):
        experience = make_experience({size: 1.0 + 0.1 * (size - 1) for size in FLAT})
        for _ in range(200):
            experience.add_round(True, 3.0, 1.0)  # at 3 tokens a second a node of 0.1 s is worth 0.3 tokens
        growth = TreeGrowth(torch.zeros(1, dtype=torch.long), settings)
        policy = AdaptiveTreePolicy(settings, experience)
        policy.begin_round(None, 100)
        for level, probability in enumerate(probabilities):
            if level:
                growth.narrow(1)
            log_probs = torch.tensor([probability, 0.35 if probability < 0.9 else 1e-4, 1e-4, 1e-4]).log()
            growth.expand(log_probs.view(1, 1, 4), torch.arange(4).view(1, 1, 4))
        kept.append(policy.num_nodes(growth) - len(probabilities))
    assert kept == [2, 2]


def test_time_is_valued_by_the_rate_of_the_call():
    """In a call that emits few tokens a second, time is worth less, so a level pays that would not pay otherwise."""
    settings = TreeSettings(64, 15, 4, is_auto=True)
    widths = []
    for tokens in (1.0, 400.0):
        policy = AdaptiveTreePolicy(settings, make_experience(FLAT, level=0.2))
        policy.add_to_call(tokens, 100.0)
        growth = grow_one_level(policy, [0.3, 0.01, 0.01, 0.01])
        widths.append(policy.width(growth))
    assert widths[0] > 0 and widths[1] == 0


def test_nodes_are_kept_where_they_cost_little():
    settings = TreeSettings(64, 15, 4, is_auto=True)
    cheap = grow([0.6] * 4, AdaptiveTreePolicy(settings, make_experience(FLAT)))[1]
    expensive = grow([0.6] * 4, AdaptiveTreePolicy(settings, make_experience(STEEP, tokens_a_round=6.0)))[1]
    assert 1 < expensive < 8 < 30 < cheap


def play(experience: Experience, num_rounds: int, tokens: float) -> list[bool]:
    """Which of the rounds drafted. A round that drafts emits `tokens` in 1.3 seconds, any other one token in 1."""
    drafted = []
    for _ in range(num_rounds):
        drafts = experience.drafting_pays()
        drafted.append(drafts)
        experience.add_round(drafts, tokens if drafts else 1.0, 1.3 if drafts else 1.0)
    return drafted


def test_drafting_pauses_where_it_does_not_pay_and_is_tried_again():
    """A trial of two rounds follows each pause. Pauses grow up to a bound, so that a text that changes is noticed."""
    drafted = play(make_experience(FLAT, tokens_a_round=1.05), 4000, tokens=1.05)
    runs = [(drafts, len(list(run))) for drafts, run in groupby(drafted)][:-1]
    assert [length for drafts, length in runs if drafts] == [2] * (len(runs) // 2)
    # The round in which drafting is found not to pay comes before its pause.
    assert [length - 1 for drafts, length in runs if not drafts] == [16, 32, 64, 128, 256, *[512] * 6]
    experience = make_experience(FLAT, tokens_a_round=3.0)
    assert all(experience.drafting_pays() for _ in range(50))


def test_drafting_comes_back_when_it_pays_again():
    """Drafting stays on from the first trial that pays."""
    experience = make_experience(FLAT, tokens_a_round=1.0)
    assert sum(play(experience, 100, tokens=1.0)) < 12
    drafted = play(experience, 400, tokens=4.0)
    assert drafted.index(True) <= 256 and all(drafted[drafted.index(True) :])


def test_a_draft_of_which_nothing_is_accepted_is_tried_in_single_rounds_after_longer_pauses():
    """Nothing more is measured then, because no size would pay."""
    experience = make_experience(FLAT, tokens_a_round=1.0)
    drafted = play(experience, 2000, tokens=1.0)
    runs = [(drafts, len(list(run))) for drafts, run in groupby(drafted)][:-1]
    assert [length for drafts, length in runs if drafts] == [1] * (len(runs) // 2)
    assert [length - 1 for drafts, length in runs if not drafts] == [16, 64, 256, *[512] * 3]
    assert {experience.next_to_explore() for _ in range(10)} == {None}


def test_a_trial_after_a_pause_is_judged_by_itself():
    """If the rounds before the pause counted too, they would outweigh two rounds that pay."""
    experience = make_experience(FLAT, tokens_a_round=1.0)
    while any(play(experience, 5, tokens=1.0)):
        pass  # until five rounds in a row lie in a pause
    drafted = play(experience, 200, tokens=1.6)
    assert True in drafted[:64] and all(drafted[drafted.index(True) :])


def test_after_drafting_has_paid_the_next_pause_is_a_short_one():
    experience = make_experience(FLAT, tokens_a_round=1.0)
    play(experience, 300, tokens=1.0)
    play(experience, 600, tokens=4.0)
    drafted = play(experience, 200, tokens=0.5)
    runs = [(drafts, len(list(run))) for drafts, run in groupby(drafted)]
    assert runs[1] == (False, 17)


def test_what_is_learnt_is_kept_apart_by_batch_size():
    """A verification of a larger batch costs more."""
    pair = tiny.pair(1)
    draft = with_auto_tree(pair.draft)
    seen = []
    for batch_size in (1, 2, 4, 1, 2, 4):
        inputs = tiny.left_padded([tiny.make_prompt(seed, 5) for seed in range(batch_size)])
        pair.target.generate(**inputs, max_new_tokens=4, assistant_model=draft)
        (experience,) = state_of(pair.target, draft).experiences.values()
        seen.append(sorted(experience._by_rows))
    assert seen[0] == [0] and {0, 1} <= set(seen[1]) and seen[-1] == [0, 1, 2]


def test_a_useless_draft_is_hardly_run():
    """A draft with random weights never pays: after the first calls nearly every round is plain decoding."""
    pair = tiny.pair(8)  # its draft was not fitted
    draft = with_auto_tree(pair.draft)
    calls = []
    draft.fc.register_forward_hook(lambda *_: calls.append(1))
    inputs = tiny.make_prompt(1, 6)
    counts = []
    for _ in range(4):
        calls.clear()
        output = pair.target.generate(**inputs, max_new_tokens=200, assistant_model=draft)
        counts.append(len(calls))
    assert torch.equal(output, pair.target.generate(**inputs, max_new_tokens=200))
    assert counts[-1] < 60 < 200
