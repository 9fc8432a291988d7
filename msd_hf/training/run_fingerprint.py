"""What a training run depends on, in a form that two runs can compare: hashes of models and data, and arguments."""

from __future__ import annotations

import enum
import hashlib
import json
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import EarlyStoppingCallback, PreTrainedModel

from ..errors import MSDError
from .arguments import MSDTrainingArguments
from .data.conversations import Conversation
from .features.fingerprint import target_fingerprint


# The arguments that change the weights. Logging, saving and paths do not; nor do the number of processes and the split
# of a batch, because the draws of the curriculum and the noise depend only on the number of a sample.
_ARGUMENTS = (
    "draft_kind",
    "recipe",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "max_length",
    "feature_loss_weight",
    "token_loss_weight",
    "accepted_length_loss_weight",
    "label_temperature",
    "noise",
    "trained_rows",
    "unroll_passes",
    "final_unroll_passes",
    "unroll_decay",
    "max_visual_rows",
    "visual_row_dropout",
    "hard_example_mixing",
    "draft_layers",
    "init_from_last_layer",
    "init_from_head",
    "global_image_vector",
    "target_layers",
    "target_written_answers",
    "decouple_visual_tokens",
    "visual_positions",
    "draft_vocab_size",
    "curriculum",
    "curriculum_stages",
    "text_fraction",
    "final_visual_share",
    "mixed_visual_share",
    "load_best_model_at_end",
)
# Left out where they have these values, because checkpoints from before there were kinds of drafts do not name them.
_NOT_NAMED = {"draft_kind": "msd", "init_from_head": False}
# The arguments that say which weights are the best ones.
_BEST_ARGUMENTS = (
    "metric_for_best_model",
    "greater_is_better",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_prompts",
    "eval_max_new_tokens",
)
_HASHES = {
    "target": "another target",
    "processor": "another processor",
    "draft": "another draft at the start",
    "text_data": "other text data",
    "visual_data": "other visual data",
    "eval_data": "other held-out data",
}
_NUM_PROBES = 64


def argument_values(args: MSDTrainingArguments) -> dict[str, Any]:
    """The arguments of a run that change its result, as JSON values."""
    names = [*_ARGUMENTS, *(_BEST_ARGUMENTS if args.load_best_model_at_end else ())]
    values = {name: getattr(args, name) for name in names if getattr(args, name) != _NOT_NAMED.get(name, ...)}
    # Only one of the two counts.
    values.pop("num_train_epochs" if args.max_steps > 0 else "max_steps")
    values["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return json.loads(json.dumps(values, default=_json_value))


def run_fingerprint(
    args: MSDTrainingArguments,
    target: PreTrainedModel,
    processor: str,
    draft: str,
    data: dict[str, Any],
    callbacks: list[Any],
    target_hash: str | None = None,
) -> dict[str, Any]:
    """
    Identifies a run by all that its result depends on. It holds neither paths nor secrets.

    Args:
        args: the arguments of the run.
        target: the frozen target.
        processor, draft: fingerprints of the processor and of the draft before its first step.
        data: the data sets `text_data`, `visual_data` and `eval_data`; `None` for one that is not there.
        callbacks: the callbacks of the trainer.
        target_hash (*optional*): fingerprint of the target, whose weights cannot be read once they are spread.
    """
    arguments = argument_values(args)
    arguments["target_dtype"] = str(target.dtype).removeprefix("torch.")
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            arguments["early_stopping_patience"] = callback.early_stopping_patience
            arguments["early_stopping_threshold"] = callback.early_stopping_threshold
    return {
        "target": target_hash or target_fingerprint(target),
        "processor": processor,
        "draft": draft,
        **{name: None if dataset is None else data_fingerprint(dataset) for name, dataset in data.items()},
        "arguments": arguments,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two fingerprints, one phrase for each. Parts that `new` lacks are not compared."""
    found = [phrase for name, phrase in _HASHES.items() if name in new and old.get(name) != new[name]]
    before, now = old.get("arguments", {}), new["arguments"]
    for name in dict.fromkeys((*now, *(before if "target" in new else ()))):
        if before.get(name) != now.get(name):
            found.append(f"{name} {_shown(before.get(name))}, this run has {_shown(now.get(name))}")
    return found


def data_fingerprint(dataset: Any) -> str:
    """
    sha256 of the content of a data set, if it knows that (`Conversations`, `FeatureCache`, `datasets.Dataset`, and
    parts, sums and dictionaries of them), else of its length and at most 64 of its samples.
    """
    for name in ("fingerprint", "_fingerprint"):
        if isinstance(getattr(dataset, name, None), str):
            return getattr(dataset, name)
    content: Any
    if isinstance(dataset, Subset):
        content = [data_fingerprint(dataset.dataset), list(dataset.indices)]
    elif isinstance(dataset, ConcatDataset):
        content = [data_fingerprint(part) for part in dataset.datasets]
    elif isinstance(dataset, dict):
        content = {name: data_fingerprint(part) for name, part in dataset.items()}
    else:
        size = len(dataset)
        places = {number * size // min(_NUM_PROBES, size) for number in range(min(_NUM_PROBES, size))}
        content = [size, [_sample_content(dataset, place) for place in sorted(places)]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_json_value).encode()).hexdigest()


def _sample_content(dataset: Any, place: int) -> Any:
    try:
        sample = dataset[place]
    except MSDError as error:  # a broken sample is skipped and counted when it is trained on
        return str(error)
    if isinstance(sample, Conversation):
        return [sample.id, sample.messages, sample.complete]
    return sample


def _json_value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.Tensor):
        return [list(value.shape), value.flatten()[:_NUM_PROBES].tolist()]
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return type(value).__name__


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


__all__ = ["argument_values", "data_fingerprint", "differences", "run_fingerprint"]
