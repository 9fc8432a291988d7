"""The draft of the toy pair: two-stage training (paper section 3.3) in its smallest form, on transformers' Trainer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ..modeling_msd import MSDDraftModel
from ..saving import replaced_folder
from ..targets import TargetAdapter
from .dataset import SampleKind, make_samples
from .target import IGNORED, collate_samples, encode_sample
from .training import Budget, train


FEATURE_LOSS_WEIGHT = 1.0
TOKEN_LOSS_WEIGHT = 0.1
# The tree that is fastest for this pair on two CPU cores, where a verification costs more with every node.
TREE = {"num_assistant_tokens": 24, "tree_depth": 6, "tree_top_k": 4}

Features = dict[str, torch.Tensor]


def visual_share(progress: float) -> float:
    """Probability that a sample is multimodal: 0 in the first half of the training, then rising linearly to 1."""
    return max(0.0, 2.0 * progress - 1.0)


def extract_features(
    target: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    kind: SampleKind,
    num_samples: int,
    seed: int,
    batch_size: int = 32,
) -> list[Features]:
    """
    Runs the target over training conversations.

    Returns:
        For each conversation of L tokens its `inputs_embeds` and `hidden_states` `[L, H]`, `visual_mask` `[L]`, and
        `labels` `[L]`, which are -100 except at the assistant's tokens.
    """
    adapter = TargetAdapter(target.eval())
    encoded = [encode_sample(processor, sample) for sample in make_samples("train", num_samples, seed, kind)]
    encoded.sort(key=lambda item: len(item["input_ids"]))  # neighbours in length waste the least padding
    extracted = []
    for start in tqdm(range(0, num_samples, batch_size), desc=f"{kind} features"):
        samples = encoded[start : start + batch_size]
        batch = collate_samples(samples, processor.tokenizer.pad_token_id)
        labels = batch.pop("labels")
        features = adapter.features(**batch)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            extracted.append(
                {
                    "inputs_embeds": features.inputs_embeds[row, :length].clone(),
                    "hidden_states": features.hidden_states[row, :length].clone(),
                    "visual_mask": features.visual_mask[row, :length],
                    "labels": labels[row, :length],
                }
            )
    return extracted


def stream_two_stage(
    features: dict[SampleKind, list[Features]], budget: Budget, seed: int, batch_size: int
) -> Iterator[Features]:
    """Endless training samples, of which the share of visual ones follows the budget's progress."""
    rng = random.Random(f"two-stage/{seed}")
    for index in count():
        share = visual_share(budget.progress(index // batch_size))
        yield rng.choice(features["visual" if rng.random() < share else "text"])


def collate_features(samples: list[Features]) -> Features:
    """A right-padded batch. In a causal model padding on the right is seen by padding only, so there is no mask."""
    padding = {"inputs_embeds": 0.0, "hidden_states": 0.0, "visual_mask": 0, "labels": IGNORED}
    return {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


class DraftTraining(torch.nn.Module):
    """A draft with its loss.

    Args:
        draft (`MSDDraftModel`): is trained.
        target (`LlavaForConditionalGeneration`): lends its head, which is neither trained nor saved.
    """

    def __init__(self, draft: MSDDraftModel, target: LlavaForConditionalGeneration):
        super().__init__()
        self.draft = draft
        # In a list, not a submodule: the optimizer and the Trainer must not see the target's weights.
        self._target = [TargetAdapter(target.requires_grad_(False))]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        visual_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss of a right-padded batch; all inputs are `[B, L, ...]`, see `extract_features`."""
        # Row j is the pair (token j + 1, hidden state j) and predicts hidden state j + 1, hence token j + 2.
        states = self.draft(
            inputs_embeds=inputs_embeds[:, 1:-1],
            hidden_states=hidden_states[:, :-2],
            visual_mask=visual_mask[:, 1:-1],
        ).last_hidden_state
        learnt = labels[:, 2:] != IGNORED
        states, expected = states[learnt], hidden_states[:, 1:-1][learnt]  # [rows, H]
        head = self._target[0].head
        feature_loss = functional.smooth_l1_loss(states, expected)
        token_loss = functional.cross_entropy(head(states), head(expected).softmax(-1))
        return {"loss": FEATURE_LOSS_WEIGHT * feature_loss + TOKEN_LOSS_WEIGHT * token_loss}


def train_draft(
    draft: MSDDraftModel,
    target: LlavaForConditionalGeneration,
    features: dict[SampleKind, list[Features]],
    budget: Budget,
    seed: int = 0,
    batch_size: int = 16,
) -> float:
    """Trains a draft in place, on text first and then on more and more visual samples; returns the mean loss."""
    return train(
        DraftTraining(draft, target),
        lambda: stream_two_stage(features, budget, seed, batch_size),
        collate_features,
        budget,
        batch_size,
        seed,
    )


def save_draft(draft: MSDDraftModel, folder: str | Path) -> Path:
    """Rounds the weights to float16 (also in `draft`) and writes the draft to `folder`; returns `folder`.

    As with the target, the configuration says float32: loading gives a float32 model.
    """
    for name, value in TREE.items():
        setattr(draft.generation_config, name, value)
    with replaced_folder(folder) as temporary:
        draft.half().save_pretrained(temporary)
        path = temporary / "config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    draft.float()
    draft.config.dtype = torch.float32
    return Path(folder)
