"""Everything that is asked of a target, in one place: prefill, embedding, head, visual mask, verification forward.

The target is only observed: hooks on its decoder, in place for one forward at a time, read what goes in and comes out,
and put the tree's attention mask and positions in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..attention.masks import buffer_attention_mask, tree_attention_mask
from ..attention.split import LIVE_SLOTS, SPLIT_SDPA, find_live_slots
from ..compiled.compile import compiled_decoder, has_compiled_part
from ..errors import MSDPairingError
from ..kv.fixed import Buffers, close_slots, reserve, whole_buffers
from ..kv.slots import ContextSlots
from ..phases import phase
from ..release import CACHE_NAME
from ..tree.candidate import CandidateTree
from .observation import TargetObservation, observed
from .support import TREE_ATTENTION, attention_windows, decoder_inputs, takes_any_argument


logger = logging.get_logger(__name__)


@dataclass
class TargetPrefill:
    """What the target's pass over the prompt gives.

    Args:
        logits (`torch.Tensor` of shape `[B, V]`): of the last position.
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): what went into the decoder, image features merged. Where a
            filled cache was given, these are the L positions behind it.
        hidden_states (`torch.Tensor` of shape `[B, L, (1 + K) * H]`): the outputs of the K feature layers, if any,
            and what came out, after the final norm.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.
        prompt_mask (`torch.BoolTensor` of shape `[B, S]`, *optional*): of all S slots of the cache, false at padding;
            `None` if there is none.
        next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the first new token.
        num_slots (`int`): of the cache, S.
        outputs (`ModelOutput`): the target's own.
    """

    logits: torch.Tensor
    inputs_embeds: torch.Tensor
    hidden_states: torch.Tensor
    visual_mask: torch.Tensor
    prompt_mask: torch.Tensor | None
    next_position: torch.Tensor
    num_slots: int
    outputs: ModelOutput


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
class TargetVerification:
    """What the target's pass over candidate trees gives.

    Args:
        logits (`torch.Tensor` of shape `[B, N, V]`): at each node.
        hidden_states (`torch.Tensor` of shape `[B, N, (1 + K) * H]`): as in [`TargetPrefill`].
        outputs (`ModelOutput`): the target's own.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor
    outputs: ModelOutput


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
        self.text_config = target.config.get_text_config(decoder=True)
        self.logit_cap: float | None = getattr(self.text_config, "final_logit_softcapping", None)
        self.windows = attention_windows(self.text_config)
        self._decoder_inputs = decoder_inputs(self.decoder)
        self._hands_on_arguments = takes_any_argument(self.decoder)
        self._is_compiled = has_compiled_part(target)
        self._dtype = target.dtype

    def outer_modules(self) -> Iterator[nn.Module]:
        """The modules of a forward over tokens that are not inside of the decoder."""
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
        dtype = weight.dtype if weight.dtype.is_floating_point else self._dtype
        logits = self.head_module(hidden_states.to(device=_device_of(self.head_module), dtype=dtype))
        return self.cap(logits)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as decoders of the Gemma 2 kind bound them."""
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

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
        """Runs the prompt `[B, L]`, or what of it is not in the cache yet, through the target's own prefill, which
        fills the cache in `model_kwargs`."""
        with self.observe() as seen:
            outputs = self.target._prefill(input_ids, generation_config, model_kwargs)
        return self.read_prefill(seen, outputs, input_ids, model_kwargs)

    def read_prefill(
        self, seen: TargetObservation, outputs: ModelOutput, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> TargetPrefill:
        """What a prefill that was observed gave: `outputs` are the target's own, `model_kwargs` those of the prompt
        (`attention_mask` if any, the cache)."""
        inputs_embeds = seen.inputs.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(seen.inputs["input_ids"])
        batch_size, length = inputs_embeds.shape[:2]
        self._dtype = inputs_embeds.dtype
        attention_mask = model_kwargs.get("attention_mask")
        prompt_mask = None if attention_mask is None else attention_mask.to(inputs_embeds.device).bool()
        if prompt_mask is not None and bool(prompt_mask.all()):
            prompt_mask = None  # older releases hand on a mask that hides nothing
        num_slots = model_kwargs[CACHE_NAME].get_seq_length()
        position_ids = seen.inputs.get("position_ids")
        if position_ids is not None:
            next_position = (position_ids[..., -1:] + 1).expand(*position_ids.shape[:-2], batch_size, 1)
        else:
            next_position = torch.full((batch_size, 1), num_slots, device=inputs_embeds.device)
        if input_ids.shape[1] >= length:
            visual_mask = self.visual_mask(input_ids[:, -length:])
        else:
            visual_mask = self._embedded_mask(inputs_embeds)
        return TargetPrefill(
            logits=outputs.logits[:, -1],
            inputs_embeds=inputs_embeds,
            hidden_states=seen.hidden_states,
            visual_mask=visual_mask,
            prompt_mask=prompt_mask,
            next_position=next_position,
            num_slots=num_slots,
            outputs=outputs,
        )

    def _embedded_mask(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Where a prompt that was given as embeddings `[B, L, H]` holds something else than embeddings of tokens."""
        table = self.embed(torch.arange(self.embedding.weight.shape[0])).to(inputs_embeds)
        nearest = (inputs_embeds @ table.mT - table.square().sum(-1) / 2).argmax(-1)
        return (table[nearest] != inputs_embeds).any(-1)

    @torch.no_grad()
    def features(self, input_ids: torch.Tensor, **inputs: Any) -> TargetFeatures:
        """Runs whole sequences `[B, L]`, with the target's other inputs, through the target without a cache."""
        with self.observe() as seen:
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
        context: ContextSlots,
        next_position: torch.Tensor,
        static_nodes: int | None = None,
        **output_flags: bool,
    ) -> TargetVerification:
        """
        One forward over all nodes of the trees, each seeing the context and its own ancestors. Appends N slots to the
        cache.

        Args:
            tree (`CandidateTree`): N nodes.
            cache (`Cache`): the target's, holding everything before the root.
            context (`ContextSlots`): what the cache holds.
            next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the root.
            static_nodes (`int`, *optional*): compile the decoder, for trees that are padded to so many nodes. The
                cache is one of `StaticSlotsLayer`s then.
            output_flags: `output_hidden_states`, `output_attentions`; with one of them nothing is compiled.
        """
        if static_nodes is None or output_flags:
            masks = self._tree_masks(tree, context)
            return self._forward_tree(tree, cache, masks, next_position + tree.depths, {}, output_flags)
        num_nodes, start = tree.tokens.shape[1], context.num_slots
        buffers = reserve(cache, static_nodes)
        try:
            verification = self.verify_in_buffers(
                tree.padded(static_nodes),
                cache,
                buffers,
                torch.full((1,), start, device=tree.tokens.device),
                context,
                next_position,
                cuda_graphs=True,
            )
        finally:
            close_slots(cache, start + num_nodes)
        # Copies: they outlive the next compiled call.
        hidden_states = verification.hidden_states[:, :num_nodes].clone()
        return TargetVerification(verification.logits[:, :num_nodes], hidden_states, verification.outputs)

    def verify_in_buffers(
        self,
        tree: CandidateTree,
        cache: Cache,
        buffers: Sequence[Buffers],
        first_slot: torch.Tensor,
        context: ContextSlots,
        next_position: torch.Tensor,
        cuda_graphs: bool = False,
    ) -> TargetVerification:
        """
        The same with a compiled decoder and whole buffers.

        Args:
            tree (`CandidateTree`): N nodes.
            cache (`Cache`): the target's. Is not written to, its buffers are.
            buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer of the cache, with
                room for the nodes.
            first_slot (`torch.LongTensor` of shape `[1]`): where the nodes go: behind what is filled. The host need
                not know it for a single row.
            context (`ContextSlots`): padding, and slots that some rows do not use.
            next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the root.
            cuda_graphs (`bool`): see [`run_compiled`].
        """
        num_nodes, num_slots = tree.tokens.shape[1], buffers[0][0].shape[2]
        masks = {
            kind: buffer_attention_mask(
                tree.ancestors, tree.depths, first_slot, context, num_slots, self._dtype, window
            )
            for kind, window in self.windows.items()
        }
        places = first_slot + torch.arange(num_nodes, device=first_slot.device)
        replaced = {CACHE_NAME: whole_buffers(buffers, places)}
        with compiled_decoder(self.decoder, (*tree.tokens.shape, num_slots), cuda_graphs):
            return self._forward_tree(tree, cache, masks, next_position + tree.depths, replaced, {})

    def _forward_tree(
        self,
        tree: CandidateTree,
        cache: Cache,
        masks: dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        replaced: dict[str, Any],
        output_flags: dict[str, bool],
    ) -> TargetVerification:
        mask: Any = masks
        if masks is not None:
            if replaced and self._hands_on_arguments and self._tree_attention(is_static=True) == SPLIT_SDPA:
                # Layers without a window see more than those with one.
                widest = min(masks, key=lambda kind: self.windows[kind] is not None)
                replaced = {**replaced, LIVE_SLOTS: find_live_slots(masks[widest])}
            if len(masks) == 1:
                (mask,) = masks.values()
        with (
            self.observe(attention_mask=mask, position_ids=position_ids, **replaced) as seen,
            self._attention_with_tree_mask(is_static=bool(replaced)),
            phase("target forward"),
        ):
            outputs = self.target(
                input_ids=tree.tokens,
                # Given here too because a model with M-RoPE would compute its own, for the rows of the prefill.
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=0,
                return_dict=True,
                **{CACHE_NAME: cache},
                **output_flags,
            )
        return TargetVerification(outputs.logits, seen.hidden_states, outputs)

    def _tree_masks(self, tree: CandidateTree, context: ContextSlots) -> dict[str, torch.Tensor] | None:
        """Masks by kind of layer; `None` if all nodes see all."""
        if tree.tokens.shape[1] == 1 and not context.hides_slots and not any(self.windows.values()):
            return None  # as in a step of `generate`: attention is faster without a mask
        return {
            kind: tree_attention_mask(tree.ancestors, context, self._dtype, window, tree.depths)
            for kind, window in self.windows.items()
        }

    def _tree_attention(self, is_static: bool) -> str:
        """The attention implementation for trees: the target's own, unless it takes no tree mask; and in place of sdpa
        one for long buffers where the cache is static."""
        implementation = self.decoder.config._attn_implementation
        if implementation not in TREE_ATTENTION:
            # A decoder that caps its attention scores has no sdpa.
            substitute = "sdpa" if self.decoder._supports_sdpa else "eager"
            logger.warning_once(
                f"The target's attention implementation {implementation!r} takes no tree mask: candidate trees are "
                f"verified with {substitute}, the prompt is read as before. The two round differently: a near-tie "
                "between two tokens may fall the other way."
            )
            implementation = substitute
        return SPLIT_SDPA if is_static and implementation == "sdpa" else implementation

    @contextmanager
    def _attention_with_tree_mask(self, is_static: bool) -> Iterator[None]:
        """Sets the attention implementation for one forward."""
        config = self.decoder.config
        before, implementation = config._attn_implementation, self._tree_attention(is_static)
        if implementation == before:
            yield
            return
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before

    def observe(self, **replaced_inputs: Any) -> AbstractContextManager[TargetObservation]:
        """Watches the forwards inside the block; the decoder gets `replaced_inputs` in place of its own."""
        return observed(self.decoder, self.feature_layers, self._decoder_inputs, self._is_compiled, replaced_inputs)


def _device_of(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate may keep its weights elsewhere."""
    hook = vars(module).get("_hf_hook")
    device: Any = getattr(hook, "execution_device", None)
    return torch.device(module.weight.device if device is None else device)  # type: ignore[arg-type]


__all__ = ["TargetAdapter", "TargetFeatures", "TargetPrefill", "TargetVerification"]
