"""Runs the target over conversations and packs the rows of its features that a draft reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ...errors import MSDDataError, MSDError
from ...prompts import move_inputs
from ...target.adapter import TargetAdapter
from ..data.conversations import Conversations
from ..data.encoding import ConversationEncoder, collate_conversations
from ..visual_row_budget import kept_visual_positions
from .storage import pack, stored_rows


_BATCHES_PER_WINDOW = 8  # samples are sorted by length within a window of this many batches

Sample = dict[str, torch.Tensor]


@dataclass
class EncodedConversation:
    """
    A conversation as inputs of the target, or the error that makes it unusable.

    Args:
        id: id of the conversation.
        inputs: the output of [`ConversationEncoder`]; empty if there is an error.
        error: why the conversation cannot be used; `None` if it can.
    """

    id: str
    inputs: Sample
    error: MSDError | None = None


class _EncodedConversations(Dataset):
    def __init__(self, conversations: Conversations, encoder: ConversationEncoder):
        self.conversations, self.encoder = conversations, encoder

    def __getitem__(self, index: int) -> EncodedConversation:
        sample_id = f"#{index}"  # a sample may be too broken to have an id
        try:
            conversation = self.conversations[index]
            sample_id = conversation.id
            return EncodedConversation(sample_id, self.encoder(conversation))
        except MSDError as error:  # raised by the main process instead, so that the user sees one line
            return EncodedConversation(getattr(error, "sample_id", None) or sample_id, {}, error)


def iterate_encoded(
    conversations: Conversations, encoder: ConversationEncoder, indices: Sequence[int], num_workers: int = 0
) -> Iterator[EncodedConversation]:
    """
    Encodes the conversations at `indices`, in that order, in `num_workers` other processes; with 0 in this process.

    Raises:
        MSDError: when an error concerns more than a single sample, such as a processor that cannot be used.
    """
    dataset = _EncodedConversations(conversations, encoder)
    for encoded in DataLoader(dataset, sampler=indices, batch_size=None, num_workers=num_workers):
        if encoded.error is not None and not isinstance(encoded.error, MSDDataError):
            raise encoded.error
        if num_workers:
            # Each tensor from a worker keeps a file open; a window of samples could exceed the limit of open files.
            encoded.inputs = {name: tensor.clone() for name, tensor in encoded.inputs.items()}
        yield encoded


class FeatureExtractor:
    """
    Runs a frozen target over encoded conversations and packs the features that a draft reads.

    Args:
        adapter: the adapter of the target, which reads the layers to keep.
        pad_token_id: padding of shorter samples in a batch.
        storage: number format of the packed features.
        all_hidden_states: keep the hidden states of all positions, not only those of [`stored_rows`].
        batch_size: samples per forward.
        max_visual_rows (*optional*): keep at most this many visual rows of a sample, with their places.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        pad_token_id: int,
        storage: str,
        all_hidden_states: bool,
        batch_size: int,
        max_visual_rows: int | None = None,
    ):
        self.adapter, self.pad_token_id, self.storage = adapter, pad_token_id, storage
        self.all_hidden_states, self.batch_size = all_hidden_states, batch_size
        self.max_visual_rows = max_visual_rows

    def __call__(self, encoded: Iterable[EncodedConversation]) -> Iterator[tuple[str, Sample | MSDDataError]]:
        """
        Yields the id of each conversation, in the given order, with its packed features or the error of the sample.
        A batch holds samples of similar length from one window. The same samples always make the same batches.
        """
        encoded = iter(encoded)
        while window := list(islice(encoded, _BATCHES_PER_WINDOW * self.batch_size)):
            results: dict[int, Sample | MSDDataError] = {}
            lengths = {}
            for number, item in enumerate(window):
                if isinstance(item.error, MSDDataError):
                    results[number] = item.error
                else:
                    lengths[number] = len(item.inputs["input_ids"])
            order = sorted(lengths, key=lambda number: lengths[number])
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                results.update(zip(batch, self._run([window[number] for number in batch]), strict=True))
            for number, item in enumerate(window):
                yield item.id, results[number]

    @torch.no_grad()
    def _run(self, batch: list[EncodedConversation]) -> Iterator[Sample | MSDDataError]:
        target = self.adapter.target
        inputs = collate_conversations([item.inputs for item in batch], self.pad_token_id)
        inputs.pop("assistant_mask")
        features = self.adapter.features(**move_inputs(inputs, target))
        visual_masks = [sample_visual_mask(self.adapter, item.inputs) for item in batch]
        kept_masks = [kept_visual_positions(visual_mask, self.max_visual_rows) for visual_mask in visual_masks]
        stored_masks = [
            stored_rows(item.inputs["assistant_mask"], visual_mask, self.all_hidden_states, kept_mask)
            for item, visual_mask, kept_mask in zip(batch, visual_masks, kept_masks, strict=True)
        ]
        visual_embeds = self._gather(features.inputs_embeds, kept_masks)
        hidden_states = self._gather(features.hidden_states, stored_masks)
        for number, item in enumerate(batch):
            rows = (visual_embeds[number], hidden_states[number])
            if not all(tensor.isfinite().all() for tensor in rows):
                detail = "the target's features hold infinities or NaN; is its dtype wide enough?"
                yield MSDDataError("non-finite features", detail, item.id)
                continue
            places = kept_masks[number].nonzero().squeeze(1).to(torch.int32)
            yield {
                "input_ids": item.inputs["input_ids"].to(torch.int32),
                "assistant_mask": item.inputs["assistant_mask"],
                "visual_mask": visual_masks[number],
                **({} if self.max_visual_rows is None else {"visual_places": places}),
                **self._pack("visual_embeds", visual_embeds[number], item),
                **self._pack("hidden_states", hidden_states[number], item),
            }

    @staticmethod
    def _gather(features: torch.Tensor, masks: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The rows of `features` `[B, L, W]` that the masks `[L]` keep, by sample, moved to the CPU in one copy."""
        mask = pad_sequence(masks, batch_first=True).to(features.device)
        return features[mask].cpu().split([int(kept.sum()) for kept in masks])

    def _pack(self, name: str, rows: torch.Tensor, item: EncodedConversation) -> Sample:
        packed = pack(name, rows, self.adapter.target.config.get_text_config(decoder=True).hidden_size, self.storage)
        if self.storage == "float16" and not packed[name].isfinite().all():
            raise MSDError(
                f"Features of sample {item.id!r} reach {rows.abs().max().item():.3g}, which float16 cannot hold. "
                'Extract them with `storage="bfloat16"`.'
            )
        return packed


def sample_visual_mask(adapter: TargetAdapter, inputs: Sample) -> torch.Tensor:
    """The mask `[L]` of the visual positions of a sample."""
    return adapter.visual_mask(inputs["input_ids"].unsqueeze(0)).squeeze(0)


__all__ = ["EncodedConversation", "FeatureExtractor", "iterate_encoded", "sample_visual_mask"]
