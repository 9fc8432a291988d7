"""Choosing the target's next tokens exactly as `generate` does, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .sampling_noise import SamplingNoise


class TokenSelector:
    """
    Extends R sequences by one token at a time, in step, as `generate` would: it applies the logits processors to the
    emitted prefix, takes the argmax or draws once, checks the stopping criteria after every token, and pads sequences
    that have ended.

    Args:
        input_ids (`torch.LongTensor` of shape `[R, L]`): the prompts.
        logits_processor, stopping_criteria: as prepared by `generate`.
        generation_config (`GenerationConfig`): sampling and output flags.
        noise (`SamplingNoise`, *optional*): makes the random draws if the sequence is one row of a batch (R = 1). By
            default `torch.multinomial` makes them.
        row (`int`): the row of `noise` that belongs to the sequence.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        noise: SamplingNoise | None = None,
        row: int = 0,
    ):
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = bool(generation_config.do_sample)
        keep = bool(generation_config.return_dict_in_generate)
        self.scores: list[torch.Tensor] | None = [] if keep and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep and generation_config.output_logits else None
        self.num_rows, self.prompt_length = input_ids.shape
        self.length = self.prompt_length
        self.ended = [False] * self.num_rows
        self.tokens: list[list[int]] = [[] for _ in range(self.num_rows)]
        # Without an EOS criterion `generate` extends every row until all rows have ended.
        self.pads_ended_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad_token = getattr(generation_config, "_pad_token_tensor", None)
        self.pad_token_id = 0 if pad_token is None else int(pad_token)
        self._noise, self._row = noise, row
        self._input_ids = input_ids
        self._num_appended = 0  # emitted tokens that are already part of `_input_ids`
        self._max_length, self.eos_token_ids, self._simple_stops = _read_simple_criteria(stopping_criteria)

    @property
    def input_ids(self) -> torch.Tensor:
        """Prompts and emitted tokens, `[R, length]`."""
        num_emitted = self.length - self.prompt_length
        if num_emitted > self._num_appended:
            pending = [tokens[self._num_appended :] for tokens in self.tokens]
            self._input_ids = torch.cat([self._input_ids, self._input_ids.new_tensor(pending)], dim=1)
            self._num_appended = num_emitted
        return self._input_ids

    @property
    def finished(self) -> bool:
        """Whether all rows have ended."""
        return all(self.ended)

    @property
    def tokens_left(self) -> int | None:
        """How many tokens may still be emitted; `None` without a length limit."""
        return None if self._max_length is None else self._max_length - self.length

    @property
    def is_plain_argmax(self) -> bool:
        """Whether tokens are chosen for a single row, each as the argmax of unprocessed logits."""
        return self.num_rows == 1 and not self.do_sample and len(self.logits_processor) == 0

    def select(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """
        Chooses the next token of every row, and emits it.

        Args:
            logits (`torch.Tensor` of shape `[r, V]`): the target's logits for `rows`.
            rows (`Sequence[int]`, *optional*): r rows; all other rows must have ended. Default: all rows.

        Returns:
            The tokens of all R rows.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=self._input_ids.device)
        if rows is not None and len(rows) < self.num_rows:
            given = raw
            raw = given.new_zeros(self.num_rows, given.shape[1])
            raw[list(rows)] = given
        scores = raw if len(self.logits_processor) == 0 else self.logits_processor(self.input_ids, raw)
        if self.do_sample:
            probs = torch.nn.functional.softmax(scores, dim=-1)
            if self._noise is None:
                chosen = torch.multinomial(probs, num_samples=1)
            else:
                chosen = self._noise.choose(probs, self._row, step=self.length - self.prompt_length)
        else:
            chosen = scores.argmax(dim=-1)
        tokens = chosen.reshape(-1).tolist()
        if self.pads_ended_rows:
            tokens = [self.pad_token_id if ended else token for token, ended in zip(tokens, self.ended, strict=True)]
        self._emit(tokens, raw, scores)
        return tokens

    def extend(self, tokens: list[int], logits: torch.Tensor, nodes: Sequence[int]) -> int:
        """
        Emits tokens that were already chosen by argmax for a single row (R = 1). Stops after a token that ends the
        sequence.

        Args:
            tokens (`list[int]`): n tokens.
            logits (`torch.Tensor` of shape `[N, V]`): the target's logits at the nodes of a tree; read only if the
                caller asked for logits or scores.
            nodes (`Sequence[int]`): the n nodes at which the tokens were chosen.

        Returns:
            The number of emitted tokens.
        """
        keep = self.scores is not None or self.logits is not None
        for num_emitted, (token, node) in enumerate(zip(tokens, nodes, strict=True), start=1):
            row = logits[node : node + 1].to(copy=True, dtype=torch.float32) if keep else None
            self._emit([token], row, row)
            if self.finished:
                return num_emitted
        return len(tokens)

    def pad(self, logits: torch.Tensor) -> None:
        """Emits one padding token in each row. All rows must have ended. `logits`: `[R, V]`."""
        raw = logits.to(copy=True, dtype=torch.float32, device=self._input_ids.device)
        scores = raw if len(self.logits_processor) == 0 else self.logits_processor(self.input_ids, raw)
        self._record([self.pad_token_id] * self.num_rows, raw, scores)

    def _emit(self, tokens: list[int], logits: torch.Tensor | None, scores: torch.Tensor | None) -> None:
        self._record(tokens, logits, scores)
        if self._simple_stops:
            if self._max_length is not None and self.length >= self._max_length:
                self.ended = [True] * self.num_rows
            elif self.eos_token_ids:
                self.ended = [
                    ended or token in self.eos_token_ids for ended, token in zip(self.ended, tokens, strict=True)
                ]
            return
        scores_so_far = None if self.scores is None else tuple(self.scores)
        stops = self.stopping_criteria(self.input_ids, scores_so_far).tolist()
        self.ended = [ended or stop for ended, stop in zip(self.ended, stops, strict=True)]

    def _record(self, tokens: list[int], logits: torch.Tensor | None, scores: torch.Tensor | None) -> None:
        if self.scores is not None and scores is not None:
            self.scores.append(scores)
        if self.logits is not None and logits is not None:
            self.logits.append(logits)
        for emitted, token in zip(self.tokens, tokens, strict=True):
            emitted.append(token)
        self.length += 1


def _read_simple_criteria(criteria: StoppingCriteriaList) -> tuple[int | None, frozenset[int], bool]:
    """The length limit and the EOS tokens of the criteria, and whether these are the only criteria. If they are, the
    host checks them without building tensors."""
    max_length: int | None = None
    eos_token_ids: set[int] = set()
    simple = True
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length if max_length is None else min(max_length, criterion.max_length)
            # Beyond the position limit the criterion also warns, so it has to be called.
            limit = criterion.max_position_embeddings
            simple = simple and (limit is None or criterion.max_length <= limit)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids.update(criterion.eos_token_id.reshape(-1).tolist())
        else:
            simple = False
    return max_length, frozenset(eos_token_ids), simple


__all__ = ["TokenSelector"]
