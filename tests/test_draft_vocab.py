"""A draft that looks for candidates in a vocabulary of its own changes nothing but the time."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from msd_hf import MSDDraftModel, MSDError, MSDPairingError
from msd_hf.draft_head import DraftHead
from msd_hf.targets import TargetAdapter


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


def test_is_saved_and_loaded_with_the_draft(tmp_path):
    _, draft = with_vocab([5, 9, 4])
    draft.save_pretrained(tmp_path)
    loaded = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.draft_vocab_size == 3 and loaded.draft_vocab.tolist() == [4, 5, 9]
    draft.set_draft_vocab(None)
    draft.save_pretrained(tmp_path / "whole")
    assert MSDDraftModel.from_pretrained(tmp_path / "whole").draft_vocab is None


@pytest.mark.parametrize("tokens", [[], [1, 1], [-1, 4]])
def test_what_is_no_vocabulary(tokens):
    with pytest.raises(MSDError, match="each of them once"):
        copy.deepcopy(tiny.pair(0).draft).set_draft_vocab(tokens)


def test_a_token_that_the_target_lacks():
    pair, draft = with_vocab([5, 60])
    with pytest.raises(MSDPairingError, match="token 60"):
        pair.target.generate(**tiny.make_prompt(0, 4), max_new_tokens=4, assistant_model=draft)
