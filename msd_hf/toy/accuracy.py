"""Measures the accuracy of the answers that a model generates to held-out questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, cast

import torch
from PIL import Image
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .dataset import Prompt, make_prompts
from .text_questions import TEXT_KINDS
from .turns import has_facts
from .visual_questions import VISUAL_KINDS


class AnyPrompt(Protocol):
    """A question of a world: a chat whose images the processor gets separately, its kind, and what is correct."""

    @property
    def messages(self) -> list[dict[str, Any]]: ...
    @property
    def images(self) -> tuple[Image.Image, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def facts(self) -> tuple[str, ...]: ...


KIND_GROUPS: dict[str, Collection[str]] = {"visual": VISUAL_KINDS, "text": TEXT_KINDS}


@dataclass(frozen=True)
class Score:
    """Counts for one kind of question: correct answers, answers equal to the reference, and questions."""

    correct: int
    exact: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0-1."""
        return self.correct / self.total


def make_evaluation_prompts(prompts_per_kind: int, seed: int, split: str = "test") -> list[Prompt]:
    """Makes `prompts_per_kind` held-out questions of each visual and each text kind."""
    kinds = [*VISUAL_KINDS, *TEXT_KINDS]
    return [prompt for kind in kinds for prompt in make_prompts(split, prompts_per_kind, seed, kind)]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processor: Any,
    prompts: Sequence[AnyPrompt],
    batch_size: int = 40,
    max_new_tokens: int = 140,
) -> list[str]:
    """Generates greedy answers, in the order of the prompts."""
    answers: dict[int, str] = {}
    model.eval()
    # Type checkers do not see that the model fulfils the protocol that is the type of `self` in `generate`.
    generate = cast(Any, model).generate
    batches = []
    # All images of a batch have one size. Prompts of one kind have similar lengths and need little padding.
    order = sorted(range(len(prompts)), key=lambda i: (_image_size(prompts[i]), prompts[i].kind))
    for _, group in groupby(order, key=lambda i: _image_size(prompts[i])):
        same = list(group)
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    for chosen in tqdm(batches, desc="answering"):
        texts = [processor.apply_chat_template(prompts[i].messages, add_generation_prompt=True) for i in chosen]
        images = [image for i in chosen for image in prompts[i].images]
        inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt").to(model.device)
        output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        generated = output[:, inputs["input_ids"].size(1) :]
        for i, text in zip(chosen, processor.batch_decode(generated, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return [answers[i] for i in range(len(prompts))]


def _image_size(prompt: AnyPrompt) -> tuple[int, int]:
    return prompt.images[0].size if prompt.images else (0, 0)


def score_answers(prompts: Sequence[AnyPrompt], answers: Sequence[str]) -> dict[str, Score]:
    """The score of each kind of question. An answer is correct if it has all facts of its prompt."""
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers.")
    rows: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for prompt, answer in zip(prompts, answers, strict=True):
        rows[prompt.kind].append((has_facts(answer, prompt.facts), answer.strip() == prompt.answer))
    return {
        kind: Score(sum(correct for correct, _ in row), sum(exact for _, exact in row), len(row))
        for kind, row in rows.items()
    }


def total_score(scores: dict[str, Score]) -> Score:
    """The score of all kinds together."""
    parts = list(scores.values())
    return Score(sum(s.correct for s in parts), sum(s.exact for s in parts), sum(s.total for s in parts))


def accuracy_table(scores: dict[str, Score], groups: Mapping[str, Collection[str]]) -> Table:
    """A printable table of the scores of `score_answers`. `groups` names groups of kinds of questions."""
    table = Table(title="Held-out questions answered")
    table.add_column("question kind")
    for name in ("correct", "word for word", "questions"):
        table.add_column(name, justify="right")
    for group, kinds in groups.items():
        chosen = {kind: score for kind, score in scores.items() if kind in kinds}
        if not chosen:
            continue
        for kind, score in chosen.items():
            table.add_row(kind, *_cells(score))
        table.add_row(f"all {group}", *_cells(total_score(chosen)), style="bold", end_section=True)
    table.add_row("all", *_cells(total_score(scores)), style="bold")
    return table


def _cells(score: Score) -> tuple[str, str, str]:
    return f"{score.accuracy:.1%}", f"{score.exact / score.total:.1%}", str(score.total)
