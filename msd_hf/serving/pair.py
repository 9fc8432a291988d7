"""The target and the draft of a server, in the form in which transformers' server asks for models."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager


@dataclass(frozen=True)
class ServedPair:
    """
    What is served.

    Args:
        name: the model that requests ask for.
        target (`PreTrainedModel`): the target.
        processor: its processor.
        draft (`Draft`): its draft, on the target's device and in its dtype.
    """

    name: str
    target: PreTrainedModel
    processor: Any
    draft: Any


class PairManager(ModelManager):
    """
    Knows one model, which is loaded already, and loads no other.

    Args:
        pair: what is served.
    """

    def __init__(self, pair: ServedPair):
        super().__init__(device="cpu")  # nothing is loaded there
        self.force_model = pair.name
        self._pair = pair

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Returns the name as it is, without a revision. Requests for other models have been refused before."""
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
        """Returns target and processor."""
        return self._pair.target, self._pair.processor

    async def load_model_streaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        """Tells `transformers chat` that the model is there."""
        yield f'data: {{"status": "ready", "model": {json.dumps(self._pair.name)}, "cached": true}}\n\n'

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model, as OpenAI's API lists it."""
        return [{"id": self._pair.name, "object": "model", "created": 0, "owned_by": "msd_hf"}]

    def shutdown(self) -> None:
        """Nothing: `/reset` of transformers' server would unload the model."""


__all__ = ["PairManager", "ServedPair"]
