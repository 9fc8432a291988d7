"""Configuration of an EAGLE-3 draft."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import MSDUnsupportedError, shown
from ...hub.fingerprint import identify_target
from ..configuration import DraftConfigMixin
from ..interface import VISUAL_POSITIONS, check_target_of_draft
from ..readings import OtherReadings, others
from ..target_sizes import draft_fields, generating_model


NUM_PARTS = 3  # layers of the target that a draft reads, if the configuration does not name them
# The draft reads the embeddings of images as they are, so it is as wide as its target.
_POLICIES_OF_ONE_WIDTH = ("image_embedding", "decoupled")


def default_aux_ids(num_layers: int) -> list[int]:
    """The hidden states that a draft reads of a target with `num_layers` layers if its configuration names none."""
    return [2, num_layers // 2, num_layers - 3]


@strict
class Eagle3DraftConfig(DraftConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an [`Eagle3DraftModel`], the draft of *EAGLE-3* (arXiv 2503.01840). The names are those of the
    published checkpoints. `examples/OTHER_DRAFTS.md` says how these are read.

    Args:
        vocab_size (`int`, defaults to 32000):
            Vocabulary size of the target, and of the draft's own embedding.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim:
            Sizes of the draft's layers, as in `LlamaConfig`.
        hidden_act, max_position_embeddings, initializer_range, rms_norm_eps, rope_parameters, attention_dropout:
            As in `LlamaConfig`. The draft's rotary positions are its own, never the target's.
        attention_bias, mlp_bias (`bool`, defaults to `False`):
            Whether the query, key and value projections, and those of the MLP, have biases.
        fc_bias (`bool`, defaults to `False`):
            Whether `fc` has a bias.
        draft_vocab_size (`int`, *optional*):
            Rows of the draft's own head, which `d2t` maps to tokens of the target. `None`: a row for each token.
        target_hidden_size (`int`, *optional*):
            Width of the target's hidden states. `None`: that of the draft.
        eagle_aux_hidden_state_layer_ids (`list[int]`, *optional*):
            The hidden states of the target that the draft reads, as transformers counts `hidden_states`: 0 is the
            input of the first layer, i the output of the i-th layer. `None`: 2, n // 2 and n - 3 of a target with n
            layers.
        norm_before_residual (`bool`, defaults to `False`):
            Whether the first layer adds its attention to the normed hidden state.
        norm_before_fc (`bool`, defaults to `False`):
            Whether one norm (`input_norm`) stands before `fc`.
        fc_norm (`bool`, defaults to `False`):
            Whether each of the target's hidden states has a norm of its own before `fc`.
        norm_output (`bool`, defaults to `False`):
            Whether the draft is fed its output after the final norm, not before it.
        qk_norm (`bool`, defaults to `False`):
            Whether queries and keys are normed, as in Qwen3.
        has_own_embedding (`bool`, defaults to `False`):
            Whether the draft has an embedding of its own, which it reads in place of the target's.
        visual_positions (`str`, defaults to `"image_embedding"`):
            What the draft is fed at visual positions: `"image_embedding"`, the target's; `"placeholder"`, the
            embedding of the placeholder token; `"pooled"`, one row for each image, the mean of its rows; `"dropped"`,
            no row; `"decoupled"`, the image's embedding in place of the target's hidden states, too, as MSD drafts
            are fed it, for drafts that were trained so.
        trained_visual_rows, target_model_type, target_text_model_type, target_name_or_path, target_revision:
            As in [`MSDDraftConfig`].
        target_fingerprint (`dict`, *optional*):
            As in [`MSDDraftConfig`].
    """

    model_type = "eagle3_draft"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    fc_bias: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    has_own_embedding: bool = False
    visual_positions: str = "image_embedding"
    trained_visual_rows: int | None = None
    target_model_type: str | None = None
    target_text_model_type: str | None = None
    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_fingerprint: dict | None = None

    def _check_parts(self) -> None:
        if self.visual_positions not in VISUAL_POSITIONS:
            raise ValueError(
                f"`visual_positions` must be one of {', '.join(VISUAL_POSITIONS)}, got {shown(self.visual_positions)}."
            )
        ids = self.eagle_aux_hidden_state_layer_ids
        if ids is not None and not ids:
            raise ValueError("`eagle_aux_hidden_state_layer_ids` must name at least one hidden state, got [].")
        if self.target_width == self.hidden_size:
            return
        if not self.has_own_embedding:
            raise ValueError(
                f"a draft of another width ({self.hidden_size}) than its target ({self.target_width}) needs "
                "`has_own_embedding`."
            )
        if self.visual_positions in _POLICIES_OF_ONE_WIDTH:
            raise ValueError(
                f'`visual_positions` cannot be "{self.visual_positions}" for a draft of another width '
                f'({self.hidden_size}) than its target ({self.target_width}): use "placeholder".'
            )

    @property
    def target_width(self) -> int:
        """Width of the target's hidden states."""
        return self.hidden_size if self.target_hidden_size is None else self.target_hidden_size

    @property
    def num_parts(self) -> int:
        """Number of hidden states of the target that the draft reads."""
        ids = self.eagle_aux_hidden_state_layer_ids
        return NUM_PARTS if ids is None else len(ids)

    def aux_ids(self, num_layers: int) -> list[int]:
        """The hidden states that the draft reads of a target with `num_layers` layers, whether it has them or not."""
        ids = self.eagle_aux_hidden_state_layer_ids
        return default_aux_ids(num_layers) if ids is None else ids

    def other_readings(self, target_config: PreTrainedConfig, num_layers: int) -> list[OtherReadings]:
        """Readings in which programs differ, see `examples/OTHER_DRAFTS.md`."""
        present = self.aux_ids(num_layers)
        ids = [present, default_aux_ids(num_layers)] if self.num_parts == NUM_PARTS else [present]
        moved = [[number + by for number in some] for some in ids for by in (0, 1, -1)]
        fitting = [some for some in moved if len(set(some)) == len(some) and 0 <= min(some) <= max(some) <= num_layers]
        is_narrow = self.target_width != self.hidden_size
        policies = [policy for policy in VISUAL_POSITIONS if not (is_narrow and policy in _POLICIES_OF_ONE_WIDTH)]
        return [
            OtherReadings("eagle_aux_hidden_state_layer_ids", others(present, fitting)),
            OtherReadings("norm_before_residual", [not self.norm_before_residual]),
            OtherReadings("norm_output", [not self.norm_output]),
            *super().other_readings(target_config, num_layers),
            OtherReadings("visual_positions", others(self.visual_positions, policies), needs_image=True),
        ]

    @classmethod
    def from_target(
        cls, target: PreTrainedModel | PreTrainedConfig, *, check: bool = True, **overrides: Any
    ) -> Eagle3DraftConfig:
        """
        The configuration of a draft that fits a target, see [`MSDDraftConfig.from_target`].

        Args:
            target (`PreTrainedModel` or `PreTrainedConfig`): the target, or its configuration.
            check (`bool`, defaults to `True`): refuse a target that `generate` would refuse with a draft.
            overrides: fields of the draft's configuration that differ from the target's decoder.

        Raises:
            MSDError: when the configuration of the target's decoder lacks a required field, and it is not given.
            MSDUnsupportedError: when `generate` refuses the target.
        """
        if isinstance(target, PreTrainedModel):
            target = generating_model(target)
        if check:
            check_target_of_draft(target)
        config = target.config if isinstance(target, PreTrainedModel) else target
        fields = draft_fields(config, {**identify_target(target), "attention_bias": False, **overrides})
        if "input_layernorm" in overrides:
            raise MSDUnsupportedError("The layers of an EAGLE-3 draft have all their norms: leave `input_layernorm`.")
        del fields["input_layernorm"]
        width = config.get_text_config(decoder=True).hidden_size
        if fields["hidden_size"] != width:
            fields.setdefault("target_hidden_size", width)
        return cls(**fields)


__all__ = ["NUM_PARTS", "Eagle3DraftConfig", "default_aux_ids"]
