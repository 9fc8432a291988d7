"""A model class of lmms-eval with a draft: loads it, gives it to each call of `generate`, records the calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics

from ...decoders import head_of
from ...errors import MSDCheckpointError, MSDError, MSDUnsupportedError, shown
from ...hook.assistant import draft_class_of
from ...hub.names import target_or_named
from ...loading import load_config, parse_device
from ...target.support import check_pair
from .journal import Journal, MSDTokenCounts
from .presets import find_preset
from .recorded_generate import RecordedGenerate


class WithDraft:
    """
    Comes before a model class of lmms-eval among the bases of a class.

    Args:
        pretrained (`str`, *optional*): the target. May be left out if the draft names it by its id.
        draft (`str`, *optional*): folder or Hub id of the draft. Without one the target decodes alone and is recorded
            in the same way: the baseline.
        preset (`str`, *optional*): `"paper"` asks as the evaluation of the paper did, see [`PRESETS`].
        batch_size (`int` or `str`): must be 1, because tau and seconds are recorded for each question.
        arguments: of the model class of lmms-eval. Without `device` and `device_map` the target is loaded on a GPU if
            there is one, else on the CPU.

    Raises:
        MSDError: when the draft does not fit the target, before the target's weights are loaded; when an argument is
            of no use.
    """

    is_simple: bool
    model: Any

    def __init__(
        self,
        pretrained: str | None = None,
        draft: str | None = None,
        preset: str | None = None,
        batch_size: int | str = 1,
        **arguments: Any,
    ):
        if str(batch_size) != "1":
            raise MSDError(f"`batch_size` is {shown(batch_size)}: questions are asked one by one, use --batch_size 1.")
        self._preset = find_preset(preset)
        loaded = None if draft is None else _load_draft(str(draft))
        if loaded is not None:
            pretrained = target_or_named(pretrained, loaded.config)
            check_pair(load_config(pretrained), loaded.config)
        if pretrained is not None:
            arguments["pretrained"] = pretrained
        if "device_map" not in arguments and PartialState().num_processes == 1:
            # The defaults of the classes differ, need a GPU, and include "", which transformers 5 refuses.
            arguments["device_map"] = arguments.setdefault("device", parse_device("auto").type)
        super().__init__(batch_size=1, **arguments)  # type: ignore[call-arg]
        if loaded is not None:
            weight = head_of(self.model).weight
            loaded.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else self.model.dtype)
        # Reached through the target, which lmms-eval deletes after the last request to make room for a judge.
        self.model.generate = RecordedGenerate(self.model, loaded)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers the requests as the model class does, and returns each answer with its [`MSDTokenCounts`]."""
        generate: RecordedGenerate = self.model.generate
        journal = Journal()
        generate.on_call = journal.note
        asked = [self._asked(request, number, journal) for number, request in enumerate(requests)]
        entries = len(get_logged_metrics_history())
        outputs = super().generate_until(asked)  # type: ignore[misc]
        journal.end()
        if generate.refusal is not None:
            raise generate.refusal
        results = [
            GenerationResult(unwrap_generation_output(output)[0], journal.counts(number))
            for number, output in enumerate(outputs)
        ]
        counts = [result.token_counts for result in results if result.token_counts is not None]
        # Classes that log by themselves have logged the seconds and tokens.
        _log(counts, with_totals=len(get_logged_metrics_history()) == entries)
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[Any]:
        """Answers requests of several rounds, with the draft but without records."""
        if self._preset is not None:
            raise MSDUnsupportedError(
                "`preset` is for tasks of one question: leave it out for tasks of several rounds."
            )
        return super().generate_until_multi_round(requests)  # type: ignore[misc]

    def _asked(self, request: Instance, number: int, journal: Journal) -> Instance:
        """A copy of a request that tells the journal when it is its turn, and that asks as the preset does."""
        generate: RecordedGenerate = self.model.generate
        settings_at, ask_at = (1, 2) if self.is_simple else (2, 1)
        arguments = list(request.args)
        settings, ask = dict(arguments[settings_at] or {}), arguments[ask_at]
        post_prompt = _post_prompt(ask)
        preset = self._preset
        if preset is not None:
            preset.check_samples(arguments[3])
            settings["max_new_tokens"] = preset.max_new_tokens
            if self.is_simple:
                arguments[0] = preset.question(arguments[0], post_prompt)

        def ask_in_turn(*args: Any, **kwargs: Any) -> Any:
            if generate.refusal is not None:  # the request before this one was refused, as all others will be
                raise generate.refusal
            journal.begin(number)
            asked = ask(*args, **kwargs)
            return asked if preset is None or self.is_simple else preset.messages(asked, post_prompt)

        arguments[settings_at], arguments[ask_at] = settings, ask_in_turn
        request = copy.copy(request)
        request.arguments = tuple(arguments)
        return request


def _load_draft(name: str) -> Any:
    model_class = draft_class_of(name)
    if model_class is None:
        raise MSDCheckpointError(f"`draft` {name!r} holds a model that is no MSD draft.")
    return model_class.from_pretrained(name)


def _post_prompt(ask: Any) -> str:
    """The instruction that a task appends to each question. `ask` is a method of the task."""
    words: Any = getattr(getattr(ask, "__self__", None), "lmms_eval_specific_kwargs", None)
    post_prompt = words.get("post_prompt") if isinstance(words, dict) else None
    return post_prompt if isinstance(post_prompt, str) else ""


def _log(counts: Sequence[MSDTokenCounts], with_totals: bool) -> None:
    """Adds the figures of all requests to the results of lmms-eval, which keeps them under `throughput`."""
    tokens = sum(count.output_tokens or 0 for count in counts) if with_totals else 0
    seconds = sum(count.seconds for count in counts) if with_totals else 0.0
    figures: dict[str, float] = {"evaluation_seconds": sum(count.evaluation_seconds for count in counts)}
    rounds = sum(count.rounds or 0 for count in counts)
    if rounds:
        figures |= {"rounds": rounds, "tau": sum((c.rounds or 0) * (c.tau or 0.0) for c in counts) / rounds}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, figures)


__all__ = ["WithDraft"]
