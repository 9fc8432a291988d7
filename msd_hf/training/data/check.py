"""Checks a data set: counts unusable samples by reason, and shows the trained tokens of usable ones."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from ...errors import MSDDataError
from ...terminal import one_line, printable
from .conversations import Conversations
from .encoding import ConversationEncoder
from .skipped import SkippedSamples


TRAINED_STYLE = "bold green"


@dataclass(frozen=True)
class ShownSample:
    """A sample as a model reads it: `pieces` of text, each with a flag that says whether it is trained."""

    id: str
    pieces: list[tuple[str, bool]]


@dataclass
class DataReport:
    """
    The counts, error messages and shown samples that [`check_conversations`] collects from a data set.

    Args:
        name: name of the data.
        num_samples: number of samples in the data.
        max_length: number of tokens to which longer samples were cut.
        reasons: number of samples that cannot be used, by reason.
        examples: the first few error messages for each reason.
        lengths: number of tokens of each usable sample, after cutting.
        num_trained_tokens: number of the assistant's tokens in all usable samples.
        num_with_images, num_images: number of usable samples with images, and number of their images.
        shown: the first few usable samples.
    """

    name: str
    num_samples: int
    max_length: int
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    num_trained_tokens: int = 0
    num_with_images: int = 0
    num_images: int = 0
    shown: list[ShownSample] = field(default_factory=list)

    @property
    def num_ok(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def check_conversations(
    conversations: Conversations, processor: Any, max_length: int = 2048, num_shown: int = 3, strict: bool = False
) -> DataReport:
    """
    Reads and encodes every sample, images included, as training would, and reports which ones cannot be used.

    Args:
        conversations: the data.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's processor.
        max_length: number of tokens to which longer samples are cut.
        num_shown: number of samples that are kept as text. Half of them have images, if there are enough.
        strict: raise at the first sample that cannot be used.

    Raises:
        MSDDataError: with `strict`, when a sample cannot be used.
    """
    encoder = ConversationEncoder(processor, max_length)
    skipped = SkippedSamples(strict, is_logged=False)
    report = DataReport(
        conversations.name, len(conversations), max_length, reasons=skipped.reasons, examples=skipped.examples
    )
    shown: dict[bool, list[ShownSample]] = {True: [], False: []}
    for index in tqdm(range(len(conversations)), desc=conversations.name, leave=False):
        try:
            conversation = conversations[index]
            sample = encoder(conversation)
        except MSDDataError as error:
            skipped.add(error)
            continue
        num_images = len(conversation.images)
        report.lengths.append(len(sample["input_ids"]))
        report.num_trained_tokens += int(sample["assistant_mask"].sum())
        report.num_with_images += num_images > 0
        report.num_images += num_images
        group = shown[num_images > 0]
        if len(group) < num_shown:
            group.append(ShownSample(conversation.id, _to_pieces(sample, encoder.tokenizer)))
    num_text = max(num_shown // 2, num_shown - len(shown[True]))
    report.shown = [*shown[False][:num_text], *shown[True]][:num_shown]
    return report


def render_report(report: DataReport, console: Console) -> None:
    """Prints a report: counts, a table of reasons, and the shown samples. Trained tokens are green, or stand between ‹
    and › if the terminal has no colours."""
    skipped = report.num_samples - report.num_ok
    console.print(f"{report.name}: {report.num_ok:,} of {report.num_samples:,} samples can be used", markup=False)
    if report.num_ok:
        share = report.num_trained_tokens / report.num_tokens
        lengths = sorted(report.lengths)
        at_limit = sum(length == report.max_length for length in lengths)
        console.print(f"with images   {report.num_with_images:,} samples, {report.num_images:,} images")
        console.print(
            f"tokens        {report.num_tokens:,}, of which {report.num_trained_tokens:,} ({share:.0%}) trained"
        )
        console.print(
            f"length        {lengths[0]} to {lengths[-1]}, median {statistics.median_low(lengths)}; "
            f"{at_limit:,} fill max_length {report.max_length}"
        )
    if skipped:
        table = Table(show_edge=False, pad_edge=False)
        for name in ("reason", "samples", "for example"):
            table.add_column(name, justify="right" if name == "samples" else "left")
        for reason, count in report.reasons.most_common():
            # `Text`, so that brackets in the data are not read as markup.
            table.add_row(Text(reason), f"{count:,}", Text("\n".join(map(one_line, report.examples[reason]))))
        console.print()
        console.print(table)
    coloured = console.is_terminal and not console.no_color
    for sample in report.shown:
        text = Text()
        for piece, trained in sample.pieces:
            if trained and not coloured:
                piece = f"‹{piece}›"
            text.append(printable(piece), style=TRAINED_STYLE if trained and coloured else "")
        console.print()
        console.print(Text(f"sample {one_line(sample.id)}", style="bold underline"))
        console.print(text, soft_wrap=True)


def _to_pieces(sample: dict[str, torch.Tensor], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a sample in pieces, each with a flag that says whether it is trained. A run of the same added token,
    such as the tokens of an image, is written with its length: `<image>x36`."""
    ids = sample["input_ids"]
    changes = (sample["assistant_mask"].diff().nonzero()[:, 0] + 1).tolist()
    added = tokenizer.added_tokens_decoder
    pieces = []
    for begin, end in zip([0, *changes], [*changes, len(ids)], strict=True):
        text = ""
        for token, start, stop in _runs(ids[begin:end].tolist(), added):
            if stop - start > 1 and token in added:
                text += f"{added[token].content}x{stop - start}"
            else:
                text += _decode(ids, begin + start, begin + stop, tokenizer)
        pieces.append((text, bool(sample["assistant_mask"][begin])))
    return pieces


def _runs(tokens: list[int], added: dict[int, Any]) -> list[tuple[int, int, int]]:
    """Splits tokens into runs. A run repeats one added token, or holds ordinary tokens only. Returns the first token,
    the begin and the end of each run."""
    runs: list[tuple[int, int, int]] = []
    for place, token in enumerate(tokens):
        if runs and (token == runs[-1][0] if token in added else runs[-1][0] not in added):
            runs[-1] = (runs[-1][0], runs[-1][1], place + 1)
        else:
            runs.append((token, place, place + 1))
    return runs


def _decode(ids: torch.Tensor, begin: int, end: int, tokenizer: Any) -> str:
    """The text of `ids[begin:end]`. The token before them is decoded too, because many tokenizers drop the space at
    the beginning of a text."""
    before, text = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (ids[max(0, begin - 1) : begin], ids[max(0, begin - 1) : end])
    )
    return text[len(before) :]


__all__ = ["DataReport", "ShownSample", "check_conversations", "render_report"]
