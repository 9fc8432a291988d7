"""Trials of a target: trees against token-by-token decoding, in several contexts.

The tree has many siblings, and its first and its last branch are compared. Three contexts are tried, because each
shows other mistakes: the prompt shows wrong positions; a few made-up slots show siblings that see each other, which a
long prompt would hide; more made-up slots than a sliding window holds show a window that is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME
from ..decoders import position_behind
from ..errors import MSDUnsupportedError
from ..kv.image_states import ImageStatesLayer
from ..kv.indexed import add_index_keys, index_keys
from ..kv.slots import ContextSlots
from ..kv.transaction import CacheTransaction, make_in_place
from ..recurrent.layer import RecurrentLayer, copy_states
from ..target.adapter import TargetAdapter
from ..target.layer_kinds import STEP_INPUTS
from ..tree.candidate import CandidateTree
from .running_rows import RunningRows


# Bound of the largest difference between logits, in units of their standard deviation. Eager attention computes its
# softmax in float32 also for a float64 model, which moves logits by up to 1e-6.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.5}
# A logit so far below the largest one has probability 0 in every dtype: the target has masked it.
_MASKED = 1000.0

NUM_SIBLINGS = 16
_SHIFT = 8.0  # of values behind a window, in units of their standard deviation

Differing = tuple[torch.Tensor, torch.Tensor]  # logits of the tree and of token-by-token decoding, both `[B, T, V]`


class Trial:
    """Runs a tree in several contexts, and its first and its last branch token by token.

    Args:
        depth (`int`): how many positions behind the root may be used.
        is_chain (`bool`): try a chain in place of a tree; all of it, and all but its last node.
        adapter, running, input_ids, model_kwargs, prefill_outputs: as in [`check_tree_verification`].
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        running: RunningRows,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        prefill_outputs: ModelOutput,
        depth: int,
        is_chain: bool = False,
    ):
        self.adapter, self.running, self.depth, self.is_chain = adapter, running, depth, is_chain
        self.input_ids, self.model_kwargs, self.prefill_outputs = input_ids, model_kwargs, prefill_outputs
        roots = torch.tensor(running.tokens, device=running.next_position.device).unsqueeze(1)
        levels = min(depth, 2) + 1
        if is_chain:
            parents = list(range(levels - 1))
            self.branches = [list(range(levels)), list(range(levels - 1))]
        else:  # the root, its children, and one node below the first child and one below the last
            parents = [0] * NUM_SIBLINGS + [1, NUM_SIBLINGS][: 2 * (depth > 1)]
            self.branches = [[0, 1, NUM_SIBLINGS + 1][:levels], [0, NUM_SIBLINGS, NUM_SIBLINGS + 2][:levels]]
        # Any text tokens: those of the nodes, and one more.
        tokens = (roots + torch.arange(len(parents) + 2, device=roots.device)) % adapter.text_config.vocab_size
        tokens = torch.where(adapter.visual_mask(tokens), roots, tokens)
        self.tree = CandidateTree.from_parents(
            tokens[:, :-1], torch.tensor([[0, *parents]], device=roots.device).expand(len(roots), -1), levels - 1
        )
        # Behind the accepted branch comes the next token of `texts[1]`.
        self.texts = [tokens[:, branch] for branch in self.branches]
        self.texts[1] = torch.cat([self.texts[1], tokens[:, -1:]], dim=1)[:, : depth + 1]

    def in_context(self) -> list[Differing]:
        """The tree behind the prompt."""
        slots = self.running.slots
        expected = []
        for text in self.texts:
            with slots.restored():
                expected.append(self._token_by_token(slots.cache, text, self.input_ids, self.model_kwargs)[0])
        return self._pairs(slots, self.running.next_position, expected)

    def in_made_up_context(self, length: int, window: int | None = None) -> list[Differing]:
        """The tree behind `length` slots with keys and values of the prompt, in any order. Slots outside of `window`
        get other values, so that a token that sees them has other logits. Recurrent states are those of the prompt.
        Token-by-token decoding gets a cache as `generate` makes it."""
        layers = self.running.slots.cache.layers
        contents = _made_up(self.running.slots, length, window)
        states = {number: layer for number, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)}
        ids = self.input_ids[:, :1].expand(-1, length)
        kwargs = dict(self.model_kwargs)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].new_ones(len(ids), length)
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = torch.arange(length, device=positions.device).expand(
                *positions.shape[:-1], length
            )
        for name, dim in STEP_INPUTS.items():
            if kwargs.get(name) is not None and dim is not None:
                last = kwargs[name][:, -1:]  # as `generate` takes it, the text is dimension 1
                kwargs[name] = last.expand(-1, length, *last.shape[2:])
        expected = []
        for text in self.texts:
            plain = DynamicCache(config=self.adapter.text_config)
            _fill(plain, contents)
            for number, layer in states.items():
                copy_states(layer, plain.layers[number])
            logits, position = self._token_by_token(plain, text, ids, kwargs)
            expected.append(logits)
        cache = DynamicCache(config=self.adapter.text_config)
        # First, or layers with a window would drop slots.
        make_in_place(cache, length + self.tree.tokens.shape[1], self.adapter.image_layers)
        _fill(cache, contents)
        for number, layer in states.items():
            copy_states(layer, cache.layers[number])
        context = ContextSlots([length] * len(ids), inputs=self.running.context.inputs)
        slots = CacheTransaction(cache, context)
        return self._pairs(slots, position, expected)

    def _pairs(
        self, slots: CacheTransaction, next_position: torch.Tensor, expected: list[torch.Tensor]
    ) -> list[Differing]:
        """Runs the tree, and the token behind its last branch after the slots of that branch were moved together.
        Pairs the logits with those of token-by-token decoding, `expected`. The cache is left as it was."""
        verify = self.adapter.verify
        with slots.restored():
            slots.begin()
            logits = verify(self.tree, slots.cache, slots.context, next_position).logits
            pairs = [
                (logits[:, branch], other[:, : len(branch)])
                for branch, other in zip(self.branches, expected, strict=True)
            ]
            count = min(self.depth, len(self.branches[1]))
            path = torch.tensor([self.branches[1][:count]], device=logits.device).expand(len(logits), -1)
            slots.commit([count] * len(logits), path)
            slots.begin()
            behind = CandidateTree.bare(self.texts[1][:, count])
            logits = verify(behind, slots.cache, slots.context, next_position + count).logits
            pairs.append((logits, expected[1][:, count : count + 1]))
        return pairs

    def _token_by_token(
        self, cache: Cache, text: torch.Tensor, ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits `[B, T, V]` of a text `[B, T]` behind a filled cache, and the position of its first token."""
        target, logits, positions, outputs = self.adapter.target, [], [], self.prefill_outputs
        kwargs = {**kwargs, CACHE_NAME: cache}
        first = position_behind(self.adapter.decoder, cache.get_seq_length())
        position = torch.full((len(text), 1), first, device=text.device)
        for token in text.split(1, dim=1):
            kwargs = target._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
            kwargs[CACHE_NAME] = cache
            ids = torch.cat([ids, token.to(ids.device)], dim=1)
            inputs = target.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
            with self.adapter.observe() as seen:
                outputs = target(**inputs, return_dict=True)
            logits.append(outputs.logits[:, -1])
            given = seen.inputs.get("position_ids")
            positions.append(position if given is None else given.expand(*given.shape[:-2], len(text), 1))
        return torch.stack(logits, dim=1), positions[0]


@dataclass
class _Slots:
    """The content of a cache layer: keys and values `[B, heads, length, head_dim]`, and keys `[B, length, D]` and
    positions `[P, B, length]` of its indexer, if it keeps them."""

    keys: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor | None = None
    positions: torch.Tensor | None = None


_Contents = dict[int, _Slots]


def _made_up(slots: CacheTransaction, length: int, window: int | None) -> _Contents:
    """Slots for each filled layer, drawn from those of the prompt. States of images stay as they are."""
    generator = torch.Generator().manual_seed(0)
    mask = slots.context.prompt_mask
    first = 0 if mask is None else int((~mask).sum(1).max())  # what stands at padding need not be a number
    made: _Contents = {}
    for number, layer in enumerate(slots.cache.layers):
        # A layer without slots is recurrent, or reads the states of another layer.
        if not isinstance(layer, DynamicLayer) or not layer.get_seq_length():
            continue
        if isinstance(layer, ImageStatesLayer):
            made[number] = _Slots(layer.keys, layer.values)
            continue
        drawn = torch.randint(first, layer.get_seq_length(), (length,), generator=generator).to(layer.keys.device)
        keys, values = layer.keys[:, :, drawn], layer.values[:, :, drawn]
        if window is not None:
            values[:, :, : max(length - window, 0)] += _SHIFT * values.float().std().to(values.dtype)
        index = index_keys(layer)
        if index is not None:
            # A slot may be drawn twice. Equal keys would have equal scores, and either may be chosen.
            factors = 1 + torch.rand(length, 1, generator=generator)
            index = index[:, drawn] * factors.to(index)
        positions = getattr(layer, "indexer_position_ids", None)
        made[number] = _Slots(keys, values, index, None if positions is None else positions[..., drawn])
    return made


def _fill(cache: DynamicCache, contents: _Contents) -> None:
    for number, slots in contents.items():
        cache.update(slots.keys, slots.values, number)
        if slots.index is not None:
            add_index_keys(cache.layers[number], slots.index)
        if slots.positions is not None:
            cache.layers[number].indexer_position_ids = slots.positions


def compare(adapter: TargetAdapter, trial: Callable[..., list[Differing]], *arguments: Any) -> None:
    """
    Runs a trial and compares its logits.

    Raises:
        MSDUnsupportedError: when they differ or cannot be compared, or the target cannot run the trial.
    """
    try:
        logits = trial(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise MSDUnsupportedError(
            f"{name_of(adapter)} was tried and cannot run a candidate tree ({type(error).__name__}: {error}). Call "
            "`generate` without `assistant_model`."
        ) from error
    differences = [_difference(got, expected) for got, expected in logits]
    difference = float("nan") if any(map(math.isnan, differences)) else max(differences)
    if math.isnan(difference):
        raise MSDUnsupportedError(
            f"{name_of(adapter)} was tried, and nothing can be learnt from its logits, which are not finite or all "
            "the same. Call `generate` without `assistant_model`."
        )
    dtypes = {adapter.target.dtype, *(part.dtype for pair in logits for part in pair)}
    if not difference <= max(_TOLERANCE.get(dtype, 0.5) for dtype in dtypes):
        raise MSDUnsupportedError(
            f"{name_of(adapter)} was tried and does not verify a candidate tree as it decodes token by token: logits "
            f"differ by {difference:.2g} standard deviations. Call `generate` without `assistant_model`."
        )


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """
    The largest difference between logits `[B, T, V]` that are not masked, and the loss of the wrong choice if another
    token has the largest logit, in standard deviations of the logits of a position. `nan` if a position has no finite
    logits, or none has two that differ; infinite if other logits are masked.
    """
    dtype = torch.float64 if expected.dtype == torch.float64 else torch.float32
    got, expected = got.to(dtype), expected.to(got.device, dtype)
    best = expected.amax(-1, keepdim=True)
    seen = expected > best - _MASKED
    count = seen.sum(-1, keepdim=True)
    mean = torch.where(seen, expected, 0).sum(-1, keepdim=True) / count
    deviation = torch.where(seen, expected - mean, 0).square().sum(-1).div(count.squeeze(-1)).sqrt()
    if not bool((deviation > 0).any() & deviation.isfinite().all()):
        return float("nan")
    deviation = torch.where(deviation > 0, deviation, deviation.max())  # a cap can make all logits of a position equal
    stays_masked = got < got.amax(-1, keepdim=True) - _MASKED / 2
    if not bool((seen | stays_masked).all()):
        return float("inf")
    largest = torch.where(seen, got - expected, 0).abs().amax(-1)
    loss = (best - expected.gather(-1, got.argmax(-1, keepdim=True))).squeeze(-1)
    return float((torch.maximum(largest, loss) / deviation).nan_to_num(nan=float("inf")).max())


def name_of(adapter: TargetAdapter) -> str:
    return f"`{type(adapter.target).__name__}` (model_type {adapter.target.config.model_type!r})"


__all__ = ["NUM_SIBLINGS", "Trial", "compare", "name_of"]
