"""Everything that is asked of a target, in one place: prefill, embedding, head, visual mask, verification forward.

The target is only observed: a pre-hook and a hook on its decoder, in place for one forward at a time, read what goes
in and comes out, and put the tree's attention mask and positions in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .cache import CACHE_NAME
from .configuration_msd import MSDDraftConfig
from .errors import MSDPairingError, MSDUnsupportedError
from .phases import phase
from .tree import CandidateTree, tree_attention_mask


SUPPORTED_MODEL_TYPES = ("llava",)
SUPPORTED_ATTENTION = ("sdpa", "eager")


@dataclass
class TargetPrefill:
    """What the target's pass over the prompt gives.

    Args:
        logits (`torch.Tensor` of shape `[B, V]`): of the last position.
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): what went into the decoder, image features merged.
        hidden_states (`torch.Tensor` of shape `[B, L, (1 + K) * H]`): the outputs of the K feature layers, if any,
            and what came out, after the final norm.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.
        prompt_mask (`torch.BoolTensor` of shape `[B, L]`, *optional*): false at padding; `None` if there is none.
        next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the first new token.
    """

    logits: torch.Tensor
    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor
    prompt_mask: torch.Tensor | None
    next_position: torch.Tensor


@dataclass
class TargetFeatures:
    """What a draft learns from: the target's pass over whole sequences.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): what went into the decoder, image features merged.
        hidden_states (`torch.Tensor` of shape `[B, L, (1 + K) * H]`): the outputs of the K feature layers, if any,
            and what came out, after the final norm.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.
    """

    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor


@dataclass
class _Observation:
    inputs: dict[str, Any] = field(default_factory=dict)
    last_hidden_state: torch.Tensor | None = None
    layer_states: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def hidden_states(self) -> torch.Tensor:
        assert self.last_hidden_state is not None
        if not self.layer_states:
            return self.last_hidden_state
        layers = [self.layer_states[layer].to(self.last_hidden_state.device) for layer in sorted(self.layer_states)]
        return torch.cat([*layers, self.last_hidden_state], dim=-1)


class TargetAdapter:
    """
    A target, as the decoding loop sees it.

    Args:
        target (`PreTrainedModel`): a model with `get_decoder()`, an input embedding and a language-model head.
        feature_layers (`Sequence[int]`, *optional*): decoder layers, counted from 0, whose outputs are given besides
            the last hidden state; see `MSDDraftConfig.target_layers`.

    Raises:
        MSDPairingError: when the target has no such layer.
    """

    def __init__(self, target: PreTrainedModel, feature_layers: Sequence[int] | None = None):
        self.target = target
        self.decoder = target.get_decoder()
        self.feature_layers = sorted(feature_layers or ())
        num_layers = len(self.decoder.layers) if self.feature_layers else 0
        if any(not 0 <= layer < num_layers for layer in self.feature_layers):
            raise MSDPairingError(
                f"`target_layers` {self.feature_layers} must lie between 0 and {num_layers - 1}, the layers of "
                "this target."
            )
        self.embedding = target.get_input_embeddings()
        self.head_module = target.get_output_embeddings()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., H]` of tokens `[...]`."""
        return self.embedding(tokens.to(self.embedding.weight.device))

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of hidden states `[..., H]`."""
        weight = self.head_module.weight
        return self.head_module(hidden_states.to(device=weight.device, dtype=weight.dtype))

    def visual_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where a prompt `[B, L]` holds visual positions."""
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for name in ("image_token_id", "video_token_id"):
            token_id = getattr(self.target.config, name, None)
            if token_id is not None:
                mask |= input_ids == token_id
        return mask

    def prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> TargetPrefill:
        """Runs the prompt `[B, L]` through the target's own prefill, which fills the cache in `model_kwargs`."""
        with self._observe() as seen:
            outputs = self.target._prefill(input_ids, generation_config, model_kwargs)
        inputs_embeds = seen.inputs.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        attention_mask = model_kwargs.get("attention_mask")
        prompt_mask = None if attention_mask is None else attention_mask.to(inputs_embeds.device).bool()
        position_ids = seen.inputs.get("position_ids")
        if position_ids is not None:
            next_position = position_ids[..., -1:] + 1
        else:
            next_position = torch.full((input_ids.shape[0], 1), input_ids.shape[1], device=inputs_embeds.device)
        return TargetPrefill(
            logits=outputs.logits[:, -1],
            inputs_embeds=inputs_embeds,
            hidden_states=seen.hidden_states,
            visual_mask=self.visual_mask(input_ids),
            prompt_mask=prompt_mask,
            next_position=next_position,
        )

    @torch.no_grad()
    def features(self, input_ids: torch.Tensor, **inputs: Any) -> TargetFeatures:
        """Runs whole sequences `[B, L]`, with the target's other inputs, through the target without a cache."""
        with self._observe() as seen:
            self.target.base_model(input_ids=input_ids, use_cache=False, **inputs)
        inputs_embeds = seen.inputs.get("inputs_embeds")
        return TargetFeatures(
            inputs_embeds=self.embed(input_ids) if inputs_embeds is None else inputs_embeds,
            hidden_states=seen.hidden_states,
            visual_mask=self.visual_mask(input_ids),
        )

    def verify(
        self,
        tree: CandidateTree,
        cache: Cache,
        next_position: torch.Tensor,
        prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One forward over all nodes of the tree, each seeing the context and its own ancestors. Appends N slots to the
        cache.

        Args:
            tree (`CandidateTree`): N nodes.
            cache (`Cache`): the target's, holding everything before the root.
            next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the root.
            prompt_mask (`torch.BoolTensor` of shape `[B, L]`, *optional*): see [`TargetPrefill`].

        Returns:
            Logits `[B, N, V]`, and hidden states `[B, N, (1 + K) * H]` as in [`TargetPrefill`].
        """
        mask = tree_attention_mask(tree.ancestors, cache.get_seq_length(), self.target.dtype, prompt_mask)
        replaced = {"attention_mask": mask, "position_ids": next_position + tree.depths}
        with self._observe(**replaced) as seen, phase("target forward"):
            outputs = self.target(
                input_ids=tree.tokens, use_cache=True, logits_to_keep=0, return_dict=True, **{CACHE_NAME: cache}
            )
        return outputs.logits, seen.hidden_states

    @contextmanager
    def _observe(self, **replaced_inputs: torch.Tensor) -> Iterator[_Observation]:
        seen = _Observation()

        def before(module, args, kwargs):
            seen.inputs = kwargs
            return args, {**kwargs, **replaced_inputs}

        def after(module, args, kwargs, output):
            seen.last_hidden_state = output[0]

        def after_layer(layer):
            def keep(module, args, output):
                seen.layer_states[layer] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [
            self.decoder.register_forward_pre_hook(before, with_kwargs=True),
            self.decoder.register_forward_hook(after, with_kwargs=True),
            *(self.decoder.layers[layer].register_forward_hook(after_layer(layer)) for layer in self.feature_layers),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def check_target(target: PreTrainedModel) -> None:
    """
    Refuses targets that the decoding loop cannot serve.

    Raises:
        MSDUnsupportedError: names the target's kind, its attention or its layers, and what is supported.
    """
    model_type = target.config.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise MSDUnsupportedError(
            f"`{type(target).__name__}` (model_type {model_type!r}) is not supported as a target of MSD drafts yet; "
            f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}. Call `generate` without `assistant_model`."
        )
    text_config = target.config.get_text_config(decoder=True)
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if getattr(text_config, "sliding_window", None) is not None and not hasattr(text_config, "layer_types"):
        layer_types.add("sliding_attention")  # Mistral: a window on every layer, without a list of layer types
    if layer_types != {"full_attention"}:
        raise MSDUnsupportedError(
            f"The decoder of this target has layers of type {', '.join(sorted(layer_types - {'full_attention'}))}, "
            "which MSD drafts do not support yet; only full attention is. Call `generate` without `assistant_model`."
        )
    attention = text_config._attn_implementation
    if attention not in SUPPORTED_ATTENTION:
        raise MSDUnsupportedError(
            f"The target's attention implementation {attention!r} takes no tree mask. Load the target with "
            '`attn_implementation="sdpa"` or `"eager"`.'
        )


def check_pair(target_config: PreTrainedConfig, draft_config: MSDDraftConfig) -> None:
    """
    Refuses a draft that was made for another target. Needs no weights, so it can come before loading them.

    Raises:
        MSDPairingError: says what differs.
    """
    text_config = target_config.get_text_config(decoder=True)
    advice = "Use the draft that was trained for this target."
    if draft_config.hidden_size != text_config.hidden_size:
        raise MSDPairingError(
            f"The draft's hidden size {draft_config.hidden_size} does not match the target's "
            f"{text_config.hidden_size}. {advice}"
        )
    for name, expected, got in (
        ("target", target_config.model_type, draft_config.target_model_type),
        ("decoder", text_config.model_type, draft_config.target_text_model_type),
    ):
        if got is not None and got != expected:
            raise MSDPairingError(
                f"The draft was made for a {name} of kind {got!r}, but this target's is {expected!r}. {advice}"
            )


__all__ = ["TargetAdapter", "TargetFeatures", "TargetPrefill", "check_pair", "check_target"]
