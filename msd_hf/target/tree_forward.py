"""The verification forward: all nodes of a candidate tree at once, each node seeing the context and its ancestors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..attention.block_selection import NodePlaces, indexers_of
from ..attention.masks import buffer_attention_mask, tree_attention_mask
from ..attention.split import LIVE_SLOTS, find_live_slots
from ..attention.substitution import Substitution, allow_substitutes
from ..compat import CACHE_NAME
from ..compiled.compile import CompiledFunctions
from ..decoders import decoder_of, padding_position
from ..errors import MSDUnsupportedError
from ..kv.fixed import close_slots, reserve, whole_buffers
from ..kv.in_place import KeysAndValues
from ..kv.indexed import BLOCK_INDEXED
from ..kv.reference_window import spared_slots
from ..kv.slots import ContextSlots
from ..kv.transaction import recurrent_layers
from ..observer import phase
from ..recurrent.kernels import allow_trees, has_known_kernels
from ..recurrent.nodes import TreeNodes
from ..recurrent.replay import mixers_of
from ..tree.candidate import CandidateTree
from .compiled_parts import uncompiled
from .layer_kinds import HYBRID, RECURRENT, STEP_INPUTS, attention_reaches
from .layer_kinds import recurrent_layers as recurrent_numbers
from .observation import TargetObservation
from .query_scales import QueryScales
from .support import TREE_ATTENTION, takes_any_argument


logger = logging.get_logger(__name__)

# Observes the decoder's forwards with a cache inside its block. Keyword arguments are fields of `TargetObservation`.
Observe = Callable[..., AbstractContextManager[TargetObservation]]


@dataclass
class TargetVerification:
    """The result of the target's pass over candidate trees.

    Args:
        logits (`torch.Tensor` of shape `[B, N, V]`): the logits at each node.
        hidden_states (`torch.Tensor` of shape `[B, N, W]`): the states that the draft reads; W is `TargetReads.width`.
        outputs (`ModelOutput`): all outputs of the target.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor
    outputs: ModelOutput


class TreeForward:
    """
    Runs candidate trees through a target.

    Args:
        target (`PreTrainedModel`): the target.
        observe (`Callable`): watches forwards of the target's decoder.
        compiled (`CompiledFunctions`): keeps compiled decoders.

    Attributes:
        dtype (`torch.dtype`): dtype of the decoder's inputs, which masks must have, too.
        masks_attention (`bool`): whether attention functions get the mask of a tree themselves, past a decoder that
            takes no such mask. For decoders with one kind of attention.
    """

    def __init__(self, target: PreTrainedModel, observe: Observe, compiled: CompiledFunctions):
        self.target = target
        self.decoder: Any = uncompiled(decoder_of(target))
        self.dtype = target.dtype
        self.masks_attention = False
        self._padding_position = padding_position(self.decoder)
        self._observe = observe
        self._compiled = compiled
        text_config = target.config.get_text_config(decoder=True)
        self._reaches = attention_reaches(text_config)
        numbers = recurrent_numbers(text_config)
        self._is_recurrent = bool(numbers)
        self._mixers: Sequence[nn.Module] = ()  # of layers along whose functions no tree can run
        if numbers and has_known_kernels(self.decoder):
            allow_trees(self.decoder)
        elif numbers:
            self._mixers = mixers_of(self.decoder, numbers)
        chooses_blocks = BLOCK_INDEXED in self._reaches
        self._indexers = indexers_of(self.decoder) if chooses_blocks else []
        self._query_scales = QueryScales(self.decoder)
        self._is_limited = any(reach.most is not None for reach in self._reaches.values())
        self._hands_on_arguments = takes_any_argument(self.decoder)

    def __call__(
        self,
        tree: CandidateTree,
        cache: Cache,
        context: ContextSlots,
        next_position: torch.Tensor,
        num_fixed_nodes: int | None = None,
        **output_flags: bool,
    ) -> TargetVerification:
        """
        Runs one forward over all nodes of the trees, which appends N slots to the cache.

        Args:
            tree (`CandidateTree`): trees of N nodes.
            cache (`Cache`): the target's cache, which holds all tokens before the root.
            context (`ContextSlots`): the slots of the cache that hold the context.
            next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the root.
            num_fixed_nodes (`int`, *optional*): if given, the decoder is compiled, smaller trees are padded to this
                number of nodes, and the cache must consist of `FixedLayer`s.
            output_flags: `output_hidden_states`, `output_attentions`; with one of them nothing is compiled.
        """
        if num_fixed_nodes is None or output_flags:
            masks = self._masks(tree, context, cache)
            num_nodes = tree.tokens.shape[1]
            replaced = {name: _for_nodes(name, value, num_nodes) for name, value in context.inputs.items()}
            factors = self._query_scales.corrections(tree, context)
            positions = self._positions(tree, next_position)
            is_text = num_nodes == 1 and not context.is_ragged  # slots are places then
            places = self._places(tree, context) if self._indexers and not is_text else None
            return self._forward(tree, cache, masks, positions, replaced, output_flags, factors=factors, places=places)
        num_nodes, start = tree.tokens.shape[1], context.num_slots
        padded = tree.padded(max(num_fixed_nodes, num_nodes))
        buffers = reserve(cache, padded.tokens.shape[1])
        first_slot = torch.full((1,), start, device=tree.tokens.device)
        try:
            verification = self.in_buffers(
                padded, cache, buffers, first_slot, context, next_position, cuda_graphs=True
            )
        finally:
            close_slots(cache, start + num_nodes)
        # A copy, because the next compiled call overwrites the states.
        hidden_states = verification.hidden_states[:, :num_nodes].clone()
        return TargetVerification(verification.logits[:, :num_nodes], hidden_states, verification.outputs)

    def in_buffers(
        self,
        tree: CandidateTree,
        cache: Cache,
        buffers: Sequence[KeysAndValues],
        first_slot: torch.Tensor,
        context: ContextSlots,
        next_position: torch.Tensor,
        cuda_graphs: bool = False,
    ) -> TargetVerification:
        """
        Runs one compiled forward over all nodes of the trees, in which attention reads whole buffers. The caller pads
        trees to fixed shapes, and makes the new slots part of the cache (`close_slots`).

        Args:
            tree (`CandidateTree`): trees of N nodes.
            cache (`Cache`): the target's cache. Only its buffers are written to.
            buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer of the cache that
                holds slots, with room for the nodes.
            first_slot (`torch.LongTensor` of shape `[1]`): slot of the root, behind the filled slots. With a single
                row the mask depends on this tensor alone, so the value may be known to the device only.
            context (`ContextSlots`): gives the padding, and the slots that some rows do not use.
            next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the root.
            cuda_graphs (`bool`): argument of [`CompiledFunctions.run`].
        """
        num_nodes, num_slots = tree.tokens.shape[1], buffers[0][0].shape[2]
        masks = {
            kind: buffer_attention_mask(tree.ancestors, tree.depths, first_slot, context, num_slots, self.dtype, reach)
            for kind, reach in self._reaches.items()
        }
        places = first_slot + torch.arange(num_nodes, device=first_slot.device)
        replaced = {CACHE_NAME: whole_buffers(cache, buffers, places)}
        shape = (*tree.tokens.shape, num_slots)
        decoder, compiled = self.decoder, self._compiled

        def run(inputs: dict[str, Any]) -> Any:
            return compiled.run_decoder(decoder, inputs, shape, cuda_graphs)

        return self._forward(tree, cache, masks, self._positions(tree, next_position), replaced, {}, run)

    def _forward(
        self,
        tree: CandidateTree,
        cache: Cache,
        masks: dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        replaced: dict[str, Any],
        output_flags: dict[str, bool],
        run: Callable[[dict[str, Any]], Any] | None = None,
        factors: torch.Tensor | None = None,
        places: NodePlaces | None = None,
    ) -> TargetVerification:
        nodes = self._tree_nodes(tree, cache)
        mask: Any = masks
        if masks is not None and len(masks) == 1:
            (mask,) = masks.values()
        elif masks is not None and self._is_recurrent:
            hybrid = {name: masks[kind] for name, kind in HYBRID.items() if kind in masks}
            mask = {**masks, **hybrid, **dict.fromkeys(RECURRENT)}  # padding is in the states already
        attention = self._substitute(mask if self.masks_attention else None)
        if self.masks_attention:
            mask = None
        if run is not None and masks is not None and self._tree_attention == "sdpa" and self._hands_on_arguments:
            allow_substitutes(self.decoder.config._attn_implementation)
            # Layers that see everything need more slots than others.
            widest = min(masks, key=lambda kind: self._reaches[kind].most is not None)
            replaced = {**replaced, LIVE_SLOTS: find_live_slots(masks[widest])}
        replaced = {"attention_mask": mask, "position_ids": position_ids, **replaced}
        observation = self._observe(
            cache=cache,
            replaced_inputs=replaced,
            attention=attention,
            nodes=nodes,
            run=run,
            projections=() if factors is None else self._query_scales.projections,
            factors=factors,
            indexers=self._indexers if places is not None else (),
            places=places,
            mixers=self._mixers if tree.tokens.shape[1] > 1 else (),
        )
        with observation as seen, phase("target forward"):
            outputs = self.target(
                input_ids=tree.tokens,
                # A model with M-RoPE would otherwise compute positions for the rows of the prefill.
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=0,
                return_dict=True,
                **{CACHE_NAME: cache},
                **output_flags,
            )
        if attention is not None and run is None and not attention.num_calls:
            raise MSDUnsupportedError(
                f"The layers of `{type(self.target).__name__}` do not look up their attention implementation "
                f"{self.decoder.config._attn_implementation!r} where transformers registers it, and it takes no tree "
                'mask: load the target with `attn_implementation="sdpa"`.'
            )
        for call in seen.mixer_calls:
            cache.layers[call.mixer.layer_idx].replay(call)  # type: ignore[attr-defined]
        if nodes is not None and not all(layer.has_kept_nodes() for layer in recurrent_layers(cache)):
            raise MSDUnsupportedError(
                f"The recurrent layers of `{type(self.target).__name__}` do not run with functions that can follow a "
                "candidate tree. Call `generate` without `assistant_model`."
            )
        return TargetVerification(outputs.logits, seen.hidden_states, outputs)

    def _places(self, tree: CandidateTree, context: ContextSlots) -> NodePlaces:
        """Where the slots of the context and the nodes stand in the text, and which of them each node sees."""
        device, (batch_size, num_nodes) = tree.depths.device, tree.tokens.shape
        slots = torch.arange(context.num_slots, device=device).expand(batch_size, -1)
        lengths = context.row_lengths(device).unsqueeze(1)
        is_used = (slots < lengths).unsqueeze(1).expand(-1, num_nodes, -1)
        places = torch.cat([slots, lengths + tree.depths], dim=1)
        visible = torch.cat([is_used, tree.ancestors], dim=2)
        return NodePlaces(places, visible, context.num_slots + tree.max_depth + 1)

    def _positions(self, tree: CandidateTree, next_position: torch.Tensor) -> torch.Tensor:
        """Positions `[..., B, N]` of the nodes of trees whose roots stand at `next_position` `[..., B, 1]`."""
        positions = next_position + tree.depths
        if self._padding_position is None:
            return positions
        return torch.where(tree.tokens == self._padding_position, self._padding_position, positions)

    def _tree_nodes(self, tree: CandidateTree, cache: Cache) -> TreeNodes | None:
        """Prepares recurrent layers for a forward over the trees. Returns the nodes along which their kernels run;
        `None` for a root alone, which is a step of plain decoding, for chains on layers of unknown kinds, and for
        targets without such layers."""
        if not self._is_recurrent:
            return None
        layers = recurrent_layers(cache)
        # Mixers read the nodes as a text, so the check of a target finds that a tree differs, and a chain does not.
        if self._mixers or tree.tokens.shape[1] == 1:
            for layer in layers:
                layer.hold()
            return None
        nodes = TreeNodes(tree.parents, tree.ancestors)
        for layer in layers:
            layer.expect(nodes)
        return nodes

    def _masks(self, tree: CandidateTree, context: ContextSlots, cache: Cache) -> dict[str, torch.Tensor] | None:
        """Masks by kind of layer; `None` for single nodes that see the whole context."""
        if tree.tokens.shape[1] == 1 and not context.hides_slots and not self._is_limited:
            return None  # as in a step of `generate`: attention is faster without a mask
        spares_prompt = any(reach.spares_prompt for reach in self._reaches.values())
        spared = spared_slots(cache.layers) if spares_prompt else 0
        return {
            kind: tree_attention_mask(tree.ancestors, context, self.dtype, reach, tree.depths, spared)
            for kind, reach in self._reaches.items()
        }

    @property
    def _tree_attention(self) -> str:
        """The attention implementation for trees: the target's own, or a substitute if its own takes no tree mask."""
        implementation = self.decoder.config._attn_implementation
        if implementation in TREE_ATTENTION:
            return implementation
        # A decoder that caps its attention scores has no sdpa.
        return "sdpa" if self.decoder._supports_sdpa else "eager"

    def _substitute(self, mask: torch.Tensor | None) -> Substitution | None:
        """The substitute for the target's attention in this forward, with the mask that it gets past the decoder;
        `None` if its own takes a tree mask, and gets it from the decoder."""
        config, name = self.decoder.config, self._tree_attention
        if name == config._attn_implementation:
            if mask is None:
                return None
            allow_substitutes(name)
            return Substitution(config, name, mask)
        logger.warning_once(
            f"The target's attention implementation {config._attn_implementation!r} takes no tree mask: candidate "
            f"trees are verified with {name}, the prompt is read as before. The two round differently: a near-tie "
            "between two tokens may fall the other way."
        )
        allow_substitutes(config._attn_implementation)
        return Substitution(config, name, mask)


def _for_nodes(name: str, value: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """An input of the last token of a prompt as input of each of N nodes."""
    dim = STEP_INPUTS[name]
    if dim is None:
        return value
    sizes = list(value.shape)
    sizes[dim] = num_nodes
    return value.expand(sizes)


__all__ = ["TargetVerification", "TreeForward"]
