"""The loss of MSD (paper section 3.3) over the trained rows, its terms by name, and the noise on the inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional

from .own_head import OwnHead
from .recipes import Recipe


NUM_RANKS = 3  # agreement is counted among the draft's 1, 2 and 3 most likely tokens
LEAST_TEMPERATURE = 0.01  # of labels above 0; dividing by less overflows
_REFERENCE_LENGTH = 512  # number of tokens at which the noise has its nominal range, as in the original code


def smooth_l1(states: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Smooth-L1 loss `[R]` of `states` against `goals`, `[R, H]` each: the mean over H."""
    return functional.smooth_l1_loss(states, goals, reduction="none").mean(-1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `[R]` of the draft's logits `[R, V]` against the target's probabilities `[R, V]`."""
    return functional.cross_entropy(logits, labels, reduction="none")


def acceptance(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The probability `[R]` that a token drawn from the draft's logits `[R, V]` is accepted, against the target's
    probabilities `[R, V]`: the sum of the smaller probability of each token (arXiv 2211.17192).
    """
    return torch.minimum(logits.softmax(-1), labels).sum(-1)


@dataclass(frozen=True)
class LossTerm:
    """
    One term of the loss.

    Args:
        function: takes the draft's outputs and the target's, both of `R` rows, and returns a value `[R]` for each row.
        weight: the field of [`Recipe`] and [`MSDTrainingArguments`] that holds the weight of the term.
        compares: `"states"` for hidden states `[R, H]`; `"tokens"` for the draft's logits and the target's
            probabilities, `[R, V]` each, which are computed for one chunk of rows at a time; `"chains"` for the same,
            where the function returns how probable it is that the row's token is accepted. The loss is then the
            length by which the chains fall short, see [`~msd_hf.training.chains.Chains`].
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: str
    compares: Literal["states", "tokens", "chains"]


# Each term is logged under its name. A new term also needs the field of its weight in `Recipe` and in the arguments.
LOSS_TERMS = {
    "feature_loss": LossTerm(smooth_l1, "feature_loss_weight", "states"),
    "token_loss": LossTerm(cross_entropy, "token_loss_weight", "tokens"),
    "accepted_length_loss": LossTerm(acceptance, "accepted_length_loss_weight", "chains"),
}
WEIGHT_NAMES = tuple(term.weight for term in LOSS_TERMS.values())


def used_terms(recipe: Recipe, learns_states: bool = True) -> tuple[str, ...]:
    """
    The names of the terms that a training computes. Those over chains cost more, and need a weight above 0.

    Args:
        recipe: the weights.
        learns_states: whether the draft's outputs should equal hidden states of the target; those of a draft with a
            head of its own should not.
    """
    kinds = {"states": learns_states, "tokens": True}
    return tuple(n for n, t in LOSS_TERMS.items() if kinds.get(t.compares, getattr(recipe, t.weight) > 0))


@dataclass
class LossSums:
    """
    The loss terms and the agreement, summed over rows. The trainer divides them by the number of rows of the whole
    batch.

    Args:
        terms: the sum of each term, a scalar, by name.
        agreement (`torch.LongTensor` of shape `[3]`): number of rows at which the target's most likely token is the
            draft's most likely one, among the draft's two, and among its three.
        num_rows: number of rows.
        agrees (`torch.BoolTensor` of shape `[R]`): the rows at which the draft's most likely token is the target's.
        acceptances: the values `[R]` of the terms over chains, by name.
    """

    terms: dict[str, torch.Tensor]
    agreement: torch.Tensor
    num_rows: int
    agrees: torch.Tensor
    acceptances: dict[str, torch.Tensor] = field(default_factory=dict)


def loss_sums(
    states: torch.Tensor,
    goals: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 1024,
    names: Collection[str] | None = None,
    label_temperature: float = 1.0,
    own_head: OwnHead | None = None,
) -> LossSums:
    """
    Computes loss terms, with gradients with respect to `states`. At most `chunk_size` rows of logits exist at a time,
    in the backward pass too.

    Args:
        states (`[R, H]`): the draft's outputs at the trained rows.
        goals (`[R, H]`): the target's hidden states, which `states` should equal.
        head: the target's head, `[r, H] -> [r, V]`. It gets no gradient.
        chunk_size: rows of logits at a time.
        names: the terms; default: all but those over chains.
        label_temperature: argument of [`label_probabilities`].
        own_head (*optional*): the draft's own head, which then scores `states` and gets a gradient; `head` scores
            `goals` alone.
    """
    dtype = _sum_dtype(states)
    terms = {name: LOSS_TERMS[name] for name in (used_terms(Recipe()) if names is None else names)}
    of_logits = {name: term.function for name, term in terms.items() if term.compares != "states"}
    values = {
        name: term.function(states.to(dtype), goals.to(dtype))
        for name, term in terms.items()
        if term.compares == "states"
    }
    labels_of = functools.partial(label_probabilities, temperature=label_temperature)
    if own_head is None:
        functions = tuple(of_logits.values())
        hits, *of_rows = _ChunkedLogitTerms.apply(states, goals, head, chunk_size, functions, labels_of)
        values |= zip(of_logits, of_rows, strict=True)
    else:
        compared = {name: (function, terms[name].compares == "tokens") for name, function in of_logits.items()}
        hits, of_own = own_head.terms(states, goals, head, labels_of, compared, NUM_RANKS, chunk_size)
        values |= of_own
    return LossSums(
        {name: values[name].sum() for name, term in terms.items() if term.compares != "chains"},
        hits.sum(0),
        len(states),
        hits[:, 0],
        {name: values[name] for name, term in terms.items() if term.compares == "chains"},
    )


def label_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    What the draft should predict: the target's probabilities `[R, V]` at a temperature, from its logits. At 0 the most
    likely token has probability 1, as in greedy decoding.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits / temperature).softmax(-1)


def weighted_loss(terms: Mapping[str, Any], recipe: Recipe) -> Any:
    """The sum of the loss terms in `terms`, tensors or numbers, with the weights of the recipe."""
    return sum(getattr(recipe, term.weight) * terms[name] for name, term in LOSS_TERMS.items() if name in terms)


class _ChunkedLogitTerms(torch.autograd.Function):
    """
    Computes the gradients in the forward pass, chunk by chunk, so that no logits are kept for the backward pass. The
    value of a row depends on no other row, so its gradient can be scaled later.
    """

    @staticmethod
    def forward(ctx, states, goals, head, chunk_size, functions, labels_of):
        values: list[list[torch.Tensor]] = [[] for _ in functions]
        hits = []  # whether the target's most likely token is among the draft's 1, 2 and 3 most likely ones
        needs_gradient = ctx.needs_input_grad[0]
        gradients: list[list[torch.Tensor]] = [[] for _ in functions]
        for rows, goal_rows in zip(states.split(chunk_size), goals.split(chunk_size), strict=True):
            goal_logits = head(goal_rows).to(_sum_dtype(states))
            labels = labels_of(goal_logits)
            with torch.set_grad_enabled(needs_gradient):
                rows = rows.detach().requires_grad_(needs_gradient)
                logits = head(rows).to(goal_logits.dtype)
                of_chunk = [function(logits, labels) for function in functions]
                totals = [value.sum() for value in of_chunk]
            for number, total in enumerate(totals):
                values[number].append(of_chunk[number].detach())
                if needs_gradient:
                    is_last = number == len(totals) - 1
                    gradients[number] += torch.autograd.grad(total, rows, retain_graph=not is_last)
            best = logits.detach().topk(min(NUM_RANKS, logits.shape[-1]), dim=-1).indices
            is_best = best == goal_logits.argmax(-1, keepdim=True)
            # A vocabulary of one or two tokens has fewer ranks.
            hits.append(functional.pad(is_best.cumsum(-1), (0, NUM_RANKS - best.shape[1])).bool())
        ctx.save_for_backward(*(torch.cat(chunks) if chunks else torch.zeros_like(states) for chunks in gradients))
        agreement = torch.cat(hits)
        ctx.mark_non_differentiable(agreement)
        return agreement, *(torch.cat(chunks) for chunks in values)

    @staticmethod
    def backward(ctx, grad_agreement, *grad_values):
        pairs = zip(ctx.saved_tensors, grad_values, strict=True)
        parts = [(gradient * scale.unsqueeze(-1)).to(gradient.dtype) for gradient, scale in pairs]
        return functools.reduce(operator.add, parts), None, None, None, None, None


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


__all__ = [
    "LEAST_TEMPERATURE",
    "LOSS_TERMS",
    "WEIGHT_NAMES",
    "LossSums",
    "LossTerm",
    "add_uniform_noise",
    "label_probabilities",
    "loss_sums",
    "used_terms",
    "weighted_loss",
]
