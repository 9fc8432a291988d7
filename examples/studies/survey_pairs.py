"""A tiny target of any family, a draft that guesses a part of its text, and a comparison of calls with and without."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from survey_configs import PAD, TEXT, tiny_config
from survey_inputs import Inputs, NoInputError
from survey_towers import stand_in_for_timm
from transformers import PreTrainedModel, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT_CLASSES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_CLASSES,
)

from msd_hf import MSDDraftModel
from msd_hf.evaluation.differences import first_difference


NUM_TOKENS = 20
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 20}
# Of logits of the same text, in units of their standard deviation. Kernels that compute in float32 also in a float64
# model, as most recurrent ones do, differ by about 1e-6.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}
_FOLLOWS = 2.0  # how much a head follows the embeddings


def has_images(model_type: str) -> bool:
    """Whether transformers lists a family among those that read images."""
    return model_type in IMAGE_CLASSES


def class_name(model_type: str) -> str:
    """The name of a family's class."""
    name = (IMAGE_CLASSES if has_images(model_type) else TEXT_CLASSES)[model_type]
    return name if isinstance(name, str) else name[0]


def build_target(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny target in float64 with random weights. Its head follows its embeddings: after a token t comes mostly
    p(t), for a random permutation p, and what the layers add makes it another token now and then.

    Raises:
        NoInputError: when the family does not generate text.
    """
    config = tiny_config(model_type)
    stand_in_for_timm(config)
    with torch.random.fork_rng(devices=[]):
        set_seed(seed)
        model = getattr(transformers, class_name(model_type))(config)
        _enlarge(model)
        _let_head_follow(model)
    if getattr(model, "generation_config", None) is None:
        raise NoInputError("it has no `generate`")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    for module in model.modules():  # grouped kernels of experts know no float64
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation("eager")
    return model.double().eval()


@torch.no_grad()
def _enlarge(model: PreTrainedModel) -> None:
    """Parameters that start at zero get values, or pictures would not count in some families."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif any(part in name for part in ("gate", "alpha", ".temp")):
                parameter.normal_(std=0.5)


@torch.no_grad()
def _let_head_follow(model: PreTrainedModel) -> None:
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return
    if head is None and isinstance(model.get_decoder(), PreTrainedModel):
        head = model.get_decoder().get_output_embeddings()
    weight, out = (getattr(module, "weight", None) for module in (embedding, head))
    if weight is None or out is None or weight.shape != out.shape or len(out) < TEXT.stop:
        return
    text = torch.tensor(list(TEXT))
    weight.normal_()
    scale = embedding(text).std()  # Gemma multiplies embeddings
    weight /= scale if torch.isfinite(scale) and scale > 0 else 1.0
    if out is weight:
        return
    out.normal_(std=0.02)
    out[text[torch.randperm(len(text))]] += _FOLLOWS * out.shape[1] ** -0.5 * weight[text] / weight[text].std()
    out[: TEXT.start] = 0.0
    out[TEXT.stop :] = 0.0


def build_draft(target: PreTrainedModel, seed: int = 0) -> MSDDraftModel:
    """A draft that passes embeddings on, with noise: it knows p, and not what the layers add."""
    with torch.random.fork_rng(devices=[]):
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


class AloneError(Exception):
    """The target fails without a draft."""


@dataclass
class Comparison:
    """
    Args:
        outcome: "same", "near-tie" (the logits agree, but rounding chose another token), "other logits" (same tokens,
            logits that differ by more than rounding) or "different".
        lengths: number of tokens that each verification emitted.
        deviation: largest difference of logits behind the same text, in standard deviations.
    """

    outcome: str
    lengths: list[int] = field(default_factory=list)
    deviation: float = 0.0


def compare(target: PreTrainedModel, draft: MSDDraftModel, inputs: Inputs, **options: Any) -> Comparison:
    """
    Generates with and without the draft, with the same seed. A greedy call with a draft returns no logits at first,
    because calls that return them take another path.

    Raises:
        AloneError: when the target fails without the draft.
    """
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    generate = functools.partial(_generate, target, inputs, options)
    try:
        alone = generate(output_logits=True)
    except Exception as error:
        raise AloneError(describe(error)) from error
    drafted = generate(assistant_model=draft, output_logits=options["do_sample"])
    lengths = [count for row in drafted.acceptance_lengths for count in row]
    length = alone.sequences.shape[1] - len(alone.logits)
    expected, got = (output.sequences[0, length:].tolist() for output in (alone, drafted))
    position = first_difference(expected, got)
    if position is not None or drafted.logits is not None:
        logits = drafted.logits or generate(assistant_model=draft, output_logits=True).logits
        count = len(expected) if position is None else position + 1
        deviation = _deviation(alone.logits[:count], logits[:count])
    else:
        deviation = 0.0
    agrees = deviation <= ROUNDING[target.dtype]
    if position is None:
        return Comparison("same" if agrees else "other logits", lengths, deviation)
    return Comparison("near-tie" if agrees else "different", lengths, deviation)


def _generate(target: PreTrainedModel, inputs: Inputs, options: dict[str, Any], **more: Any) -> Any:
    set_seed(0)
    return target.generate(**inputs, **options, **more)


def _deviation(expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...]) -> float:
    left, right = (torch.cat(list(logits)).double() for logits in (expected, got))
    seen = left > left.amax(-1, keepdim=True) - 1000  # others are masked by the target, as Chameleon masks images
    spread = torch.stack([row[known].std() for row, known in zip(left, seen, strict=True)])
    return float((torch.where(seen, left - right, 0.0).abs().amax(-1) / spread).max())


def describe(error: BaseException, length: int = 200) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]


__all__ = [
    "IMAGE_CLASSES",
    "ROUNDING",
    "SAMPLING",
    "TEXT_CLASSES",
    "AloneError",
    "Comparison",
    "build_draft",
    "build_target",
    "class_name",
    "compare",
    "describe",
    "has_images",
]
