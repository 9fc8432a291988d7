"""Measures the accuracy of the answers that a model generates to held-out questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .dataset import Prompt, make_prompts
from .text_questions import TEXT_KINDS
from .turns import has_facts
from .visual_questions import VISUAL_KINDS


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
    prompts: Sequence[Prompt],
    batch_size: int = 40,
    max_new_tokens: int = 140,
) -> list[str]:
    """Generates greedy answers, in the order of the prompts."""
    answers: dict[int, str] = {}
    model.eval()
    # Type checkers do not see that the model fulfils the protocol that is the type of `self` in `generate`.
    generate = cast(Any, model).generate
    # Sorted by kind, because prompts of one kind have similar lengths and need little padding.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].image is None, prompts[i].kind))
    for start in tqdm(range(0, len(order), batch_size), desc="answering"):
        chosen = order[start : start + batch_size]
        texts = [processor.apply_chat_template(prompts[i].messages, add_generation_prompt=True) for i in chosen]
        images = [image for i in chosen if (image := prompts[i].image) is not None]
        inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt").to(model.device)
        output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        generated = output[:, inputs["input_ids"].size(1) :]
        for i, text in zip(chosen, processor.batch_decode(generated, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return [answers[i] for i in range(len(prompts))]


def score_answers(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, Score]:
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


def accuracy_table(scores: dict[str, Score]) -> Table:
    """A printable table of the scores of `score_answers`."""
    table = Table(title="Held-out questions answered")
    table.add_column("question kind")
    for name in ("correct", "word for word", "questions"):
        table.add_column(name, justify="right")
    groups = (("visual", VISUAL_KINDS), ("text", TEXT_KINDS))
    for group, kinds in groups:
        chosen = {kind: score for kind, score in scores.items() if kind in kinds}
        if not chosen:
            continue
        for kind, score in (*chosen.items(), (f"[bold]all {group}[/bold]", total_score(chosen))):
            table.add_row(kind, f"{score.accuracy:.1%}", f"{score.exact / score.total:.1%}", str(score.total))
        table.add_section()
    overall = total_score(scores)
    table.add_row(
        "[bold]all[/bold]", f"{overall.accuracy:.1%}", f"{overall.exact / overall.total:.1%}", str(overall.total)
    )
    return table
