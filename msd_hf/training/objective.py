"""Computes the loss of a draft on a batch: the target's features, noise, the draft's passes, the loss of each."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from ..drafting.embedding import draft_embeds
from ..drafting.visual_rows import pooled, skipped_rows
from ..prompts import move_inputs
from ..target.adapter import TargetAdapter
from .arguments import MSDTrainingArguments
from .chains import Chains
from .losses import LossSums, add_uniform_noise, loss_sums, used_terms, weighted_loss
from .own_head import OwnHead
from .rows import DraftRows, draft_rows
from .unrolling import unrolled_states
from .visual_row_budget import rows_beyond
from .visual_row_dropout import unread_rows


class DraftObjective:
    """
    The loss of a draft, summed over the trained rows of a batch.

    Args:
        adapter: the frozen target. Its embedding and head are used, and it computes the features of batches that do
            not come from a cache.
        args: weights, noise and number of passes.
    """

    def __init__(self, adapter: TargetAdapter, args: MSDTrainingArguments):
        self.adapter = adapter
        self.args = args
        self.recipe = args.make_recipe()

    def __call__(
        self, draft: Any, batch: dict[str, Any], dtype: torch.dtype, progress: float = 0.0
    ) -> tuple[torch.Tensor, LossSums]:
        """
        Computes the loss of one batch.

        Args:
            draft (`DraftPreTrainedModel` or a wrapper of it): in training mode there are noise and all passes, in
                evaluation mode one pass without noise.
            batch: a batch of [`MixtureCollator`].
            dtype: dtype of the draft.
            progress: share of the run that is done, on which the number of passes depends.

        Returns:
            The weighted sum of all loss terms over all passes (a scalar with a gradient), and the unweighted sums of
            the first pass; those of terms over chains are of all passes.
        """
        args, recipe = self.args, self.recipe
        model = extract_model_from_parallel(draft)
        rows = self.make_rows(batch, dtype, model)
        if draft.training and recipe.noise > 0:
            rows.hidden_states = self._add_noise(rows.hidden_states, batch["attention_mask"].sum(1), batch["numbers"])
        rows = self._read_rows(rows, batch, draft.training, model.visual_positions)
        num_passes = recipe.passes_at(progress) if draft.training else 1
        weights = [args.unroll_decay**pass_index for pass_index in range(num_passes)]
        trained = rows.trained
        own_head = self._own_head(model)
        names = used_terms(recipe, learns_states=own_head is None)
        total, first = torch.zeros((), device=trained.device), None
        chains: dict[str, Chains] = {}
        for pass_index, states in enumerate(unrolled_states(draft, rows, num_passes)):
            if pass_index > 0:
                trained = trained & rows.drafted_from(pass_index)
            sums = loss_sums(
                states[trained],
                rows.goals[trained].to(states),
                self.adapter.head,
                args.head_chunk_size,
                names,
                recipe.label_temperature,
                own_head,
            )
            for name, acceptance in sums.acceptances.items():
                chains.setdefault(name, Chains()).add(acceptance, trained)
            total = total + weights[pass_index] / sum(weights) * weighted_loss(sums.terms, recipe)
            first = sums if first is None else first
        assert first is not None
        lengths = {name: chain.missing for name, chain in chains.items()}
        first.terms |= lengths
        return total + weighted_loss(lengths, recipe), first

    def _own_head(self, model: Any) -> OwnHead | None:
        if model.own_head is None:
            return None

        def score(states: torch.Tensor) -> torch.Tensor:
            # The draft's forward has its mixed precision from accelerate, which knows nothing of this call.
            half = torch.float16 if self.args.fp16 else torch.bfloat16
            with torch.autocast(states.device.type, half, enabled=bool(self.args.fp16 or self.args.bf16)):
                return model.own_head(states if model.head_norm is None else model.head_norm(states))

        return OwnHead(score, model.draft_vocab)

    def make_rows(self, batch: dict[str, Any], dtype: torch.dtype, model: Any = None) -> DraftRows:
        """Makes the rows of a batch for a draft (`model`; default: one that reads the target's embeddings). The target
        runs only if the batch does not hold its hidden states."""
        labels = batch["labels"]
        if "hidden_states" in batch:
            hidden_states, visual_mask = batch["hidden_states"], batch["visual_mask"]
            with torch.no_grad():
                inputs_embeds = self.adapter.embed(batch["input_ids"]).to(labels.device)
            visual_embeds = batch["visual_embeds"].to(inputs_embeds)
            embedded = batch.get("kept_visual", visual_mask)
            inputs_embeds = inputs_embeds.masked_scatter(embedded.unsqueeze(-1), visual_embeds)
        else:
            target = self.adapter.target
            others = ("labels", "numbers", "places", "is_visual", "skipped")
            inputs = move_inputs({name: value for name, value in batch.items() if name not in others}, target)
            # The target runs in its own dtype, as in generation and in feature caches, even if the draft trains in
            # another one.
            with torch.autocast(labels.device.type, enabled=False):
                features = self.adapter.features(**inputs)
            inputs_embeds, hidden_states = features.inputs_embeds.detach(), features.hidden_states
            visual_mask = features.visual_mask
        if model is not None:
            with torch.no_grad():
                inputs_embeds = draft_embeds(model, self.adapter, batch["input_ids"], inputs_embeds, visual_mask)
        return draft_rows(
            inputs_embeds.to(labels.device, dtype),
            hidden_states.to(labels.device, dtype),
            visual_mask.to(labels.device),
            labels != -100,
            self.adapter.reads,
        )

    def _read_rows(self, rows: DraftRows, batch: dict[str, Any], is_training: bool, policy: str) -> DraftRows:
        """The rows that the draft reads: without the visual rows that it never reads (`policy`), those beyond a
        budget, and those that the cache left out."""
        kept, budget, share = batch.get("kept_visual"), self.args.max_visual_rows, self.args.visual_row_dropout
        share = share if is_training else 0.0
        if kept is None and budget is None and share == 0 and policy not in ("pooled", "dropped"):
            return rows
        left_out = skipped_rows(rows.visual_mask, policy).clone()
        if policy == "pooled":
            rows.inputs_embeds, rows.hidden_states = (
                pooled(part, rows.visual_mask) for part in (rows.inputs_embeds, rows.hidden_states)
            )
        if kept is not None:
            left_out[:, :-1] |= (batch["visual_mask"] & ~kept)[:, 1:]
        if budget is not None:
            left_out |= rows_beyond(rows.visual_mask & ~left_out, [budget] * len(left_out))
        if share > 0:
            left_out |= unread_rows(rows.visual_mask & ~left_out, batch["numbers"], share, self.args.seed)
        padding = ~batch["attention_mask"].bool().to(left_out.device)
        return rows.without(left_out | padding)

    def _add_noise(self, hidden_states: torch.Tensor, lengths: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        # Each sample is seeded by its number in the run, so that the noise does not change with the number of
        # processes or when a run is resumed.
        noisy = hidden_states.clone()
        for row, (length, number) in enumerate(zip(lengths.tolist(), numbers.tolist(), strict=True)):
            generator = torch.Generator(noisy.device).manual_seed(self.args.seed * 1_000_003 + number)
            states = noisy[row, :length]
            uniform = torch.rand(states.shape, generator=generator, dtype=states.dtype, device=states.device)
            noisy[row, :length] = add_uniform_noise(states, uniform, self.recipe.noise)
        return noisy


__all__ = ["DraftObjective"]
