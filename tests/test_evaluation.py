import math

import pytest

from msd_hf.evaluation import Comparison, TimedRun, mean_acceptance_length, median_speedup


def test_tau_is_the_mean_over_verifications_not_over_sequences():
    assert mean_acceptance_length([[4, 2], [1, 1, 1, 3]]) == pytest.approx(2.0)
    assert math.isnan(mean_acceptance_length([[]]))


def test_speedup_is_the_median_ratio_of_pairs():
    def runs(*seconds):
        return [TimedRun([5] * 10, s, [4, 6]) for s in seconds]

    comparison = Comparison(plain=runs(2.0, 4.0, 6.0), drafted=runs(1.0, 4.0, 2.0))  # ratios 2, 1, 3
    assert comparison.speedup == pytest.approx(2.0)
    assert comparison.tau == pytest.approx(5.0)
    faster = Comparison(plain=runs(9.0), drafted=runs(1.0))
    assert median_speedup([comparison, faster, faster]) == pytest.approx(9.0)


def test_one_different_run_is_not_identical():
    same, other = TimedRun([1, 2], 1.0, []), TimedRun([1, 3], 1.0, [2])
    assert Comparison([same], [same]).identical
    assert not Comparison([same, same], [same, other]).identical
