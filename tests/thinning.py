"""Parametrised tests of which the default run takes a part, such as each pair of values; `-m slow` runs the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import combinations
from typing import Any

import pytest


Case = tuple[Hashable, ...]


def thinned(names: str, cases: Iterable[Case], strength: int = 2) -> pytest.MarkDecorator:
    """
    `pytest.mark.parametrize` with a part of the cases marked `slow`.

    Args:
        names: names of the parameters, with commas between them.
        cases: values of the parameters.
        strength: the default run keeps each combination of so many values: 1 is each value, 2 is each pair.
    """
    cases = list(dict.fromkeys(cases))
    kept = covering(cases, strength)
    marked: list[Any] = [case if case in kept else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(names, marked)


def covering(cases: list[Case], strength: int) -> set[Case]:
    """A small set of cases with each combination of `strength` values that stand together in a case. Values are used
    about equally often, so that no two always meet the same third."""
    parts = {case: set(combinations(enumerate(case), strength)) for case in cases}
    missing = set().union(*parts.values())
    uses: Counter[Any] = Counter()
    kept: set[Case] = set()
    while missing:
        # The first of those with the most new combinations, and of these, with the least used ones.
        best = max(cases, key=lambda case: (len(missing & parts[case]), -sum(uses[part] for part in parts[case])))
        kept.add(best)
        uses.update(parts[best])
        missing -= parts[best]
    return kept
