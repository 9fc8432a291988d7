"""Seeded random calls against the target alone: the short form of `examples/studies/random_cases.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


STUDIES = Path(__file__).parents[1] / "examples" / "studies"
NUM_CASES, NUM_PARTS = 240, 8


@pytest.fixture(scope="module")
def run_case():
    sys.path.insert(0, str(STUDIES))
    try:
        from random_cases import COMPILED_EVERY, run_case

        yield lambda number: run_case(number) if number % COMPILED_EVERY else None  # tracing takes long
    finally:
        sys.path.remove(str(STUDIES))


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow if part % 2 else ()) for part in range(NUM_PARTS)]
)
def test_random_calls_are_those_of_the_target_alone(run_case, part):
    results = [result for number in range(part, NUM_CASES, NUM_PARTS) if (result := run_case(number))]
    assert [result for result in results if result["differences"]] == []
    assert sum(result["compared"] for result in results) > len(results)  # chats are compared at each turn
    assert sum(result["emitted"] for result in results) > 1.3 * sum(result["rounds"] for result in results)
