"""Trains the draft of the toy pair by the recommended recipe of `msd_hf.training`, at the size of the toy world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..decoders import decoder_of
from ..draft.base import DraftPreTrainedModel
from ..draft.folder import DRAFT_FOLDER
from ..training import (
    FeatureCache,
    MSDTrainer,
    MSDTrainingArguments,
    extract_features,
    load_conversations,
    new_draft,
    regenerate,
)
from ..training.curriculum import SAMPLE_KINDS, SampleKind
from ..training.draft_vocab import answer_vocabulary
from ..training.provenance import write_provenance
from ..writing.destination import replaced_folder
from .dataset import ToySamples
from .optimizer import build_optimizer
from .rounding import save_rounded
from .training import Budget


# The fastest tree for this pair on two CPU cores, where each node adds to the cost of a verification.
TREE: dict[str, Any] = {"num_assistant_tokens": "auto", "tree_depth": 40, "tree_top_k": 4}


def toy_samples(num_samples: int, seed: int) -> dict[SampleKind, Sequence[dict[str, Any]]]:
    """`num_samples` training conversations of the toy world, half of them visual."""
    return {kind: ToySamples("train", num_samples // 2, seed, kind) for kind in SAMPLE_KINDS}


def train_draft(
    target: PreTrainedModel,
    processor: Any,
    work: str | Path,
    max_steps: int,
    samples: Mapping[SampleKind, Sequence[dict[str, Any]]],
    seed: int = 0,
    batch_size: int = 16,
    forward_batch_size: int = 32,
    **arguments: Any,
) -> MSDTrainer:
    """
    Trains a new draft, by default by the recommended recipe; returns the trainer, whose model is the draft.

    Args:
        target, processor: the target and its processor.
        work: folder for answers and features. Answers and features that it already holds are used again.
        max_steps: training steps.
        samples: the training conversations, in LLaVA style, of each kind.
        seed: seed of the weights and the order of samples.
        batch_size: conversations per step.
        forward_batch_size: conversations of a forward of the target.
        arguments: further arguments of `MSDTrainingArguments`.
    """
    arguments.setdefault("recipe", "recommended")
    args = MSDTrainingArguments(
        output_dir=str(work),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        max_grad_norm=1.0,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        **arguments,
    )
    tokens = None
    if args.draft_vocab_size is not None:
        data = [load_conversations(part) for part in samples.values()]
        tokens = answer_vocabulary(data, processor, target.config.text_config.vocab_size, args.draft_vocab_size)
    draft = new_draft(target, args, tokens)
    caches = {
        kind: _make_features(target, processor, Path(work), kind, samples[kind], forward_batch_size, draft, args)
        for kind in SAMPLE_KINDS
    }
    optimizer = build_optimizer(draft)
    trainer = MSDTrainer(
        model=draft,
        target=target,
        processing_class=processor,
        args=args,
        text_dataset=caches["text"],
        visual_dataset=caches["visual"],
        optimizers=(optimizer, LambdaLR(optimizer, Budget(max_steps).rate)),
    )
    trainer.train()
    return trainer


def _make_features(
    target: PreTrainedModel,
    processor: Any,
    work: Path,
    kind: SampleKind,
    samples: Sequence[dict[str, Any]],
    batch_size: int,
    draft: DraftPreTrainedModel,
    args: MSDTrainingArguments,
) -> FeatureCache:
    conversations = load_conversations(samples)
    if args.target_written_answers:
        path = work / "answers" / f"{kind}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            regenerate(target, processor, conversations, path, max_new_tokens=160, batch_size=2 * batch_size)
        conversations = load_conversations(path)
    folder = work / "features" / kind
    extract_features(
        target,
        processor,
        conversations,
        folder,
        storage="float16",
        batch_size=batch_size,
        max_length=args.max_length,
        feature_layers=draft.reads_of(decoder_of(target)).layers,
        all_hidden_states=draft.reads_visual_states,
    )
    return FeatureCache(folder)


def save_draft(trainer: MSDTrainer, folder: str | Path, overwrite: bool = False) -> Path:
    """
    Writes the draft to `folder`, rounded by [`save_rounded`], with its provenance; returns `folder`.

    Raises:
        MSDError: when the folder exists; with `overwrite`, when it holds anything but a draft.
    """
    draft = trainer.model
    for name, value in TREE.items():
        setattr(draft.generation_config, name, value)
    with replaced_folder(folder, DRAFT_FOLDER, overwrite) as temporary:
        save_rounded(draft, temporary)
        write_provenance(temporary, trainer.provenance())
    return Path(folder)
