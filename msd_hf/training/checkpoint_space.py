"""The disk space that the checkpoints of a run need, estimated before its target is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .arguments import MSDTrainingArguments
from .checkpointing import checkpoints
from .curriculum import SampleKind
from .disk import check_space, format_bytes


_FLOAT32_BYTES = 4
_OPTIMIZER_STATES = 2  # the moments of AdamW; other optimizers have fewer
_EXAMPLE_LIMIT = 3


def count_parameters(target_config: PreTrainedConfig, args: MSDTrainingArguments) -> int:
    """Number of parameters of the new draft that `args` describe, without its weights."""
    num_layers = target_config.get_text_config(decoder=True).num_hidden_layers
    fields = args.kind.fields(args, args.layers_of(num_layers))
    model_class = args.kind.model_class
    with torch.device("meta"):
        return model_class(model_class.config_class.from_target(target_config, **fields)).num_parameters()


def check_checkpoint_space(args: MSDTrainingArguments, num_parameters: int, sizes: dict[SampleKind, int]) -> None:
    """
    Checks that the disk has room for the checkpoints that are kept at the same time, and for the draft.

    Args:
        args: the arguments of the run. Checkpoints that its output folder holds already are counted in.
        num_parameters: number of parameters of the draft.
        sizes: number of samples of each data set.

    Raises:
        MSDError: when the disk is too small.
    """
    weights = num_parameters * _FLOAT32_BYTES
    checkpoint = weights if args.save_only_model else weights * (1 + _OPTIMIZER_STATES)
    kept = _num_kept(args, sizes)
    there = sum(path.stat().st_size for folder in checkpoints(args.output_dir) for path in folder.rglob("*"))
    subject = "The checkpoints and the draft of this run"
    if kept:
        subject += f" ({kept:,} x {format_bytes(checkpoint)} and {format_bytes(weights)})"
    check_space(
        Path(str(args.output_dir)),
        max(0, kept * checkpoint - there) + weights,
        subject,
        f"Keep fewer checkpoints (--save-total-limit {_EXAMPLE_LIMIT}, for example), or use another disk.",
    )


def _num_kept(args: MSDTrainingArguments, sizes: dict[SampleKind, int]) -> int:
    """The largest number of checkpoints that exist at the same time."""
    steps_per_epoch, num_steps = args.run_length(sizes, args.train_batch_size)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    every = {"steps": args.save_steps, "epoch": steps_per_epoch, "best": num_steps}.get(strategy)
    if not every:
        return 0
    if every < 1:  # a share of all steps
        every = math.ceil(num_steps * every)
    saved = math.ceil(num_steps / every)
    if not args.save_total_limit or args.save_total_limit < 0:
        return saved
    # The newest one is written before the oldest one is removed, and the best one stays.
    return min(saved, args.save_total_limit + 1 + bool(args.load_best_model_at_end))


__all__ = ["check_checkpoint_space", "count_parameters"]
