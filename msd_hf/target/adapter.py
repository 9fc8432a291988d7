"""Everything that is asked of a target: prefill, embedding, head, visual positions, features, verification.

The target is only observed. For one forward at a time functions stand in for methods of its decoder; they read inputs
and outputs, and put in the attention mask and the positions of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..compat import CACHE_NAME
from ..compiled.compile import CompiledFunctions
from ..decoders import decoder_of, head_of, position_behind
from ..draft.interface import EMBEDDINGS, TargetReads
from ..errors import MSDPairingError
from ..kv.in_place import KeysAndValues
from ..kv.slots import ContextSlots
from ..tree.candidate import CandidateTree
from .compiled_parts import CompiledPart, compiled_parts, uncompiled
from .cross_attention import samples_apart
from .layer_kinds import STEP_INPUTS, image_layers
from .observation import TargetObservation, observed
from .support import decoder_inputs
from .tree_forward import TargetVerification, TreeForward


@dataclass
class TargetPrefill:
    """The result of the target's pass over the prompt.

    Args:
        logits (`torch.Tensor` of shape `[B, V]`): the logits at the last position.
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): the decoder's input, image features merged. If the cache
            was filled before, L counts only the positions behind it.
        hidden_states (`torch.Tensor` of shape `[B, L, W]`): the states that the draft reads; W is `TargetReads.width`.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.
        tokens (`torch.LongTensor` of shape `[B, L]`, *optional*): the tokens, placeholders at visual positions; `None`
            if the prompt was given as embeddings.
        prompt_mask (`torch.BoolTensor` of shape `[B, S]`, *optional*): mask of all S slots of the cache, false at
            padding; `None` without padding.
        next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the first new token.
        num_slots (`int`): number of slots of the cache, S.
        outputs (`ModelOutput`): all outputs of the target.
        repeated_inputs (`dict[str, torch.Tensor]`): `inputs` of the `ContextSlots` behind the prompt.
    """

    logits: torch.Tensor
    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor
    prompt_mask: torch.Tensor | None
    next_position: torch.Tensor
    num_slots: int
    outputs: ModelOutput
    repeated_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: torch.Tensor | None = None


@dataclass
class TargetFeatures:
    """The result of the target's pass over whole sequences, from which a draft learns.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): the decoder's input, image features merged.
        hidden_states (`torch.Tensor` of shape `[B, L, W]`): the states that the draft reads; W is `TargetReads.width`.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.
    """

    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor


class TargetAdapter:
    """
    Everything that the decoding loop and training ask of a target.

    Args:
        target (`PreTrainedModel`): a model with `get_decoder()`, an input embedding and a language-model head.
        feature_layers (`Sequence[int]` or `TargetReads`, *optional*): decoder layers, counted from 0, whose outputs
            are read besides the last hidden state; see `MSDDraftConfig.target_layers`. Or what else is read.
        compiled (`CompiledFunctions`, *optional*): keeps compiled decoders between calls.

    Raises:
        MSDPairingError: when the target lacks one of `feature_layers`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        feature_layers: Sequence[int] | TargetReads | None = None,
        compiled: CompiledFunctions | None = None,
    ):
        self.target = target
        self.decoder: Any = uncompiled(decoder_of(target))
        self.text_config = target.config.get_text_config(decoder=True)
        if isinstance(feature_layers, TargetReads):
            self.reads = feature_layers
        else:
            self.reads = TargetReads(tuple(sorted(feature_layers or ())), self.text_config.hidden_size)
        num_layers = len(self.decoder.layers) if self.reads.layers else 0
        if any(not (layer >= 0 or layer == EMBEDDINGS) or layer >= num_layers for layer in self.reads.layers):
            raise MSDPairingError(
                f"`target_layers` {list(self.reads.layers)} must lie between 0 and {num_layers - 1}, the layers of "
                "this target."
            )
        self.image_layers = image_layers(self.text_config)
        self.embedding = target.get_input_embeddings()
        self.head_module = head_of(target)
        self.logit_cap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        # Not bound methods: a cycle of references would keep the target alive after its last use.
        self._observe = partial(
            _observed, self.decoder, self.reads, decoder_inputs(self.decoder), compiled_parts(target)
        )
        self._tree_forward = TreeForward(target, self._observe, compiled or CompiledFunctions())

    @property
    def masks_attention(self) -> bool:
        """Whether attention functions get the mask of a tree themselves, past a decoder that takes no such mask."""
        return self._tree_forward.masks_attention

    @masks_attention.setter
    def masks_attention(self, value: bool) -> None:
        self._tree_forward.masks_attention = value

    def outer_modules(self) -> Iterator[nn.Module]:
        """The modules outside the decoder that run in a forward over tokens, and the decoder itself."""
        yield from (self.embedding, self.head_module, self.target)
        (name,) = (name for name, module in self.target.named_modules() if module is self.decoder)
        parts = name.split(".")
        yield from (self.target.get_submodule(".".join(parts[:count])) for count in range(1, len(parts) + 1))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., H]` of tokens `[...]`."""
        return self.embedding(tokens.to(_device_of(self.embedding)))

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of hidden states `[..., H]`."""
        weight = self.head_module.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else self._tree_forward.dtype
        logits = self.head_module(hidden_states.to(device=_device_of(self.head_module), dtype=dtype))
        return self.cap(logits)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Caps logits if the configuration of the target's decoder says so, as that of Gemma 2."""
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def visual_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which positions of a prompt `[B, L]` are visual: none, if image features are read by cross-attention."""
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        if self.image_layers:
            return mask
        for name in ("image_token_id", "video_token_id"):
            token_id = getattr(self.target.config, name, None)
            if token_id is not None:
                mask |= input_ids == token_id
        return mask

    def prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> TargetPrefill:
        """Runs the prompt `[B, L]`, or the part that the cache lacks, through the target's own prefill, which fills
        the cache in `model_kwargs`."""
        with self.observe(model_kwargs[CACHE_NAME]) as seen:
            outputs = self.target._prefill(input_ids, generation_config, model_kwargs)
        return self.read_prefill(seen, outputs, input_ids, model_kwargs)

    def read_prefill(
        self, seen: TargetObservation, outputs: ModelOutput, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> TargetPrefill:
        """Builds a [`TargetPrefill`] from what hooks have seen and what the target returned.

        Args:
            seen (`TargetObservation`): what hooks have seen during the prefill.
            outputs (`ModelOutput`): what the target's prefill returned.
            input_ids (`torch.LongTensor` of shape `[B, L]`): the prompt.
            model_kwargs (`dict[str, Any]`): `attention_mask` of the prompt, if any, and the cache.
        """
        inputs_embeds = seen.inputs.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(seen.inputs["input_ids"])
        batch_size, length = inputs_embeds.shape[:2]
        self._tree_forward.dtype = inputs_embeds.dtype
        attention_mask = model_kwargs.get("attention_mask")
        prompt_mask = None if attention_mask is None else attention_mask.to(inputs_embeds.device).bool()
        if prompt_mask is not None and bool(prompt_mask.all()):
            prompt_mask = None  # older releases hand on a mask that hides nothing
        own_rows = seen.hidden_states.shape[1] - length
        if own_rows > 0 and prompt_mask is not None:
            prompt_mask = pad(prompt_mask, (own_rows, 0), value=True)
        num_slots = model_kwargs[CACHE_NAME].get_seq_length()
        position_ids = seen.inputs.get("position_ids")
        if position_ids is not None:
            next_position = (position_ids[..., -1:] + 1).expand(*position_ids.shape[:-2], batch_size, 1)
        else:
            position = position_behind(self.decoder, num_slots)
            next_position = torch.full((batch_size, 1), position, device=inputs_embeds.device)
        tokens = input_ids[:, -length:] if input_ids.shape[1] >= length else None
        visual_mask = self._embedded_mask(inputs_embeds) if tokens is None else self.visual_mask(tokens)
        return TargetPrefill(
            logits=outputs.logits[:, -1],
            inputs_embeds=inputs_embeds,
            hidden_states=_states_of_tokens(seen.hidden_states, length),
            visual_mask=visual_mask,
            prompt_mask=prompt_mask,
            next_position=next_position,
            repeated_inputs={
                **self._image_mask(model_kwargs[CACHE_NAME], inputs_embeds),
                **self._step_inputs(seen.inputs, outputs, batch_size),
            },
            num_slots=num_slots,
            outputs=outputs,
            tokens=tokens,
        )

    def _step_inputs(self, inputs: dict[str, Any], outputs: ModelOutput, batch_size: int) -> dict[str, torch.Tensor]:
        """What the decoder reads in every forward, from the inputs and outputs of the prefill. With the dimension of
        the text only the entry of the last token is kept."""
        kept = {
            name: inputs[name] if dim is None else inputs[name][(slice(None),) * dim + (slice(-1, None),)]
            for name, dim in STEP_INPUTS.items()
            if inputs.get(name) is not None
        }
        # Idefics reads pixels once, and what its encoder made of them from then on.
        name = "image_encoder_embeddings"
        if inputs.get("pixel_values") is not None and name in decoder_inputs(self.decoder):
            states = outputs.image_outputs.last_hidden_state  # of all images of the batch
            kept[name] = states.view(batch_size, -1, *states.shape[1:])
        return kept

    def _image_mask(self, cache: Cache, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """A mask with which every token reads all states of images in the cache. A step of `generate` alone may do
        without one; several nodes may not, because sdpa would take them for a causal text."""
        num_states = max((cache.layers[number].get_seq_length() for number in self.image_layers), default=0)
        if not num_states:
            return {}
        return {"cross_attention_mask": inputs_embeds.new_zeros(inputs_embeds.shape[0], 1, 1, num_states)}

    def _embedded_mask(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Which positions of a prompt given as embeddings `[B, L, H]` are not embeddings of tokens."""
        table = self.embed(torch.arange(self.embedding.weight.shape[0])).to(inputs_embeds)
        return (table[_nearest(inputs_embeds, table)] != inputs_embeds).any(-1)

    def tokens_of(self, prefill: TargetPrefill) -> torch.Tensor:
        """The tokens of a prompt `[B, L]`. If it was given as embeddings, those whose embeddings are the nearest."""
        if prefill.tokens is not None:
            return prefill.tokens
        table = self.embed(torch.arange(self.embedding.weight.shape[0])).to(prefill.inputs_embeds)
        nearest = _nearest(prefill.inputs_embeds, table)
        placeholder = getattr(self.target.config, "image_token_id", None)
        return nearest if placeholder is None else nearest.masked_fill(prefill.visual_mask, placeholder)

    @torch.no_grad()
    def features(self, input_ids: torch.Tensor, **inputs: Any) -> TargetFeatures:
        """Runs whole sequences `[B, L]`, with the target's other inputs, through the target without a cache."""
        if self.image_layers and len(input_ids) > 1:
            # With cross-attention, tokens before the first image read padding and the absence of images too, so that
            # samples with other numbers of images would change the states of a sample.
            parts = [self.features(**sample) for sample in samples_apart({"input_ids": input_ids, **inputs})]
            joined = {item.name: torch.cat([getattr(part, item.name) for part in parts]) for item in fields(parts[0])}
            return TargetFeatures(**joined)
        with self.observe() as seen:
            self.target.base_model(input_ids=input_ids, use_cache=False, **inputs)
        inputs_embeds = seen.inputs.get("inputs_embeds")
        return TargetFeatures(
            inputs_embeds=self.embed(input_ids) if inputs_embeds is None else inputs_embeds,
            hidden_states=_states_of_tokens(seen.hidden_states, input_ids.shape[1]),
            visual_mask=self.visual_mask(input_ids),
        )

    def verify(
        self,
        tree: CandidateTree,
        cache: Cache,
        context: ContextSlots,
        next_position: torch.Tensor,
        num_fixed_nodes: int | None = None,
        **output_flags: bool,
    ) -> TargetVerification:
        """Runs one forward over all nodes of a tree. Its arguments are those of [`TreeForward.__call__`]."""
        return self._tree_forward(tree, cache, context, next_position, num_fixed_nodes, **output_flags)

    def verify_in_buffers(
        self,
        tree: CandidateTree,
        cache: Cache,
        buffers: Sequence[KeysAndValues],
        first_slot: torch.Tensor,
        context: ContextSlots,
        next_position: torch.Tensor,
    ) -> TargetVerification:
        """Runs one compiled forward over all nodes of a tree in whole cache buffers, for a caller that records CUDA
        graphs. Its arguments are those of [`TreeForward.in_buffers`]."""
        return self._tree_forward.in_buffers(tree, cache, buffers, first_slot, context, next_position)

    def observe(self, cache: Cache | None = None) -> AbstractContextManager[TargetObservation]:
        """Observes the decoder's forwards inside the block, as far as this call runs them: those with this cache, or
        all."""
        return self._observe(cache=cache)


def _observed(
    decoder: Any, reads: TargetReads, input_names: Sequence[str], parts: Sequence[CompiledPart], **fields: Any
) -> AbstractContextManager[TargetObservation]:
    if "logits_to_keep" in input_names:
        # Decoders whose last layers share the keys of earlier ones would compute these layers, and the hidden states,
        # for the positions alone whose logits are asked for. The draft reads all positions.
        fields["replaced_inputs"] = {"logits_to_keep": 0, **fields.get("replaced_inputs", {})}
    return observed(TargetObservation(decoder, reads, input_names, **fields), parts)


def _states_of_tokens(states: torch.Tensor, length: int) -> torch.Tensor:
    """The states `[B, L, W]` of the tokens of a prompt. GIT puts rows of the image before those of the tokens, inside
    of its decoder."""
    return states[:, -length:]


def _nearest(inputs_embeds: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows `[B, L]` of a table `[V, H]` that are nearest to embeddings `[B, L, H]`."""
    return (inputs_embeds @ table.mT - table.square().sum(-1) / 2).argmax(-1)


def _device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on; accelerate may keep its weights on another one."""
    hook = vars(module).get("_hf_hook")
    device: Any = getattr(hook, "execution_device", None)
    return torch.device(module.weight.device if device is None else device)  # type: ignore[arg-type]


__all__ = ["TargetAdapter", "TargetFeatures", "TargetPrefill"]
