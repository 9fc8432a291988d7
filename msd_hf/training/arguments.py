"""Arguments of a training run, with the paper's values (section 3.3) as defaults, and the recipes of its draft."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from ..draft.interface import VISUAL_POSITIONS
from ..errors import MSDError, MSDPairingError
from ..limits import LARGEST_SEED, MOST_WORKERS
from ..writing.redaction import redact, secret_values
from .curriculum import CURRICULA, Curriculum, SampleKind
from .kinds import KINDS, TrainedKind
from .losses import LEAST_TEMPERATURE, WEIGHT_NAMES
from .recipes import RECIPES, Recipe
from .rows import ROW_CHOICES


# Fields of `Recipe` that are also arguments. The trainer computes the learning rate, which depends on the draft too.
_RECIPE_FIELDS = tuple(f.name for f in fields(Recipe) if f.name not in ("base_learning_rate", "scale_learning_rate"))
# Values that may be pickled. Other objects, such as the state of a DeepSpeed run, may hold paths of this machine.
_PICKLED = (type(None), bool, int, float, str, list, tuple, dict, Enum, torch.device, AcceleratorConfig)
_AT_LEAST_1 = (
    "max_length",
    "max_visual_rows",
    "unroll_passes",
    "draft_layers",
    "draft_vocab_size",
    "head_chunk_size",
    "eval_max_new_tokens",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_NOT_NEGATIVE = (
    "label_temperature",
    "noise",
    "unroll_decay",
    "eval_prompts",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "dataloader_num_workers",
)
_AT_MOST = {"seed": LARGEST_SEED, "data_seed": LARGEST_SEED, "dataloader_num_workers": MOST_WORKERS}
# For optional flags on the command line: `--bf16` alone means yes, and without the flag the value is `None`.
_FLAG = {"nargs": "?", "const": True}


@dataclass
class MSDTrainingArguments(TrainingArguments):
    """
    Arguments of [`MSDTrainer`]: those of `TrainingArguments`, with the paper's values as defaults, and the following.
    An argument that is `None` takes its value from the recipe.

    Args:
        draft_kind (`str`, defaults to `"msd"`): `"msd"`, or `"eagle3"`: a draft with a head of its own that reads
            three layers of the target and learns from tokens alone (arXiv 2503.01840).
        recipe (`str`, defaults to `"paper"`): `"paper"`, or `"recommended"`, which adds changes that raised the
            acceptance length in our studies and scales the learning rate with the size of the draft.
        learning_rate (`float`, *optional*): paper: 5e-5; recommended: 5e-5 times 4,096 over the hidden size.
        warmup_steps (`float`, *optional*): paper: 2,000; recommended: 0.05, a share of all steps.
        max_length (`int`, defaults to 2048): number of tokens to which longer samples are cut, expanded images
            included. A sample that would lose a part of an image is skipped and counted. No number is too large for
            the draft, whose memory in training grows with the length and not with its square.
        feature_loss_weight (`float`, *optional*): weight of the Smooth-L1 loss on hidden states; paper: 1.0.
        token_loss_weight (`float`, *optional*): weight of the cross-entropy on tokens; paper: 0.1.
        accepted_length_loss_weight (`float`, *optional*): weight of the loss on the expected accepted length: the
            number of drafted tokens, one for each of `unroll_passes`, that are expected to be refused. Paper: 0.
        label_temperature (`float`, *optional*): temperature of the target's probabilities that the losses on tokens
            compare with: best the one of generation. 0 takes the most likely token alone, as greedy decoding does.
            Paper: 1.
        noise (`float`, *optional*): range of the uniform noise on hidden states in a sample of 512 tokens; paper: 0.2.
        trained_rows (`str`, *optional*): the positions in the loss: `"answer"`, those of the assistant's tokens, or
            `"drafted"`, those that generation drafts from ([`~msd_hf.training.rows.trained_rows`]). Paper: `"answer"`.
        unroll_passes (`int`, *optional*): passes of the draft in each step. All passes but the first read the draft's
            own outputs. Paper: 1.
        final_unroll_passes (`int`, *optional*): passes at the end of the run, to which they grow from `unroll_passes`;
            each number of passes has an equal part of the run. Paper: they stay.
        unroll_decay (`float`, defaults to 0.8): weight of each pass relative to the pass before it.
        max_visual_rows (`int`, *optional*): the most visual rows of a sample that the draft reads, evenly spaced, as
            with the same setting in generation. Default: all.
        visual_row_dropout (`float`, defaults to 0.0): share of samples in which the draft reads a random number of the
            visual rows, evenly spaced, so that it gets used to every `max_visual_rows`.
        hard_example_mixing (`float`, *optional*): share of the samples, from the second epoch on, that are drawn again
            because the draft did badly on them: in proportion to the share of positions at which its most likely token
            was not the target's. Needs data sets with a length. Paper: 0.
        draft_layers (`int`, *optional*): decoder layers of a new draft. Paper: 1.
        init_from_last_layer (`bool`, *optional*): whether a new draft starts from the target's last layer.
        global_image_vector (`bool`, *optional*): whether a new draft adds one vector, pooled from all visual rows that
            it has read, to the input of each text row. Paper: no.
        init_from_head (`bool`, *optional*): whether the head of a new EAGLE-3 draft starts as the target's. Paper: no.
        target_layers (`str`, *optional*): layers of the target that a new draft reads, an MSD draft besides the last
            hidden state: numbers from 0, with commas; `"auto"` for one low, one middle and one high layer; or
            `"none"`. EAGLE-3: auto.
        target_written_answers (`bool`, *optional*): whether `msd-hf train` first lets the target answer the prompts
            and then trains on these answers.
        decouple_visual_tokens (`bool`, defaults to `True`): whether a new draft is fed visual positions as they are;
            `False` is plain EAGLE.
        visual_positions (`str`, *optional*): what a new EAGLE-3 draft is fed at visual positions, a value of
            [`Eagle3DraftConfig`]: `"decoupled"` as an MSD draft, others as engines feed it. Default: the image's
            embedding.
        draft_vocab_size (`int`, *optional*): number of tokens that a new EAGLE-3 draft proposes: the most frequent
            ones of the answers in the data. Default: all of the target's.
        curriculum (`str`, defaults to `"two-stage"`): `"two-stage"` (text first, then a rising share of visual
            samples), `"mixed"` (one share for the whole run), `"text"` or `"visual"`.
        curriculum_stages (`int`, defaults to 40): number of equal parts of the run, each with its own share of visual
            samples.
        text_fraction (`float`, defaults to 0.5): fraction of the run, from its start, that is text only.
        final_visual_share (`float`, defaults to 1.0): share of visual samples in the last part.
        mixed_visual_share (`float`, defaults to 0.5): share of visual samples when `curriculum` is `"mixed"`.
        head_chunk_size (`int`, defaults to 1024): number of positions whose logits exist at the same time.
        strict (`bool`, defaults to `False`): stop at a broken sample rather than count it and take the next one.
        eval_prompts (`int`, defaults to 16): number of held-out prompts of each kind on which an evaluation measures
            tau.
        eval_max_new_tokens (`int`, defaults to 128): length limit of the answers to these prompts.

        shard_target (`bool`, defaults to `False`): spread the target's decoder layers over the processes.
        force (`bool`, defaults to `False`): resume from the given checkpoint even if it was made with another target,
            other data or other arguments.

    Raises:
        MSDError: when a value is unknown or out of range.
    """

    # `TrainingArguments` accepts a JSON string for the fields in this list.
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS

    num_train_epochs: float = field(default=40, metadata={"help": "Passes over the smaller data set."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Paper: 5e-5; recommended: 5e-5 * 4096 / hidden size."}
    )
    warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps, or a share of all steps if below 1. Paper: 2000; recommended: 0.05."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient norm that is clipped to."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs, or a share of all steps."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision. Default: where a GPU has it, unless fp16 is set.", **_FLAG},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights without a gradient. A draft has none."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run keeps the patience of early stopping."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})

    draft_kind: str = field(default="msd", metadata={"help": "Kind of draft: msd or eagle3.", "choices": list(KINDS)})
    recipe: str = field(default="paper", metadata={"help": "paper or recommended.", "choices": list(RECIPES)})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a sample, expanded images included."})
    feature_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on hidden states. Paper: 1.0."}
    )
    token_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the cross-entropy on tokens. Paper: 0.1."}
    )
    accepted_length_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss on the expected accepted length. Paper: 0."}
    )
    label_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the target's probabilities as labels. Paper: 1; greedy: 0."}
    )
    noise: float | None = field(default=None, metadata={"help": "Range of the noise on hidden states. Paper: 0.2."})
    trained_rows: str | None = field(
        default=None, metadata={"help": "Rows in the loss: answer (paper) or drafted.", "choices": list(ROW_CHOICES)}
    )
    unroll_passes: int | None = field(
        default=None, metadata={"help": "Passes a step; all but the first read the draft's own outputs. Paper: 1."}
    )
    final_unroll_passes: int | None = field(
        default=None, metadata={"help": "Passes a step at the end of the run, to which they grow. Default: they stay."}
    )
    unroll_decay: float = field(default=0.8, metadata={"help": "Weight of a pass relative to the one before."})
    max_visual_rows: int | None = field(
        default=None, metadata={"help": "Most visual positions of a sample that the draft reads. Default: all."}
    )
    visual_row_dropout: float = field(
        default=0.0, metadata={"help": "Share of samples in which only some visual rows, a random number, are read."}
    )
    hard_example_mixing: float | None = field(
        default=None, metadata={"help": "Share of samples that are drawn again as they went badly. Paper: 0."}
    )
    draft_layers: int | None = field(default=None, metadata={"help": "Decoder layers of a new draft. Paper: 1."})
    init_from_last_layer: bool | None = field(
        default=None, metadata={"help": "Start a new draft from the target's last layer. Paper: no.", **_FLAG}
    )
    init_from_head: bool | None = field(
        default=None, metadata={"help": "Start the head of a new EAGLE-3 draft from the target's. Paper: no.", **_FLAG}
    )
    global_image_vector: bool | None = field(
        default=None, metadata={"help": "A new draft adds one vector of all images to its inputs. Paper: no.", **_FLAG}
    )
    target_layers: str | None = field(
        default=None,
        metadata={"help": "Layers that a new draft also reads: ids with commas, auto, or none. EAGLE-3: auto."},
    )
    target_written_answers: bool | None = field(
        default=None, metadata={"help": "Let the target write the answers first. Paper: no.", **_FLAG}
    )
    decouple_visual_tokens: bool = field(
        default=True, metadata={"help": "Feed visual positions to a new draft as they are; no is plain EAGLE."}
    )
    visual_positions: str | None = field(
        default=None,
        metadata={
            "help": "What a new EAGLE-3 draft is fed at visual positions. Default: image_embedding.",
            "choices": list(VISUAL_POSITIONS),
        },
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "Tokens that a new EAGLE-3 draft proposes. Default: all."}
    )
    curriculum: str = field(
        default="two-stage", metadata={"help": "two-stage, mixed, text or visual.", "choices": list(CURRICULA)}
    )
    curriculum_stages: int = field(
        default=40, metadata={"help": "Parts of the run, each with its own share of visual samples."}
    )
    text_fraction: float = field(default=0.5, metadata={"help": "Share of the run that is text only."})
    final_visual_share: float = field(default=1.0, metadata={"help": "Share of visual samples at the end."})
    mixed_visual_share: float = field(
        default=0.5, metadata={"help": "Share of visual samples in the mixed curriculum."}
    )
    head_chunk_size: int = field(default=1024, metadata={"help": "Positions whose logits exist at the same time."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first broken sample."})
    eval_prompts: int = field(default=16, metadata={"help": "Prompts of each kind on which tau is measured."})
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Length limit of the answers to --eval-prompts."})

    shard_target: bool = field(
        default=False, metadata={"help": "Spread the target's layers over the processes (FSDP2), for a large target."}
    )
    force: bool = field(
        default=False,
        metadata={"help": "With --resume-from-checkpoint PATH: resume even if the checkpoint is of another run."},
    )

    def __post_init__(self) -> None:
        for name, choices in (("draft_kind", KINDS), ("recipe", RECIPES)):
            if getattr(self, name) not in choices:
                raise MSDError(f"Unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        self.start_is_given = self.init_from_last_layer is not None
        for name in _RECIPE_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.kind.recipes[self.recipe], name))
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        self.make_curriculum()
        self._check()

    @property
    def kind(self) -> TrainedKind:
        """The kind of draft that is trained."""
        return KINDS[self.draft_kind]

    def make_curriculum(self) -> Curriculum:
        """Makes the curriculum that these arguments describe."""
        return Curriculum(
            self.curriculum,
            self.curriculum_stages,
            self.text_fraction,
            self.final_visual_share,
            self.mixed_visual_share,
        )

    def make_recipe(self) -> Recipe:
        """The recipe, with the arguments that were given in place of its own values."""
        return replace(self.kind.recipes[self.recipe], **{name: getattr(self, name) for name in _RECIPE_FIELDS})

    def run_length(self, sizes: Mapping[SampleKind, int | None], batch_size: int) -> tuple[int, int]:
        """
        The number of steps in an epoch and in the run.

        Args:
            sizes: number of samples of each kind; `None` for a stream, with which the run is one epoch.
            batch_size: samples of a forward of one process.

        Raises:
            MSDError: with a stream and without `max_steps`.
        """
        curriculum, batch = self.make_curriculum(), batch_size * self.gradient_accumulation_steps * self.world_size
        used = [size for kind, size in sizes.items() if size is not None and curriculum.needs(kind)]
        if any(size is None and curriculum.needs(kind) for kind, size in sizes.items()):
            if self.max_steps < 1:
                raise MSDError(
                    "A streamed data set has no length, over which epochs could be counted: set `max_steps`."
                )
            return self.max_steps, self.max_steps
        # An epoch has whole batches only, so that the samples of a step do not depend on the number of processes.
        steps_per_epoch = max(1, min(used, default=0) // batch)
        num_steps = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
        return steps_per_epoch, num_steps

    def layers_of(self, num_layers: int) -> list[int] | None:
        """
        The layer ids that `target_layers` means for a target of `num_layers` decoder layers; `None` for none.

        Raises:
            MSDError: when it is of no known form, or names a layer that the target lacks.
        """
        layers: Any = self.make_recipe().target_layers
        if isinstance(layers, (list, tuple)):  # from YAML or Python
            layers = ",".join(map(str, layers))
        layers = str(layers)
        if layers == "none":
            return None
        if layers == "auto":
            return self.kind.auto_layers(num_layers)
        try:
            chosen = sorted({int(number) for number in layers.split(",")})
        except ValueError:
            raise MSDError(f"`target_layers` must be numbers with commas, 'auto' or 'none', got {layers!r}.") from None
        if chosen[-1] >= num_layers:
            raise MSDPairingError(
                f"`target_layers` {chosen} must lie between 0 and {num_layers - 1}, the layers of this target."
            )
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """
        As in `TrainingArguments`, for trackers and for `runs/`, which are public; so without secrets and local paths.
        """
        return redact(super().to_dict(), secrets=secret_values(vars(self)))

    def __getstate__(self) -> dict[str, Any]:
        # `Trainer` pickles its arguments to `training_args.bin`, which lies beside the draft and is uploaded with it.
        known = {name: value if isinstance(value, _PICKLED) else None for name, value in vars(self).items()}
        return redact(known, secrets=secret_values(vars(self)))

    def __copy__(self) -> MSDTrainingArguments:
        copied = object.__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> MSDTrainingArguments:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def _check(self) -> None:
        if self.layers_of(num_layers=sys.maxsize) is None and self.kind.needs_layers:
            raise MSDError(f"`target_layers` cannot be 'none': {self.kind.name} reads nothing else of the target.")
        for name, (neutral, advice) in self.kind.unused.items():
            if getattr(self, name) != neutral:
                raise MSDError(
                    f"`{name}` cannot be {getattr(self, name)!r} for {self.kind.name} (`draft_kind` "
                    f"{self.draft_kind!r}): {advice}."
                )
        if self.visual_positions not in (None, *VISUAL_POSITIONS):
            raise MSDError(
                f"`visual_positions` must be one of {', '.join(VISUAL_POSITIONS)}, got {self.visual_positions!r}."
            )
        if self.trained_rows not in ROW_CHOICES:
            raise MSDError(f"`trained_rows` must be one of {', '.join(ROW_CHOICES)}, got {self.trained_rows!r}.")
        for name in ("visual_row_dropout", "hard_example_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise MSDError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        temperature = self.make_recipe().label_temperature
        if 0 < temperature < LEAST_TEMPERATURE:
            raise MSDError(
                f"`label_temperature` must be 0, which is greedy, or at least {LEAST_TEMPERATURE}; got {temperature}."
            )
        for name in _AT_LEAST_1:
            if (value := getattr(self, name)) is not None and value < 1:
                raise MSDError(f"`{name}` must be at least 1, got {value}.")
        for name in (*WEIGHT_NAMES, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # not for NaN either
                raise MSDError(f"`{name}` must not be negative, and finite; got {value}.")
        if self.max_steps < 1 and not 0 < self.num_train_epochs < math.inf:
            raise MSDError(f"`num_train_epochs` must be above 0, and finite; got {self.num_train_epochs}.")
        for name, most in _AT_MOST.items():
            if (getattr(self, name) or 0) > most:
                raise MSDError(f"`{name}` must be at most {most:,}, got {getattr(self, name)}.")
        recipe = self.make_recipe()
        if recipe.final_unroll_passes is not None and recipe.final_unroll_passes < recipe.unroll_passes:
            raise MSDError(
                f"`final_unroll_passes` must be at least `unroll_passes`, {recipe.unroll_passes}, got "
                f"{recipe.final_unroll_passes}."
            )
        is_reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.gradient_checkpointing and is_reentrant and recipe.passes_at(1.0) > 1:
            raise MSDError(
                "`gradient_checkpointing_kwargs` with `use_reentrant=True` cannot be combined with `unroll_passes` "
                "above 1: gradients would not reach the keys of earlier passes. Leave `use_reentrant` out."
            )


__all__ = ["MSDTrainingArguments"]
