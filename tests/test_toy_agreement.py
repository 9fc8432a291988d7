"""`python -m msd_hf.toy.agreement` on a few prompts, and its report of a difference."""

from __future__ import annotations

import pytest
import typer

from msd_hf.evaluation import Disagreement
from msd_hf.toy import agreement


def test_generations_in_bfloat16_are_identical(capsys):
    """These two generations come nowhere near a tie, so rounding changes no token."""
    agreement.measure_agreement(agreement.Precision.bfloat16, generations=2, max_new_tokens=20)
    assert capsys.readouterr().out == "bfloat16: 2 of 2 generations are identical\n"


@pytest.mark.parametrize("gap, fails", [(0.39, False), (0.41, True)])
def test_differences_are_explained_or_fail(monkeypatch, capsys, gap, fails):
    found = iter([None, Disagreement(position=7, gap=gap, rounding=0.2)])
    monkeypatch.setattr(agreement, "find_disagreement", lambda *args, **kwargs: next(found))
    code = 0
    try:
        agreement.measure_agreement(generations=2)
    except typer.Exit as stopped:
        code = stopped.exit_code
    printed = capsys.readouterr().out
    assert code == int(fails) and ("1 of them differ by more" in printed) == fails
    assert "bfloat16: 1 of 2" in printed and str(gap) in printed and ("NO" in printed) == fails
