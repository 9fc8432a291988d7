"""A draft with a vocabulary of its own changes the speed, never the output."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from transformers import LlavaForConditionalGeneration

from msd_hf import MSDDraftModel, MSDError, MSDPairingError
from msd_hf.drafting.head import DraftHead
from msd_hf.prompts import build_inputs
from msd_hf.target.adapter import TargetAdapter
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.training import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder
from msd_hf.training.draft_vocab import count_answer_tokens, coverage, frequent_tokens


def with_vocab(tokens) -> tuple[tiny.Pair, MSDDraftModel]:
    pair = tiny.pair(0)
    draft = copy.deepcopy(pair.with_tree(24, 4, 4))
    draft.set_draft_vocab(tokens)
    return pair, draft


@pytest.mark.parametrize("tokens", [[3], list(range(20)), list(range(7, 60, 2)), list(range(60))])
def test_output_is_that_of_the_target_alone(tokens):
    pair, draft = with_vocab(tokens)
    for seed in range(4):
        inputs = tiny.make_prompt(seed, 6, (2,) if seed % 2 else ())
        expected = pair.target.generate(**inputs, max_new_tokens=20)
        output = pair.target.generate(**inputs, max_new_tokens=20, assistant_model=draft, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("tokens", [list(range(25)), [5, 9, 4, 40, 33, 17]])
def test_candidates_are_the_best_of_the_vocabulary(tokens):
    pair, draft = with_vocab(tokens)
    head = DraftHead(draft, TargetAdapter(pair.target))
    states = torch.randn(1, 3, 32, dtype=torch.float64)
    log_probs, found = head.top_k(states, 4)
    ids = torch.tensor(sorted(tokens))
    expected = pair.target.get_output_embeddings()(states)[..., ids].log_softmax(-1).topk(4)
    torch.testing.assert_close(log_probs, expected.values)
    assert torch.equal(found, ids[expected.indices])


def test_memory_for_scores_is_kept_for_levels_of_any_size():
    tokens = list(range(3, 40, 2))
    pair, draft = with_vocab(tokens)
    head = DraftHead(draft, TargetAdapter(pair.target))
    results = []
    for number, shape in enumerate([(1, 1), (2, 5), (1, 6), (1, 3), (3, 1)]):
        states = torch.randn(*shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        with torch.inference_mode(number % 2 == 1), torch.no_grad():
            results.append((states, *head.top_k(states, 4)))
    for states, log_probs, found in results:  # results of earlier calls are not overwritten
        scores = torch.nn.functional.linear(states, pair.target.get_output_embeddings().weight[tokens])
        expected = scores.log_softmax(-1).topk(4)
        torch.testing.assert_close(log_probs, expected.values)
        assert torch.equal(found, torch.tensor(tokens)[expected.indices])


@pytest.mark.parametrize("is_hooked", [False, True])
def test_logits_that_a_hook_has_seen_are_not_overwritten(is_hooked):
    """A plain head's logits are overwritten with log-probabilities; logits that a hook has seen must stay."""
    pair = tiny.pair(1)
    target, seen = copy.deepcopy(pair.target), []
    head_module = target.get_output_embeddings()
    if is_hooked:
        head_module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    head = DraftHead(pair.draft, TargetAdapter(target))
    states = torch.randn(1, 3, 32, dtype=torch.float64)
    log_probs, tokens = head.top_k(states, 4)
    expected = torch.nn.functional.linear(states, head_module.weight, head_module.bias)
    best = expected.log_softmax(-1).topk(4)
    torch.testing.assert_close(log_probs, best.values)
    assert torch.equal(tokens, best.indices)
    for logits in seen:
        torch.testing.assert_close(logits, expected)
    assert len(seen) == is_hooked


def test_rows_are_copied_once_and_again_when_the_head_changes():
    pair, draft = with_vocab([5, 9, 4])
    head = copy.deepcopy(pair.target.get_output_embeddings())
    first = draft.head_rows(head)[0]
    assert draft.head_rows(head)[0] is first
    with torch.no_grad():
        head.weight.mul_(2.0)
    assert torch.equal(draft.head_rows(head)[0], 2 * first)
    draft.set_draft_vocab(range(10))
    assert draft.head_rows(head)[0].data_ptr() == head.weight.data_ptr()  # the first rows are not copied


def test_the_vocabulary_is_saved_and_loaded_with_the_draft(tmp_path):
    _, draft = with_vocab([5, 9, 4])
    draft.save_pretrained(tmp_path)
    loaded = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.draft_vocab_size == 3 and loaded.draft_vocab.tolist() == [4, 5, 9]
    draft.set_draft_vocab(None)
    draft.save_pretrained(tmp_path / "whole")
    assert MSDDraftModel.from_pretrained(tmp_path / "whole").draft_vocab is None


@pytest.mark.parametrize("tokens", [[], [1, 1], [-1, 4]])
def test_invalid_vocabularies_are_refused(tokens):
    with pytest.raises(MSDError, match="each of them once"):
        copy.deepcopy(tiny.pair(0).draft).set_draft_vocab(tokens)


def test_a_token_that_the_target_lacks_is_refused():
    pair, draft = with_vocab([5, 60])
    with pytest.raises(MSDPairingError, match="token 60"):
        pair.target.generate(**tiny.make_prompt(0, 4), max_new_tokens=4, assistant_model=draft)


def make_sample(question, *answers, **fields):
    turns = [{"from": "human", "value": question}]
    for answer in answers:
        turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": "And now?"}]
    return {"conversations": turns, **fields}


def test_counts_are_those_of_the_answers_and_their_ends(toy_processor):
    """Counting opens no image, so an image file may be missing."""
    samples = [
        make_sample("Count.", "1 2 2", "2 3"),
        make_sample("<image>\nWhat is there?", "3", image="nowhere.png"),
        make_sample("Count."),
    ]
    counts = count_answer_tokens([load_conversations(samples, "/")], toy_processor, 512)
    tokenizer = toy_processor.tokenizer
    counted = enumerate(counts.counted.tolist())
    found = {tokenizer.convert_ids_to_tokens(token): count for token, count in counted if count}
    assert found == {"Ġ": 6, "1": 1, "2": 3, "3": 2, tokenizer.eos_token: 3}  # a space before each digit
    assert (counts.num_samples, counts.skipped, int(counts.held_out.sum())) == (2, {"no assistant turn": 1}, 0)


def test_counts_equal_those_of_the_trained_tokens(toy_processor, training_data):
    encoder = ConversationEncoder(toy_processor)
    data = list(training_data.values())
    counts = count_answer_tokens(data, toy_processor, 512)
    expected = torch.zeros(2, 512, dtype=torch.long)  # one conversation in ten is held out
    for number, conversation in enumerate((conversation for part in data for conversation in part), start=1):
        sample = encoder(conversation)
        expected[int(number % 10 == 0)] += sample["input_ids"][sample["assistant_mask"]].bincount(minlength=512)
    assert torch.equal(torch.stack([counts.counted, counts.held_out]), expected)
    assert expected[1].sum() > 100


def test_the_most_frequent_tokens():
    counts = torch.zeros(40, dtype=torch.long)
    counts[[7, 30, 2, 11]] = torch.tensor([500, 490, 6, 4])
    assert frequent_tokens(counts, 3).tolist() == [7, 30, 2]
    assert frequent_tokens(counts, 7).tolist() == [7, 30, 2, 11, 0, 1, 3]  # filled up with the lowest ids
    assert frequent_tokens(counts).tolist() == [7, 30, 2]  # 99.6% are covered, and 99.0% by two
    assert coverage(counts, frequent_tokens(counts, 2)) == 0.99
    assert frequent_tokens(counts, 40).sort().values.tolist() == list(range(40))
    with pytest.raises(MSDError, match=r"take 40 of 40 different ones, and the 10 most frequent cover 25\.0%"):
        frequent_tokens(torch.ones(40, dtype=torch.long))


def test_command_writes_a_draft_that_changes_no_output(run, toy_processor, raw_samples, tmp_path):
    samples = [*raw_samples["text"], make_sample("Count.")]
    (tmp_path / "text.json").write_text(json.dumps(samples))
    (tmp_path / "more.jsonl").write_text(json.dumps(make_sample("Name one.", "A red circle.")) + "\n")
    files = ("--data", tmp_path / "text.json", "--data", tmp_path / "more.jsonl")
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR)
    code, out, err = run("draft-vocab", *pair, *files, "--size", 100, "--output", tmp_path / "short")
    assert code == 0, err
    for expected in ("in 25 conversations", "skipped 1: no assistant turn", "100 of the target's 512", "held-out"):
        assert expected in out
    assert "Warning" not in out
    draft = MSDDraftModel.from_pretrained(tmp_path / "short", dtype=torch.float64)
    assert len(draft.draft_vocab) == 100 and toy_processor.tokenizer.eos_token_id in draft.draft_vocab
    whole = MSDDraftModel.from_pretrained(DRAFT_DIR, dtype=torch.float64)
    assert torch.equal(draft.fc.weight, whole.fc.weight)
    assert draft.generation_config.num_assistant_tokens == whole.generation_config.num_assistant_tokens

    target = LlavaForConditionalGeneration.from_pretrained(TARGET_DIR, dtype=torch.float64)
    inputs = build_inputs(toy_processor, "Count from 5 to 12.", None)
    alone = target.generate(**inputs, max_new_tokens=40)
    assert torch.equal(target.generate(**inputs, max_new_tokens=40, assistant_model=draft), alone)

    code, _, err = run("draft-vocab", *pair, *files, "--size", 100, "--output", tmp_path / "short")
    assert code == 1 and "--overwrite" in err
    code, out, err = run("draft-vocab", *pair, *files, "--size", 300, "--output", tmp_path / "short", "--overwrite")
    assert code == 0 and "Warning: more than half" in out, err
    code, _, err = run("draft-vocab", *pair, *files, "--output", tmp_path / "auto")
    assert code == 1 and "No draft vocabulary pays" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.jsonl", "short", "text.json"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"--size": "0"}, "between 1 and 512 tokens"),
        ({"--size": "-3"}, "between 1 and 512 tokens"),
        ({"--size": "513"}, "between 1 and 512 tokens"),
        ({"--size": "many"}, "neither a number nor auto"),
        ({"--data": "nothing.json"}, "cannot be read"),
        ({"--image-folder": "nowhere"}, "no image folder"),
        ({"--draft": "other"}, "hidden size 32 does not match the target's 128"),
    ],
)
def test_command_refuses_before_it_counts(options, message, run, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("tokens were counted")

    monkeypatch.setattr("msd_hf.training.draft_vocab.count_answer_tokens", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps([make_sample("Count.", "1 2")]))
    if "other" in options.values():
        tiny.pair(0).draft.save_pretrained("other")
        capsys.readouterr()  # drops the progress bar of `save_pretrained`
    arguments = {"--target": TARGET_DIR, "--draft": DRAFT_DIR, "--data": "data.json", "--output": "new", **options}
    code, _, err = run("draft-vocab", *(part for option in arguments.items() for part in option))
    assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "new").exists()


def test_command_without_a_usable_conversation(run, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([make_sample("Count.")]))
    options = ("--target", TARGET_DIR, "--draft", DRAFT_DIR, "--output", tmp_path / "new")
    code, _, err = run("draft-vocab", *options, "--data", tmp_path / "data.json")
    assert code == 1 and "No conversation in the data (data.json) can be used" in err and "no assistant turn" in err


def test_a_processor_of_another_target(toy_processor, training_data):
    with pytest.raises(MSDError, match="only 20 rows: the processor is not the target's"):
        count_answer_tokens([training_data["text"]], toy_processor, 20)
