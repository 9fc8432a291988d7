"""What a user gives `MSDTrainer`: raw data sets of any form, and perhaps no processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import PreTrainedModel

from ..errors import MSDDataError, MSDError
from ..loading import load_processor
from .arguments import MSDTrainingArguments
from .curriculum import SAMPLE_KINDS, SampleKind
from .data.conversations import (
    Conversation,
    Conversations,
    JoinedConversations,
    StreamedConversations,
    load_conversations,
)
from .features.cache import FeatureCache


def processor_of(target: PreTrainedModel) -> Any:
    """
    Loads the processor of a target from where the target was loaded.

    Raises:
        MSDError: when the target was not loaded from anywhere, or there is no processor.
    """
    name = getattr(target.config, "_name_or_path", "") or getattr(target, "name_or_path", "")
    if not name:
        raise MSDError(
            f"This `{type(target).__name__}` does not say where it was loaded from: give its processor as "
            "`processing_class`."
        )
    return load_processor(name)


def open_training_data(text: Any, visual: Any, both: Any, args: MSDTrainingArguments) -> dict[SampleKind, Any]:
    """
    Opens the training data of a run, raw or opened.

    Args:
        text, visual: the arguments `text_dataset` and `visual_dataset` of the trainer.
        both: its argument `train_dataset`: a mapping with the keys `"text"` and `"visual"`, or samples with and
            without images, which are told apart here.
        args: the arguments of the run.

    Raises:
        MSDError: when data is given twice, is of no known form, or cannot be used with these arguments.
    """
    if both is not None:
        if text is not None or visual is not None:
            raise MSDError("Give `text_dataset` and `visual_dataset`, or `train_dataset` with both kinds, not all.")
        if isinstance(both, Mapping) and set(both) <= set(SAMPLE_KINDS):
            text, visual = both.get("text"), both.get("visual")
        else:
            text, visual = _told_apart(_opened(both), args)
    data: dict[SampleKind, Any] = {"text": _opened(text), "visual": _opened(visual)}
    streamed = [kind for kind, dataset in data.items() if isinstance(dataset, StreamedConversations)]
    if streamed and args.dataloader_num_workers > 0:
        raise MSDError(
            f"The {streamed[0]} data is streamed, and a stream is read in order by the process that trains: set "
            f"`dataloader_num_workers` to 0, got {args.dataloader_num_workers}."
        )
    args.run_length(dict.fromkeys(streamed), args.train_batch_size)  # a stream needs `max_steps`
    if args.make_recipe().hard_example_mixing > 0:
        _check_draws_again(data, args)
    return data


def open_held_out(data: Any) -> Any:
    """
    Opens held-out data, raw or opened, or a dictionary of such data sets.

    Raises:
        MSDError: when it is streamed, or of no known form.
    """
    if isinstance(data, Mapping):
        return {name: open_held_out(part) for name, part in data.items()}
    opened = _opened(data)
    if isinstance(opened, StreamedConversations):
        len(opened)  # says that a stream has none
    return opened


def _check_draws_again(data: Mapping[SampleKind, Any], args: MSDTrainingArguments) -> None:
    if any(isinstance(dataset, StreamedConversations) for dataset in data.values()):
        raise MSDError(
            "`hard_example_mixing` draws samples again, and a streamed data set has them in its order alone: set it "
            "to 0, or give data sets with a length."
        )
    sizes: dict[SampleKind, int | None] = {kind: len(dataset) for kind, dataset in data.items() if dataset is not None}
    epoch, run = args.run_length(sizes, args.train_batch_size)
    if run <= epoch:
        raise MSDError(
            f"`hard_example_mixing` draws again what went badly in the epochs before, and this run of {run} steps has "
            f"one epoch of {epoch}: set it to 0, or train for several epochs."
        )


def _opened(data: Any) -> Any:
    """Conversations for raw data; any other data set as it is, because its samples may be [`Conversation`]s."""
    if data is None or isinstance(data, (FeatureCache, Conversations, JoinedConversations, StreamedConversations)):
        return data
    if isinstance(data, (str, Path, Mapping)) or hasattr(data, "with_format") or not _has_samples(data):
        return load_conversations(data)
    first = _first_sample(data)
    is_raw = isinstance(first, Mapping) or (isinstance(data, (list, tuple)) and not isinstance(first, Conversation))
    return load_conversations(data) if is_raw else data


def _has_samples(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _first_sample(data: Any) -> Any:
    try:
        return data[0] if len(data) else None
    except MSDDataError:  # the data set makes conversations, and the first one is broken
        return None


def _told_apart(data: Any, args: MSDTrainingArguments) -> tuple[Any, Any]:
    """Samples without and samples with images."""
    if args.curriculum in SAMPLE_KINDS:
        return (data, None) if args.curriculum == "text" else (None, data)
    if isinstance(data, (FeatureCache, StreamedConversations)):
        what = "A stream" if isinstance(data, StreamedConversations) else "A feature cache"
        raise MSDError(
            f"{what} as `train_dataset` is not told apart into text and images, which the curriculum "
            f"{args.curriculum!r} draws in turns: give `text_dataset` and `visual_dataset`, or set `curriculum` to "
            "'text' or 'visual'."
        )
    if len(data) == 0:
        raise MSDError("`train_dataset` holds no samples.")
    places: dict[bool, list[int]] = {False: [], True: []}
    for index in range(len(data)):
        try:
            places[bool(data[index].images)].append(index)
        except MSDDataError:  # counted when it is drawn
            places[False].append(index)
    text, visual = (Subset(data, places[has_images]) if places[has_images] else None for has_images in (False, True))
    if text is None or visual is None:
        kind = "visual" if text is None else "text"
        raise MSDError(
            f"All samples of `train_dataset` are of one kind, {kind}, and the curriculum {args.curriculum!r} needs "
            f"both: add samples {'without' if text is None else 'with'} images, or set `curriculum` to {kind!r}."
        )
    return text, visual


__all__ = ["open_held_out", "open_training_data", "processor_of"]
