"""From the target's features to the draft's rows: row j is the pair (token at j + 1, hidden state at j)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..draft.interface import TargetReads


ROW_CHOICES = ("answer", "drafted")


@dataclass
class DraftRows:
    """
    A batch of the rows that a draft reads in training, with the goals of its outputs.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): row j is the embedding at position j + 1.
        hidden_states (`torch.Tensor` of shape `[B, L, W]`): row j is the target's states at position j that
            the draft reads.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true where position j + 1 is visual.
        goals (`torch.Tensor` of shape `[B, L, H]`): row j is the target's last hidden state at position j + 1, which
            row j of the draft's output should equal.
        trained (`torch.BoolTensor` of shape `[B, L]`): the rows that count in the loss.
        positions (`torch.LongTensor` of shape `[B, L]`): the position j of each row in its sample.
        reads (`TargetReads`): the hidden states of the target that lie side by side in `hidden_states`.
    """

    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor
    goals: torch.Tensor
    trained: torch.Tensor
    positions: torch.Tensor
    reads: TargetReads

    def without(self, left_out: torch.Tensor) -> DraftRows:
        """
        The rows without those that are left out. The other ones move up, and keep their positions.

        Args:
            left_out (`torch.BoolTensor` of shape `[B, L]`): the rows that are left out.
        """
        lengths = (~left_out).sum(1)
        # The rows that stay, in order. Rows that go are the padding of samples with fewer rows.
        order = left_out.to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
        samples = torch.arange(len(order), device=order.device).unsqueeze(1)
        fields = ("inputs_embeds", "hidden_states", "visual_mask", "goals", "trained", "positions")
        moved = replace(self, **{name: getattr(self, name)[samples, order] for name in fields})
        moved.trained &= ~left_out[samples, order]
        return moved

    def drafted_from(self, depth: int) -> torch.Tensor:
        """Which rows `[B, L]` generation reaches `depth` deep in a tree from a trained row: the row that is `depth`
        places before them is trained, and no row between the two is left out."""
        reached = torch.zeros_like(self.trained)
        places = self.positions.shape[1] - depth
        if places > 0:
            is_near = self.positions[:, depth:] - self.positions[:, :places] == depth
            reached[:, depth:] = self.trained[:, :places] & is_near
        return reached


def draft_rows(
    inputs_embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    visual_mask: torch.Tensor,
    trained: torch.Tensor,
    reads: TargetReads | None = None,
) -> DraftRows:
    """
    Makes rows from a right-padded batch of features. The last row, which has no next position, gets a zero embedding
    and a zero goal.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`), hidden_states (`[B, L, W]`), visual_mask (`[B, L]`): the
            fields of the target's [`TargetFeatures`].
        trained (`torch.BoolTensor` of shape `[B, L]`): the rows that count in the loss, chosen by [`trained_rows`].
        reads (`TargetReads`, *optional*): the hidden states of the target that lie side by side in `hidden_states`.
            Default: the last hidden state alone.
    """
    if reads is None:
        reads = TargetReads((), inputs_embeds.shape[-1])
    _, goals = reads.split(hidden_states)
    return DraftRows(
        inputs_embeds=_shift(inputs_embeds),
        hidden_states=hidden_states,
        visual_mask=_shift(visual_mask),
        goals=_shift(goals),
        trained=trained,
        positions=torch.arange(trained.shape[1], device=trained.device).expand_as(trained),
        reads=reads,
    )


def trained_rows(assistant_mask: torch.Tensor, attention_mask: torch.Tensor, choice: str = "answer") -> torch.Tensor:
    """
    The mask `[B, L]` of the rows that count in the loss.

    Args:
        assistant_mask (`torch.BoolTensor` of shape `[B, L]`): true at the assistant's tokens.
        attention_mask (`torch.Tensor` of shape `[B, L]`): 1 at tokens, 0 at the padding on the right.
        choice: `"answer"`, as in the original code: the rows whose hidden state is at a token of the assistant,
            without the last row of the sequence. `"drafted"`: the rows that generation uses, which read a token of
            the assistant and predict another one. Compared with `"answer"`, this adds the row between the question
            and the answer, and leaves out the rows that predict the token after an answer.
    """
    next_is_answer = _shift(assistant_mask)
    if choice == "drafted":
        return next_is_answer & _shift(next_is_answer)
    return assistant_mask & _shift(attention_mask).bool()


def _shift(tensor: torch.Tensor) -> torch.Tensor:
    """Moves row j + 1 to row j; the last row becomes zero."""
    return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)


__all__ = ["ROW_CHOICES", "DraftRows", "draft_rows", "trained_rows"]
