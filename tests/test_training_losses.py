"""Batches, losses, gradients and noise equal the original implementation; the chunked head equals the plain one."""

import golden_sets
import pytest
import torch
from torch.nn import functional

from msd_hf.training import Recipe, losses
from msd_hf.training.losses import LossTerm, add_uniform_noise, loss_sums, weighted_loss
from msd_hf.training.rows import draft_rows, trained_rows


SETS = ("llava", "qwen2vl")


def golden_features(name):
    """The features of the raw samples as a right-padded batch, as our collators make it."""
    values, _ = golden_sets.load(f"draft_forward_train_{name}")
    length = values["batch.attention_mask"].shape[1]
    weights, _ = golden_sets.load(f"draft_weights_{name}")
    embedding = weights["embed_tokens.weight"]
    inputs_embeds, hidden_states = torch.zeros(2, 4, length, 64, dtype=torch.float64)
    masks = torch.zeros(4, length, dtype=torch.bool)
    visual_mask = torch.zeros(4, length, dtype=torch.bool)
    for row in range(4):
        ids = values[f"raw{row}.input_ids"]
        states = values[f"raw{row}.hidden_state"]
        embeds = values.get(f"raw{row}.inputs_embeds", embedding[ids.clamp(min=0)])
        inputs_embeds[row, : len(embeds)] = embeds
        hidden_states[row, : len(states)] = states
        masks[row, : len(states)] = values[f"raw{row}.loss_mask"].bool()
        num_image = int(values["batch.image_tokens_num"][row])
        if num_image:
            marker = -200 if name == "llava" else 315
            start = int((ids == marker).nonzero()[0])
            visual_mask[row, start : start + num_image] = True
    return values, inputs_embeds, hidden_states, visual_mask, masks


def golden_rows(name):
    values, inputs_embeds, hidden_states, visual_mask, assistant_mask = golden_features(name)
    attention_mask = values["batch.attention_mask"]
    trained = trained_rows(assistant_mask, attention_mask, "answer")
    return values, draft_rows(inputs_embeds, hidden_states, visual_mask, trained)


@pytest.mark.parametrize("name", SETS)
def test_batches(name):
    values, rows = golden_rows(name)
    lengths = values["batch.attention_mask"].sum(1).tolist()
    assert torch.equal(rows.trained.long(), values["batch.loss_mask"])
    for row, length in enumerate(lengths):
        # The last row differs: the original puts the embedding of token 0 there, but no trained row depends on it.
        inside = slice(0, length - 1)
        assert torch.equal(rows.inputs_embeds[row, inside].float(), values["batch.inputs_embeds"][row, inside])
        assert torch.equal(rows.goals[row, :length].float(), values["batch.target"][row, :length])
        assert torch.equal(rows.hidden_states[row, :length].float(), values["batch.hidden_states"][row, :length])


@pytest.mark.parametrize("name", SETS)
def test_forward_losses_and_gradients(name, tmp_path):
    values, rows = golden_rows(name)
    golden, _ = golden_sets.load(f"loss_{name}")
    head_weight = golden_sets.load("lm_head")[0]["lm_head.weight"].double()
    draft = golden_sets.load_draft(f"draft_weights_{name}", tmp_path)
    states = draft(rows.inputs_embeds, rows.hidden_states, rows.visual_mask).last_hidden_state
    for row, length in enumerate(values["batch.attention_mask"].sum(1).tolist()):
        inside = slice(0, length - 1)
        expected = values["out_hidden_f64"][row, inside]
        torch.testing.assert_close(states[row, inside], expected, atol=golden_sets.ATOL, rtol=0)
    sums = loss_sums(states[rows.trained], rows.goals[rows.trained], lambda x: x @ head_weight.T, chunk_size=7)
    feature_loss, token_loss = (sums.terms[name] / (sums.num_rows + 1e-5) for name in ("feature_loss", "token_loss"))
    assert feature_loss.item() == pytest.approx(golden["vloss_nobf16_f64"].item(), abs=1e-6)
    assert token_loss.item() == pytest.approx(golden["ploss_f64"].item(), abs=1e-5)
    total = feature_loss + 0.1 * token_loss
    assert total.item() == pytest.approx(golden["total_nobf16_f64"].item(), abs=1e-5)
    total.backward()
    gradients = {f"grad.{key}": parameter.grad for key, parameter in draft.named_parameters()}
    expected = {key: value for key, value in golden.items() if key.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key].float(), value, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_noise(dtype):
    values, _ = golden_sets.load("schedule")
    torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    states, uniform = values[f"noise_in_{dtype}"][0].to(torch_dtype), values[f"noise_rand_{dtype}"][0].to(torch_dtype)
    noisy = add_uniform_noise(states, uniform, 0.2)
    torch.testing.assert_close(noisy.float(), values[f"noise_out_{dtype}"][0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_rows, chunk_size", [(1, 4), (8, 4), (11, 4), (5, 100), (0, 4)])
def test_chunks_give_the_plain_loss_and_gradient(num_rows, chunk_size):
    torch.manual_seed(0)
    states = torch.randn(num_rows, 6, dtype=torch.float64, requires_grad=True)
    goals = torch.randn(num_rows, 6, dtype=torch.float64)
    head = torch.nn.Linear(6, 13, bias=True).double()
    sums = loss_sums(states, goals, head, chunk_size)
    probabilities = head(goals).softmax(-1)
    plain_token = -(probabilities * head(states).log_softmax(-1)).sum()
    plain_feature = torch.nn.functional.smooth_l1_loss(states, goals, reduction="none").mean(-1).sum()
    torch.testing.assert_close(sums.terms["token_loss"], plain_token)
    torch.testing.assert_close(sums.terms["feature_loss"], plain_feature)
    (expected,) = torch.autograd.grad(plain_feature + 0.3 * plain_token, states)
    (got,) = torch.autograd.grad(sums.terms["feature_loss"] + 0.3 * sums.terms["token_loss"], states)
    torch.testing.assert_close(got, expected)
    assert head.weight.grad is None
    ranks = head(states).argsort(-1, descending=True)
    hits = [(ranks[:, :k] == head(goals).argmax(-1, keepdim=True)).any(-1).sum().item() for k in (1, 2, 3)]
    assert sums.agreement.tolist() == hits


def test_another_term_is_one_entry_of_the_table(monkeypatch):
    def total_variation(logits, labels):
        return (logits.softmax(-1) - labels).abs().sum(-1) / 2

    monkeypatch.setitem(losses.LOSS_TERMS, "variation", LossTerm(total_variation, "token_loss_weight", "tokens"))
    torch.manual_seed(0)
    states = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    goals = torch.randn(11, 6, dtype=torch.float64)
    head = torch.nn.Linear(6, 13).double()
    loss = weighted_loss(loss_sums(states, goals, head, chunk_size=4).terms, Recipe(token_loss_weight=0.3))
    plain = functional.smooth_l1_loss(states, goals, reduction="none").mean(-1).sum()
    plain = plain + 0.3 * functional.cross_entropy(head(states), head(goals).softmax(-1), reduction="sum")
    plain = plain + 0.3 * total_variation(head(states), head(goals).softmax(-1)).sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, states), torch.autograd.grad(plain, states))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_labels_are_the_probabilities_of_generation(temperature):
    torch.manual_seed(0)
    states, goals = torch.randn(2, 11, 6, dtype=torch.float64)
    head = torch.nn.Linear(6, 13).double()
    names = ("token_loss", "accepted_length_loss")
    sums = loss_sums(states, goals, head, 4, names, temperature)
    logits = head(goals)
    labels = (logits / max(temperature, 1e-9)).softmax(-1)  # a temperature near 0 is greedy decoding
    plain = -(labels * head(states).log_softmax(-1)).sum()
    torch.testing.assert_close(sums.terms["token_loss"], plain)
    accepted = torch.minimum(head(states).softmax(-1), labels).sum(-1)
    torch.testing.assert_close(sums.acceptances["accepted_length_loss"], accepted)


def test_no_more_than_a_chunk_of_logits_exists():
    largest = 0

    def head(states):
        nonlocal largest
        largest = max(largest, len(states))
        return states @ torch.ones(4, 9)

    states = torch.randn(50, 4, requires_grad=True)
    sums = loss_sums(states, torch.randn(50, 4), head, chunk_size=8)
    sums.terms["token_loss"].backward()
    assert largest == 8 and states.grad.shape == (50, 4)


def test_drafted_rows_are_those_that_generation_asks_for():
    #                 question        answer      question  answer
    assistant = [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]
    length = 11
    mask = torch.tensor([assistant], dtype=torch.bool)
    attention_mask = torch.tensor([[1] * length + [0] * 2])
    # Row j reads token j + 1 (which the target has chosen) and predicts token j + 2.
    drafted = [j for j in range(length - 2) if assistant[j + 1] and assistant[j + 2]]
    assert trained_rows(mask, attention_mask, "drafted")[0].nonzero().flatten().tolist() == drafted == [3, 4, 8]
    answer = trained_rows(mask, attention_mask, "answer")[0].nonzero().flatten().tolist()
    assert answer == [4, 5, 6, 9]  # rows whose own token is the assistant's, except the sample's last
