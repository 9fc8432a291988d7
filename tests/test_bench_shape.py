"""Published shapes with random weights, and rounds whose acceptance is assumed."""

import copy
import json

import pytest
import torch
from tiny import make_prompt, pair

from msd_hf import MSDDraftModel
from msd_hf.compiled import compile as compiled
from msd_hf.decoding.batch_selection import BatchSelector
from msd_hf.drafting.head import DraftHead
from msd_hf.errors import MSDError
from msd_hf.evaluation import simulation
from msd_hf.evaluation.intercepted_loop import run_intercepted
from msd_hf.evaluation.shape_bench import bench_shape, bytes_read_per_step
from msd_hf.evaluation.shapes import SHAPES, build_pair, random_prompt, shape_config
from msd_hf.evaluation.simulation import FIRST_ROUNDS, check_assumed_length, lengths_of_mean, simulated_rounds, steer
from msd_hf.evaluation.verification_cost import verification_seconds
from msd_hf.target.adapter import TargetAdapter
from msd_hf.tree.candidate import CandidateTree
from msd_hf.tree.settings import TreeSettings


@pytest.mark.parametrize("mean", [1.0, 2.5, 3.8, 6.0])
def test_lengths_have_the_mean_and_lie_next_to_it(mean):
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


def walk(logits, tree):
    """The tokens that greedy verification emits, found by walking from node to node."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    node, emitted = 0, []
    while node is not None:
        emitted.append(int(logits[0, node].argmax()))
        node = children.get((node, emitted[-1]))
    return emitted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_steered_along_a_path_of_the_wanted_length(dtype):
    parents = torch.tensor([[0, 0, 0, 1, 2, 2, 5]])
    tree = CandidateTree.from_parents(torch.tensor([[9, 1, 2, 3, 4, 5, 6]]), parents, max_depth=3)
    generator = torch.Generator().manual_seed(0)
    for length, path in ((1, []), (2, [1]), (3, [1, 3]), (4, [2, 5, 6]), (7, [2, 5, 6])):
        # Without steering, every path would continue as long as the tree has children.
        logits = torch.randn(1, 7, 10, generator=generator).to(dtype) - 20
        logits[0, :, 1:7] += 5
        steer(logits, tree, length)
        emitted = walk(logits, tree)
        assert emitted[:-1] == path and len(emitted) == min(length, 4)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("images_at", [(), (2,)])
def test_simulated_rounds_are_those_of_the_loop(images_at, is_compiled, monkeypatch):
    """Each round verifies the whole tree once and emits as many tokens as the simulation assumes."""
    target, draft = copy.deepcopy((pair(0).target, pair(0).with_tree(10, 3, 3)))
    inputs = make_prompt(1, images_at=images_at)
    length = inputs["input_ids"].shape[1]
    widths, possible, started, emitted = [], [], [], []

    def record_call(logits, tree, wanted):
        possible.append(min(wanted, int(tree.depths.max()) + 1))
        return steer(logits, tree, wanted)

    def count(self, counts, num_draft_tokens):
        emitted.extend(counts)
        return end_round(self, counts, num_draft_tokens)

    end_round = BatchSelector.end_round
    monkeypatch.setattr(BatchSelector, "end_round", count)
    draft.generation_config.compile = is_compiled
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)

    handle = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(simulation, "steer", record_call)
    rounds = simulated_rounds(target, draft, inputs, [3, 1, 4, 2, 1, 3], lambda: started.append(len(widths)))
    handle.remove()
    assert rounds.lengths == possible[FIRST_ROUNDS:] == emitted[FIRST_ROUNDS:] and max(possible) > 2
    assert rounds.tau == pytest.approx(sum(rounds.lengths) / 6) and rounds.seconds_per_round == rounds.seconds / 6
    assert widths == [length] + [10] * (FIRST_ROUNDS + 7) and started == [FIRST_ROUNDS + 2]


def test_an_interrupted_loop_is_restored():
    target, draft = pair(0).target, pair(0).with_tree(10, 3, 3)
    before = TargetAdapter.verify

    def fail(verify, tree, cache):
        raise KeyError

    with pytest.raises(KeyError):
        run_intercepted(target, draft, make_prompt(1), fail, max_new_tokens=8)
    assert TargetAdapter.verify is before


def test_verifications_start_from_the_same_context(monkeypatch):
    target, draft = pair(0).target, pair(0).with_tree(10, 3, 3)
    inputs = make_prompt(1)
    seen = []
    verify = TargetAdapter.verify

    def record_call(self, tree, cache, *args):
        seen.append((tree.tokens.shape[1], int(tree.depths.max()), cache.get_seq_length()))
        return verify(self, tree, cache, *args)

    monkeypatch.setattr(TargetAdapter, "verify", record_call)
    seconds = verification_seconds(target, draft, inputs, [1, 8, 64], repeats=2)
    assert {number: len(times) for number, times in seconds.items()} == {1: 2, 8: 2, 64: 2}
    length = inputs["input_ids"].shape[1]
    assert seen == [(1, 0, length), (8, 3, length), (64, 6, length)] * 3


def test_trees_of_random_drafts_are_as_deep_as_those_of_trained_ones():
    """`build_pair` scales the random head so that the draft prefers few tokens, as trained drafts do."""
    config = shape_config("small")
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 1, 4000
    target, draft = build_pair(config, torch.float32, torch.device("cpu"))
    rounds = simulated_rounds(target, draft, random_prompt(target, 20), [5] * 3)
    assert rounds.lengths == [5] * 3


def test_published_shapes_have_the_published_sizes():
    expected = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9, "qwen2-vl-7b": 8.29e9}
    for name, size in expected.items():
        target, draft = build_pair(shape_config(name), torch.bfloat16, torch.device("meta"))
        assert sum(weight.numel() for weight in target.parameters()) == pytest.approx(size, rel=2e-3), name
        assert {weight.dtype for weight in (*target.parameters(), *draft.parameters())} == {torch.bfloat16}
        assert draft.config.hidden_size == target.config.get_text_config().hidden_size
    with pytest.raises(MSDError, match=f"Unknown shape 'gpt': choose from {', '.join(SHAPES)}"):
        shape_config("gpt")


def tiny_shape():
    """A small model of a published kind: the tests are about the measurements, not about the model."""
    config = shape_config("small")
    small = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    for field, value in small.items():
        setattr(config.text_config, field, value)
    config.image_token_id = 490
    return config


def test_a_shape_is_measured(monkeypatch):
    config = tiny_shape()
    target, draft = build_pair(config, torch.float32, torch.device("cpu"))
    assert isinstance(draft, MSDDraftModel) and target.dtype == draft.dtype == torch.float32
    inputs = random_prompt(target, context=30)
    assert inputs["input_ids"].shape == (1, 30) and inputs["input_ids"].max() < 490
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    figures = bench_shape(
        target, draft, inputs, assumed_taus=[2.5, 4], nodes=[1, 8], num_rounds=4, repeats=2, compile=True
    )
    assert not draft.generation_config.compile
    kinds = [(way, tau) for way in ("eager", "compiled") for tau in (2.5, 4)]
    for row, (way, tau) in zip(figures["rounds"], kinds, strict=True):
        assert row["way"] == way and row["simulated_tau"] == tau
        seconds = row["milliseconds"]["median"] / 1e3
        assert row["simulated_tokens_per_second"] == pytest.approx(tau / seconds, rel=1e-6)
        assert row["cost_in_steps"]["median"] > 1 and row["first_rounds_milliseconds"] > 0
    for way in ("eager", "compiled"):
        assert figures["round"][way]["num_rounds"] == 4 and 0 < figures["round"][way]["round_efficiency"] < 1
    assert [row["nodes"] for row in figures["verification"]] == [1, 8]


def test_a_draft_vocabulary_is_measured_and_reported(monkeypatch, run, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", tiny_shape)
    sizes = []
    top_k = DraftHead.top_k

    def record_call(self, states, count):
        sizes.append(self.logits(states).shape[-1])
        return top_k(self, states, count)

    monkeypatch.setattr(DraftHead, "top_k", record_call)
    options = ("--context", 20, "--assume-tau", 2, "--nodes", 1, "--repeats", 1, "--output", tmp_path)
    for chosen, size in (((), 500), (("--draft-vocab-size", 40), 40)):
        sizes.clear()
        code, _out, err = run("bench", "--shape", "tiny", *options, *chosen)
        assert code == 0, err
        assert set(sizes) == {size}
        settings = json.loads((tmp_path / "report.json").read_text())["settings"]
        assert settings.get("draft vocabulary", 500) == size


def test_bytes_of_a_step_are_those_of_weights_keys_and_values():
    target = pair(0).target  # float64, 2 layers, hidden 32, 4 heads of 8, vocabulary 60
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert bytes_read_per_step(target, context=10) == 8 * (layers + 60 * 32 + 2 * 2 * 32 * 10)
