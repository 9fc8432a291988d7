"""Answers of a target to many prompts at once, greedy or sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...errors import MSDError
from ...prompts import move_inputs
from ..data.encoding import concatenate_padded


_WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
# Arguments of `generate` for plain greedy decoding. They override the sampling defaults of the target.
_GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
_TAKEN = (
    "do_sample",
    "generation_config",
    "max_length",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "streamer",
)
_NO_SAMPLING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "num_beams", "assistant_model")


class AnswerGenerator:
    """
    Lets a target answer prompts, several at once.

    Each row of a batch has its own random generator, so that a sampled answer depends on its seed and not on the other
    rows.

    Args:
        target: the target, in evaluation mode.
        tokenizer: the target's tokenizer.
        max_new_tokens: length limit of an answer.
        temperature: 0 for greedy decoding, above 0 for sampling.
        generate_arguments: further arguments of `generate`. If `top_k`, `top_p` or `min_p` are missing, their values
            come from the target's generation config.

    Raises:
        MSDError: when an argument is out of range or cannot be combined with the generation of answers.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: Any,
        max_new_tokens: int,
        temperature: float,
        generate_arguments: dict[str, Any],
    ):
        if max_new_tokens < 1:
            raise MSDError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        if temperature < 0:
            raise MSDError(f"`temperature` must be 0 (greedy) or above, got {temperature}.")
        self.target, self.tokenizer, self.max_new_tokens, self.temperature = (
            target,
            tokenizer,
            max_new_tokens,
            temperature,
        )
        self.arguments = dict(generate_arguments)
        self.processors = list(self.arguments.pop("logits_processor", None) or ())
        self.sampling = self._pop_sampling()
        refused = [name for name in (*_TAKEN, *(_NO_SAMPLING if temperature else ())) if name in self.arguments]
        if refused:
            how = " with sampling" if temperature else ""
            raise MSDError(f"`{refused[0]}` cannot be given when answers are regenerated{how}.")
        if temperature > 0:
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
            self.processors += [_WARPERS[name](value) for name, value in self.sampling.items()]
        config = target.generation_config
        eos_token_id = self.arguments.get("eos_token_id", config.eos_token_id)
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        self.pad_token_id = pad_token_id if pad_token_id is not None else next(iter(self.eos_token_ids), 0)
        self.context_length: int | None = getattr(
            target.config.get_text_config(decoder=True), "max_position_embeddings", None
        )

    def _pop_sampling(self) -> dict[str, Any]:
        given = {name: self.arguments.pop(name) for name in _WARPERS if name in self.arguments}
        if self.temperature == 0:
            if given:
                raise MSDError(f"`{next(iter(given))}` needs a `temperature` above 0.")
            return {}
        values = {name: given.get(name, getattr(self.target.generation_config, name, None)) for name in _WARPERS}
        return {name: value for name, value in values.items() if value}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which the answers depend, besides target and prompts."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": float(self.temperature),
            **self.sampling,
            "logits_processor": self.processors,
            **self.arguments,
        }

    @torch.no_grad()
    def __call__(self, prompts: Sequence[dict[str, torch.Tensor]], seeds: Sequence[str]) -> list[tuple[str, bool]]:
        """
        Answers prompts. Either all prompts have images, or none has.

        Args:
            prompts: inputs of `build_chat_inputs` for each prompt.
            seeds: one seed for each prompt, for sampling.

        Returns:
            For each prompt the answer, without special tokens and outer white space, and whether the target ended it.
        """
        batch = move_inputs(pad_left(prompts, self.pad_token_id), self.target)
        processors = [*self.processors]
        if self.temperature > 0:
            processors.append(SeededDraw(seeds, self.target.device))
        output: Any = self.target.generate(  # type: ignore[operator]
            **batch,
            **{**_GREEDY, **self.arguments},
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.pad_token_id,
            logits_processor=LogitsProcessorList(processors),
        )
        answers = output[:, batch["input_ids"].shape[1] :]
        ended = torch.isin(answers, torch.tensor(self.eos_token_ids, device=answers.device)).any(1).tolist()
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


class SeededDraw(LogitsProcessor):
    """
    Turns greedy decoding into sampling: the largest score after adding Gumbel noise is a sample from the softmax of
    the scores. Each row `[V]` has its own generator, while the sampling of `generate` shares one in a batch.
    """

    def __init__(self, seeds: Sequence[str], device: torch.device):
        self.generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Adds the noise to scores `[B, V]`."""
        size = scores.shape[1:]
        noise = [torch.empty(size, device=g.device).exponential_(generator=g) for g in self.generators]
        return scores - torch.stack(noise).clamp_min(1e-30).log().to(scores)


def pad_left(prompts: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Makes one batch from the inputs of single prompts. Values per token `[1, L]` are padded on the left. Other values
    are concatenated, and padded with zeros if the images have different numbers of tiles.
    """
    batch = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        values = [prompt[name] for prompt in prompts if name in prompt]
        if all(prompt[name].shape == prompt["input_ids"].shape for prompt in prompts if name in prompt):
            longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
            fill = pad_token_id if name == "input_ids" else 0
            values = [functional.pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
            batch[name] = torch.cat(values)
        else:
            batch[name] = concatenate_padded(values)
    return batch


__all__ = ["AnswerGenerator", "SeededDraw", "pad_left"]
