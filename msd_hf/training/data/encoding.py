"""Encodes conversations as inputs of the target, with a mask of the assistant's tokens, and makes batches."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import MSDDataError, MSDError, errors_name_sample
from ...prompts import adds_special_tokens
from .chat_rendering import ChatRenderer, RenderedChat
from .conversations import Conversation
from .expansion import Stretch, TokenizerRecorder, align, move


# An input of models that read images by cross-attention, of which each sample has one row: `[1, L, images, tiles]`.
# Their other inputs of images also have one row for each sample, those without images included.
_ROW_MASK = "cross_attention_mask"


class ConversationEncoder:
    """
    Encodes conversations with the target's own processor and chat template.

    The characters of an answer in the rendered text determine the mask of the assistant's tokens. The masked tokens
    are then decoded and compared with the answer. A difference raises an error, so that no mask is silently wrong.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's processor.
        max_length: number of tokens to which longer samples are cut, expanded images included.

    Raises:
        MSDError: when this tokenizer or chat template does not show which tokens belong to an answer.
    """

    def __init__(self, processor: Any, max_length: int = 2048):
        if max_length < 1:
            raise MSDError(f"`max_length` must be at least 1, but is {max_length}.")
        self.processor = processor
        self.max_length = max_length
        self.renderer = ChatRenderer(processor)
        self.tokenizer = self.renderer.tokenizer
        if not self.tokenizer.is_fast:
            raise MSDError(
                f"`{type(self.tokenizer).__name__}` does not say which characters its tokens stand for: "
                "load it as a fast tokenizer (`use_fast=True`, with the package tokenizers)."
            )

    def __call__(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """
        Encodes one conversation up to its last answer.

        Returns:
            `input_ids` (long, `[L]`) with expanded images; `assistant_mask` (bool, `[L]`), true at answers and the
            tokens that end them; and the other outputs of the processor: those with one value per token as `[L]`,
            images with their leading dimension.

        Raises:
            MSDDataError: when the conversation cannot be encoded; its `reason` is one of `REASONS`.
        """
        with errors_name_sample(conversation.id):
            return self._encode(conversation)

    def answer_tokens(self, conversation: Conversation) -> torch.Tensor:
        """
        The tokens of all answers (long, `[A]`), including the tokens that end them. Images are not opened. Nothing is
        cut, because the length of the conversation is not known without its images.

        Raises:
            MSDDataError: when the conversation cannot be encoded; its `reason` is one of `REASONS`.
        """
        with errors_name_sample(conversation.id):
            _, chat = self._render(conversation)
            recorder = TokenizerRecorder(self.tokenizer)
            recorder([chat.text], add_special_tokens=adds_special_tokens(self.tokenizer, chat.text))
            return recorder.ids[self._mask(chat, recorder, [Stretch(0, 0, len(chat.text))])]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer, the processor, the chat template and `max_length`, which determine the result."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # `truncation` and `padding` hold the state of the last call, not settings.
        state = {name: value for name, value in tokenizer.items() if name not in ("truncation", "padding")}
        settings = [] if self.processor is self.tokenizer else [self.processor.to_dict()]
        content = [state, self.tokenizer.special_tokens_map, settings, self.processor.chat_template, self.max_length]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _render(self, conversation: Conversation) -> tuple[Conversation, RenderedChat]:
        """Returns the conversation up to its last answer, and the text that the chat template writes for it."""
        messages = conversation.messages
        while messages and messages[-1]["role"] != "assistant":  # there is nothing to learn after the last answer
            messages = messages[:-1]
        if not messages:
            raise MSDDataError("no assistant turn", "no turn of the assistant answers the user.")
        num_images = self.renderer.count_images(messages)
        chat = self.renderer(messages, conversation.complete)
        return Conversation(conversation.id, messages, conversation.images[:num_images]), chat

    def _encode(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        conversation, chat = self._render(conversation)
        images = conversation.open_images()

        recorder = TokenizerRecorder(self.tokenizer)
        data = self._process(recorder, chat.text, images)
        ids = data.pop("input_ids")[0]
        if not torch.equal(recorder.ids, ids):
            raise MSDError(f"`{type(self.processor).__name__}` changes tokens after its tokenizer made them.")
        stretches = align(chat.text, recorder.text, self.renderer.image_tokens)
        mask = self._mask(chat, recorder, stretches)
        length = len(ids)
        result = {"input_ids": ids, "assistant_mask": mask}
        for name, value in data.items():
            if name != "attention_mask":
                result[name] = value[0] if tuple(value.shape) == (1, length) else value
        return self._cut(result, recorder.offsets, stretches) if length > self.max_length else result

    def _process(self, recorder: TokenizerRecorder, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
        arguments: dict[str, Any] = {"return_tensors": "pt", "padding": False}
        arguments["add_special_tokens"] = adds_special_tokens(self.tokenizer, text)
        if self.processor is self.tokenizer:
            return dict(recorder([text], **arguments))
        processor = copy.copy(self.processor)  # the user's processor keeps its tokenizer
        processor.tokenizer = recorder
        if images:
            arguments["images"] = images
        with errors_name_sample(None, "refused by processor"):  # for example, an image is too small or too narrow
            return dict(processor(text=[text], **arguments))

    def _mask(self, chat: RenderedChat, recorder: TokenizerRecorder, stretches: list[Stretch]) -> torch.Tensor:
        text, (starts, ends) = recorder.text, recorder.offsets.unbind(1)
        mask = torch.zeros(len(starts), dtype=torch.bool)
        for answer in chat.answers:
            begin, end = move(answer, stretches)
            # Byte-level tokenizers give a token of white space an empty span at the end of the white space.
            blank = (starts == ends) & (starts > begin) & (ends <= end)
            tokens = ((starts < end) & (ends > begin) & (starts < ends) | blank).nonzero()[:, 0]
            if len(tokens) == 0 or len(tokens) != tokens[-1] - tokens[0] + 1:
                raise MSDDataError("tokenization", f"no run of tokens stands for the answer {text[begin:end][:80]!r}.")
            # This check also fails if a token belongs partly to the answer and partly to the text beside it.
            decoded = self.tokenizer.decode(
                recorder.ids[tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if _canonical(decoded) != _canonical(text[begin:end]):
                raise MSDDataError(
                    "tokenization", f"the tokens of {text[begin:end][:80]!r} decode to {decoded[:80]!r}."
                )
            mask[tokens] = True
        return mask

    def _cut(
        self, sample: dict[str, torch.Tensor], offsets: torch.Tensor, stretches: list[Stretch]
    ) -> dict[str, torch.Tensor]:
        length = len(sample["input_ids"])
        detail = f"has {length} tokens, {self.max_length} are allowed"
        if not sample["assistant_mask"][: self.max_length].any():
            raise MSDDataError("too long", f"{detail}, and no answer begins before this limit.")
        for before, after in itertools.pairwise(stretches):
            in_image = (offsets[:, 0] < after.expanded) & (offsets[:, 1] > before.expanded + before.length)
            if in_image[self.max_length :].any():
                raise MSDDataError("too long", f"{detail}, and an image would be cut off.")
        return {
            name: value[: self.max_length] if _is_per_token(value, length) else value for name, value in sample.items()
        }


def collate_conversations(samples: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Makes one batch of encoded conversations, padded on the right.

    Args:
        samples: outputs of [`ConversationEncoder`], with or without images.
        pad_token_id: padding of `input_ids`.

    Returns:
        `input_ids` (long, `[B, L]`), `attention_mask` (long, `[B, L]`), `assistant_mask` (bool, `[B, L]`), other
        values per token (`[B, L]`, padded with 0), and images, concatenated along their first dimension. If images
        differ in another dimension (the patches of LLaVA-NeXT), they are padded with zeros.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample.get(name) for sample in samples]
        there = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
        if all(_is_per_token(value, length) for value, length in there):
            fill = pad_token_id if name == "input_ids" else 0
            rows = [
                there[0][0].new_zeros(length) if value is None else value
                for value, length in zip(values, lengths, strict=True)
            ]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        else:
            if any(_ROW_MASK in sample for sample in samples):
                like = there[0][0]
                values = [
                    _empty_row(like, name, length) if value is None else value
                    for value, length in zip(values, lengths, strict=True)
                ]
            batch[name] = concatenate_padded([value for value in values if value is not None])
    positions = torch.arange(max(lengths))
    batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
    return batch


def _empty_row(like: torch.Tensor, name: str, length: int) -> torch.Tensor:
    """A row without images, as small as it can be."""
    sizes = [1] * like.dim()
    if name == _ROW_MASK:
        sizes[1] = length
    return like.new_zeros(sizes)


def concatenate_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates tensors along their first dimension. Zeros pad each other dimension to its largest size."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        # `pad` takes the amounts of the last dimension first.
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        amounts = [amount for gap in reversed(missing) for amount in (0, gap)]
        padded.append(torch.nn.functional.pad(tensor, amounts) if any(missing) else tensor)
    return torch.cat(padded)


def _is_per_token(value: torch.Tensor, length: int) -> bool:
    return value.dim() == 1 and len(value) == length


def _canonical(text: str) -> str:
    """A text without the details that a tokenizer may change: case, white space, compatible characters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


__all__ = ["ConversationEncoder", "collate_conversations", "concatenate_padded"]
