"""The EAGLE-3 draft model (arXiv 2503.01840): three hidden states of the target, one layer, a head of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ...attention.unrolled import UnrolledPass
from ...compat import CACHE_NAME
from ...decoders import head_of
from ...errors import MSDCheckpointError, MSDError, MSDPairingError
from ..base import DraftPreTrainedModel
from ..interface import TargetReads
from ..last_row import last_row_of_layer
from ..plain_forward import PlainForward, PlainLayer
from ..plain_modules import TensorFunction
from ..target_sizes import generating_model
from .configuration import Eagle3DraftConfig
from .layers import Eagle3DecoderLayer


class Eagle3DraftModel(DraftPreTrainedModel):
    """
    An EAGLE-3 draft, passed to the target's `generate` as `assistant_model`. It reads hidden states of three layers of
    the target, and has a head of its own, whose rows `d2t` maps to tokens of the target. Published drafts in the flat
    format and in that of speculators load as they are.

    Settings are attributes of `draft.generation_config`, as in [`MSDDraftModel`].

    Args:
        config (`Eagle3DraftConfig`): sizes and conventions of the draft.

    Example:

    ```python
    >>> import msd_hf
    >>> draft = msd_hf.AutoDraft.from_pretrained("some/eagle3-draft")
    >>> out = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
    ```
    """

    config_class = Eagle3DraftConfig
    _no_split_modules = ["Eagle3DecoderLayer"]
    ignored_weights: ClassVar[tuple[str, ...]] = ("t2d",)  # says which tokens have a row of the head, as `d2t` does
    _keys_to_ignore_on_load_unexpected = [rf"^{re.escape(name)}$" for name in ignored_weights]

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        width = config.num_parts * config.target_width
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.has_own_embedding else None
        self.input_norm = LlamaRMSNorm(width, eps=eps) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(config.target_width, eps=eps) for _ in range(config.num_parts * config.fc_norm)]
        self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(width, size, bias=config.fc_bias)
        self.layers = nn.ModuleList([Eagle3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(size, eps=eps)
        num_rows = config.vocab_size if config.draft_vocab_size is None else config.draft_vocab_size
        self.lm_head = nn.Linear(size, num_rows, bias=False)
        self.d2t: torch.Tensor | None
        no_offsets = torch.zeros(num_rows, dtype=torch.long)
        self.register_buffer("d2t", None if config.draft_vocab_size is None else no_offsets)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Eagle3DraftModel) and module.d2t is not None:
            nn.init.zeros_(module.d2t)

    @property
    def visual_positions(self) -> str:  # type: ignore[override]
        """What the draft is fed at visual positions."""
        return self.config.visual_positions

    @property
    def own_embedding(self) -> nn.Module | None:  # type: ignore[override]
        """The draft's own embedding; `None`: the target's."""
        return self.embed_tokens

    @property
    def own_head(self) -> nn.Module:  # type: ignore[override]
        """The draft's own head."""
        return self.lm_head

    @property
    def head_norm(self) -> nn.Module | None:  # type: ignore[override]
        """The norm between the draft's output and its head; `None` if the output is normed already."""
        return None if self.config.norm_output else self.norm

    @property
    def draft_vocab(self) -> torch.Tensor | None:
        """The target's id of each row of the draft's head, `[V']`; `None`: a row for each of its tokens."""
        return None if self.d2t is None else self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_draft_vocab(self, tokens: Any) -> None:
        """
        Gives a new draft the tokens that it proposes, one for each row of its head.

        Args:
            tokens (`Sequence[int]` or `torch.LongTensor` of shape `[V']`): token ids.

        Raises:
            MSDPairingError: when there are more or fewer tokens than rows, or tokens are repeated or negative.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device).sort().values
        size = 0 if self.d2t is None else len(self.d2t)
        if self.d2t is None or len(ids) != size or int(ids[0]) < 0 or bool((ids[1:] == ids[:-1]).any()):
            raise MSDPairingError(f"The draft's vocabulary is {size} token ids, each of them once, got {len(ids)}.")
        self.d2t.copy_(ids - torch.arange(size, device=ids.device))

    @torch.no_grad()
    def start_from_head(self, target: PreTrainedModel) -> None:
        """
        Starts the head of a new draft as the rows of the target's head for its tokens.

        Args:
            target (`PreTrainedModel`): the target.

        Raises:
            MSDError: when the target's head has no rows of the draft's width to copy.
        """
        weight = getattr(head_of(generating_model(target)), "weight", None)
        size = self.config.hidden_size
        if weight is None or not weight.dtype.is_floating_point or weight.is_meta or weight.shape[1:] != (size,):
            raise MSDError(
                f"The head of `{type(target).__name__}` has no rows of the draft's width {size} to start from. Do "
                "without `init_from_head`."
            )
        tokens = torch.arange(len(self.lm_head.weight)) if self.draft_vocab is None else self.draft_vocab
        self.lm_head.weight.copy_(weight[tokens.to(weight.device)])

    def check_loaded(self, name_or_path: Any) -> None:
        if self.d2t is None or self.d2t.is_meta:
            return
        tokens = self.draft_vocab
        assert tokens is not None
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size or len(tokens.unique()) < len(tokens):
            raise MSDCheckpointError(
                f"The weight `d2t` in {str(name_or_path)!r} is no map to the target's vocabulary: the number of each "
                f"row plus its offset must be a token below {self.config.vocab_size}, each of them once, got "
                f"{tokens.tolist()[:8]}{'...' * (len(tokens) > 8)}."
            )

    @classmethod
    def from_target(cls, target: PreTrainedModel, *, check: bool = True, **overrides: Any) -> Eagle3DraftModel:
        """
        A draft with new weights that fits a target, with the same dtype and device.

        Args:
            target (`PreTrainedModel`): the target.
            check (`bool`, defaults to `True`): refuse a target that `generate` would refuse with a draft.
            overrides: fields of [`Eagle3DraftConfig`] that differ from the target's decoder.

        Raises:
            MSDError: when the target lacks a required size.
            MSDUnsupportedError: when `generate` refuses the target.
        """
        draft = cls(Eagle3DraftConfig.from_target(target, check=check, **overrides))
        weight = getattr(head_of(generating_model(target)), "weight", None)
        dtype = target.dtype if weight is None or not weight.dtype.is_floating_point else weight.dtype
        return draft.to(device=target.device if weight is None else weight.device, dtype=dtype)

    @property
    def reads_layers(self) -> bool:
        """Whether the draft reads other hidden states of the target than the last one."""
        return True

    def reads_of(self, decoder: Any) -> TargetReads:
        """
        The hidden states that the draft reads of a target with this decoder.

        Raises:
            MSDPairingError: when the target has too few layers.
        """
        num_layers = len(decoder.layers)
        ids = self.config.eagle_aux_hidden_state_layer_ids
        chosen = self.config.aux_ids(num_layers)
        if len(set(chosen)) < self.config.num_parts or not 0 <= min(chosen) <= max(chosen) <= num_layers:
            where = "by default, 2, n // 2 and n - 3" if ids is None else "`eagle_aux_hidden_state_layer_ids`"
            raise MSDPairingError(
                f"The draft reads the hidden states {chosen} ({where}) of a target that has {num_layers} "
                f"layers, expected {self.config.num_parts} different ones from 0 to {num_layers}. Load the draft with "
                "`eagle_aux_hidden_state_layer_ids=[...]`, or use the one that was trained for this target."
            )
        # Hidden state i is the output of layer i - 1.
        return TargetReads(tuple(sorted(number - 1 for number in chosen)), self.config.target_width, with_last=False)

    def read_target(self, states: torch.Tensor) -> torch.Tensor:
        """
        Combines the hidden states of the target into one input of the draft.

        Args:
            states (`torch.Tensor` of shape `[B, T, W]`): hidden states of the target, joined as in [`TargetReads`].

        Returns:
            `torch.Tensor` of shape `[B, T, H]`.
        """
        if self.fc_norm:
            parts = states.split(self.config.target_width, dim=-1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.input_norm is not None:
            states = self.input_norm(states)
        return self.fc(states)

    def fuse(self, inputs_embeds: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the first layer starts from.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[..., H]`): row j is the embedding at sequence position j + 1.
            hidden_states (`torch.Tensor` of shape `[..., H]`): row j is `read_target` at position j, or the draft's
                output in its place.

        Returns:
            What is added to the result of the attention, `[..., H]`, and the input of the attention, `[..., 2 * H]`.
        """
        first: Any = self.layers[0]
        return _first_input(first.input_layernorm, first.hidden_norm, self.config, inputs_embeds, hidden_states)

    @property
    def is_plain(self) -> bool:
        """Whether `plain_forward` computes what `forward` computes."""
        return super().is_plain and all(type(layer) is Eagle3DecoderLayer for layer in self.layers)

    def plain_forward(self, convert: Callable[[nn.Module], TensorFunction] = lambda module: module) -> PlainForward:
        """The forward over a few nodes of a tree, with `convert(module)` in place of each module."""
        layers: Any = self.layers
        norms = convert(layers[0].input_layernorm), convert(layers[0].hidden_norm)
        return PlainForward(
            lambda embeds, states: _first_input(*norms, self.config, embeds, states),
            [PlainLayer.of(layer, convert) for layer in layers],
            convert(self.norm) if self.config.norm_output else None,
        )

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
        unrolled: UnrolledPass | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Runs the draft over T positions.

        Args:
            inputs_embeds, hidden_states: arguments of [`~Eagle3DraftModel.fuse`], `[B, T, H]`.
            visual_mask (`torch.BoolTensor` of shape `[B, T]`, *optional*): true at row j if position j + 1 is visual.
                Only read with `visual_positions="decoupled"`; else all rows go the same way.
            attention_mask (`torch.Tensor`, *optional*): `[B, S + T]` with 1 for slots that may be seen, or an additive
                mask `[B, 1, T, S + T]` in the draft's dtype. Without one, attention is causal.
            position_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): default: the next slots of the cache.
            past_key_values (`Cache`, *optional*): keys and values of S earlier rows; extended in place.
            use_cache (`bool`, *optional*): make a cache when none is given.
            layer_states (`torch.Tensor` of shape `[B, T, W]`, *optional*): an argument of
                [`~Eagle3DraftModel.read_target`], whose result is then read in place of `hidden_states`. For training.
            last_row_only (`bool`, defaults to `False`): compute the output of the last row alone, which is all that
                drafting needs of a prompt. The cache is the same.
            unrolled (`UnrolledPass`, *optional*): a pass of training, which attends to the passes before it without
                mask and cache.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`] with `last_hidden_state` of shape `[B, T, H]`,
            or `[B, 1, H]` with `last_row_only`. Its row j is fed back in place of a hidden state of the target, and
            after `head_norm`, given to the draft's head, predicts the token at position j + 2.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if layer_states is not None:
            hidden_states = self.read_target(layer_states)
        if visual_mask is not None and self.visual_positions == "decoupled":
            hidden_states = torch.where(visual_mask.unsqueeze(-1), inputs_embeds, hidden_states)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0) + past_length
        causal_mask = None
        if unrolled is not None:
            kwargs["unrolled"] = unrolled
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: past_key_values},
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        states, attention_input = self.fuse(inputs_embeds, hidden_states)
        layers: Any = self.layers
        is_short = last_row_only and self.is_plain and not self.training
        for number, layer in enumerate(layers):
            if number:
                attention_input = layer.input_layernorm(states)
            if is_short and number == len(layers) - 1:
                states = last_row_of_layer(
                    layer, states[:, -1:], attention_input, attention_mask, position_embeddings, past_key_values
                )
                break
            states = layer(
                states,
                attention_input,
                causal_mask,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        if last_row_only:
            states = states[:, -1:].clone()  # a view would keep the states of all rows
        if self.config.norm_output:
            states = self.norm(states)
        return BaseModelOutputWithPast(last_hidden_state=states, **{CACHE_NAME: past_key_values})


def _first_input(
    embedding_norm: TensorFunction,
    hidden_norm: TensorFunction,
    config: Eagle3DraftConfig,
    inputs_embeds: torch.Tensor,
    hidden_states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = hidden_norm(hidden_states)
    residual = normed if config.norm_before_residual else hidden_states
    return residual, torch.cat([embedding_norm(inputs_embeds), normed], dim=-1)


__all__ = ["Eagle3DraftModel"]
