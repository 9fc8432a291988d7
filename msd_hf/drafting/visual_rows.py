"""Which visual rows of a prompt the draft reads: at most a number of them, evenly spaced over the whole chat.

A draft loses acceptance where it sees many more visual rows than it was trained with, and how many rows it sees
matters more than which ones. The target sees all of them, so no output depends on this choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from ..errors import MSDError, shown
from ..tree.settings import AUTO


def most_visual_rows(generation_config: GenerationConfig, trained_visual_rows: int | None) -> int | None:
    """
    The most visual rows that a draft reads, as `max_visual_rows` of its generation config says: a number; `"auto"`, as
    many as it was trained with; or `None`, all.

    Args:
        generation_config (`GenerationConfig`): the draft's generation config.
        trained_visual_rows (`int`, *optional*): `trained_visual_rows` of the draft's config.

    Raises:
        MSDError: when the setting is none of these.
    """
    value = getattr(generation_config, "max_visual_rows", None)
    if value == AUTO:
        return trained_visual_rows
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise MSDError(
            f'`draft.generation_config.max_visual_rows` must be a number of at least 0, "auto" or None, got '
            f"{shown(value)}."
        )
    return value


@dataclass
class KeptRows:
    """
    The rows of a prompt that are left, in order, `[B, K]`.

    Args:
        index (`torch.LongTensor` of shape `[B, K]`): the rows, counted in the prompt. Rows of the batch that keep
            fewer are filled up at the front.
        mask (`torch.BoolTensor` of shape `[B, K]`, *optional*): false at padding; `None` without padding.
    """

    index: torch.Tensor
    mask: torch.Tensor | None

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """The entries of these rows, of states `[B, L]` or `[B, L, ...]`."""
        index = self.index.to(states.device)
        if len(index) == 1:
            return states.index_select(1, index[0])
        return states[torch.arange(len(index), device=states.device).unsqueeze(1), index]


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced, each in the middle of its part."""
    if count <= most:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * most) for number in range(most)]


def pooled(states: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
    """States `[B, L, H]` with the mean of each run of visual rows (`visual_mask`, `[B, L]`) in place of its rows."""
    visual_mask = visual_mask.to(states.device)
    starts = visual_mask & ~_shifted(visual_mask, 1)
    runs = starts.long().cumsum(1) * visual_mask  # [B, L]: the number of the run that a row belongs to, 0 for text
    sums = states.new_zeros(states.shape[0], int(runs.max()) + 1, states.shape[2])
    # Padding need not be a number. It belongs to run 0, whose sum is not read.
    sums.scatter_add_(1, runs.unsqueeze(2).expand_as(states), states)
    counts = sums.new_zeros(sums.shape[:2]).scatter_add_(1, runs, torch.ones_like(states[..., 0]))
    means = sums / counts.clamp(min=1).unsqueeze(2)  # [B, R, H]
    return torch.where(visual_mask.unsqueeze(2), means.gather(1, runs.unsqueeze(2).expand_as(states)), states)


def _shifted(mask: torch.Tensor, by: int) -> torch.Tensor:
    """A mask `[B, L]` moved by one place to the right (1) or the left (-1); false where nothing comes in."""
    rolled = mask.roll(by, 1)
    rolled[:, 0 if by > 0 else -1] = False
    return rolled


def skipped_rows(visual_mask: torch.Tensor, policy: str, rows_per_image: int = 1) -> torch.Tensor:
    """The visual rows that a draft never reads, `[B, L]`: with `"dropped"` all of `visual_mask` `[B, L]`, with
    `"pooled"` and `"compressed"` all but the last `rows_per_image` of each run."""
    if policy == "dropped":
        return visual_mask
    if policy not in ("pooled", "compressed"):
        return torch.zeros_like(visual_mask)
    following = skipped = visual_mask
    for _ in range(rows_per_image):
        following = _shifted(following, -1)
        skipped = skipped & following
    return skipped


def keep_visual_rows(
    visual_mask: torch.Tensor,
    prompt_mask: torch.Tensor | None,
    most: int | None,
    held: Sequence[bool] = (),
    policy: str = "image_embedding",
    rows_per_image: int = 1,
) -> tuple[KeptRows, list[int]] | None:
    """
    Chooses rows such that no row of the batch has more than `most` visual ones.

    Args:
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): which rows of the prompt are visual.
        prompt_mask (`torch.BoolTensor` of shape `[B, L]`, *optional*): false at padding.
        most (`int`, *optional*): the most visual rows; `None`: all.
        held (`Sequence[bool]`): which rows that the draft holds already, of earlier turns, are visual. Only for a
            single row of the batch.
        policy (`str`): with `"dropped"` no visual row is left, with `"pooled"` and `"compressed"` only the last
            `rows_per_image` of each run.

    Returns:
        The rows of the prompt that are left, and which of the held rows are, counted in `held`; `None` if nothing has
        to go.
    """
    visual = visual_mask.cpu()
    real = torch.ones_like(visual) if prompt_mask is None else prompt_mask.cpu()
    visual = visual & real
    skipped = skipped_rows(visual, policy, rows_per_image)
    visual = visual & ~skipped
    if policy == "dropped":
        most = 0
    num_held, num_visual = sum(held), int(visual.sum(1).max())
    most = num_held + num_visual if most is None else most
    if num_held + num_visual <= most and not bool(skipped.any()):
        return None
    left, held_left = [], list(range(len(held)))
    for row in range(len(visual)):
        places = visual[row].nonzero().squeeze(1)
        chosen = evenly_spaced(num_held + len(places), most)
        stays = real[row] & ~visual[row] & ~skipped[row]
        stays[places[[number - num_held for number in chosen if number >= num_held]]] = True
        left.append(stays.nonzero().squeeze(1))
        if num_held:
            kept = set(chosen)
            numbers = iter(range(num_held))
            held_left = [slot for slot, is_visual in enumerate(held) if not is_visual or next(numbers) in kept]
    longest = max(map(len, left))
    index = torch.stack([torch.nn.functional.pad(places, (longest - len(places), 0)) for places in left])
    counts = torch.tensor([len(places) for places in left])
    mask = torch.arange(longest) >= (longest - counts).unsqueeze(1)
    device = visual_mask.device
    return KeptRows(index.to(device), None if bool(mask.all()) else mask.to(device)), held_left


__all__ = ["KeptRows", "evenly_spaced", "keep_visual_rows", "most_visual_rows", "pooled", "skipped_rows"]
