"""Regeneration: the target answers the prompts of a data set, so that a draft learns what the target really says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel
from transformers.utils import logging

from ...errors import MSDDataError, MSDError, errors_name_sample
from ...processes.group import ALONE, Processes
from ..data.conversations import Conversations
from ..data.encoding import ConversationEncoder
from ..data.skipped import SkippedSamples
from ..disk import check_space, check_writable
from ..features.fingerprint import target_fingerprint
from ..interruption import resumable
from .answered_chat import AnsweredChat, EntryWriter
from .answers import AnswerGenerator
from .journal import Journal, check_unwritten
from .parts import Parts, remove_parts


logger = logging.get_logger(__name__)

_NUM_PROBES = 64
_BYTES_PER_TOKEN = 4
_BATCHES_PER_WINDOW = 4  # prompts are sorted by length within a window of this many batches


@dataclass(frozen=True)
class RegenerateReport:
    """
    The file that [`regenerate`] wrote, and the numbers of its conversations and of the skipped samples.

    Args:
        output: the JSONL file.
        num_samples: number of conversations in the file.
        num_cut: number of conversations in the file whose last answer was cut by the length limit.
        skipped: number of samples that could not be used, by reason.
    """

    output: Path
    num_samples: int
    num_cut: int
    skipped: dict[str, int]


def regenerate(
    target: PreTrainedModel,
    processor: Any,
    conversations: Conversations,
    output: str | Path,
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    processes: Processes = ALONE,
    **generate_arguments: Any,
) -> RegenerateReport:
    """
    Lets the target answer the user's turns of a data set. Each turn is answered after the target's own earlier
    answers; the answers of the data are dropped. If the length limit cuts an answer, the conversation ends there and
    is marked `"complete": false`.

    A killed run resumes when it is started again. The result is the same as without the interruption, also with
    sampling, because a sampled answer depends only on seed, sample and turn.

    Args:
        target: the target, on its device and in its dtype.
        processor: the target's processor.
        conversations: the data.
        output: a LLaVA-style `.jsonl` file, in the order of the data. Images that the data holds in memory are written
            to a folder beside it.
        max_new_tokens: length limit of an answer.
        batch_size: number of prompts that are answered together.
        temperature: 0 for greedy decoding, above 0 for sampling.
        seed: seed of sampling.
        strict: stop at a broken sample instead of leaving it out.
        processes: the processes that share the work, [`~msd_hf.processes.group.launched`]. All of them make this call,
            with an `output` in a folder that all machines see. The file is the one that a single process writes.
        generate_arguments: further arguments of `generate`, such as `top_p` or `repetition_penalty`.

    Raises:
        MSDError: when an argument is wrong, when `output` exists or was begun with other settings, or when no sample
            can be used; no file is left then.
        MSDDataError: with `strict`, at a broken sample.
    """
    output = Path(output)
    processes.from_first(lambda: check_output(output))
    if batch_size < 1:
        raise MSDError(f"`batch_size` must be at least 1, got {batch_size}.")
    encoder = ConversationEncoder(processor)
    generator = AnswerGenerator(target, encoder.tokenizer, max_new_tokens, temperature, generate_arguments)
    settings = {
        "target": target_fingerprint(target),
        "dtype": str(target.dtype),
        "processor": encoder.fingerprint,
        "data": conversations.fingerprint,
        "batch_size": batch_size,
        "seed": seed,
        "strict": strict,
        **generator.settings,
    }
    processes.check_equal({name: str(value) for name, value in settings.items() if name != "logits_processor"})
    processes.from_first(lambda: check_answer_space(output, conversations, max_new_tokens, processes))
    chats = _Windows(generator, encoder, conversations, batch_size, seed, strict)
    writer = EntryWriter(output, conversations.image_folder)
    was_training = target.training
    target.eval()
    try:
        if not processes.is_alone:
            _write_part(output, settings, chats, writer, processes)
        return processes.from_first(lambda: _write_output(output, settings, chats, writer, processes.is_alone))
    finally:
        target.train(was_training)


def _write_part(
    output: Path, settings: dict[str, Any], chats: _Windows, writer: EntryWriter, processes: Processes
) -> None:
    """Answers this process's share of the samples that no earlier run has answered."""

    def find_missing() -> list[int]:
        with Journal(output, settings) as journal:
            return _missing(journal, Parts(output, settings), len(chats.conversations))

    missing = processes.from_first(find_missing)
    windows = processes.share(chats.windows(missing))
    total = sum(len(window) for window in windows)
    with Journal(output, settings, processes.index) as part, resumable(lambda: _place(part, total)):
        with tqdm(total=total, desc="regenerating", disable=not processes.is_first) as bar:
            for index, chat in chats.answered(windows, set(missing)):
                part.append({"index": index, **_record(index, chat, writer)})
                bar.update()
        processes.gather(None)  # waits for the others


def _write_output(
    output: Path, settings: dict[str, Any], chats: _Windows, writer: EntryWriter, is_alone: bool
) -> RegenerateReport:
    """Answers the samples that are missing yet, and writes all of them in order."""
    total = len(chats.conversations)
    with Journal(output, settings) as journal, resumable(lambda: _place(journal, total)):
        parts = Parts(output, settings)
        missing = _missing(journal, parts, total)
        if missing and not is_alone:
            raise MSDError(
                f"Sample {missing[0]} was answered, but is not beside {str(output)!r}: all machines need the same "
                "folder."
            )
        if journal.num_done:
            logger.info("Resuming after sample %d of %d.", journal.num_done, total)
        answered = chats.answered(chats.windows(missing), set(missing))
        with tqdm(total=total, initial=journal.num_done, desc="regenerating", disable=not is_alone) as bar:
            for index in range(journal.num_done, total):
                journal.append(parts.record(index) if index in parts else _record(*next(answered), writer))
                bar.update()
        counts = Counter(_outcome(record) for record in journal.records())
        num_cut, num_samples = counts.pop("cut", 0), counts.pop("complete", 0)
        remove_parts(output)  # the journal has their lines now
        if num_samples + num_cut == 0:
            journal.discard()
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
            raise MSDError(f"None of {total:,} samples can be used ({reasons or 'no data'}).")
        journal.finish("sample")
    return RegenerateReport(output, num_samples + num_cut, num_cut, skipped=dict(counts))


def _missing(journal: Journal, parts: Parts, total: int) -> list[int]:
    return [index for index in range(journal.num_done, total) if index not in parts]


def _record(index: int, chat: AnsweredChat | str, writer: EntryWriter) -> dict[str, Any]:
    return {"skipped": chat} if isinstance(chat, str) else {"sample": writer(index, chat)}


def check_output(output: Path) -> None:
    """
    Checks that answers can be written to `output`.

    Raises:
        MSDError: when `output` exists, is not a .jsonl file, or lies in a folder that cannot be written to.
    """
    if output.suffix != ".jsonl":
        raise MSDError(f"`output` must be a .jsonl file, got {str(output)!r}.")
    check_unwritten(output)
    check_writable(output.parent)


def check_answer_space(
    output: Path, conversations: Conversations, max_new_tokens: int, processes: Processes = ALONE
) -> None:
    """
    Checks that the disk has room for the longest possible answers to the prompts of `conversations`, as far as at most
    64 evenly spaced samples tell. The target is not needed.

    Raises:
        MSDError: when the disk is too small.
    """
    num_probes = min(_NUM_PROBES, len(conversations))
    num_bytes = 0
    for number in range(num_probes):
        try:
            conversation = conversations[(2 * number + 1) * len(conversations) // (2 * num_probes)]
        except MSDDataError:
            continue
        turns = [message for message in conversation.messages if message["role"] != "assistant"]
        num_bytes += len(str(turns).encode()) + len(turns) * max_new_tokens * _BYTES_PER_TOKEN
        num_bytes += sum(
            3 * image.width * image.height for image in conversation.images if not isinstance(image, Path)
        )
    needed = num_bytes * len(conversations) // max(num_probes, 1)
    # The journal and the file that is made of it exist at the same time; several processes have parts too.
    copies = 2 if processes.is_alone else 3
    check_space(output.parent, copies * needed, "The answers", "Use fewer samples, or another disk.")


def _place(journal: Journal, total: int) -> str:
    kept = f"{journal.num_done:,} of {total:,} samples are kept in {str(journal.path)!r}"
    return f"{kept}, and the same call goes on there."


def _outcome(record: dict[str, Any]) -> str:
    if "skipped" in record:
        return record["skipped"]
    return "complete" if record["sample"].get("complete", True) else "cut"


class _Windows:
    """Answers conversations in windows of a few batches. Prompts are sorted by length within a window. A resumed run
    has the same windows as an uninterrupted one."""

    def __init__(
        self,
        generator: AnswerGenerator,
        encoder: ConversationEncoder,
        conversations: Conversations,
        batch_size: int,
        seed: int,
        strict: bool,
    ):
        self.generator, self.conversations = generator, conversations
        self.processor, self.renderer = encoder.processor, encoder.renderer
        self.batch_size, self.seed, self.skipped = batch_size, seed, SkippedSamples(strict)

    def windows(self, missing: Sequence[int]) -> list[range]:
        """The windows that hold the missing samples, in order."""
        size = self.batch_size * _BATCHES_PER_WINDOW
        starts = sorted({index - index % size for index in missing})
        return [range(start, min(start + size, len(self.conversations))) for start in starts]

    def answered(self, windows: Sequence[range], missing: Collection[int]) -> Iterator[tuple[int, AnsweredChat | str]]:
        """Answers windows. Yields the index of each missing sample, with its chat or the reason why it was skipped."""
        for indices in windows:
            window = self._open(indices)
            for turn in count():
                prompts = self._prompts(window)
                if not prompts:
                    break
                for batch in self._batches(prompts):
                    seeds = [f"{self.seed}/{index}/{turn}" for index in batch]
                    answers = self.generator([prompts[index] for index in batch], seeds)
                    for index, answer in zip(batch, answers, strict=True):
                        window[index].answer(*answer)
            for index in filter(missing.__contains__, indices):
                chat = window[index]
                yield index, "empty turn" if isinstance(chat, AnsweredChat) and not chat.is_answered else chat

    def _open(self, indices: Sequence[int]) -> dict[int, Any]:
        window: dict[int, Any] = {}
        for index in indices:
            try:
                conversation = self.conversations[index]
                with errors_name_sample(conversation.id):
                    window[index] = AnsweredChat(conversation)
            except MSDDataError as error:
                window[index] = self._skip(error)
        return window

    def _prompts(self, window: dict[int, Any]) -> dict[int, BatchFeature]:
        """The next prompt of each chat that has one. A broken chat is replaced in `window` by its reason."""
        prompts = {}
        for index, chat in window.items():
            if isinstance(chat, str) or not chat.questions:
                continue
            try:
                with errors_name_sample(chat.id, "refused by processor"):
                    prompts[index] = self._prompt(chat)
            except MSDDataError as error:
                if chat.is_answered:  # the conversation ends before this question
                    chat.questions = []
                else:
                    window[index] = self._skip(error)
        return prompts

    def _prompt(self, chat: AnsweredChat) -> BatchFeature:
        prompt = chat.prompt(self.processor, self.renderer)
        length, context = prompt["input_ids"].shape[1], self.generator.context_length
        if context is not None and length + self.generator.max_new_tokens > context:
            raise MSDDataError(
                "too long",
                f"a prompt of {length} tokens leaves no room for {self.generator.max_new_tokens} in the target's "
                f"context of {context}.",
            )
        return prompt

    def _skip(self, error: MSDDataError) -> str:
        self.skipped.add(error)
        return error.reason

    def _batches(self, prompts: dict[int, BatchFeature]) -> Iterator[list[int]]:
        for visual in (False, True):  # some models take only batches in which all prompts have images, or none
            chosen = [index for index, prompt in prompts.items() if ("pixel_values" in prompt) is visual]
            chosen.sort(key=lambda index: prompts[index]["input_ids"].shape[1])
            for start in range(0, len(chosen), self.batch_size):
                yield chosen[start : start + self.batch_size]


__all__ = ["RegenerateReport", "check_answer_space", "check_output", "regenerate"]
