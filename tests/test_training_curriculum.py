"""The schedule equals the original's, and a draw depends only on seed and number."""

from collections import Counter

import golden_sets
import pytest

from msd_hf.errors import MSDError
from msd_hf.training.curriculum import Curriculum, CurriculumSampler


@pytest.mark.parametrize("num_epochs", [1, 2, 3, 5, 7, 10, 20, 40])
def test_shares_are_those_of_the_original(num_epochs):
    values, _ = golden_sets.load("schedule")
    curriculum = Curriculum(num_stages=num_epochs)
    shares = [curriculum.share(stage) for stage in range(num_epochs)]
    assert shares == pytest.approx(values[f"ratio_epochs_{num_epochs}"].tolist(), abs=1e-12)


def make_sampler(num_samples=4000, curriculum=None, seed=0, **sizes):
    sizes = {"num_text": 70, "num_visual": 50, **sizes}
    return CurriculumSampler(
        **sizes, curriculum=curriculum or Curriculum(), epoch_length=50, num_samples=num_samples, seed=seed
    )


def run(sampler, epochs):
    draws = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        draws += list(sampler)
    return draws


def test_drawn_shares_follow_the_schedule():
    draws = run(make_sampler(), range(80))
    assert [draw.number for draw in draws] == list(range(4000))
    halves = [Counter(draw.kind for draw in draws[start : start + 1000]) for start in range(0, 4000, 1000)]
    assert halves[0]["visual"] == halves[1]["visual"] == 0
    assert halves[2]["visual"] == pytest.approx(275, abs=50)  # mean share of stages 20-29
    assert halves[3]["visual"] == pytest.approx(775, abs=50)
    assert all(draw.kind == "visual" for draw in draws[3900:])  # the last stage


def test_a_draw_depends_on_seed_and_number_alone():
    whole = run(make_sampler(), range(80))
    assert run(make_sampler(), [63]) == whole[63 * 50 : 64 * 50]  # a resumed run
    assert [make_sampler().draw(number) for number in (3999, 17)] == [whole[3999], whole[17]]
    other = run(make_sampler(seed=1), range(80))
    assert [draw.kind for draw in other] != [draw.kind for draw in whole]
    for kind in ("text", "visual"):  # of a kind alone: the other one has other places
        places = [{draw.number: draw.place for draw in draws if draw.kind == kind} for draws in (whole, other)]
        common = places[0].keys() & places[1].keys()
        assert len(common) > 500
        assert sum(places[0][number] == places[1][number] for number in common) < 0.1 * len(common)


def test_every_sample_is_seen_equally_often_and_in_changing_order():
    draws = run(make_sampler(curriculum=Curriculum("text")), range(7))  # 350 = 5 times 70
    counts = Counter(draw.place for draw in draws)
    assert counts == dict.fromkeys(range(70), 5)
    assert [draw.place for draw in draws[:70]] != [draw.place for draw in draws[70:140]]


def test_other_curricula():
    mixed = run(make_sampler(curriculum=Curriculum("mixed", mixed_share=0.3)), range(80))
    assert sum(draw.kind == "visual" for draw in mixed[:2000]) == pytest.approx(600, abs=70)
    kinds = [draw.kind for draw in mixed]
    assert all(kinds[:100] != kinds[start : start + 100] for start in range(100, 4000, 100))
    assert {draw.kind for draw in run(make_sampler(curriculum=Curriculum("visual"), num_text=0), [0])} == {"visual"}
    halfway = Curriculum(text_fraction=0.25, final_share=0.6)
    assert halfway.share(9) == 0 and halfway.share(10) > 0 and halfway.share(39) == 0.6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "three-stage"}, "Unknown curriculum 'three-stage'"),
        ({"num_stages": 0}, "at least one stage"),
        ({"text_fraction": 1.5}, "`text_fraction` must lie between 0 and 1"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(MSDError, match=message):
        Curriculum(**arguments)


def test_a_kind_without_samples_is_refused():
    with pytest.raises(MSDError, match=r"needs visual samples and there are none.*choose the curriculum 'text'"):
        make_sampler(num_visual=0)
