"""Published shapes with random weights, and rounds whose acceptance is assumed."""

import pytest
import torch
from tiny import make_prompt, pair

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError
from msd_hf.evaluation import simulation, verification_cost
from msd_hf.evaluation.shape_bench import bench_shape, bytes_read_per_step
from msd_hf.evaluation.shapes import SHAPES, build_pair, random_prompt, shape_config
from msd_hf.evaluation.simulation import check_assumed_length, lengths_of_mean, simulated_rounds
from msd_hf.evaluation.verification_cost import verification_seconds
from msd_hf.tree import TreeSettings


@pytest.mark.parametrize("mean", [1.0, 2.5, 3.8, 6.0])
def test_lengths_have_the_mean_and_are_next_to_it(mean):
    lengths = lengths_of_mean(mean, 20)
    assert sum(lengths) == pytest.approx(20 * mean)
    assert set(lengths) <= {int(mean), int(mean) + 1}


def test_an_acceptance_beyond_the_tree_is_refused():
    settings = TreeSettings(num_nodes=59, depth=5, top_k=10)
    check_assumed_length(7, settings)
    for mean in (0.5, 7.1):
        with pytest.raises(MSDError, match="between 1 and 7"):
            check_assumed_length(mean, settings)
    with pytest.raises(MSDError, match="between 1 and 3"):
        check_assumed_length(4, TreeSettings(num_nodes=3, depth=5, top_k=10))


@pytest.mark.parametrize("images_at", [(), (2,)])
def test_simulated_rounds_do_the_work_of_real_ones(images_at, monkeypatch):
    """One verification a round over the whole tree, and caches that hold what was taken for accepted."""
    target, draft = pair(0).target, pair(0).with_tree(10, 3, 3)
    inputs = make_prompt(1, images_at=images_at)
    length = inputs["input_ids"].shape[1]
    kept, generators, widths = [], [], []
    keep_slots, generator_class = simulation.keep_slots, simulation.MSDCandidateGenerator

    def look(cache, start, path):
        keep_slots(cache, start, path)
        kept.append((start, path.tolist()[0], cache.get_seq_length()))

    class Generator(generator_class):
        def __init__(self, *args):
            super().__init__(*args)
            generators.append(self)

    handle = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(simulation, "keep_slots", look)
    monkeypatch.setattr(simulation, "MSDCandidateGenerator", Generator)
    lengths = [3, 1, 5, 2]
    seconds = simulated_rounds(target, draft, inputs, lengths)
    handle.remove()
    assert seconds > 0
    assert widths == [length, 10, 10, 10, 10]
    assert [start for start, _, _ in kept] == [length, length + 3, length + 4, length + 9]
    assert kept[-1][2] == length + sum(lengths)
    for (_, path, _), expected in zip(kept, lengths, strict=True):
        assert len(path) == expected and path[0] == 0 and path == sorted(set(path))
    assert generators[0].cache.get_seq_length() == length + sum(lengths)


def test_verifications_start_from_the_same_context(monkeypatch):
    target = pair(0).target
    inputs = make_prompt(1)
    seen = []
    verify = verification_cost.TargetAdapter.verify

    def look(self, tree, cache, *args):
        seen.append((tree.tokens.shape[1], int(tree.depths.max()), cache.get_seq_length()))
        return verify(self, tree, cache, *args)

    monkeypatch.setattr(verification_cost.TargetAdapter, "verify", look)
    seconds = verification_seconds(target, inputs, [1, 8, 64], repeats=2)
    assert {number: len(times) for number, times in seconds.items()} == {1: 2, 8: 2, 64: 2}
    length = inputs["input_ids"].shape[1]
    assert seen == [(1, 0, length), (8, 3, length), (64, 6, length)] * 3


def test_published_shapes_have_the_published_sizes():
    expected = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9, "qwen2-vl-7b": 8.29e9}
    for name, size in expected.items():
        target, draft = build_pair(shape_config(name), torch.bfloat16, torch.device("meta"))
        assert sum(weight.numel() for weight in target.parameters()) == pytest.approx(size, rel=2e-3), name
        assert {weight.dtype for weight in (*target.parameters(), *draft.parameters())} == {torch.bfloat16}
        assert draft.config.hidden_size == target.config.get_text_config().hidden_size
    with pytest.raises(MSDError, match=f"Unknown shape 'gpt': choose from {', '.join(SHAPES)}"):
        shape_config("gpt")


@pytest.mark.parametrize("name", ["small", "qwen2-vl-7b"])
def test_a_shape_is_measured(name):
    """The kind of model is the shape's; it is made small, since this is about what is done with it."""
    config = shape_config(name)
    small = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    for field, value in small.items():
        setattr(config.text_config, field, value)
    if name == "qwen2-vl-7b":
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
        config.image_token_id, config.video_token_id, config.vision_start_token_id = 490, 491, 492
    else:
        vision = {}
        config.image_token_id = 490
    for field, value in vision.items():
        setattr(config.vision_config, field, value)
    target, draft = build_pair(config, torch.float32, torch.device("cpu"))
    assert isinstance(draft, MSDDraftModel) and target.dtype == draft.dtype == torch.float32
    inputs = random_prompt(target, context=30)
    assert inputs["input_ids"].shape == (1, 30) and inputs["input_ids"].max() < 490
    figures = bench_shape(target, draft, inputs, assumed_tau=2.5, nodes=[1, 8], num_rounds=4, repeats=2)
    assert figures["simulated_tau"] == 2.5
    round_seconds = figures["simulated_round_milliseconds"]["median"] / 1e3
    assert figures["simulated_tokens_per_second"] == pytest.approx(2.5 / round_seconds, rel=1e-6)
    assert figures["cost_of_a_round_in_steps"]["median"] > 1
    assert figures["round"]["num_rounds"] == 4 and 0 < figures["round"]["round_efficiency"] < 1
    assert [row["nodes"] for row in figures["verification"]] == [1, 8]


def test_bytes_of_a_step_are_weights_and_keys_and_values():
    target = pair(0).target  # float64, 2 layers, hidden 32, 4 heads of 8, vocabulary 60
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert bytes_read_per_step(target, context=10) == 8 * (layers + 60 * 32 + 2 * 2 * 32 * 10)
