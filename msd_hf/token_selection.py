"""Choosing the target's next token exactly as `generate` does, one at a time."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer


class TokenSelector:
    """
    Holds the sequence so far, and extends it as `generate` would: logits processors on the true prefix, argmax or one
    multinomial draw, stopping criteria after every token.

    Args:
        input_ids (`torch.LongTensor` of shape `[1, L]`): the prompt.
        logits_processor, stopping_criteria: as prepared by `generate`.
        generation_config (`GenerationConfig`): sampling and output flags.
        streamer (`BaseStreamer`, *optional*): receives every token. If it has a method
            `put_verified(tokens, num_draft_tokens)`, that is called once a verification instead.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
    ):
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = bool(generation_config.do_sample)
        self.streamer = streamer
        keep = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = () if keep and generation_config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep and generation_config.output_logits else None
        self.finished = False
        self.length = input_ids.shape[1]
        self._input_ids = input_ids
        self._pending: list[int] = []  # emitted, not yet in `_input_ids`
        self._max_length, self._eos_token_ids, self._simple_stops = _read_simple_criteria(stopping_criteria)

    @property
    def input_ids(self) -> torch.Tensor:
        """Prompt and emitted tokens, `[1, length]`."""
        if self._pending:
            self._input_ids = torch.cat([self._input_ids, self._input_ids.new_tensor([self._pending])], dim=1)
            self._pending = []
        return self._input_ids

    @property
    def tokens_left(self) -> int | None:
        """How many tokens may still be emitted, if a length limit is set."""
        return None if self._max_length is None else self._max_length - self.length

    @property
    def is_plain_argmax(self) -> bool:
        """Whether a token depends on the logits of its own position alone."""
        return not self.do_sample and len(self.logits_processor) == 0

    def select(self, logits: torch.Tensor) -> int:
        """Chooses the next token from the target's logits `[1, V]`, and emits it."""
        raw = logits.to(copy=True, dtype=torch.float32, device=self._input_ids.device)
        scores = raw if len(self.logits_processor) == 0 else self.logits_processor(self.input_ids, raw)
        if self.do_sample:
            probs = torch.nn.functional.softmax(scores, dim=-1)
            token = int(torch.multinomial(probs, num_samples=1))
        else:
            token = int(scores.argmax(dim=-1))
        self._emit(token, raw, scores)
        return token

    def extend(self, tokens: list[int], logits: torch.Tensor) -> int:
        """
        Emits tokens that were already chosen by argmax, up to the one that ends the sequence.

        Args:
            tokens (`list[int]`): n tokens.
            logits (`torch.Tensor` of shape `[n, V]`): the target's, for each of them; read only if they are kept.

        Returns:
            How many tokens were emitted.
        """
        keep = self.scores is not None or self.logits is not None
        for count, token in enumerate(tokens, start=1):
            row = logits[count - 1 : count].to(copy=True, dtype=torch.float32) if keep else None
            self._emit(token, row, row)
            if self.finished:
                return count
        return len(tokens)

    def stream(self, tokens: list[int], num_draft_tokens: int) -> None:
        """Hands the tokens of one verification to the streamer; the first `num_draft_tokens` were drafted."""
        if self.streamer is None:
            return
        if hasattr(self.streamer, "put_verified"):
            self.streamer.put_verified(torch.tensor(tokens), num_draft_tokens)
            return
        for token in tokens:
            self.streamer.put(torch.tensor([token]))

    def _emit(self, token: int, logits: torch.Tensor | None, scores: torch.Tensor | None) -> None:
        if self.scores is not None and scores is not None:
            self.scores += (scores,)
        if self.logits is not None and logits is not None:
            self.logits += (logits,)
        self._pending.append(token)
        self.length += 1
        if self._simple_stops:
            self.finished = token in self._eos_token_ids or (self.tokens_left is not None and self.tokens_left <= 0)
        else:
            self.finished = bool(self.stopping_criteria(self.input_ids, self.scores).all())


def _read_simple_criteria(criteria: StoppingCriteriaList) -> tuple[int | None, frozenset[int], bool]:
    """Length limit and EOS tokens of the criteria, and whether they are all of these two kinds: then they are checked
    on the host without building tensors."""
    max_length: int | None = None
    eos_token_ids: set[int] = set()
    simple = True
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length if max_length is None else min(max_length, criterion.max_length)
            # Beyond the position limit it also warns, which is left to itself.
            limit = criterion.max_position_embeddings
            simple = simple and (limit is None or criterion.max_length <= limit)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids.update(criterion.eos_token_id.reshape(-1).tolist())
        else:
            simple = False
    return max_length, frozenset(eos_token_ids), simple


__all__ = ["TokenSelector"]
