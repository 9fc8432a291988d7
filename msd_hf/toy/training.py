"""Trains the vision tower or the target with the `Trainer` of transformers on an endless stream of samples."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .optimizer import build_optimizer


logger = logging.get_logger(__name__)

_WARMUP = 0.04  # share of the training


class EndlessStream(IterableDataset):
    """Wraps a function that starts an endless iterator of training samples."""

    def __init__(self, start: Callable[[], Iterator[dict[str, Any]]]):
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.start()


class Budget:
    """Limits a training run to a number of steps or of seconds, and gives its progress (0-1) and learning rate.

    With a limit in seconds the learning rate follows the clock, so that it reaches zero in time on a busy machine too.
    """

    def __init__(self, max_steps: int | None = None, max_seconds: float | None = None):
        if (max_steps is None) == (max_seconds is None):
            raise ValueError("Give either a number of steps or a number of seconds.")
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.started: float | None = None

    def progress(self, step: int) -> float:
        """The share of the budget that is used after `step` steps."""
        if self.started is None:
            self.started = time.monotonic()
        if self.max_steps is not None:
            return min(1.0, step / self.max_steps)
        assert self.max_seconds is not None
        return min(1.0, (time.monotonic() - self.started) / self.max_seconds)

    def rate(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, then half a cosine to zero."""
        progress = self.progress(step)
        if progress < _WARMUP:
            # At least 1e-3, because with a limit in seconds the first steps would have a rate of almost zero.
            return max(progress, 1e-3) / _WARMUP
        return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


class _StopAtBudget(TrainerCallback):
    def __init__(self, budget: Budget):
        self.budget = budget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget.progress(state.global_step) >= 1.0:
            control.should_training_stop = True


def train(
    model: nn.Module,
    start_stream: Callable[[], Iterator[dict[str, Any]]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    budget: Budget,
    batch_size: int,
    seed: int,
    rate: float = 1.0,
    logging_steps: int = 20,
) -> float:
    """Trains `model` in place on batches of consecutive samples of the stream; returns the mean training loss.

    `rate` is relative to the learning rates of `build_optimizer`.
    """
    optimizer = build_optimizer(model)
    scheduler = LambdaLR(optimizer, lambda step: rate * budget.rate(step))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=budget.max_steps or 10**6,
            per_device_train_batch_size=batch_size,
            max_grad_norm=1.0,
            logging_steps=logging_steps,
            save_strategy="no",
            report_to="none",
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            accelerator_config={"dispatch_batches": False},
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=EndlessStream(start_stream),
            data_collator=collate,
            optimizers=(optimizer, scheduler),
            callbacks=[_StopAtBudget(budget)],
        )
        result = trainer.train()
    logger.info("Trained for %d steps, mean loss %.4f.", result.global_step, result.training_loss)
    return result.training_loss
