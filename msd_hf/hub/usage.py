"""The lines of a card that use the draft. They run as they stand."""

from __future__ import annotations

import json
from typing import Any


VISION_TASK, TEXT_TASK = "image-text-to-text", "text-generation"

_VISION = """\
import msd_hf
from msd_hf.toy import DEMO_IMAGE  # a picture to try; put your own in its place
from transformers import AutoModelForImageTextToText, AutoProcessor

target = AutoModelForImageTextToText.from_pretrained({target}, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained({target})
draft = msd_hf.AutoDraft.from_pretrained({draft}, dtype=target.dtype, device_map=target.device)

question = [{{"type": "image", "path": str(DEMO_IMAGE)}}, {{"type": "text", "text": "Describe the picture."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(target.device, target.dtype)
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

_TEXT = """\
import msd_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained({target})
draft = msd_hf.AutoDraft.from_pretrained({draft}, dtype=target.dtype, device_map=target.device)

inputs = tokenizer("The capital of France is", return_tensors="pt").to(target.device)
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
print(tokenizer.decode(out[0], skip_special_tokens=True))"""


def usage_lines(draft: str, target: Any, task: str) -> str:
    """
    Lines of Python that answer a question with a draft.

    Args:
        draft: what `from_pretrained` takes for the draft.
        target: the target's name; `None` if it is not known.
        task: `VISION_TASK` or `TEXT_TASK`.
    """
    template = _TEXT if task == TEXT_TASK else _VISION
    return template.format(
        draft=json.dumps(draft, ensure_ascii=False),
        target=json.dumps(target or "NAME-OF-THE-TARGET", ensure_ascii=False),
    )


__all__ = ["TEXT_TASK", "VISION_TASK", "usage_lines"]
