"""The draft's head: log-probabilities of the best candidates, as the target's head and configuration define them."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import FAMILIES

from msd_hf import MSDDraftModel
from msd_hf.drafting.head import DraftHead
from msd_hf.target.adapter import TargetAdapter


TOP_K = 4
OWN_VOCABULARY = list(range(5, 59, 3))


def best_candidates(draft, target, states, is_compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    head = DraftHead(draft, TargetAdapter(target))
    if not is_compiled:
        return head.top_k(states, TOP_K)
    head.keep_address()
    return head.compiled_top_k(states, TOP_K)


@pytest.mark.parametrize("vocabulary", [None, OWN_VOCABULARY], ids=["whole", "own"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_logits_are_capped_as_the_target_caps_them(is_compiled, vocabulary):
    """Without the cap, log-probabilities of different nodes are not comparable as those of the target are."""
    target = FAMILIES["gemma2"].build()
    cap = target.config.final_logit_softcapping
    draft = MSDDraftModel.from_target(target)
    draft.set_draft_vocab(vocabulary)
    weight = target.get_output_embeddings().weight.detach()
    ids = torch.arange(len(weight)) if vocabulary is None else torch.tensor(vocabulary)
    states = 4 * torch.randn(1, 3, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    logits = states @ weight[ids].T
    assert (logits.abs() > 2 * cap).any()
    expected = (cap * (logits / cap).tanh()).log_softmax(-1).topk(TOP_K)
    with torch.no_grad():
        log_probs, tokens = best_candidates(draft, target, states, is_compiled)
    torch.testing.assert_close(log_probs, expected.values)
    assert torch.equal(tokens, ids[expected.indices])


@pytest.mark.parametrize("vocabulary", [None, OWN_VOCABULARY], ids=["whole", "own"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_of_half_precision_are_float32(dtype, is_compiled, vocabulary):
    """They are added up over the levels of a tree: with eight bits each, nodes would tie that do not."""
    target = tiny.build_target(dtype=dtype)
    draft = tiny.build_draft(target)
    draft.set_draft_vocab(vocabulary)
    weight = target.get_output_embeddings().weight.detach()
    rows = weight if vocabulary is None else weight[vocabulary]
    states = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = torch.nn.functional.linear(states, rows)  # rounded once, as the target's own
    expected = logits.double().log_softmax(-1).topk(TOP_K).values
    with torch.no_grad():
        log_probs, _ = best_candidates(draft, target, states, is_compiled)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)
