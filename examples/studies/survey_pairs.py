"""A tiny target of any family, a draft that guesses a part of its text, and a comparison of calls with and without."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from survey_configs import PAD, TEXT, VOCAB_SIZE, tiny_config
from survey_inputs import NoInputError, image_inputs, other_image, text_inputs
from transformers import PreTrainedModel, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from msd_hf import MSDDraftModel, MSDError
from msd_hf.evaluation.differences import first_difference
from msd_hf.target.support import check_target


NUM_TOKENS = 20
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 20}
_PER_SIZE = 2.0  # of logits: how much the head follows the embeddings


def model_class(model_type: str, with_images: bool) -> type[PreTrainedModel]:
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if with_images else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = names[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build_target(model_type: str, with_images: bool, seed: int = 0) -> PreTrainedModel:
    """A target in float64 whose head follows its embeddings: after a token t comes mostly p(t), for a permutation p of
    the tokens of text, and what the layers add makes it another token now and then."""
    set_seed(seed)
    model = model_class(model_type, with_images)(tiny_config(model_type))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    _rig(model)
    return model.double().eval()


@torch.no_grad()
def _rig(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    if any(weight is None or weight.ndim != 2 or len(weight) < TEXT.stop for weight in weights):
        return
    weight, out = weights
    weight.normal_()
    ids = torch.tensor(list(TEXT))
    scale = embedding(ids).std()
    weight /= scale if torch.isfinite(scale) and scale > 0 else 1.0
    if out is weight or out.shape != weight.shape:
        return
    out.normal_(std=0.02)
    out[ids[torch.randperm(len(ids))]] += _PER_SIZE * out.shape[1] ** -0.5 * weight[ids] / weight[ids].std()
    out[TEXT.stop :] = 0.0
    out[: TEXT.start] = 0.0


def build_draft(target: PreTrainedModel, seed: int = 0) -> MSDDraftModel:
    """A draft that passes embeddings on, with noise: it knows p, and not what the layers add."""
    set_seed(seed)
    draft = MSDDraftModel.from_target(target)
    size = draft.config.hidden_size
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if name == "fc.weight":
                weight.normal_(std=0.05)
                weight[:, :size] += torch.eye(size).to(weight)
            elif "o_proj" in name or "down_proj" in name:
                weight *= 0.3
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = 24, 4, 4
    return draft.to(target.dtype).eval()


@dataclass
class Call:
    """The comparison of one call.

    Args:
        outcome: "identical", "near-tie" (the first difference is one of rounding) or "different".
        lengths: number of tokens that each verification emitted.
    """

    outcome: str
    lengths: list[int] = field(default_factory=list)


@dataclass
class Row:
    """What is found for a family.

    Args:
        model_type, class_name: of the target.
        status: "served", "different", "refused", "failed", "target alone fails", "no model", "no draft".
        text, image: outcomes of calls; the reason, if there are none.
        tau: mean number of tokens a verification.
        dtype: of the target.
        note: the sentence or the exception.
        loss: of a draft, before and after some steps of training.
        seconds: of the whole family.
    """

    model_type: str
    class_name: str = ""
    status: str = "untried"
    text: str = ""
    image: str = ""
    tau: float | None = None
    dtype: str = ""
    note: str = ""
    loss: tuple[float, float] | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(error: BaseException) -> str:
    """One line about an exception."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MSDError) else f"{type(error).__name__}: {text}"[:200]


class AloneError(Exception):
    """The target fails without a draft."""


def compare(target: PreTrainedModel, draft: MSDDraftModel, inputs: dict[str, Any], **options: Any) -> Call:
    """
    Generates with and without the draft.

    Raises:
        AloneError: when the target fails without the draft.
    """
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    try:
        set_seed(0)
        alone = target.generate(**inputs, **options, output_logits=True)
    except Exception as error:
        raise AloneError(describe(error)) from error
    set_seed(0)
    drafted = target.generate(**inputs, **options, assistant_model=draft)
    length = alone.sequences.shape[1] - len(alone.logits)
    expected, got = (output.sequences[0, length:].tolist() for output in (alone, drafted))
    lengths = [count for row in drafted.acceptance_lengths for count in row]
    position = first_difference(expected, got)
    if position is None:
        return Call("identical", lengths)
    if not options["do_sample"] and position < min(len(expected), len(got)):
        logits = alone.logits[position][0].double()
        gap = float(logits[expected[position]] - logits[got[position]])
        if gap <= 1e-5 * float(logits.abs().max()):
            return Call("near-tie", lengths)
    return Call("different", lengths)


def survey(model_type: str, with_images: bool) -> Row:
    """Tries one family: text and image, greedy and sampled."""
    row = Row(model_type)
    try:
        row.class_name = model_class(model_type, with_images).__name__
        target = build_target(model_type, with_images)
    except Exception as error:
        row.status, row.note = "no model", describe(error)
        return row
    target = _in_its_dtype(row, target)
    inputs: dict[str, Any] = {}
    for kind in ("text", "image")[: 1 + with_images]:
        inputs[kind] = _inputs(row, target, kind)
    try:
        check_target(target)
        draft = build_draft(target)
    except MSDError as error:
        row.status, row.note = "refused", describe(error)
        return row
    except Exception as error:
        row.status, row.note = "failed", f"from_target: {describe(error)}"
        return row
    lengths: list[int] = []
    for kind, given in inputs.items():
        if given is not None:
            setattr(row, kind, _try_kind(row, target, draft, kind, given, lengths))
    outcomes = [row.text, row.image]
    if row.status == "untried" and any("different" in outcome for outcome in outcomes):
        row.status = "different"
    if row.status == "untried" and any("identical" in outcome for outcome in outcomes):
        row.status = "served"
    row.tau = sum(lengths) / len(lengths) if lengths else None
    return row


def _in_its_dtype(row: Row, target: PreTrainedModel) -> PreTrainedModel:
    """float64, or float32 where the family computes in nothing else."""
    row.dtype = "float64"
    try:
        target.generate(**text_inputs(target, 1), max_new_tokens=2, do_sample=False)
    except Exception as error:
        if any(word in str(error) for word in ("dtype", "Float", "Double", "float")):
            row.dtype = "float32"
            return target.float()
    return target


def _inputs(row: Row, target: Any, kind: str) -> dict[str, Any] | None:
    """Inputs with which the target runs alone; `None` if there are none, and the row says why."""
    try:
        inputs = text_inputs(target, 1) if kind == "text" else image_inputs(target, 2)
        set_seed(0)
        target.generate(**inputs, max_new_tokens=3, do_sample=False)
    except NoInputError as error:
        setattr(row, kind, f"no input: {error}")
        return None
    except Exception as error:
        setattr(row, kind, f"alone: {describe(error)}")
        return None
    setattr(row, kind, "runs")
    return inputs


def _try_kind(row: Row, target: Any, draft: Any, kind: str, inputs: dict[str, Any], lengths: list[int]) -> str:
    try:
        calls = [compare(target, draft, inputs), compare(target, draft, inputs, **SAMPLING)]
    except AloneError as error:
        return f"alone: {error}"
    except MSDError as error:
        row.status, row.note = "refused", describe(error)
        return "refused"
    except Exception as error:
        row.status, row.note = "failed", f"{kind}: {describe(error)}"
        return "failed"
    for call in calls:
        lengths += call.lengths
    outcome = "/".join(dict.fromkeys(call.outcome for call in calls))
    if kind == "image" and not _image_matters(target, inputs):
        outcome += ", image ignored"
    return outcome


@torch.no_grad()
def _image_matters(target: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    first, second = (target(**given).logits[0, -1] for given in (inputs, other_image(inputs)))
    return not torch.allclose(first, second, atol=1e-6)


__all__ = ["NUM_TOKENS", "SAMPLING", "VOCAB_SIZE", "Row", "build_draft", "build_target", "compare", "survey"]
