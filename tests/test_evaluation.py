"""Figures of merit, compared with values computed by hand."""

import math

import pytest

from msd_hf.evaluation import Comparison, TimedRun, mean_acceptance_length
from msd_hf.evaluation.differences import first_difference
from msd_hf.evaluation.metrics import acceptance_by_depth, acceptance_histogram, spread
from msd_hf.evaluation.round_timing import RoundTiming


def runs(*seconds, tokens=(5,) * 10, prefill=0.0):
    return [TimedRun(list(tokens), s, prefill, [4, 6]) for s in seconds]


def test_tau_is_the_mean_over_verifications_not_over_sequences():
    assert mean_acceptance_length([[4, 2], [1, 1, 1, 3]]) == pytest.approx(2.0)
    assert math.isnan(mean_acceptance_length([[]]))


def test_histogram_has_no_holes():
    assert acceptance_histogram([[1, 4], [1]]) == {1: 2, 2: 0, 3: 0, 4: 1}
    assert acceptance_histogram([[]]) == {}


def test_acceptance_by_depth_leaves_the_last_verification_of_an_answer_out():
    # Draft tokens accepted in rounds after which the answer continued: 2, 0, 2, 1.
    rows = acceptance_by_depth([[3, 1, 9], [3, 2, 1], [7]])
    assert [(row.depth, row.share) for row in rows] == [(1, 0.75), (2, 0.5)]
    assert [row.given_parent for row in rows] == [0.75, pytest.approx(2 / 3)]
    assert [row.share for row in acceptance_by_depth([[1, 1, 1]])] == [0.0]
    assert acceptance_by_depth([[5]]) == []


def test_spread_ignores_nan():
    result = spread([1.0, 2.0, 3.0, 4.0, 5.0, float("nan")])
    assert (result.lower_quartile, result.median, result.upper_quartile) == (2.0, 3.0, 4.0)
    assert spread([7.0]).upper_quartile == 7.0
    assert math.isnan(spread([]).median)


def test_speedup_is_the_median_ratio_of_pairs():
    comparison = Comparison({"vanilla": runs(6.0, 2.0, 8.0), "tree": runs(2.0, 2.0, 4.0)})
    assert comparison.speedup() == pytest.approx(2.0)
    other = Comparison({"vanilla": runs(9.0, 1.0, 4.0), "tree": runs(1.0, 1.0, 4.0)})
    assert other.speedup() == pytest.approx(1.0)


def test_decode_speedup_is_without_prefill_and_first_token():
    comparison = Comparison({"vanilla": runs(10.0, prefill=1.0), "tree": runs(4.0, prefill=1.0)})
    assert comparison.speedup() == pytest.approx(2.5)
    assert comparison.decode_speedup() == pytest.approx(3.0)
    assert comparison.runs["tree"][0].decode_tokens_per_second == pytest.approx(3.0)
    one_token = Comparison({"vanilla": runs(1.0, tokens=[1]), "tree": runs(1.0, tokens=[1])})
    assert math.isnan(one_token.decode_speedup())


def test_one_different_run_is_not_identical():
    same, other = runs(1.0, tokens=[1, 2]), runs(1.0, tokens=[1, 3])
    comparison = Comparison({"vanilla": same + same, "tree": same + other, "chain": same + same})
    assert not comparison.identical()
    assert comparison.identical("chain")


def test_the_first_difference_may_be_an_end():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_round_efficiency_is_the_share_of_time_in_the_two_models():
    phases = {"target forward": 6.0, "draft forward": 2.0, "draft head": 1.0, "tree": 0.5, "decode": 0.5}
    timing = RoundTiming.from_phases(phases, num_rounds=5)
    assert timing.efficiency == pytest.approx(0.9)
    assert timing.milliseconds_per_round["target forward"] == pytest.approx(1200)
    assert sum(timing.milliseconds_per_round.values()) == pytest.approx(2000)
    both = RoundTiming.total([timing, RoundTiming.from_phases({"cache": 10.0}, num_rounds=5)])
    assert both.num_rounds == 10 and both.efficiency == pytest.approx(0.45)
    assert math.isnan(RoundTiming.total([]).efficiency)
