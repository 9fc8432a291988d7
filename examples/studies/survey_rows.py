"""What the survey finds for one family: a row of `examples/FAMILIES.md`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from survey_inputs import Inputs, NoInputError, image_inputs, other_image, text_inputs
from survey_pairs import SAMPLING, AloneError, build_draft, build_target, class_name, compare, describe, has_images
from survey_table import NEEDS_IMAGE, NO_TARGETS
from transformers import PreTrainedModel

from msd_hf import MSDDraftModel, MSDError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.target.support import check_target
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.objective import DraftObjective


SERVED, REFUSED, FAILED, ALONE, UNTRIED = "served", "refused", "failed", "target alone fails", "untried"
TRAINING_STEPS = 8


@dataclass
class Row:
    """
    Args:
        model_type, class_name: of the target.
        status: "served", "refused", "failed" (an exception, or other tokens), "target alone fails", "untried" (no
            model or no input could be built).
        text, image: outcomes of calls, or why there are none.
        tau: mean number of tokens a verification.
        dtype: of the target.
        deviation: largest difference of logits, in their standard deviations.
        loss: of a draft before and after some steps of training on one batch.
        note: the sentence of a refusal, or an exception.
    """

    model_type: str
    class_name: str = ""
    status: str = UNTRIED
    text: str = "–"
    image: str = "–"
    tau: float | None = None
    dtype: str = ""
    deviation: float = 0.0
    loss: tuple[float, float] | None = None
    note: str = ""


@dataclass
class Family:
    """A target with inputs that it runs alone; a kind of input that it has not got is missing."""

    target: PreTrainedModel
    inputs: dict[str, Inputs]


def find_row(model_type: str, training: bool = False) -> Row:
    """Tries one family: text and image, greedy and sampled; with `training`, some steps of training of a draft."""
    row = Row(model_type, class_name(model_type))
    if model_type in NO_TARGETS:
        row.note = NO_TARGETS[model_type]
        return row
    try:
        target = build_target(model_type)
    except Exception as error:
        row.note = str(error) if isinstance(error, NoInputError) else f"no model could be built: {describe(error)}"
        return row
    family = find_inputs(row, target)
    row.dtype = str(target.dtype).removeprefix("torch.")
    try:
        check_target(target)
        draft = build_draft(target)
        _compare_all(row, family, draft)
        if training and row.status == SERVED:
            row.loss = train_draft(target, draft, list(family.inputs.values())[-1])
    except MSDError as error:
        row.status, row.note = REFUSED, str(error)
    except AloneError as error:
        row.status, row.note = ALONE, str(error)
    except Exception as error:
        row.status, row.note = FAILED, describe(error)
        if not family.inputs:
            _without_inputs(row)
    return row


def find_inputs(row: Row, target: PreTrainedModel) -> Family:
    """Inputs that the target runs alone. The row says why there are none of a kind. The target is made float32 if it
    does not run in float64."""
    family = Family(target, {})
    if target.config.is_encoder_decoder:
        return family
    makers: dict[str, Callable[[Any, int], Inputs]] = {"text": text_inputs, "image": image_inputs}
    kinds = ["text"] * (row.model_type not in NEEDS_IMAGE) + ["image"] * has_images(row.model_type)
    for kind in kinds:
        outcome = _run_alone(family, kind, makers[kind])
        if any(word in outcome for word in ("dtype", "Double", "Float", "float")) and target.dtype == torch.float64:
            target.float()
            for name in family.inputs:
                family.inputs[name] = makers[name](target, 1)
            outcome = _run_alone(family, kind, makers[kind])
        setattr(row, kind, outcome)
    return family


def _run_alone(family: Family, kind: str, make: Callable[[Any, int], Inputs]) -> str:
    try:
        inputs = make(family.target, 1)
        torch.manual_seed(0)
        family.target.generate(**inputs, max_new_tokens=3, do_sample=False)
    except NoInputError as error:
        return f"no input: {error}"
    except Exception as error:
        return f"alone: {describe(error)}"
    family.inputs[kind] = inputs
    return "alone"


def _compare_all(row: Row, family: Family, draft: MSDDraftModel) -> None:
    if not family.inputs:
        _without_inputs(row)
        return
    lengths: list[int] = []
    good = True
    for kind, inputs in family.inputs.items():
        calls = [compare(family.target, draft, inputs, **options) for options in ({}, SAMPLING)]
        lengths += [length for call in calls for length in call.lengths]
        row.deviation = max(row.deviation, *(call.deviation for call in calls))
        outcome = "/".join(dict.fromkeys(call.outcome for call in calls))
        good = good and all(call.outcome in ("same", "near-tie") for call in calls)
        if kind == "image" and not image_matters(family.target, inputs):
            outcome += ", image without effect"
        setattr(row, kind, outcome)
    row.status = SERVED if good else FAILED
    row.tau = sum(lengths) / len(lengths)


def _without_inputs(row: Row) -> None:
    found = [outcome for outcome in (row.text, row.image) if outcome != "–"]
    row.status = ALONE if any(outcome.startswith("alone:") for outcome in found) else UNTRIED
    row.note = "; ".join(found)


@torch.no_grad()
def image_matters(target: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether another picture changes the logits."""
    first, second = (target(**given).logits[0, -1] for given in (inputs, other_image(inputs)))
    return not torch.allclose(first, second, atol=1e-6)


def train_draft(target: PreTrainedModel, draft: MSDDraftModel, inputs: Inputs) -> tuple[float, float]:
    """Trains a draft on the features of one batch. Returns the loss before and after it."""
    ids = inputs["input_ids"]
    batch = {**inputs, "numbers": torch.zeros(len(ids), dtype=torch.long)}
    batch["labels"] = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 6, ids, -100)
    with tempfile.TemporaryDirectory() as folder:
        args = MSDTrainingArguments(output_dir=folder, use_cpu=True, report_to="none", noise=0.0)
    objective = DraftObjective(TargetAdapter(target), args)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    losses = []
    draft.train()
    for _ in range(TRAINING_STEPS + 1):
        loss, _ = objective(draft, batch, draft.dtype)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    draft.eval()
    return losses[0], losses[-1]


__all__ = [
    "ALONE",
    "FAILED",
    "REFUSED",
    "SERVED",
    "UNTRIED",
    "Family",
    "Row",
    "find_inputs",
    "find_row",
    "image_matters",
    "train_draft",
]
