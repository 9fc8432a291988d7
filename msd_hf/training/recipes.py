"""What a draft is trained by: the paper's recipe, and the recommended one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """
    The arguments of [`MSDTrainingArguments`] that a recipe fills in where they are left open; the defaults are the
    paper's (section 3.3).
    """

    feature_loss_weight: float = 1.0
    token_loss_weight: float = 0.1
    noise: float = 0.2
    trained_rows: str = "answer"
    unroll_passes: int = 1
    init_from_last_layer: bool = False
    target_layers: str = "none"
    target_written_answers: bool = False


RECIPES = {
    "paper": Recipe(),
    # What raised tau on the toy world (`examples/ablation.py --study recipes`). Several layers and target-written
    # answers did not.
    "recommended": Recipe(noise=0.0, trained_rows="drafted", unroll_passes=3, init_from_last_layer=True),
}


__all__ = ["RECIPES", "Recipe"]
