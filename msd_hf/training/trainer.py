"""`MSDTrainer`: a transformers `Trainer` that trains a draft against its frozen target."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..decoders import decoder_of
from ..decoding.result import mean_acceptance_length
from ..draft.base import DraftPreTrainedModel
from ..draft.target_sizes import generating_model
from ..errors import MSDDataError, MSDError, MSDUnsupportedError
from ..hub.card import is_generated, load_card, write_card
from ..hub.fingerprint import identify_target
from ..target.adapter import TargetAdapter
from ..target.support import check_pair, check_target
from ..writing.redaction import redact_text
from .acceptance import acceptance_lengths
from .arguments import MSDTrainingArguments
from .best_checkpoint import RestoreBestCheckpoint, SavedState
from .curriculum import SAMPLE_KINDS, CurriculumSampler, Draw
from .data.encoding import ConversationEncoder
from .draft_vocab import answer_vocabulary
from .features.cache import FeatureCache
from .features.fingerprint import draft_fingerprint, target_fingerprint
from .given_data import open_held_out, open_training_data, processor_of
from .hard_examples import HardExamples
from .kinds import check_kind
from .losses import used_terms, weighted_loss
from .meters import LossMeter
from .mixture import Mixture, MixtureCollator
from .new_draft import new_draft
from .objective import DraftObjective
from .provenance import describe_run, read_provenance
from .resuming import ResumableTrainer
from .run_fingerprint import run_fingerprint
from .sharded_target import check_can_shard, check_not_tensor_parallel, shard_target
from .visual_counts import VisualCounts
from .whole_models import check_whole, loaded_whole


logger = logging.get_logger(__name__)


class MSDTrainer(ResumableTrainer):
    """
    Trains a draft in the two stages of the paper (section 3.3).

    The target is frozen. It runs under `no_grad` in each step, or not at all if the data sets are feature caches; its
    embedding and head are used in both cases.

    Args:
        model (*optional*): the draft, of the kind that `args.draft_kind` says; by default a new draft for the target,
            as `args` describe it. An embedding of its own stays as it is.
        target: the target, on any device and in any dtype.
        processing_class (`ProcessorMixin` or tokenizer, *optional*): the target's processor, with its chat template;
            by default the one in the folder or repository that the target was loaded from.
        args: the arguments of the run.
        text_dataset, visual_dataset: data in any form that [`load_conversations`] takes (a `datasets.Dataset` or
            `IterableDataset`, a list of dicts, a name), or a [`FeatureCache`].
        train_dataset (*optional*): instead of the two, samples with and without images in one data set, or a
            dictionary with the keys `"text"` and `"visual"`.
        eval_dataset (*optional*): held-out conversations, with and without images, or a dictionary of such data sets.
            Losses, agreement and tau are measured on them.
        kwargs: further arguments of `Trainer` (`callbacks`, `optimizers`, ...).

    Raises:
        MSDError: when data sets, target and draft do not fit together.
    """

    def __init__(
        self,
        model: DraftPreTrainedModel | None = None,
        target: PreTrainedModel | None = None,
        processing_class: Any = None,
        args: MSDTrainingArguments | None = None,
        text_dataset: Any = None,
        visual_dataset: Any = None,
        eval_dataset: Any = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ):
        if target is None:
            raise MSDError("`MSDTrainer` needs the draft's `target`; `model` is the draft, and may be left out.")
        args = MSDTrainingArguments() if args is None else args
        if isinstance(model, DraftPreTrainedModel):
            check_kind(model, args)
        if generating_model(target) is not target:
            raise MSDUnsupportedError(
                f"`{type(target).__name__}` hands `generate` on to a language model inside of it, to which the draft "
                "belongs: give that model as `target`."
            )
        check_target(target)
        check_whole(target)
        check_not_tensor_parallel(target)
        if args.shard_target:
            check_can_shard(target, args.world_size)
        processing_class = processor_of(target) if processing_class is None else processing_class
        data = open_training_data(text_dataset, visual_dataset, train_dataset, args)
        eval_dataset = open_held_out(eval_dataset)
        if model is None:
            size, used = args.draft_vocab_size, [dataset for dataset in data.values() if dataset is not None]
            num_tokens = target.config.get_text_config(decoder=True).vocab_size
            tokens = None if size is None else answer_vocabulary(used, processing_class, num_tokens, size)
            with loaded_whole(args):
                model = new_draft(target, args, tokens)
        check_pair(target.config, model.config)
        if model.own_embedding is not None:
            model.own_embedding.requires_grad_(False)  # as EAGLE-3 trains; rows read it outside of the draft's forward
        # The target's last hidden state gives the labels, also for a draft that does not read it.
        reads = replace(model.reads_of(decoder_of(target)), with_last=True)
        if redact_text(model.config._name_or_path) != model.config._name_or_path:
            model.config._name_or_path = ""  # a local path; trackers get the whole config
        for name, value in identify_target(target).items():
            setattr(model.config, name, value)
        if args.learning_rate is None:
            args.learning_rate = args.make_recipe().learning_rate(model.config.hidden_size)
            logger.info("The learning rate is %g.", args.learning_rate)
        self._start = draft_fingerprint(model)
        self.processor = processing_class
        self.encoder = ConversationEncoder(processing_class, args.max_length)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        mixture = Mixture(data, self.encoder, args.strict)
        for dataset in mixture.datasets.values():
            if isinstance(dataset, FeatureCache):
                dataset.check(
                    target,
                    processing_class,
                    args.max_length,
                    feature_layers=reads.layers,
                    needs_all_hidden_states=model.reads_visual_states,
                    max_visual_rows=args.max_visual_rows,
                )
                if model.visual_positions == "pooled":
                    dataset.check_visual_rows(None)  # the mean is that of all rows
        rows = args.make_recipe().trained_rows
        self._collate_train = MixtureCollator(tokenizer.pad_token_id or 0, mixture.is_cached, rows)
        self._collate_eval = MixtureCollator(tokenizer.pad_token_id or 0, False, rows)
        # In a list, so that no code takes the target for a model to wrap or to save.
        self._target = [target.eval()]
        use_cache = model.config.use_cache
        # `processing_class` is not passed on, because `Trainer` would save the processor in the draft's folder.
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate_train,
            train_dataset=mixture,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        if model.own_head is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise MSDUnsupportedError(
                f"{args.kind.name[:1].upper()}{args.kind.name[1:]} has a head that the loss reads outside of its "
                "forward, so FSDP and DeepSpeed cannot shard it: use DDP (examples/configs/ddp.yaml)."
            )
        model.config.use_cache = use_cache  # `Trainer` turned it off, also for the saved config
        self.model_accepts_loss_kwargs = True  # the loss is a mean over the rows of the whole batch
        self._loss_shifts_labels = False  # each label is at the row that it belongs to
        self.label_names = ["labels"]
        if not hasattr(target, "hf_device_map") and not getattr(target, "is_quantized", False):
            target.to(self.args.device)
        self._target_hash = None
        if args.shard_target:
            self._target_hash = target_fingerprint(target)
            shard_target(target, self.args.device)
        self.objective = DraftObjective(TargetAdapter(target, reads), self.args)
        names = used_terms(args.make_recipe(), learns_states=model.own_head is None)
        self._train_meter, self._eval_meter = LossMeter(names), LossMeter(names)
        self._visual_counts = VisualCounts(args.max_visual_rows)
        self._hard_examples = None
        if args.make_recipe().hard_example_mixing > 0:
            self._hard_examples = HardExamples({kind: size or 0 for kind, size in mixture.sizes.items()})
        self._skipped: dict[tuple[str, int], str] = {}
        self._held_out_skipped: dict[tuple[str, int], str] = {}
        self._skipped_before: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}
        self._restore_best_checkpoint = RestoreBestCheckpoint()
        self.add_callback(self._restore_best_checkpoint)
        self._sampler: CurriculumSampler
        self._best_step: int | None = None  # step of the best checkpoint, if that was loaded at the end

    @property
    def target(self) -> PreTrainedModel:
        """The frozen target."""
        return self._target[0]

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> CurriculumSampler:
        args, mixture = self.args, self.train_dataset
        sizes = mixture.sizes
        batch_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps_per_epoch, num_steps = args.run_length(sizes, self._train_batch_size)
        self._sampler = CurriculumSampler(
            sizes.get("text", 0),
            sizes.get("visual", 0),
            args.make_curriculum(),
            steps_per_epoch * batch_size,
            num_steps * batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            args.make_recipe().hard_example_mixing,
            None if self._hard_examples is None else self._hard_examples.draw,
        )
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        steps_per_epoch, _ = self.args.run_length(self.train_dataset.sizes, self._train_batch_size)
        epoch = self.state.global_step // steps_per_epoch
        # `Trainer` sets it too, but does not reach the sampler if several processes resume within an epoch.
        self._sampler.set_epoch(epoch)
        if self._hard_examples is not None:
            self._hard_examples.begin_epoch(epoch, self.accelerator)
        super()._run_epoch(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        self.data_collator = self._collate_eval
        try:
            return super().get_eval_dataloader(_HeldOut(open_held_out(dataset), self.encoder, self.args.strict))
        finally:
            self.data_collator = self._collate_train

    # ---- the step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the trained rows. `num_items_in_batch` is the number of these rows in the whole
        batch, over all processes."""
        counted = self._skipped if model.training else self._held_out_skipped
        for kind, index, reason in inputs.get("skipped", ()):
            counted.setdefault((kind, index), reason)
        progress = self.state.global_step / max(1, self.state.max_steps)
        loss, sums = self.objective(model, inputs, self.model.dtype, progress)
        meter = self._train_meter if model.training else self._eval_meter
        meter.add(sums, inputs["is_visual"])
        if model.training:
            visual_mask = inputs.get("visual_mask")
            if visual_mask is None:
                visual_mask = self.objective.adapter.visual_mask(inputs["input_ids"])
            self._visual_counts.add(visual_mask)
            if self._hard_examples is not None:
                trained = inputs["labels"] != -100
                self._hard_examples.add(trained, sums.agrees, inputs["places"], inputs["is_visual"])
        if num_items_in_batch is None:
            num_items_in_batch = sums.num_rows
        loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and model.training:
            loss = loss * self.accelerator.num_processes  # `Trainer` averages gradients over processes
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._train_meter.read(self.accelerator)
            skipped = sum(self._count_skipped().values())
            if skipped:
                logs["skipped_samples"] = skipped
        if self.state.global_step == self._first_step:  # a run that was resumed at its end has no loss of its own
            logs.pop("train_loss", None)
        self._metrics |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._held_out_skipped = {}
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        values = self._eval_meter.read(self.accelerator)
        values.pop("visual_share", None)
        if values:
            values["loss"] = weighted_loss(values, self.args.make_recipe())
        values |= self._measure_tau(dataloader.dataset.conversations)
        skipped = dict(gather_object(list(self._held_out_skipped.items())))
        if skipped:
            values["skipped_samples"] = len(skipped)
        metrics = {**output.metrics, **{f"{metric_key_prefix}_{name}": value for name, value in values.items()}}
        return EvalLoopOutput(output.predictions, output.label_ids, metrics, output.num_samples)

    def _measure_tau(self, conversations: Any) -> dict[str, float]:
        if self.args.eval_prompts == 0:
            return {}
        chosen = self._choose_prompts(conversations)
        # The processes that hold a target together must run it together: each measures all prompts.
        is_shared = self.args.shard_target or self.accelerator.num_processes == 1
        share = chosen if is_shared else chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        draft = self._whole_draft()
        own = acceptance_lengths(self.target, draft, self.processor, share, self.args.eval_max_new_tokens)
        lengths = own if is_shared else {kind: gather_object(own[kind]) for kind in own}
        taus = {f"tau_{kind}": mean_acceptance_length(lengths[kind]) for kind in lengths if lengths[kind]}
        everything = [answer for answers in lengths.values() for answer in answers]
        return {"tau": mean_acceptance_length(everything), **taus} if everything else {}

    def _choose_prompts(self, conversations: Any) -> list[Any]:
        """The first usable conversations of each kind, `eval_prompts` of each."""
        chosen: dict[bool, list[Any]] = {True: [], False: []}
        for index in range(len(conversations)):
            if min(len(group) for group in chosen.values()) >= self.args.eval_prompts:
                break
            try:
                conversation = conversations[index]
                self.encoder(conversation)
            except MSDDataError:
                continue
            same_kind = chosen[bool(conversation.images)]
            if len(same_kind) < self.args.eval_prompts:
                same_kind.append(conversation)
        return [*chosen[False], *chosen[True]]

    def _whole_draft(self) -> DraftPreTrainedModel:
        """The draft with all of its weights on this process."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return self.accelerator.unwrap_model(self.model)
        # A draft cannot run with sharded weights: the first process collects them and sends them to the others.
        weights = [self.accelerator.get_state_dict(self.model_wrapped)]
        broadcast_object_list(weights)
        sharded = self.accelerator.unwrap_model(self.model)
        draft = self.args.kind.model_class(sharded.config)
        draft.generation_config = sharded.generation_config
        draft.load_state_dict(weights[0])
        return draft.to(self.args.device)

    # ---- checkpoints ----

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        datasets = self.train_dataset.datasets
        data = {f"{kind}_data": datasets.get(kind) for kind in SAMPLE_KINDS}
        return run_fingerprint(
            self.args,
            self.target,
            self.encoder.fingerprint,
            self._start,
            {**data, "eval_data": self.eval_dataset},
            self.callback_handler.callbacks,
            self._target_hash,
        )

    def restore(self, folder: str) -> None:
        self._restore_best_checkpoint.resumed_from = folder
        provenance = read_provenance(folder)
        self._skipped_before = Counter(provenance.get("data", {}).get("skipped", {}))
        self._metrics |= provenance.get("metrics", {})
        self._visual_counts.restore(provenance.get("data", {}).get("visual_positions", {}))
        self._set_visual_rows()  # as the save of this checkpoint did, because evaluations draft with it
        if self._hard_examples is not None:
            self._hard_examples.load(folder, self.accelerator.is_main_process)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = read_provenance(str(self.state.best_model_checkpoint))
        self._metrics |= best.get("metrics", {})
        self._best_step = best.get("step")

    def _set_visual_rows(self) -> None:
        """Writes into the draft's configuration how many visual positions the samples have had."""
        number = self._visual_counts.usual_most()
        if number is not None:
            self.model.config.trained_visual_rows = number
            if not hasattr(self.model.generation_config, "max_visual_rows"):  # `None` is a choice: all rows
                self.model.generation_config.max_visual_rows = "auto"

    def _save(self, *args: Any, **kwargs: Any) -> None:
        self._set_visual_rows()
        super()._save(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._hard_examples is not None:
            self._hard_examples.save(output_dir, self.accelerator, self.args.should_save)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.state: TrainerState = SavedState.of(self.state)
        super()._save_checkpoint(*args, **kwargs)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes the card of the draft into the output folder, which must hold the draft already (`save_model`). A card
        that somebody has written or edited stays.

        Args:
            language, license, tags (*optional*): of the metadata.
            model_name (*optional*): what a reader of the card loads the draft by; default: `hub_model_id`, else the
                name of the output folder.
            kwargs: further arguments of `Trainer.create_model_card`, which mean nothing for a draft.

        Raises:
            MSDError: when the output folder holds no draft.
        """
        if not self.is_world_process_zero():
            return
        card = load_card(str(self.args.output_dir))
        if card is not None and not is_generated(card.content):
            return
        write_card(
            str(self.args.output_dir),
            self.args.hub_model_id or model_name,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags or (),
        )

    def provenance(self) -> dict[str, Any]:
        return {
            **describe_run(self.args),
            "recipe": self.args.recipe,
            "target": self.model.config.target_name_or_path or type(self.target).__name__,
            "step": self.state.global_step if self._best_step is None else self._best_step,
            "max_steps": self.state.max_steps,
            "finished": self.has_ended,
            "fingerprint": self.fingerprint,
            "data": {
                **self.train_dataset.sizes,
                "cached_features": self.train_dataset.is_cached,
                "skipped": dict(self._count_skipped(gather=False)),
                "visual_positions": self._visual_counts.saved(),
            },
            "metrics": self._metrics,
        }

    def _count_skipped(self, gather: bool = True) -> Counter[str]:
        items = list(self._skipped.items())
        if gather and self.accelerator.num_processes > 1:
            self._skipped = dict(gather_object(items))
        return self._skipped_before + Counter(self._skipped.values())


class _HeldOut(Dataset):
    """Held-out conversations as samples, in the order of the data."""

    def __init__(self, conversations: Any, encode: ConversationEncoder, strict: bool):
        self.conversations = conversations
        self._mixture = Mixture({"text": conversations}, encode, strict)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._mixture[Draw(index, "text", index)]


__all__ = ["MSDTrainer"]
