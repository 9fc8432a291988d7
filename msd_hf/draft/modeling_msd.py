"""The MSD draft model: fusion of embeddings and target hidden states, then one decoder layer (paper section 3.2)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ..attention.unrolled import UnrolledPass
from ..compat import CACHE_NAME
from ..decoders import decoder_of, head_of
from ..errors import MSDError, MSDPairingError
from .base import DraftPreTrainedModel
from .configuration_msd import MSDDraftConfig
from .global_image import GlobalImage
from .interface import TargetReads
from .last_row import last_row_of_layer
from .loading import check_draft_vocab
from .plain_forward import Fuse, PlainForward, PlainLayer
from .plain_modules import TensorFunction
from .target_sizes import generating_model


class MSDDraftAttention(LlamaAttention):
    """LLaMA attention. Only the query, key and value projections may have biases, as in Qwen2."""

    def __init__(self, config: MSDDraftConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, unrolled: UnrolledPass | None = None, **kwargs: Any):
        if unrolled is None:
            return super().forward(hidden_states, *args, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        queries, keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])
        dropout = self.attention_dropout if self.training else 0.0
        attended = unrolled.attend(self.layer_idx, queries, keys, values, self.scaling, dropout)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


class MSDDraftDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MSDDraftConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MSDDraftAttention(config, layer_idx)
        if layer_idx == 0 and not config.input_layernorm:
            self.input_layernorm = nn.Identity()


class MSDDraftPreTrainedModel(DraftPreTrainedModel):
    config_class = MSDDraftConfig
    _no_split_modules = ["MSDDraftDecoderLayer"]


class MSDDraftModel(MSDDraftPreTrainedModel):
    """
    A draft for multimodal speculative decoding, passed to the target's `generate` as `assistant_model`.

    It owns `fc`, `layers`, with `target_layers` also `feature_proj`, and with `global_image_vector` also
    `global_image`. The token embedding and the language-model head
    are the target's, and are not saved with the draft.

    Settings are attributes of `draft.generation_config`, and are saved with the draft. None of them changes tokens:

    - `num_assistant_tokens` (`int` or `"auto"`, defaults to `"auto"`, with `compile` to 59): the budget of a tree, its
      nodes with the root, from 1 (no drafting) to 1024. With `"auto"`, each tree has as many nodes, levels and
      siblings as pay on this machine with this draft, at most 64 nodes, and there is none while drafting does not
      pay. What trees cost is learnt in the first rounds.
    - `tree_depth` (`int`, defaults to 40; with a number of nodes to 5): expansions of a tree after the first, so it
      has up to `tree_depth + 1` levels below the root. With `"auto"`, an upper bound.
    - `tree_top_k` (`int`, defaults to 10): candidates of each node, and nodes that are expanded in each level. 1
      drafts a chain. With `"auto"`, an upper bound.
    - `suffix_nodes` (`int`, defaults to 0): nodes that are added when the last 3 tokens have come before; they repeat
      the tokens that came next there.
    - `max_visual_rows` (`int` or `"auto"`, *optional*): the most visual positions that the draft reads. `"auto"`: as
      many as it was trained with, which is the default where that is recorded; `None`: all.
    - `compile` (`bool`, defaults to `False`): run verification and drafting with fixed shapes under `torch.compile`,
      on a GPU as CUDA graphs. Trees have a set size then. The first call compiles, which takes one to two minutes for
      a large target.

    Args:
        config (`MSDDraftConfig`): sizes of the draft. [`~MSDDraftModel.from_target`] makes a draft that fits a target,
            [`~MSDDraftModel.from_pretrained`] loads one.

    Example:

    ```python
    >>> from msd_hf import MSDDraftModel
    >>> draft = MSDDraftModel.from_pretrained("lucylyn/MSD-LLaVA1.5-7B")
    >>> out = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
    ```
    """

    def __init__(self, config: MSDDraftConfig):
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList([MSDDraftDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.feature_proj = (
            nn.Linear(len(config.target_layers) * config.hidden_size, config.hidden_size, bias=False)
            if config.target_layers
            else None
        )
        self.global_image = (
            GlobalImage(config.hidden_size, config.rms_norm_eps) if config.global_image_vector else None
        )
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.draft_vocab: torch.Tensor | None
        size = config.draft_vocab_size
        self.register_buffer("draft_vocab", None if size is None else torch.arange(size))
        # A reference to a head's weight, its version, and the rows taken from the head.
        self._head_rows: tuple[Any, int, tuple[torch.Tensor, torch.Tensor | None]] | None = None
        self.post_init()
        if self.feature_proj is not None:
            nn.init.zeros_(self.feature_proj.weight)  # a new draft starts with the last hidden state alone
        if self.global_image is not None:
            nn.init.zeros_(self.global_image.proj.weight)  # and without a vector

    @classmethod
    def from_target(
        cls, target: PreTrainedModel, init_from_last_layer: bool = False, *, check: bool = True, **overrides: Any
    ) -> MSDDraftModel:
        """
        A draft with new weights that fits a target, with the same dtype and device.

        Args:
            target (`PreTrainedModel`): the target. For a model that hands `generate` on to a language model inside of
                it, as BLIP-2 does, the draft fits that one.
            init_from_last_layer (`bool`, defaults to `False`): the draft's first layer starts as a copy of the
                target's last one, and `fc` passes the embedding on. Further layers start as copies that add nothing to
                their input.
            check (`bool`, defaults to `True`): refuse a target that `generate` would refuse with a draft.
            overrides: fields of [`MSDDraftConfig`] that differ from the target's decoder; see
                [`MSDDraftConfig.from_target`] for sizes that the target lacks.

        Raises:
            MSDError: when the target's last layer does not fit the draft's, or the target lacks a required size.
            MSDUnsupportedError: when `generate` refuses the target.
        """
        if init_from_last_layer:
            overrides = {"input_layernorm": True, **overrides}
        draft = cls(cls.config_class.from_target(target, check=check, **overrides))
        target = generating_model(target)
        if init_from_last_layer:
            draft._copy_last_layer(target)
        weight = getattr(head_of(target), "weight", None)
        dtype = target.dtype if weight is None or not weight.dtype.is_floating_point else weight.dtype
        return draft.to(device=target.device if weight is None else weight.device, dtype=dtype)

    def set_draft_vocab(self, tokens: Sequence[int] | torch.Tensor | None) -> None:
        """
        Gives the draft a vocabulary of its own. Candidates come only from these tokens, so drafting computes fewer
        rows of the target's head. The output does not change, because the target verifies with its whole head. The
        vocabulary is saved with the draft.

        Args:
            tokens (`Sequence[int]`): token ids, preferably the most frequent ones; `None`: the target's whole
                vocabulary.

        Raises:
            MSDError: when `tokens` is empty, or an id is repeated or negative.
        """
        if tokens is None:
            self.config.draft_vocab_size, self.draft_vocab = None, None
        else:
            ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device).sort().values
            if len(ids) == 0 or int(ids[0]) < 0 or bool((ids[1:] == ids[:-1]).any()):
                raise MSDError("A draft vocabulary is one or more token ids, each of them once.")
            self.config.draft_vocab_size, self.draft_vocab = len(ids), ids
        self._head_rows = None

    def head_rows(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """
        The rows of a target's head for the draft's own vocabulary. They are copied once per head, or not at all if the
        vocabulary is the first rows of the head.

        Returns:
            Weight `[V', H]`, and bias `[V']` if the head has one; `None` if no rows can be taken, because the head is
            quantised, sharded or offloaded.

        Raises:
            MSDPairingError: when the head has too few rows.
        """
        assert self.draft_vocab is not None
        weight: Any = head.weight
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
            return None
        known = self._head_rows  # read once: another thread may replace it
        if known is not None and known[0]() is weight and known[1] == weight._version:
            return known[2]
        size, last = len(self.draft_vocab), int(self.draft_vocab[-1])
        if last >= len(weight):
            raise MSDPairingError(
                f"The draft's vocabulary has token {last}, and the target's head only {len(weight)} rows. Use the "
                "draft that was made for this target."
            )
        index: Any = slice(size) if last == size - 1 else self.draft_vocab.to(weight.device)
        bias: Any = getattr(head, "bias", None)
        taken = weight.detach()[index]
        if taken.device.type == "cpu" and not isinstance(index, slice):
            # Products with few states are faster in this layout: 6.1 ms instead of 8.4 for 8,000 rows of 1,024.
            taken = taken.t().contiguous().t()
        rows = (taken, None if bias is None else bias.detach()[index])
        self._head_rows = (weakref.ref(weight), weight._version, rows)
        return rows

    @torch.no_grad()
    def _copy_last_layer(self, target: PreTrainedModel) -> None:
        layer: Any = decoder_of(target).layers[-1]
        first: Any = self.layers[0]
        source, own = layer.state_dict(), first.state_dict()
        unfit = [name for name in own if name not in source or source[name].shape != own[name].shape]
        if unfit:
            raise MSDError(
                f"The last layer of `{type(target).__name__}` has no weight for {', '.join(unfit)} of the "
                "draft's layer, or one of another shape. Do without `init_from_last_layer`."
            )
        more = sorted(source.keys() - own.keys())
        if more:
            raise MSDError(
                f"The last layer of `{type(target).__name__}` has {', '.join(more)}, of which the draft's layer knows "
                "nothing. Do without `init_from_last_layer`."
            )
        first.load_state_dict(source)
        for name in ("input_layernorm", "post_attention_layernorm"):
            # Some norms multiply by 1 + weight. Their output for an input of ones is the factor.
            ours, theirs = getattr(first, name), getattr(layer, name)
            factor = theirs(torch.ones_like(theirs.weight))
            if not torch.allclose(factor, theirs.weight, atol=1e-3):
                ours.weight.copy_(factor)
        further: Any
        for further in self.layers[1:]:
            further.load_state_dict(first.state_dict())
            for projection in (further.self_attn.o_proj, further.mlp.down_proj):
                nn.init.zeros_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        self.fc.weight[:, : self.config.hidden_size].add_(torch.eye(self.config.hidden_size))

    def check_loaded(self, name_or_path: Any) -> None:
        check_draft_vocab(name_or_path, self.draft_vocab)

    @property
    def reads(self) -> TargetReads:
        """The hidden states of the target that the draft reads."""
        return TargetReads(tuple(sorted(self.config.target_layers or ())), self.config.hidden_size)

    @property
    def reads_layers(self) -> bool:
        """Whether the draft reads other hidden states of the target than the last one."""
        return bool(self.config.target_layers)

    @property
    def reads_visual_states(self) -> bool:
        """Whether the draft reads hidden states of the target at visual rows."""
        return not self.config.decouple_visual_tokens

    def reads_of(self, decoder: Any) -> TargetReads:
        """The hidden states that the draft reads of a target with this decoder."""
        return self.reads

    def read_target(self, states: torch.Tensor) -> torch.Tensor:
        """
        Combines the hidden states of the target into one input of the draft.

        Args:
            states (`torch.Tensor` of shape `[B, T, W]`): hidden states of the target, joined as in [`TargetReads`].

        Returns:
            `torch.Tensor` of shape `[B, T, H]`.
        """
        layer_states, last = self.reads.split(states)
        return self._with_layers(last, layer_states)

    def _with_layers(self, hidden_states: torch.Tensor, layer_states: torch.Tensor | None) -> torch.Tensor:
        if self.feature_proj is None or layer_states is None:
            return hidden_states
        return hidden_states + self.feature_proj(layer_states)

    def image_vectors(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The vectors `[B, T, H]` that [`~MSDDraftModel.fuse`] adds to text rows, by the arguments of
        [`~msd_hf.draft.global_image.GlobalImage`]; `None` for a draft without `global_image_vector`."""
        return None if self.global_image is None else self.global_image(inputs_embeds, visual_mask, earlier)

    def fuse(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        layer_states: torch.Tensor | None = None,
        image_vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The input of the first layer: `fc([embedding ; hidden state])` at text positions, and the embedding alone at
        visual positions (paper section 3.2).

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, T, H]`): row j is the embedding at sequence position j + 1.
            hidden_states (`torch.Tensor` of shape `[B, T, H]`): row j is the last hidden state of the target at
                position j, after the final norm, or the draft's output in its place.
            visual_mask (`torch.BoolTensor` of shape `[B, T]`, *optional*): true at row j if position j + 1 is visual.
            layer_states (`torch.Tensor` of shape `[B, T, K * H]`, *optional*): outputs of the K `target_layers` at
                position j; `None` if `hidden_states` are the draft's own outputs.
            image_vectors (`torch.Tensor` of shape `[B, T, H]` or `[B, 1, H]`, *optional*): added at text positions.

        Returns:
            `torch.Tensor` of shape `[B, T, H]`.
        """
        hidden_states = self._with_layers(hidden_states, layer_states)
        if visual_mask is None or not self.config.decouple_visual_tokens:
            fused = self.fc(torch.cat([inputs_embeds, hidden_states], dim=-1))
            if image_vectors is None:
                return fused
            return fused + image_vectors * (1 if visual_mask is None else ~visual_mask.unsqueeze(-1))
        if torch.is_grad_enabled():
            fused = self.fc(torch.cat([inputs_embeds, hidden_states], dim=-1))
            if image_vectors is not None:
                fused = fused + image_vectors
            return torch.where(visual_mask.unsqueeze(-1), inputs_embeds, fused)
        is_text = ~visual_mask
        text = self.fc(torch.cat([inputs_embeds[is_text], hidden_states[is_text]], dim=-1))
        if image_vectors is not None:
            text = text + image_vectors.expand_as(inputs_embeds)[is_text]
        fused = inputs_embeds.clone()
        fused[is_text] = text
        return fused

    @property
    def is_plain(self) -> bool:
        """Whether `plain_forward` computes what `forward` computes."""
        return super().is_plain and all(type(layer) is MSDDraftDecoderLayer for layer in self.layers)

    def plain_forward(self, convert: Callable[[nn.Module], TensorFunction] = lambda module: module) -> PlainForward:
        """The forward over a few nodes of a tree, with `convert(module)` in place of each module."""
        layers: Any = self.layers
        fc = convert(self.fc)
        fuse: Fuse = self.fuse
        if fc is not self.fc and type(self).fuse is MSDDraftModel.fuse:
            fuse = lambda embeds, states: fc(torch.cat([embeds, states], dim=-1))  # noqa: E731
        return PlainForward(fuse, [PlainLayer.of(layer, convert) for layer in layers])

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        layer_states: torch.Tensor | None = None,
        last_row_only: bool = False,
        image_vectors: torch.Tensor | None = None,
        unrolled: UnrolledPass | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Runs the draft over T positions.

        Args:
            inputs_embeds, hidden_states, visual_mask, layer_states, image_vectors: arguments of
                [`~MSDDraftModel.fuse`]. Without `image_vectors`, a draft with `global_image_vector` makes them of the
                visual rows in `visual_mask`.
            attention_mask (`torch.Tensor`, *optional*): `[B, S + T]` with 1 for slots that may be seen, or an additive
                mask `[B, 1, T, S + T]` in the draft's dtype. Without one, attention is causal.
            position_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): default: the next slots of the cache.
            past_key_values (`Cache`, *optional*): keys and values of S earlier rows; extended in place.
            use_cache (`bool`, *optional*): make a cache when none is given.
            last_row_only (`bool`, defaults to `False`): compute the output of the last row alone, which is all that
                drafting needs of a prompt. The cache is the same.
            unrolled (`UnrolledPass`, *optional*): a pass of training, which attends to the passes before it without
                mask and cache.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`] with `last_hidden_state` of shape `[B, T, H]`,
            or `[B, 1, H]` with `last_row_only`. Its row j, given to the target's head, predicts the token at position
            j + 2.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if image_vectors is None and visual_mask is not None:
            image_vectors = self.image_vectors(inputs_embeds, visual_mask)
        states = self.fuse(inputs_embeds, hidden_states, visual_mask, layer_states, image_vectors)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(states.shape[1], device=states.device).unsqueeze(0) + past_length
        position_embeddings = self.rotary_emb(states, position_ids=position_ids)
        layers: list[Any] = list(self.layers)
        last_layer = layers.pop() if last_row_only and self.is_plain and not self.training else None
        causal_mask = None
        if unrolled is not None:
            kwargs["unrolled"] = unrolled
        elif layers:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: past_key_values},
            )
        for layer in layers:
            states = layer(
                states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        if last_layer is not None:
            normed = last_layer.input_layernorm(states)
            states = last_row_of_layer(
                last_layer, states[:, -1:], normed, attention_mask, position_embeddings, past_key_values
            )
        elif last_row_only:
            states = states[:, -1:].clone()  # a view would keep the states of all rows
        return BaseModelOutputWithPast(last_hidden_state=states, **{CACHE_NAME: past_key_values})


__all__ = ["MSDDraftModel", "MSDDraftPreTrainedModel"]
