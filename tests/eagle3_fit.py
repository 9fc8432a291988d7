"""Fits an EAGLE-3 draft to the bundled toy target by a short loop, so that some of its candidates are accepted."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from msd_hf import Eagle3DraftModel
from msd_hf.toy.dataset import Prompt, make_prompts
from msd_hf.toy.text_questions import TEXT_KINDS
from msd_hf.toy.visual_questions import VISUAL_KINDS


PASSES = 3  # passes of the draft over a text: each but the first reads the draft's own output of the one before
BATCH_SIZE = 16


def fit_eagle3(
    target: PreTrainedModel, processor: Any, per_kind: int = 30, steps: int = 500, **fields: Any
) -> Eagle3DraftModel:
    """A draft of the toy target with these fields, fitted to answers to `per_kind` questions of each kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draft = Eagle3DraftModel.from_target(target, **fields).train()
        prompts = [
            prompt for kind in (*TEXT_KINDS, *VISUAL_KINDS) for prompt in make_prompts("train", per_kind, 0, kind)
        ]
        samples = [_sample(target, processor, draft, prompt) for prompt in prompts]
        optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(steps):
            chosen = [samples[int(number)] for number in torch.randint(len(samples), (BATCH_SIZE,))]
            embeds, states, probs = (
                pad_sequence(list(parts), batch_first=True) for parts in zip(*chosen, strict=True)
            )
            loss = _loss(draft, embeds, states, probs)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return draft.eval()


@torch.no_grad()
def _sample(
    target: PreTrainedModel, processor: Any, draft: Eagle3DraftModel, prompt: Prompt
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings after the shift `[T, H]`, hidden states `[T, W]`, and the target's probabilities `[T, V]`."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": prompt.answer}]}
    texts = [
        processor.apply_chat_template(messages, add_generation_prompt=is_question)
        for messages, is_question in ((prompt.messages, True), ([*prompt.messages, answer], False))
    ]
    images = {"images": list(prompt.images)} if prompt.images else {}
    asked, inputs = (processor(text=text, return_tensors="pt", **images) for text in texts)
    seen: dict[str, torch.Tensor] = {}
    handle = target.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = target(**inputs, output_hidden_states=True)
    handle.remove()
    chosen = draft.config.aux_ids(len(target.get_decoder().layers))
    states = torch.cat([output.hidden_states[number] for number in chosen], dim=-1)
    probs = output.logits[0, 1:].softmax(-1)
    probs[: asked["input_ids"].shape[1] - 2] = 0  # answers count, not questions
    return seen["embeds"][0, 1:].clone(), states[0, :-1].clone(), probs


def _loss(draft: Eagle3DraftModel, embeds: torch.Tensor, states: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    given, loss = draft.read_target(states), torch.zeros(())
    for number in range(PASSES):
        states = draft(embeds[:, number:], given).last_hidden_state
        logits = draft.own_head(states if draft.head_norm is None else draft.head_norm(states))
        goal = probs[:, number:]
        loss = loss - (goal * logits.log_softmax(-1)).sum() / goal.sum().clamp(min=1)
        given = states[:, :-1]
    return loss


__all__ = ["fit_eagle3"]
