"""Configuration of an MSD draft model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.fingerprint import identify_target
from .configuration import HINT, TARGET_FIELDS, DraftConfigMixin
from .interface import check_target_of_draft
from .readings import OtherReadings
from .target_sizes import draft_fields, generating_model


@strict
class MSDDraftConfig(DraftConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`MSDDraftModel`], the draft of *Speculative Decoding Reimagined for Multimodal Large Language
    Models* (section 3.2). The defaults are those of the published draft for LLaVA-1.5-7B. Every number has limits
    ([`~msd_hf.draft.limits`]).

    Args:
        vocab_size (`int`, defaults to 32000):
            Vocabulary size of the target with which the draft was trained. For information only: the draft uses the
            target's embedding and head.
        hidden_size (`int`, defaults to 4096):
            Width of the draft. It equals the width of the target's decoder.
        intermediate_size (`int`, defaults to 11008):
            Width of the MLP.
        num_hidden_layers (`int`, defaults to 1):
            Number of decoder layers.
        num_attention_heads, num_key_value_heads, head_dim (`int`):
            Number and width of the attention heads, as in `LlamaConfig`.
        hidden_act, max_position_embeddings, initializer_range, rms_norm_eps, attention_dropout, mlp_bias:
            As in `LlamaConfig`.
        rope_parameters (`dict`, *optional*):
            As in `LlamaConfig`. Positions have one dimension, also for targets with M-RoPE.
        attention_bias (`bool`, defaults to `False`):
            Whether the query, key and value projections have biases, as in Qwen2. The output projection has none.
        input_layernorm (`bool`, defaults to `False`):
            Whether the first layer normalises its input. The published drafts for LLaVA do not, the ones for
            Qwen2-VL do.
        fc_bias (`bool`, defaults to `True`):
            Whether `fc` has a bias. A few EAGLE drafts have none.
        decouple_visual_tokens (`bool`, defaults to `True`):
            Whether visual positions are fed unchanged, without `fc` and the target's hidden state. `False` gives plain
            EAGLE.
        target_layers (`list[int]`, *optional*):
            Decoder layers of the target, counted from 0, whose outputs the draft reads besides the last hidden state.
            Nodes of a growing tree do without them, as the target has not computed them yet. The paper uses none.
        global_image_vector (`bool`, defaults to `False`):
            Whether the draft pools the visual rows that it reads into one vector, which it adds to the input of every
            text row behind them. The paper does not.
        draft_vocab_size (`int`, *optional*):
            Size of the draft's own vocabulary, from which it chooses candidates; see
            [`~MSDDraftModel.set_draft_vocab`]. `None`: the target's whole vocabulary.
        trained_visual_rows (`int`, *optional*):
            How many visual positions a sample had in training: the 95th percentile. `None`: not recorded. The setting
            `max_visual_rows="auto"` of a call reads it.
        target_model_type (`str`, *optional*):
            `model_type` of the target that the draft belongs to. `None`: unknown and not checked.
        target_text_model_type (`str`, *optional*):
            `model_type` of the target's decoder.
        target_name_or_path (`str`, *optional*):
            The target's id on the Hub, or the last part of its folder's name. Never a path.
        target_revision (`str`, *optional*):
            The target's commit on the Hub.
        target_fingerprint (`dict`, *optional*):
            Architecture, sizes and signs of the target's head, see [`~msd_hf.hub.fingerprint`]. `generate` warns once
            of a target that has other weights.

    Example:

    ```python
    >>> from msd_hf import MSDDraftConfig
    >>> config = MSDDraftConfig.from_target(target, intermediate_size=2048)
    ```
    """

    model_type = "msd_draft"
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
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    input_layernorm: bool = False
    fc_bias: bool = True
    decouple_visual_tokens: bool = True
    target_layers: list[int] | None = None
    global_image_vector: bool = False
    draft_vocab_size: int | None = None
    trained_visual_rows: int | None = None
    target_model_type: str | None = None
    target_text_model_type: str | None = None
    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_fingerprint: dict | None = None

    def other_readings(self, target_config: PreTrainedConfig, num_layers: int) -> list[OtherReadings]:
        """As in every kind of draft; and whether visual positions are decoupled."""
        decoupling = OtherReadings("decouple_visual_tokens", [not self.decouple_visual_tokens], needs_image=True)
        return [*super().other_readings(target_config, num_layers), decoupling]

    @classmethod
    def from_target(
        cls, target: PreTrainedModel | PreTrainedConfig, *, check: bool = True, **overrides: Any
    ) -> MSDDraftConfig:
        """
        The configuration of a draft that fits a target. The draft is a plain attention layer of the target's sizes.
        If they differ between the target's layers, it has those that most layers have.

        Without an `intermediate_size` in the target, the MLP is as wide as the target's own field for it says
        (`ffn_dim`, `ffn_hidden_size`, `n_inner`), else as the experts that a token is given to, shared ones included,
        else four times the hidden size. Without attention heads in the target, the draft has heads of width 64. An
        argument takes the place of each of these.

        Args:
            target (`PreTrainedModel` or `PreTrainedConfig`): the target, or its configuration. For a model that hands
                `generate` on to a language model inside of it, as BLIP-2 does, the draft fits that one.
            check (`bool`, defaults to `True`): refuse a target that `generate` would refuse with a draft. A
                configuration shows less of that than a model.
            overrides: fields of the draft's configuration that differ from the target's decoder.

        Raises:
            MSDError: when the configuration of the target's decoder lacks a required field, and it is not given.
            MSDUnsupportedError: when `generate` refuses the target.
        """
        given = target
        if isinstance(target, PreTrainedModel):
            target = generating_model(target)
        if check:
            check_target_of_draft(target)
        config = target.config if isinstance(target, PreTrainedModel) else target
        identity = identify_target(target)
        if target is not given:  # the model inside has no name of its own
            outer = identify_target(given)
            identity |= {name: outer[name] for name in ("target_name_or_path", "target_revision")}
        return cls(**draft_fields(config, {**identity, **overrides}))


__all__ = ["HINT", "TARGET_FIELDS", "MSDDraftConfig"]
