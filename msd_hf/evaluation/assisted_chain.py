"""The draft as a chain in transformers' own assisted loop: the baseline that needs no loop of ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import CandidateGenerator

from ..compat import CACHE_NAME
from ..decoders import decoder_of
from ..draft.modeling_msd import MSDDraftModel
from ..drafting.growing import GrowingDrafter
from ..target.adapter import TargetAdapter
from ..target.observation import TargetObservation
from ..target.support import check_pair, check_target
from ..tree.growth import TreeGrowth
from ..tree.policy import TreePolicy
from ..tree.settings import TreeSettings


class ChainAssistant:
    """
    Stands in for a draft as the `assistant_model` of `generate`. It is not a draft itself, so our hook into `generate`
    leaves the call to transformers.

    Args:
        config (`PreTrainedConfig`): config of the target, because `generate` compares the vocabularies of target and
            assistant.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config


@contextmanager
def assisted_chain(target: PreTrainedModel, draft: MSDDraftModel) -> Iterator[ChainAssistant]:
    """
    Gives an `assistant_model` for `generate` calls inside the block, which then decode with transformers' own assisted
    loop, one prompt a call. The length of a chain (`num_assistant_tokens`) and the least confidence of its tokens
    (`assistant_confidence_threshold`) come from the draft's generation config or from transformers' defaults.

    Raises:
        MSDUnsupportedError: when the target cannot be used with a draft.
        MSDPairingError: when the draft was made for another target.
    """
    check_target(target)
    check_pair(target.config, draft.config)
    adapter = TargetAdapter(target, draft.reads_of(decoder_of(target)))
    assistant = ChainAssistant(target.config)
    original = GenerationMixin._get_candidate_generator

    def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
        if assistant_model is not assistant:
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        return ChainCandidateGenerator(draft, adapter, seen, kwargs["generation_config"], kwargs["model_kwargs"])

    with adapter.observe() as seen:
        GenerationMixin._get_candidate_generator = _get_candidate_generator
        try:
            yield assistant
        finally:
            GenerationMixin._get_candidate_generator = original


class ChainCandidateGenerator(CandidateGenerator):
    """
    Proposes the draft's most likely tokens, one after the other, without logits. Without candidate logits the loop
    takes the target's own choice at each position, greedy or sampled, as long as the choice equals the candidate.

    Args:
        draft (`MSDDraftModel`): the draft.
        adapter (`TargetAdapter`): the adapter of the target.
        seen (`TargetObservation`): the observation of the target's forwards, those of the loop included.
        generation_config (`GenerationConfig`): the generation config of the call.
        model_kwargs (`dict[str, Any]`): the target's keyword arguments before its first forward.
    """

    requires_model_outputs = True  # so that the loop hands on the outputs of the prefill
    model_kwargs_overrides: dict[str, Any] = {}

    def __init__(
        self,
        draft: MSDDraftModel,
        adapter: TargetAdapter,
        seen: TargetObservation,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        settings = copy.deepcopy(draft.generation_config)
        settings.update(**settings._get_default_generation_params(), defaults_only=True)
        self.num_assistant_tokens: int = settings.num_assistant_tokens
        self.confidence_threshold: float = settings.assistant_confidence_threshold
        eos_token_ids = getattr(generation_config, "_eos_token_tensor", None)
        self.eos_token_ids: list[int] = [] if eos_token_ids is None else eos_token_ids.tolist()
        self.max_length: int = generation_config.max_length
        self._drafter = GrowingDrafter(draft, adapter)
        self._adapter = adapter
        self._seen = seen
        self._device = draft.device
        # Kept from before the prefill, because the loop replaces these arguments.
        self._prompt_kwargs = {name: model_kwargs.get(name) for name in ("attention_mask", CACHE_NAME)}
        self._fed_ids: torch.Tensor | None = None  # [1, S]: tokens that the draft has seen

    def get_candidates(
        self, input_ids: torch.Tensor, model_outputs: Any = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """
        Proposes candidates that follow the tokens so far.

        Args:
            input_ids (`torch.LongTensor` of shape `[1, S]`): the tokens so far.
            model_outputs (`ModelOutput`): the outputs of the target's last forward.
            is_first_iteration (`bool`): whether the target has not run yet, so that there is nothing to draft from.

        Returns:
            The tokens followed by the candidates (`[1, S + C]`), and no logits.
        """
        # One place is left for the token that the target adds to the candidates.
        num_tokens = min(self.num_assistant_tokens, self.max_length - input_ids.shape[1] - 1)
        if is_first_iteration:
            self._fed_ids = input_ids
            return input_ids, None
        if num_tokens < 1:  # near the length limit; no later round drafts, so the draft is not fed
            return input_ids, None
        self._feed(input_ids, model_outputs)
        settings = TreeSettings(num_nodes=1 + num_tokens, depth=num_tokens - 1, top_k=1)
        self._drafter.policy = ChainPolicy(settings, self.confidence_threshold, self.eos_token_ids)
        tree = self._drafter.propose(input_ids[:, -1].to(self._device), settings)
        return torch.cat([input_ids, tree.tokens[:, 1:].to(input_ids.device)], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Does nothing: the number of candidates stays the same, as in transformers' default schedule for assistant
        tokens. The method exists because older releases of transformers require it."""

    def _feed(self, input_ids: torch.Tensor, model_outputs: Any) -> None:
        """Feeds the draft the tokens that were emitted since the last call, with the states of the target's last
        forward. That forward began at the token before them."""
        assert self._fed_ids is not None
        tokens = input_ids[:, self._fed_ids.shape[1] :].to(self._device)
        if self._prompt_kwargs:
            prefill = self._adapter.read_prefill(self._seen, model_outputs, self._fed_ids, self._prompt_kwargs)
            self._drafter.prefill(prefill, tokens[:, 0])
            self._prompt_kwargs = {}
        else:
            count = tokens.shape[1]
            self._drafter.accept(tokens, self._seen.hidden_states[:, :count], [count])
        self._fed_ids = input_ids


class ChainPolicy(TreePolicy):
    """
    Ends a chain where the `generate` of an assistant would end: after a token whose probability is below the
    threshold, or after a token that ends the answer.

    Args:
        settings (`TreeSettings`): the longest chain.
        threshold (`float`): least probability of a token; 0 for none.
        eos_token_ids (`Sequence[int]`): tokens that end an answer.
    """

    def __init__(self, settings: TreeSettings, threshold: float, eos_token_ids: Sequence[int]):
        super().__init__(settings)
        self.threshold = threshold
        self.eos_token_ids = eos_token_ids
        self._score = 0.0

    def width(self, growth: TreeGrowth) -> int:
        score = growth.frontier_scores.item()
        confidence, self._score = math.exp(score - self._score), score
        if confidence < self.threshold:
            return 0
        return 0 if growth.frontier_tokens.item() in self.eos_token_ids else 1


__all__ = ["ChainAssistant", "ChainCandidateGenerator", "ChainPolicy", "assisted_chain"]
