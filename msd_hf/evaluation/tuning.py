"""Finds out how the configuration of a draft should be read, by the tokens a round on a few prompts.

A wrong reading never changes the output, it only makes the draft slow. So the right one is the one of whose candidates
the target accepts most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..decoders import decoder_of
from ..decoding.result import mean_acceptance_length
from ..draft.readings import OtherReadings
from ..draft.refitted import with_fields
from ..draft.target_sizes import generating_model
from ..errors import MSDError, MSDPairingError
from ..observer import observing
from ..tree.settings import DEFAULT_TREE_DEPTH
from .bench_prompts import BenchPrompt


# A value replaces the present one if it gives this share more tokens a round. Less is chance with 20 prompts, so of
# several about as good ones the likeliest is taken.
LEAST_GAIN = 0.02
# Chains, because trees hide a part of the difference. Their size must not depend on the machine.
_CHAIN = {
    "num_assistant_tokens": DEFAULT_TREE_DEPTH + 2,
    "tree_depth": DEFAULT_TREE_DEPTH,
    "tree_top_k": 1,
    "suffix_nodes": 0,
    "compile": False,
}
_MOST_PASSES = 4


@dataclass(frozen=True)
class Trial:
    """
    One value of one field, measured with the best values of the other fields so far.

    Args:
        field (`str`): name of the field.
        value: the value.
        tau (`float`): tokens a round of a chain; 0 if the target does not take a draft that is read like this.
        is_present (`bool`): whether the field had this value when the others were tried.
        is_kept (`bool`): whether it has this value afterwards.
    """

    field: str
    value: Any
    tau: float
    is_present: bool
    is_kept: bool


@dataclass(frozen=True)
class TuneResult:
    """
    What [`tune_draft`] has found.

    Args:
        tau_before, tau (`float`): tokens a round of a chain, with the draft as it is and with the best values.
        fields (`dict[str, Any]`): the fields that should be changed, with their best values.
        trials (`list[Trial]`): all measurements, in order.
        untried (`list[str]`): fields that matter only with images, if no prompt has one.
    """

    tau_before: float
    tau: float
    fields: dict[str, Any]
    trials: list[Trial]
    untried: list[str]


def tune_draft(
    target: PreTrainedModel,
    draft: Any,
    prompts: Sequence[BenchPrompt],
    max_new_tokens: int = 64,
    show_progress: bool = False,
) -> TuneResult:
    """
    Tries other values of the fields of a draft that may have been read wrongly, one field after the other, until no
    field changes any more. A field whose values make no difference stays as it is. All answers are greedy, and drafted
    in chains of a fixed length, so the result does not depend on the machine's speed.

    Args:
        target (`PreTrainedModel`): the target.
        draft (`PreTrainedModel`): a draft of any kind. It stays as it is; [`~msd_hf.draft.refitted.with_fields`] makes
            one with the fields that were found.
        prompts (`Sequence[BenchPrompt]`): what is asked; 20 are enough.
        max_new_tokens (`int`, defaults to 64): length limit of an answer.
        show_progress (`bool`, defaults to `False`): whether to show a progress bar.

    Raises:
        MSDPairingError: when the target does not take the draft, however it is read.
        MSDError: when all answers are too short to draft anything.
        MSDUnsupportedError: when the draft's weights are quantised.
    """
    model = generating_model(target)
    choices = draft.config.other_readings(model.config, len(decoder_of(model).layers))
    has_images = any(prompt.group == "visual" for prompt in prompts)
    untried = [choice.field for choice in choices if choice.needs_image and not has_images]
    choices = [choice for choice in choices if choice.field not in untried]
    with tqdm(
        total=1 + sum(len(choice.values) for choice in choices),
        desc="readings",
        disable=not show_progress,
        leave=False,
    ) as progress:
        measure = _Measure(target, draft, prompts, max_new_tokens, progress)
        before = measure({})
        fields, tau, trials = _search(measure, draft.config, choices, before)
    if tau == 0:
        assert measure.refusal is not None
        raise measure.refusal
    return TuneResult(before, tau, fields, trials, untried)


def _search(
    measure: _Measure, config: Any, choices: Sequence[OtherReadings], tau: float
) -> tuple[dict[str, Any], float, list[Trial]]:
    """Goes through the fields until none changes; returns the changed fields, their tau, and all trials."""
    fields: dict[str, Any] = {}
    trials: list[Trial] = []
    for _ in range(_MOST_PASSES):
        before = fields
        for choice in choices:
            own = getattr(config, choice.field)
            present = fields.get(choice.field, own)
            values = [value for value in (own, *choice.values) if value != present]
            is_news = any(not measure.knows({**fields, choice.field: value}) for value in values)
            taus = [measure({**fields, choice.field: value}) for value in values]
            best = _better(taus, tau)
            if is_news:
                trials.append(Trial(choice.field, present, tau, True, best is None))
                trials += [
                    Trial(choice.field, value, taus[number], False, number == best)
                    for number, value in enumerate(values)
                ]
            if best is not None:
                tau, fields = taus[best], {**fields, choice.field: values[best]}
        if fields == before:
            break
    return {name: value for name, value in fields.items() if value != getattr(config, name)}, tau, trials


def _better(taus: Sequence[float], present: float) -> int | None:
    """The number of the value to change to, `None` for none: the first, and so the likeliest, of those that are better
    than the present one, and about as good as the best."""
    least = max(present * (1 + LEAST_GAIN), max(taus, default=0) / (1 + LEAST_GAIN))
    return next((number for number, tau in enumerate(taus) if tau >= least and tau > present), None)


class _Measure:
    """tau of a draft with changed fields. Each combination is measured once."""

    def __init__(
        self, target: PreTrainedModel, draft: Any, prompts: Sequence[BenchPrompt], max_new_tokens: int, progress: tqdm
    ):
        self.target, self.draft, self.prompts = target, draft, prompts
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.refusal: MSDPairingError | None = None
        self._taus: dict[str, float] = {}

    def _key(self, fields: Mapping[str, Any]) -> str:
        config = self.draft.config
        return repr(sorted((name, value) for name, value in fields.items() if value != getattr(config, name)))

    def knows(self, fields: Mapping[str, Any]) -> bool:
        """Whether these fields were measured before."""
        return self._key(fields) in self._taus

    def __call__(self, fields: Mapping[str, Any]) -> float:
        """Tokens a round; 0 if the target does not take the draft."""
        key = self._key(fields)
        if key not in self._taus:
            try:
                self._taus[key] = self._measured(fields)
            except MSDPairingError as error:
                self.refusal = self.refusal or error
                self._taus[key] = 0.0
            self.progress.total = max(self.progress.total, len(self._taus))
            self.progress.update()
        return self._taus[key]

    @torch.no_grad()
    def _measured(self, fields: Mapping[str, Any]) -> float:
        target = self.target
        fields = dict(fields)
        if self._taus:  # the target was compared with the one that the draft was made for
            fields["target_fingerprint"] = None
        draft = with_fields(self.draft, device=target.device, dtype=target.dtype, **fields)
        draft.generation_config.update(**_CHAIN)
        lengths: list[list[int]] = []
        for prompt in self.prompts:
            inputs = prompt.make_inputs().to(target.device, dtype=target.dtype)
            with observing(notices=False):  # a draft that is read wrongly is of no use
                output = target.generate(
                    **inputs,
                    assistant_model=draft,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_scores=False,
                )
            lengths += output.acceptance_lengths
        if not any(lengths):
            raise MSDError("The answers have one token each, so nothing is drafted: give other prompts.")
        return mean_acceptance_length(lengths)


__all__ = ["LEAST_GAIN", "Trial", "TuneResult", "tune_draft"]
