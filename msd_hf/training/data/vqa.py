"""Files of questions about pictures in the form of VQA: `{"questions": [{"question", "image_id", "question_id"}]}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


_LIST_KEYS = ("questions", "data")  # VQA; TextVQA


def questions_of(content: Any) -> Any:
    """
    The questions of a file of this form, as raw samples; other content as it is.

    VQA names a picture of COCO by its number. Such samples get the name of the file as `image`:
    `COCO_val2014_000000000042.jpg`.
    """
    if not isinstance(content, Mapping):
        return content
    questions = next((content[key] for key in _LIST_KEYS if isinstance(content.get(key), list)), None)
    if questions is None:
        return content
    part = content.get("data_subtype")
    if content.get("data_type") != "mscoco" or not isinstance(part, str):
        return questions
    return [_with_image(question, part.replace("test-dev", "test")) for question in questions]


def _with_image(question: Any, part: str) -> Any:
    number = question.get("image_id") if isinstance(question, Mapping) else None
    if not isinstance(number, int) or "image" in question:
        return question
    return {**question, "image": f"COCO_{part}_{number:012d}.jpg"}


__all__ = ["questions_of"]
