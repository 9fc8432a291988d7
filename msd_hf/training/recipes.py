"""Recipes for training a draft: its paper's and the recommended one, for each kind of draft."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """
    Values for those arguments of [`MSDTrainingArguments`] that the user left open. The defaults are those of MSD's
    paper (section 3.3).

    Args:
        feature_loss_weight, token_loss_weight, accepted_length_loss_weight, label_temperature, noise, trained_rows,
            unroll_passes, final_unroll_passes, hard_example_mixing, draft_layers, init_from_last_layer,
            init_from_head, global_image_vector, target_layers, target_written_answers, warmup_steps: see
            [`MSDTrainingArguments`].
        base_learning_rate (`float`): the peak learning rate at a hidden size of 4,096.
        scale_learning_rate (`bool`): whether a narrower draft has a higher rate, in proportion.
    """

    feature_loss_weight: float = 1.0
    token_loss_weight: float = 0.1
    accepted_length_loss_weight: float = 0.0
    label_temperature: float = 1.0
    noise: float = 0.2
    trained_rows: str = "answer"
    unroll_passes: int = 1
    final_unroll_passes: int | None = None
    hard_example_mixing: float = 0.0
    draft_layers: int = 1
    init_from_last_layer: bool = False
    init_from_head: bool = False
    global_image_vector: bool = False
    target_layers: str = "none"
    target_written_answers: bool = False
    warmup_steps: float = 2000
    # The rate for a hidden size of 4,096. With `scale_learning_rate` narrower drafts get a higher rate (arXiv
    # 2203.03466).
    base_learning_rate: float = 5e-5
    scale_learning_rate: bool = False

    def passes_at(self, progress: float) -> int:
        """The passes of a step after this share of the run. They grow from `unroll_passes` to `final_unroll_passes`;
        each number has an equal part of the run."""
        first, last = self.unroll_passes, self.final_unroll_passes
        return first if last is None else min(last, first + int(progress * (last - first + 1)))

    def learning_rate(self, hidden_size: int) -> float:
        """The peak learning rate for a draft with this hidden size."""
        return self.base_learning_rate * (4096 / hidden_size if self.scale_learning_rate else 1.0)


RECIPES = {
    "paper": Recipe(),
    # The changes that raised tau on the toy world (`examples/studies/ablation.py --study recipes`). Several layers and
    # target-written answers did not raise it.
    "recommended": Recipe(
        noise=0.0,
        trained_rows="drafted",
        unroll_passes=3,
        init_from_last_layer=True,
        warmup_steps=0.05,
        scale_learning_rate=True,
    ),
}


# Of EAGLE-3 (arXiv 2503.01840) and its published training code: tokens alone are compared, over seven passes. The
# recommended one adds the changes that raised tau for MSD drafts, as far as such a draft can have them.
_EAGLE3 = Recipe(
    feature_loss_weight=0.0,
    token_loss_weight=1.0,
    noise=0.0,
    unroll_passes=7,
    target_layers="auto",
    warmup_steps=0.015,
)
EAGLE3_RECIPES = {
    "paper": _EAGLE3,
    "recommended": replace(
        _EAGLE3, trained_rows="drafted", init_from_head=True, warmup_steps=0.05, scale_learning_rate=True
    ),
}


__all__ = ["EAGLE3_RECIPES", "RECIPES", "Recipe"]
