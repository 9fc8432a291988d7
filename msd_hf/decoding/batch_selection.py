"""Token selection for a batch: tracks the running rows, extends them, and collects their output."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .sampling_noise import SamplingNoise
from .token_selection import TokenSelector


# Processors that treat each row independently and keep no state between steps, so rows may advance at their own pace.
# Any other processor must see the whole batch at each step, as without a draft, so the rows advance in step.
_ROW_WISE_PROCESSORS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
_ROW_WISE_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class BatchSelector:
    """
    Extends the B sequences of a batch as `generate` would. Each advances at its own pace when that cannot change the
    output; otherwise all advance in step.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts.
        logits_processor, stopping_criteria: as prepared by `generate`.
        generation_config (`GenerationConfig`): sampling and output flags.
        streamer (`BaseStreamer`, *optional*): receives every token. If it has a method
            `put_verified(tokens, num_draft_tokens)` and there is one sequence, that method is called instead, once per
            verification.
        keeps_ended_rows (`bool`): whether ended rows stay in the batch, with their padding, if rows advance in step.

    Attributes:
        running (`list[int]`): the rows of the running batch. A *place* is an index into this list.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        keeps_ended_rows: bool = False,
    ):
        self.prompt = input_ids
        self.streamer = streamer
        self.batch_size = input_ids.shape[0]
        self.in_step = self.batch_size == 1 or not _is_row_wise(logits_processor, stopping_criteria)
        self._noise: SamplingNoise | None = None
        arguments = (stopping_criteria, generation_config)
        if self.in_step:
            self._groups = [TokenSelector(input_ids, logits_processor, *arguments)]
        else:
            self._noise = SamplingNoise(self.batch_size)
            self._groups = [
                TokenSelector(input_ids[row : row + 1], _of_row(logits_processor, row), *arguments, self._noise, row)
                for row in range(self.batch_size)
            ]
        pads = self._groups[0].pads_ended_rows
        self.pad_token_id = self._groups[0].pad_token_id
        # Without padding `generate` keeps extending ended rows. With padding, a processor that sees the whole batch
        # still sees their scores.
        needs_all_rows = not pads or not _are_row_wise(logits_processor)
        self.keeps_ended_rows = self.in_step and (needs_all_rows or keeps_ended_rows)
        self.running = list(range(self.batch_size))
        self.acceptance_lengths: list[list[int]] = [[] for _ in range(self.batch_size)]
        self._num_streamed = 0

    @property
    def finished(self) -> bool:
        """Whether all rows have ended."""
        return all(group.finished for group in self._groups)

    @property
    def is_plain_argmax(self) -> bool:
        """Whether every token is the argmax of unprocessed logits, in rows that advance independently."""
        return all(group.is_plain_argmax for group in self._groups)

    @property
    def keeps_logits(self) -> bool:
        """Whether the caller asked for logits or scores."""
        return any(group.scores is not None or group.logits is not None for group in self._groups)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a row."""
        return self._groups[0].eos_token_ids

    @property
    def tokens_left(self) -> int | None:
        """How many tokens the shortest unfinished row may still emit; `None` without a length limit."""
        left = [group.tokens_left for group in self._groups if not group.finished]
        return max((count for count in left if count is not None), default=None)

    @property
    def tokens_left_by_row(self) -> list[int] | None:
        """How many tokens each running row may still emit; `None` without a length limit."""
        left = [group.tokens_left for group, places, _ in self.groups() for _ in places]
        counts = [count for count in left if count is not None]
        return counts if len(counts) == len(left) else None

    @property
    def padded_rows(self) -> list[int]:
        """Places of rows that have ended but stay in the running batch."""
        if not self.in_step or not self._groups[0].pads_ended_rows:
            return []
        return [place for place, row in enumerate(self.running) if self._groups[0].ended[row]]

    def groups(self) -> Iterator[tuple[TokenSelector, list[int], list[int]]]:
        """For each group with running rows: its selector, the places of these rows, and their rows in the selector."""
        if self.in_step:
            yield self._groups[0], list(range(len(self.running))), self.running
        else:
            for place, row in enumerate(self.running):
                yield self._groups[row], [place], [0]

    def select(self, logits: torch.Tensor) -> list[int]:
        """Emits the first token of each row, given the logits `[B, V]` at the end of the prompts."""
        chosen = [group.select(logits[places]) for group, places, _ in self.groups()]
        self._stream(0)
        return [token for tokens in chosen for token in tokens]

    def end_round(self, counts: Sequence[int], num_draft_tokens: Sequence[int]) -> None:
        """Records how many tokens one verification emitted for each running row, and streams the tokens."""
        for row, count in zip(self.running, counts, strict=True):
            self.acceptance_lengths[row].append(count)
        self._stream(num_draft_tokens[0])
        if self._noise is not None:
            running = [group.length - group.prompt_length for group in self._groups if not group.finished]
            self._noise.forget(min(running, default=0))

    def drop_ended(self) -> list[int]:
        """Removes rows that have ended from the running batch. Returns the places of the rows that stay."""
        ended = [self._has_ended(row) for row in self.running]
        places = [place for place in range(len(self.running)) if not ended[place]]
        self.running = [self.running[place] for place in places]
        return places

    def pad(self, row: int, logits: torch.Tensor) -> None:
        """Emits one padding token for each of the n `logits` `[n, V]` in a row that has ended."""
        for step in range(logits.shape[0]):
            self._groups[row].pad(logits[step : step + 1])

    @property
    def sequences(self) -> torch.Tensor:
        """Prompts and emitted tokens, with padding behind shorter rows, `[B, L + new tokens]`."""
        rows = [self.row_tokens(row) for row in range(self.batch_size)]
        length = max(len(tokens) for tokens in rows)
        padded = [tokens + [self.pad_token_id] * (length - len(tokens)) for tokens in rows]
        return torch.cat([self.prompt, self.prompt.new_tensor(padded)], dim=1)

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        """Processed scores of each step, `[B, V]`; `None` if the caller did not ask for them."""
        return _by_step([group.scores for group in self._groups])

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        """Logits of each step, `[B, V]`; `None` if the caller did not ask for them."""
        return _by_step([group.logits for group in self._groups])

    def row_tokens(self, row: int) -> list[int]:
        """The tokens that a row has emitted."""
        return self._groups[0].tokens[row] if self.in_step else self._groups[row].tokens[0]

    @property
    def num_tokens(self) -> int:
        """How many tokens all rows have emitted, without padding."""
        return sum(self._num_tokens_of(self.row_tokens(row)) for row in range(self.batch_size))

    def _num_tokens_of(self, tokens: list[int]) -> int:
        if not self.in_step or self.batch_size == 1:  # no row is padded
            return len(tokens)
        end = next((place for place, token in enumerate(tokens) if token in self.eos_token_ids), len(tokens) - 1)
        return end + 1

    @property
    def running_tokens(self) -> dict[int, list[int]]:
        """The emitted tokens of each running row: row of the batch -> tokens."""
        return {row: self.row_tokens(row) for row in self.running}

    def _has_ended(self, row: int) -> bool:
        if self.in_step:
            return self._groups[0].finished or (self._groups[0].ended[row] and not self.keeps_ended_rows)
        return self._groups[row].finished

    def _stream(self, num_draft_tokens: int) -> None:
        """Streams the tokens of all steps that every row has reached. The first `num_draft_tokens` were drafted."""
        if self.streamer is None:
            return
        rows = [self.row_tokens(row) for row in range(self.batch_size)]
        unfinished = [len(rows[row]) for row in self.running if not self._has_ended(row)]
        ready = min(unfinished) if unfinished else max(len(tokens) for tokens in rows)
        if self.batch_size == 1 and hasattr(self.streamer, "put_verified"):
            self.streamer.put_verified(torch.tensor(rows[0][self._num_streamed : ready]), num_draft_tokens)
        else:
            for step in range(self._num_streamed, ready):
                tokens = [tokens[step] if step < len(tokens) else self.pad_token_id for tokens in rows]
                self.streamer.put(torch.tensor(tokens))
        self._num_streamed = ready


def _are_row_wise(logits_processor: LogitsProcessorList) -> bool:
    return all(type(processor) in _ROW_WISE_PROCESSORS for processor in logits_processor)


def _is_row_wise(logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> bool:
    if not _are_row_wise(logits_processor):
        return False
    kinds = {type(criterion) for criterion in stopping_criteria}
    # Without an EOS criterion `generate` extends ended rows until all rows have ended. Under a length limit alone, all
    # rows end at once.
    return kinds <= set(_ROW_WISE_CRITERIA) and (EosTokenCriteria in kinds or kinds <= {MaxLengthCriteria})


def _of_row(logits_processor: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors for a single row of the batch."""
    processors = LogitsProcessorList()
    for processor in logits_processor:
        # The only state per row: how much padding precedes the prompt.
        if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
        processors.append(processor)
    return processors


def _by_step(groups: list[list[torch.Tensor] | None]) -> tuple[torch.Tensor, ...] | None:
    lists = [steps for steps in groups if steps is not None]
    if not lists:
        return None
    return tuple(torch.cat(rows) if len(rows) > 1 else rows[0] for rows in zip(*lists, strict=True))


__all__ = ["BatchSelector"]
