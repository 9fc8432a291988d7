"""The loss of MSD (paper section 3.3) over the trained rows, its terms by name, and the noise on the inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from .recipes import Recipe


NUM_RANKS = 3  # agreement is counted among the draft's 1, 2 and 3 most likely tokens
_REFERENCE_LENGTH = 512  # number of tokens at which the noise has its nominal range, as in the original code


def smooth_l1(states: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Smooth-L1 loss of `states` against `goals`, `[R, H]` each: the mean over H, summed over the rows."""
    return functional.smooth_l1_loss(states, goals, reduction="none").mean(-1).sum()


def cross_entropy(logits: torch.Tensor, goal_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the draft's against the target's distribution, `[R, V]` each, summed over the rows."""
    return functional.cross_entropy(logits, goal_logits.softmax(-1), reduction="sum")


@dataclass(frozen=True)
class LossTerm:
    """
    One term of the loss.

    Args:
        function: takes the draft's outputs and the target's, both of `R` rows, and returns a sum over the rows.
        weight: the field of [`Recipe`] and [`MSDTrainingArguments`] that holds the weight of the term.
        compares: `"states"` for hidden states `[R, H]`, `"logits"` for logits `[R, V]`, which are computed for one
            chunk of rows at a time.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: str
    compares: Literal["states", "logits"]


# Each term is logged under its name. A new term also needs the field of its weight in `Recipe` and in the arguments.
LOSS_TERMS = {
    "feature_loss": LossTerm(smooth_l1, "feature_loss_weight", "states"),
    "token_loss": LossTerm(cross_entropy, "token_loss_weight", "logits"),
}
WEIGHT_NAMES = tuple(term.weight for term in LOSS_TERMS.values())


@dataclass
class LossSums:
    """
    The loss terms and the agreement, summed over rows. The trainer divides them by the number of rows of the whole
    batch.

    Args:
        terms: the sum of each of [`LOSS_TERMS`], a scalar, by name.
        agreement (`torch.LongTensor` of shape `[3]`): number of rows at which the target's most likely token is the
            draft's most likely one, among the draft's two, and among its three.
        num_rows: number of rows.
    """

    terms: dict[str, torch.Tensor]
    agreement: torch.Tensor
    num_rows: int


def loss_sums(
    states: torch.Tensor,
    goals: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 1024,
) -> LossSums:
    """
    Computes all loss terms, with gradients with respect to `states`. At most `chunk_size` rows of logits exist at a
    time, in the backward pass too.

    Args:
        states (`[R, H]`): the draft's outputs at the trained rows.
        goals (`[R, H]`): the target's hidden states, which `states` should equal.
        head: the target's head, `[r, H] -> [r, V]`. It gets no gradient.
        chunk_size: rows of logits at a time.
    """
    dtype = _sum_dtype(states)
    of_states = {name: term.function for name, term in LOSS_TERMS.items() if term.compares == "states"}
    of_logits = {name: term.function for name, term in LOSS_TERMS.items() if term.compares == "logits"}
    sums = {name: function(states.to(dtype), goals.to(dtype)) for name, function in of_states.items()}
    agreement, *logit_sums = _ChunkedLogitTerms.apply(states, goals, head, chunk_size, tuple(of_logits.values()))
    sums |= zip(of_logits, logit_sums, strict=True)
    return LossSums({name: sums[name] for name in LOSS_TERMS}, agreement, len(states))


def weighted_loss(terms: Mapping[str, Any], recipe: Recipe) -> Any:
    """The sum of all loss terms, tensors or numbers, with the weights of the recipe."""
    return sum(getattr(recipe, term.weight) * terms[name] for name, term in LOSS_TERMS.items())


class _ChunkedLogitTerms(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx, states, goals, head, chunk_size, functions):
        totals = [states.new_zeros((), dtype=_sum_dtype(states)) for _ in functions]
        agreement = torch.zeros(NUM_RANKS, dtype=torch.long, device=states.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradients: list[list[torch.Tensor]] = [[] for _ in functions]
        for rows, goal_rows in zip(states.split(chunk_size), goals.split(chunk_size), strict=True):
            goal_logits = head(goal_rows).to(_sum_dtype(states))
            with torch.set_grad_enabled(needs_gradient):
                rows = rows.detach().requires_grad_(needs_gradient)
                logits = head(rows).to(goal_logits.dtype)
                losses = [function(logits, goal_logits) for function in functions]
            for number, loss in enumerate(losses):
                totals[number] += loss.detach()
                if needs_gradient:
                    is_last = number == len(losses) - 1
                    gradients[number] += torch.autograd.grad(loss, rows, retain_graph=not is_last)
            best = logits.detach().topk(min(NUM_RANKS, logits.shape[-1]), dim=-1).indices
            hits = (best == goal_logits.argmax(-1, keepdim=True)).cumsum(-1)
            agreement[: hits.shape[1]] += hits.sum(0)
        ctx.save_for_backward(*(torch.cat(chunks) if chunks else torch.zeros_like(states) for chunks in gradients))
        ctx.mark_non_differentiable(agreement)
        return agreement, *totals

    @staticmethod
    def backward(ctx, grad_agreement, *grad_totals):
        pairs = zip(ctx.saved_tensors, grad_totals, strict=True)
        parts = [(gradient * grad_total).to(gradient.dtype) for gradient, grad_total in pairs]
        return functools.reduce(operator.add, parts), None, None, None, None


def _sum_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def add_uniform_noise(hidden_states: torch.Tensor, uniform: torch.Tensor, scale: float = 0.2) -> torch.Tensor:
    """
    Adds the noise of the paper's training to the hidden states that the draft reads. The goals stay without noise.

    Args:
        hidden_states (`[L, W]`): one sample without padding: the longer the sample, the smaller the noise.
        uniform (`[L, W]`): random numbers from [0, 1).
        scale: range of the noise at a length of 512 tokens.
    """
    return hidden_states + (uniform - 0.5) * scale * _REFERENCE_LENGTH / hidden_states.shape[-2]


__all__ = ["LOSS_TERMS", "WEIGHT_NAMES", "LossSums", "LossTerm", "add_uniform_noise", "loss_sums", "weighted_loss"]
