"""Where the best checkpoint of a run lies: `trainer_state.json` names its step, not its path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..writing.redaction import redact
from ..writing.saving import replace_text


class SavedState(TrainerState):
    """
    The state of a run, written without local paths. A checkpoint may be uploaded with it.

    The path of the best checkpoint is left out if it is absolute; [`RestoreBestCheckpoint`] finds it by its step.
    """

    @classmethod
    def of(cls, state: TrainerState) -> SavedState:
        return cls(**{field.name: getattr(state, field.name) for field in dataclasses.fields(state)})

    def save_to_json(self, json_path: str) -> None:
        state = dataclasses.asdict(self)
        best = self.best_model_checkpoint
        if best is not None and redact(best) != best:
            state["best_model_checkpoint"] = None
        replace_text(json_path, json.dumps(redact(state), indent=2, sort_keys=True) + "\n")


class RestoreBestCheckpoint(TrainerCallback):
    """
    Finds the best checkpoint again when a run resumes.

    Args:
        resumed_from: the checkpoint that the run resumes from, if any. The best one lies beside it.
    """

    resumed_from: str | Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed_from is None or not state.best_global_step:
            return
        best = Path(self.resumed_from).parent / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


__all__ = ["RestoreBestCheckpoint", "SavedState"]
