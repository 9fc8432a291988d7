"""The help of `msd-hf train`: the arguments that matter first, in groups; those of `TrainingArguments` on demand."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Mapping
from typing import Any


USAGE = """msd-hf train --target TARGET --text-data FILE --visual-data FILE --output-dir FOLDER [...]

Trains a draft for a target, in two stages: text first, then more and more images."""

# An argument of ours that is in no group comes after them.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "target, data and result": (
        "target",
        "text_data",
        "visual_data",
        "image_folder",
        "eval_data",
        "eval_samples",
        "output_dir",
        "config",
    ),
    "training": (
        "draft_kind",
        "recipe",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
        "max_length",
        "seed",
        "draft",
    ),
    "machine": (
        "bf16",
        "use_cpu",
        "target_dtype",
        "target_device_map",
        "attn_implementation",
        "dataloader_num_workers",
        "head_chunk_size",
        "shard_target",
    ),
    "logging and evaluation": (
        "report_to",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "eval_prompts",
        "eval_max_new_tokens",
        "load_best_model_at_end",
        "metric_for_best_model",
        "early_stopping_patience",
    ),
    "checkpoints": (
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "force",
        "push_to_hub",
        "hub_model_id",
    ),
    "cached features": ("text_features", "visual_features"),
    "answers of the target": ("target_written_answers", "answer_batch_size", "answer_max_new_tokens"),
    "parts of a recipe": (
        "feature_loss_weight",
        "token_loss_weight",
        "accepted_length_loss_weight",
        "label_temperature",
        "noise",
        "trained_rows",
        "unroll_passes",
        "final_unroll_passes",
        "unroll_decay",
        "visual_row_dropout",
        "hard_example_mixing",
        "draft_layers",
        "init_from_last_layer",
        "init_from_head",
        "global_image_vector",
        "target_layers",
        "decouple_visual_tokens",
        "visual_positions",
        "draft_vocab_size",
    ),
    "curriculum": ("curriculum", "curriculum_stages", "text_fraction", "final_visual_share", "mixed_visual_share"),
    "the draft's tree": ("num_assistant_tokens", "tree_depth", "tree_top_k"),
}


class HelpAll(argparse.Action):
    """The option `--help-all`: prints the help with all arguments and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(with_inherited=True), end="")
        parser.exit()


def format_help(actions: Iterable[argparse.Action], inherited: Iterable[str], with_inherited: bool) -> str:
    """
    Formats the help of a parser.

    Args:
        actions: the arguments of the parser.
        inherited: names of arguments that are listed on demand, unless they are in a group.
        with_inherited: whether they are listed.
    """
    by_name: dict[str, argparse.Action] = {}
    for action in actions:
        if not isinstance(action, argparse._HelpAction | HelpAll):
            by_name.setdefault(action.dest, action)  # `--no-NAME` of a flag comes after `--NAME`
    grouped = {name for names in GROUPS.values() for name in names}
    rest = [name for name in by_name if name not in grouped]
    behind = set(inherited)
    sections = {title: list(names) for title, names in GROUPS.items()}
    sections["more"] = [name for name in rest if name not in behind]
    if with_inherited:
        sections["arguments of TrainingArguments"] = [name for name in rest if name in behind]
    formatter = _Formatter("msd-hf train", max_help_position=36)
    formatter.add_usage(USAGE, [], [])
    for title, names in sections.items():
        formatter.start_section(title)
        formatter.add_arguments([_shown(by_name[name]) for name in names if name in by_name])
        formatter.end_section()
    if not with_inherited:
        formatter.add_text("--help-all also lists every argument of transformers' TrainingArguments.")
    return formatter.format_help()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out defaults of `None`: the recipe or the machine decides then, as the text says."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def _shown(action: argparse.Action) -> argparse.Action:
    """An argument under one name, with dashes; it also works with underscores."""
    shown = copy.copy(action)
    shown.option_strings = [name for name in action.option_strings if "_" not in name][:1] or action.option_strings
    if shown.choices is None and shown.metavar is None:
        shown.metavar = "BOOL" if action.nargs == "?" else action.dest.rpartition("_")[2].upper()
    return shown


__all__ = ["GROUPS", "HelpAll", "format_help"]
