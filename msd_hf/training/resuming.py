"""A `Trainer` whose result does not depend on whether, and where, a run is interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from .checkpointing import STATE_NAME, is_complete, moved_into, remove_checkpoint, remove_leftovers, write_errors
from .interruption import HeldSignals, StopAtSignal, shielded_worker
from .provenance import PROVENANCE_NAME, read_provenance, write_provenance
from .resume_point import find_resume_point


logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """
    Refuses to resume from a checkpoint of another run, does nothing if the run is finished, and saves a checkpoint at
    SIGTERM and SIGINT. Its subclass gives `fingerprint` and `provenance`.

    Attributes:
        was_finished: whether the run was finished before `train` was called.
        saves_at_end: whether `train` leaves the draft in `output_dir`.
    """

    was_finished = False
    saves_at_end = True
    _is_resumed = False
    _first_step = -1  # step of the checkpoint that the run was resumed from

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the run depends on, as [`run_fingerprint`] gives it."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """The content of `training_provenance.json`."""
        raise NotImplementedError

    def restore(self, folder: str) -> None:
        """Takes over counts and metrics from the checkpoint, or the finished draft, in a folder."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Like `Trainer.train`, and leaves the draft in `output_dir` at its end (`saves_at_end`). When a run is resumed:

        - `resume_from_checkpoint=True` takes the last complete checkpoint, because a run may have been killed while it
          wrote a later one, and starts from the beginning if there is none.
        - A checkpoint of a run with another target, processor, data or arguments that change the result is refused,
          unless its path is given and `args.force` is set.
        - No step follows the last one. If the finished draft is in the output folder too, nothing is done but loading
          it, and `was_finished` is true.

        At SIGTERM or SIGINT the step is finished and a checkpoint is saved before the signal takes effect. A second
        signal takes effect at once.

        Raises:
            MSDError: when the checkpoint cannot be used, or a file cannot be written.
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM.
        """
        output_dir = str(self.args.output_dir)
        point = find_resume_point(resume_from_checkpoint, self.args.force, output_dir, self.fingerprint)
        if resume_from_checkpoint and self.args.should_save:
            remove_leftovers(output_dir)
        if point.finished:
            return self._take_finished(output_dir)
        self._is_resumed = point.folder is not None
        if point.folder is not None:
            self.restore(point.folder)
            self._first_step = TrainerState.load_from_json(str(Path(point.folder) / STATE_NAME)).global_step
        elif resume_from_checkpoint:
            logger.warning("There is no checkpoint in %s: training starts from the beginning.", output_dir)
        return self._train_until_signal(point.folder, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = partial(shielded_worker, inner.worker_init_fn)
        return loader

    def _train_until_signal(self, resume: str | None, *args: Any, **kwargs: Any) -> Any:
        with HeldSignals() as held:
            stop = StopAtSignal(held, self.accelerator)
            self.add_callback(stop)
            try:
                output = super().train(resume, *args, **kwargs)
            finally:
                self.remove_callback(stop)
        if stop.stopped:
            logger.warning(
                "Training stopped after step %d of %d and saved a checkpoint in %s: go on with "
                "--resume-from-checkpoint True.",
                self.state.global_step,
                self.state.max_steps,
                self.args.output_dir,
            )
        elif self.saves_at_end:
            self.save_model(_internal_call=True)  # and does not push it to the Hub
        if held.signal is not None:
            held.deliver()
        return output

    def _take_finished(self, folder: str) -> TrainOutput:
        provenance = read_provenance(folder)
        logger.warning(
            "The run in %s is finished (%d steps): nothing is changed.", folder, provenance.get("max_steps", 0)
        )
        self.was_finished = True
        self.restore(folder)
        self.state.global_step, self.state.max_steps = provenance["step"], provenance["max_steps"]
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(folder)
        metrics = {name: value for name, value in provenance.get("metrics", {}).items() if name.startswith("train_")}
        return TrainOutput(self.state.global_step, metrics.get("train_loss", 0.0), metrics)

    @property
    def has_ended(self) -> bool:
        """Whether no step is left: all steps are made, or a callback for early stopping has lost its patience."""
        lost_patience = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return self.was_finished or lost_patience or 0 < self.state.max_steps <= self.state.global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_resumed and self.has_ended:  # `Trainer` looks for the end only after a step
            self.control.should_training_stop = True
            if self.args.should_save:  # the run may have been killed before older checkpoints were removed
                best = self.state.best_model_checkpoint
                rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, best, use_mtime=True)
            return
        super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.args.force:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Optimizer and scheduler take their settings from the checkpoint, and with --force those of this run count.
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = [own["initial_lr"] for own in settings]
            rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
            self.lr_scheduler._last_lr = [base * share(self.lr_scheduler.last_epoch) for base, share in rates]
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # a checkpoint of this name from an earlier run is incomplete from now on
            (folder / STATE_NAME).unlink(missing_ok=True)
        advice = "Earlier checkpoints are complete: --resume-from-checkpoint True goes on from the last one."
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            if is_complete(folder):  # the error came later, for example from an upload
                raise
            if self.args.should_save and folder.is_dir():
                remove_checkpoint(folder)
            with write_errors(folder, advice):
                raise error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            super()._save(str(folder), state_dict)
            return
        advice = "What was there before is unchanged: --resume-from-checkpoint True goes on from the last checkpoint."
        with write_errors(folder, advice), moved_into(folder, PROVENANCE_NAME) as temporary:
            super()._save(str(temporary), state_dict)
            write_provenance(temporary, self.provenance())


__all__ = ["ResumableTrainer"]
