"""`msd-hf train`: a training run from command-line arguments or a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from torch.distributed import get_backend
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ..draft.auto import AutoDraft
from ..draft.base import DraftPreTrainedModel
from ..errors import MSDError, MSDUsageError, describe_error
from ..hub.names import target_or_named
from ..loading import load_config, load_processor, load_target, parse_dtype
from ..processes.group import ALONE, Processes, launched
from ..tree.settings import TREE_SETTINGS, TreeSettings
from .arguments import MSDTrainingArguments
from .checkpoint_space import check_checkpoint_space, count_parameters
from .curriculum import SAMPLE_KINDS, other_kind
from .data.conversations import JoinedConversations, load_conversations
from .disk import check_writable
from .draft_vocab import check_size
from .features.cache import FeatureCache
from .features.fingerprint import target_fingerprint
from .kinds import check_kind
from .regeneration.journal import is_written
from .regeneration.regenerate import regenerate
from .resume_point import find_resume_point
from .run_fingerprint import argument_values
from .script_help import HelpAll, format_help
from .trainer import MSDTrainer
from .whole_models import loaded_whole


_GO_ON = "Start the same command on all machines again, with --resume-from-checkpoint True, to go on."


@dataclass
class ScriptArguments:
    """The arguments of `msd-hf train` besides [`MSDTrainingArguments`]."""

    target: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the target; may be left out if --draft names it."}
    )
    draft: str | None = field(default=None, metadata={"help": "A draft to continue from, instead of a new one."})
    text_data: list[str] | None = field(
        default=None, metadata={"help": "Conversations without images: one or more files, saved data sets or Hub ids."}
    )
    visual_data: list[str] | None = field(default=None, metadata={"help": "Conversations with images, likewise."})
    text_data_weights: list[float] | None = field(
        default=None, metadata={"help": "The share of each of several --text-data. Default: each sample once a pass."}
    )
    visual_data_weights: list[float] | None = field(
        default=None, metadata={"help": "The share of each of several --visual-data."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that the image paths are relative to."})
    text_features: str | None = field(
        default=None, metadata={"help": "Output of `msd-hf extract` for the text data, instead of --text-data."}
    )
    visual_features: str | None = field(
        default=None, metadata={"help": "Output of `msd-hf extract` for the visual data, instead of --visual-data."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out conversations, with and without images."})
    eval_samples: int = field(
        default=0, metadata={"help": "Without --eval-data: hold out the last samples of each data set, this many."}
    )
    target_dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    target_device_map: str | None = field(default=None, metadata={"help": "auto spreads the target over devices."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa or eager."})
    num_assistant_tokens: int | None = field(default=None, metadata={"help": "Nodes of the draft's tree."})
    tree_depth: int | None = field(default=None, metadata={"help": "Expansions of the draft's tree."})
    tree_top_k: int | None = field(default=None, metadata={"help": "Candidates per node of the draft's tree."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better --metric-for-best-model."}
    )
    answer_batch_size: int = field(
        default=8, metadata={"help": "Prompts that are answered together, with --target-written-answers."}
    )
    answer_max_new_tokens: int = field(default=512, metadata={"help": "Length limit of a target-written answer."})


class _Parser(HfArgumentParser):
    def format_help(self, with_inherited: bool = False) -> str:
        ours = {*vars(ScriptArguments)["__annotations__"], *vars(MSDTrainingArguments)["__annotations__"]}
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)} - ours
        return format_help(self._actions, inherited, with_inherited)

    def error(self, message: str) -> NoReturn:
        raise MSDUsageError(f"{message[:1].upper()}{message[1:]}. `msd-hf train --help` lists the arguments.")


def parse_arguments(argv: Sequence[str]) -> tuple[ScriptArguments, MSDTrainingArguments]:
    """
    Reads the arguments of a run.

    Args:
        argv: the command line. `--config FILE` names a YAML file of arguments, which the command line overrides.

    Raises:
        MSDError: for an unknown argument or a value that is not allowed.
    """
    parser = _Parser((ScriptArguments, MSDTrainingArguments), prog="msd-hf train", allow_abbrev=False)
    parser.add_argument("--config", type=str, default=None, help="YAML file of arguments.")
    parser.add_argument("--help-all", action=HelpAll, help="List all arguments.")
    known, _ = _config_parser().parse_known_args(list(argv))
    if known.config is not None:
        parser.set_defaults(**_read_config(known.config))
    try:
        script_args, args, _, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except MSDError:
        raise
    except Exception as error:  # of many kinds, above all for values of a YAML file, whose types nobody checks
        raise MSDError(f"The training arguments cannot be used: {describe_error(error)}") from error
    if unknown:
        parser.error(f"unknown arguments {' '.join(unknown)}")
    _check(script_args, args)
    return script_args, args


def run_training(argv: Sequence[str]) -> MSDTrainer:
    """Trains a draft and saves it in `output_dir`. Returns the trainer, which holds the metrics."""
    script_args, args = parse_arguments(argv)
    # Over NCCL training needs no connections of gloo, and NCCL notices a lost process itself.
    talks = args.world_size > 1 and ("gloo" in get_backend() or bool(args.target_written_answers))
    processes = launched() if talks else ALONE
    with processes.together(_GO_ON):
        return _train(script_args, args, processes)


def _train(script_args: ScriptArguments, args: MSDTrainingArguments, processes: Processes) -> MSDTrainer:
    set_seed(args.seed)
    resume = args.resume_from_checkpoint
    resume = True if str(resume).lower() == "true" else None if str(resume).lower() == "false" else resume
    # A checkpoint of another run is refused before the target is loaded, if its arguments differ.
    point = find_resume_point(resume, args.force, str(args.output_dir), {"arguments": _given_values(args)})
    data = _open_data(script_args, args)
    with loaded_whole(args):
        draft = None if script_args.draft is None else _load_draft(script_args.draft, args)
    script_args.target = target_or_named(script_args.target, None if draft is None else draft.config)
    if not point.finished:
        _check_disk(script_args, args, draft, data)
    processor = load_processor(script_args.target)
    with loaded_whole(args):
        target = load_target(
            script_args.target,
            script_args.target_dtype,
            dtype_option="--target-dtype",
            device_map=script_args.target_device_map,
            attn_implementation=script_args.attn_implementation,
        )
    if args.target_written_answers:
        data = {
            kind: _with_target_answers(conversations, kind, target, processor, script_args, args, processes)
            for kind, conversations in data.items()
        }
    data, held_out = _hold_out(data, script_args)
    patience = script_args.early_stopping_patience
    trainer = MSDTrainer(
        model=draft,
        target=target,
        processing_class=processor,
        args=args,
        text_dataset=data.get("text"),
        visual_dataset=data.get("visual"),
        eval_dataset=held_out,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )
    for name, value in _tree_settings(script_args).items():
        if value is not None:
            setattr(trainer.model.generation_config, name, value)
    trainer.saves_at_end = False  # it is saved below, with the metrics of its evaluation
    trainer.train(resume_from_checkpoint=resume)
    if trainer.has_ended and not trainer.was_finished:
        if held_out is not None:
            trainer.evaluate()
        trainer.save_model()
    return trainer


def _check_disk(
    script_args: ScriptArguments, args: MSDTrainingArguments, draft: DraftPreTrainedModel | None, data: dict[str, Any]
) -> None:
    check_writable(str(args.output_dir))
    if draft is None:
        assert script_args.target is not None  # `run_training` has set it
        config = load_config(script_args.target)
        if args.draft_vocab_size is not None:
            check_size(args.draft_vocab_size, config.get_text_config(decoder=True).vocab_size)
        num_parameters = count_parameters(config, args)
    else:
        num_parameters = draft.num_parameters()
    check_checkpoint_space(args, num_parameters, {kind: len(data[kind]) for kind in SAMPLE_KINDS if kind in data})


def _given_values(args: MSDTrainingArguments) -> dict[str, Any]:
    """The values that the run is identified by, without the learning rate if the size of the draft decides it."""
    return {name: value for name, value in argument_values(args).items() if (name, value) != ("learning_rate", None)}


def _config_parser() -> Any:
    parser = _Parser((), add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=str, default=None)
    return parser


def _read_config(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MSDError(f"--config {path!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MSDError(f"--config {path!r} is not UTF-8: {error.reason} at byte {error.start}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MSDError(f"--config {path!r} is not YAML: {error}.") from error
    if not isinstance(config, dict):
        raise MSDError(f"--config {path!r} must hold arguments, one `name: value` a line.")
    config = {str(name).replace("-", "_"): value for name, value in config.items()}
    known = {f.name for kind in (ScriptArguments, MSDTrainingArguments) for f in dataclasses.fields(kind) if f.init}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise MSDError(f"--config {path!r} has unknown arguments: {', '.join(unknown)}.")
    return config


def _check(script_args: ScriptArguments, args: MSDTrainingArguments) -> None:
    if script_args.target is None and script_args.draft is None:
        raise MSDError("--target is missing: the folder or Hub id of the model that the draft is for.")
    cached = [script_args.text_features, script_args.visual_features]
    plain = [script_args.text_data, script_args.visual_data]
    if not any(cached) and not any(plain):
        raise MSDError("There is nothing to train on: give --text-data, --visual-data, or both.")
    if any(cached) and any(plain):
        raise MSDError("Give conversations (--text-data, --visual-data) or features of them, not both.")
    if any(cached) and args.target_written_answers:
        raise MSDError(
            "--target-written-answers cannot be combined with cached features: run `msd-hf regenerate`, then `msd-hf "
            "extract` on its output, and add --target-written-answers false."
        )
    if any(cached) and args.draft_vocab_size is not None and script_args.draft is None:
        raise MSDError(
            "--draft-vocab-size counts the tokens of conversations, and cannot be combined with cached features: give "
            "conversations, leave it out, or give a --draft that has its vocabulary."
        )
    for kind in SAMPLE_KINDS:
        names, weights = getattr(script_args, f"{kind}_data") or (), getattr(script_args, f"{kind}_data_weights")
        if weights is not None and (len(weights) != len(_as_list(names)) or min(weights, default=0) <= 0):
            raise MSDError(
                f"--{kind}-data-weights must be one number above 0 for each --{kind}-data, of which there are "
                f"{len(_as_list(names))}; got {weights}."
            )
    if (script_args.text_data_weights or script_args.visual_data_weights) and script_args.eval_samples:
        raise MSDError(
            "--eval-samples cannot be combined with weights of data sets, with which a sample may come several times: "
            "give --eval-data."
        )
    if any(cached) and script_args.eval_samples:
        raise MSDError("--eval-samples cannot be combined with cached features: give --eval-data.")
    for name in ("answer_batch_size", "answer_max_new_tokens", "early_stopping_patience"):
        value = getattr(script_args, name)
        if value is not None and value < 1:
            raise MSDError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    parse_dtype(script_args.target_dtype, "--target-dtype")
    if script_args.eval_samples < 0:
        raise MSDError(f"--eval-samples must not be negative, got {script_args.eval_samples}.")
    if script_args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise MSDError(
            "--early-stopping-patience needs --load-best-model-at-end, --metric-for-best-model (tau, for example) and "
            "--eval-strategy steps."
        )
    _check_tree(script_args)
    available = get_available_reporting_integrations()
    missing = sorted(set(args.report_to or ()) - set(available))
    if missing:
        raise MSDError(
            f"--report-to {missing[0]} is not known, or its package is not installed; available: "
            f"{', '.join([*available, 'none'])}."
        )
    for kind in SAMPLE_KINDS:
        given = getattr(script_args, f"{kind}_data") or getattr(script_args, f"{kind}_features")
        if not given and args.make_curriculum().needs(kind):
            raise MSDError(
                f"The curriculum {args.curriculum!r} needs {kind} samples: give --{kind}-data, or "
                f"--curriculum {other_kind(kind)}."
            )


def _check_tree(script_args: ScriptArguments) -> None:
    """Refuses wrong settings of the tree now; `generate` would refuse them only at the first evaluation."""
    TreeSettings.from_generation_config(GenerationConfig(**_tree_settings(script_args)))


def _tree_settings(script_args: ScriptArguments) -> dict[str, Any]:
    """The arguments that go into the generation config of the draft, under the same names."""
    return {name: getattr(script_args, name) for name in TREE_SETTINGS if hasattr(script_args, name)}


def _open_data(script_args: ScriptArguments, args: MSDTrainingArguments) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for kind in SAMPLE_KINDS:
        names, features = getattr(script_args, f"{kind}_data"), getattr(script_args, f"{kind}_features")
        if names is not None:
            folder = script_args.image_folder if kind == "visual" else None
            data[kind] = load_conversations(
                _as_list(names), folder, weights=getattr(script_args, f"{kind}_data_weights")
            )
        elif features is not None:
            data[kind] = FeatureCache(features)
            data[kind].check_visual_rows(args.max_visual_rows)  # before the target is loaded
    return data


def _as_list(names: str | Sequence[str]) -> list[str]:
    """One or more names. A YAML file may hold one without a list."""
    return [names] if isinstance(names, str) else list(names)


def _with_target_answers(
    conversations: Any,
    kind: str,
    target: PreTrainedModel,
    processor: Any,
    script_args: ScriptArguments,
    args: MSDTrainingArguments,
    processes: Processes,
) -> Any:
    if isinstance(conversations, JoinedConversations):
        parts = [
            _with_target_answers(part, kind, target, processor, script_args, args, processes)
            for part in conversations.parts
        ]
        return JoinedConversations(parts, conversations.weights)
    fingerprint = f"{target_fingerprint(target)[:8]}{conversations.fingerprint[:8]}"
    # `--push-to-hub` uploads the output folder without names that begin with `_`. The data is the user's own.
    output = Path(str(args.output_dir)) / "_answers" / f"{kind}-{fingerprint}.jsonl"
    if not processes.from_first(lambda: is_written(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        regenerate(
            target.to(args.device) if script_args.target_device_map is None else target,
            processor,
            conversations,
            output,
            max_new_tokens=script_args.answer_max_new_tokens,
            batch_size=script_args.answer_batch_size,
            strict=args.strict,
            processes=processes,
        )
    return load_conversations(output, conversations.image_folder)


def _hold_out(data: dict[str, Any], script_args: ScriptArguments) -> tuple[dict[str, Any], Any]:
    if script_args.eval_data is not None:
        return data, load_conversations(script_args.eval_data, script_args.image_folder)
    if script_args.eval_samples == 0:
        return data, None
    kept, held_out = {}, []
    for kind, samples in data.items():
        count = len(samples) - script_args.eval_samples
        if count < 1:
            raise MSDError(
                f"--eval-samples {script_args.eval_samples} leaves none of the {len(samples)} {kind} samples."
            )
        kept[kind] = Subset(samples, range(count))
        held_out.append(Subset(samples, range(count, len(samples))))
    return kept, ConcatDataset(held_out)


def _load_draft(name: str, args: MSDTrainingArguments) -> DraftPreTrainedModel:
    draft = AutoDraft.from_pretrained(name)
    check_kind(draft, args)
    return draft.float()


__all__ = ["ScriptArguments", "parse_arguments", "run_training"]
