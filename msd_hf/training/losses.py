"""The loss of MSD (paper section 3.3) and its input noise, over the positions that count and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional


NUM_RANKS = 3  # of the agreement that is counted: top-1, top-2, top-3
_REFERENCE_LENGTH = 512  # tokens at which the noise has its nominal range (the original code)


@dataclass
class LossSums:
    """
    Sums over rows, to be divided by the number of rows of the whole batch.

    Args:
        feature_loss (`torch.Tensor`, scalar): Smooth-L1 between the draft's and the target's hidden states, averaged
            over the hidden dimension.
        token_loss (`torch.Tensor`, scalar): cross-entropy of the draft's against the target's distribution.
        agreement (`torch.Tensor` of shape `[3]`): rows at which the target's most likely token is the draft's most
            likely one, among its two, among its three.
        num_rows (`int`): how many rows.
    """

    feature_loss: torch.Tensor
    token_loss: torch.Tensor
    agreement: torch.Tensor
    num_rows: int


def loss_sums(
    states: torch.Tensor,
    goals: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 1024,
) -> LossSums:
    """
    Both loss terms, with gradients with respect to `states`. No more than `chunk_size` rows of logits exist at a time,
    in the backward pass too.

    Args:
        states (`torch.Tensor` of shape `[R, H]`): the draft's outputs at the trained rows.
        goals (`torch.Tensor` of shape `[R, H]`): the target's hidden states that they should equal.
        head (`Callable`): the target's head, `[r, H] -> [r, V]`. It gets no gradient.
        chunk_size (`int`): rows of logits at a time.
    """
    dtype = _sum_dtype(states)
    feature_loss = functional.smooth_l1_loss(states.to(dtype), goals.to(dtype), reduction="none")
    token_loss, agreement = _ChunkedTokenLoss.apply(states, goals, head, chunk_size)
    return LossSums(feature_loss.mean(-1).sum(), token_loss, agreement, len(states))


class _ChunkedTokenLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx, states, goals, head, chunk_size):
        total = states.new_zeros((), dtype=_sum_dtype(states))
        agreement = torch.zeros(NUM_RANKS, dtype=torch.long, device=states.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradients = []
        for rows, goal_rows in zip(states.split(chunk_size), goals.split(chunk_size), strict=True):
            goal_logits = head(goal_rows).to(total.dtype)
            with torch.set_grad_enabled(needs_gradient):
                rows = rows.detach().requires_grad_(needs_gradient)
                logits = head(rows).to(total.dtype)
                loss = functional.cross_entropy(logits, goal_logits.softmax(-1), reduction="sum")
            total += loss.detach()
            best = logits.detach().topk(min(NUM_RANKS, logits.shape[-1]), dim=-1).indices
            hits = (best == goal_logits.argmax(-1, keepdim=True)).cumsum(-1)
            agreement[: hits.shape[1]] += hits.sum(0)
            if needs_gradient:
                gradients.append(torch.autograd.grad(loss, rows)[0])
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(states))
        ctx.mark_non_differentiable(agreement)
        return total, agreement

    @staticmethod
    def backward(ctx, grad_total, grad_agreement):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_total).to(gradient.dtype), None, None, None


def _sum_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def add_uniform_noise(hidden_states: torch.Tensor, uniform: torch.Tensor, scale: float = 0.2) -> torch.Tensor:
    """
    Adds the noise of the paper's training to what the draft reads (not to what it should predict).

    Args:
        hidden_states (`torch.Tensor` of shape `[L, W]`): of one sample, without padding: the noise gets less with
            length.
        uniform (`torch.Tensor` of shape `[L, W]`): drawn from [0, 1).
        scale (`float`): range at a length of 512 tokens.
    """
    return hidden_states + (uniform - 0.5) * scale * _REFERENCE_LENGTH / hidden_states.shape[-2]


__all__ = ["LossSums", "add_uniform_noise", "loss_sums"]
