"""What the default run leaves out of a product is covered by what it keeps."""

from itertools import combinations, product

import pytest
from thinning import covering


CASES = [case for case in product("abcdef", (0, 1, 2), (False, True), "xy") if case[:2] != ("a", 2)]


@pytest.mark.parametrize("strength, most", [(1, 6), (2, 20)])
def test_each_combination_is_kept(strength, most):
    def parts(cases):
        return {part for case in cases for part in combinations(enumerate(case), strength)}

    kept = covering(CASES, strength)
    assert parts(kept) == parts(CASES) and kept <= set(CASES) and len(kept) <= most
    assert kept == covering(CASES, strength)  # each process of a run keeps the same


def test_values_are_used_equally_often():
    kept = covering([*product(range(10), "ab", "xy")], strength=1)
    assert [sum(case[place] == value for case in kept) for place, value in ((1, "a"), (2, "x"))] == [5, 5]
