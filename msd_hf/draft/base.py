"""What all kinds of drafts share: loading, saving, settings, and the usual answers to what the decoding loop asks."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from ..errors import MSDUnsupportedError
from ..tree.settings import TREE_SETTINGS
from .experience_file import read_experience
from .files import location_of
from .hub_mixin import DraftHubMixin
from .loading import check_loading_info, errors_of_quantised_weights, prepare_loading
from .weights import IGNORED_WEIGHTS


# Kinds of rotary embeddings whose frequencies depend on the length of the text, so that no table of them can be made.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class DraftPreTrainedModel(DraftHubMixin, PreTrainedModel):
    """Base class of drafts. A kind adds its modules, its forward and what differs of [`~msd_hf.draft.interface`]."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    ignored_weights: ClassVar[tuple[str, ...]] = IGNORED_WEIGHTS  # of published checkpoints; the draft has no use for
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keys_to_ignore_on_load_unexpected = [rf"^{re.escape(name)}$" for name in IGNORED_WEIGHTS]
    _supports_sdpa = True
    _supports_attention_backend = True

    layers: nn.ModuleList
    rotary_emb: Any
    visual_positions: str = "image_embedding"
    rows_per_image: int = 1
    own_embedding: nn.Module | None = None
    own_head: nn.Module | None = None
    head_norm: nn.Module | None = None

    def __init__(self, config: Any):
        super().__init__(config)
        self.gradient_checkpointing = False
        # Settings that leave everything to the defaults, with all names there to be set.
        self.generation_config = GenerationConfig(**dict.fromkeys(TREE_SETTINGS))
        if config.trained_visual_rows is not None:
            self.generation_config.max_visual_rows = "auto"

    @classmethod
    def can_generate(cls) -> bool:
        # Only a model that "can generate" gets a generation config, which is saved with it. The draft's holds the
        # settings of the candidate tree.
        return True

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ) -> None:
        # Called by `from_pretrained` with the settings that it has read. Without any, the defaults stay.
        if generation_config is not None:
            self.generation_config = GenerationConfig.from_dict(generation_config.to_dict())

    def generate(self, *args: Any, **kwargs: Any):
        """
        Refuses the call.

        Raises:
            MSDUnsupportedError: a draft alone has no target to read.
        """
        raise MSDUnsupportedError(
            "A draft cannot generate by itself, because embedding and head are the target's. Call "
            "`target.generate(..., assistant_model=draft)`."
        )

    # `PreTrainedModel` expects an embedding and a head in the model. Most drafts have neither.
    def get_input_embeddings(self):
        """The draft's own embedding; `None`: the target's."""
        return self.own_embedding

    def get_output_embeddings(self):
        """The draft's own head; `None`: the target's."""
        return self.own_head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):  # type: ignore[override]
        """
        Loads a draft of this package, or a published one of the same kind, from a folder or the Hub. Takes the
        arguments of `PreTrainedModel.from_pretrained`, and fields of the draft's configuration by name.

        Raises:
            MSDCheckpointError: when a file is damaged, a number in it is out of range, a weight is missing,
                unexpected or of the wrong shape or dtype, or the checkpoint is another kind of model. Nothing is
                allocated before that.
            OSError: when there is no such checkpoint, or it lacks its configuration or its weights.
        """
        if pretrained_model_name_or_path is not None:
            config, kwargs = prepare_loading(cls, pretrained_model_name_or_path, config, kwargs)
        location = location_of(kwargs)
        return_loading_info = kwargs.pop("output_loading_info", False)
        accept_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        with errors_of_quantised_weights(pretrained_model_name_or_path, config):
            draft, loading_info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loading_info` reports these keys with the others
                **kwargs,
            )
        # `save_pretrained` would give weights the names of the checkpoint back.
        conversions = getattr(draft, "_weight_conversions", None) or []
        draft._weight_conversions = [kept for kept in conversions if not isinstance(kept, WeightRenaming)]
        if accept_other_shapes:
            loading_info = {**loading_info, "mismatched_keys": set()}
        check_loading_info(pretrained_model_name_or_path, loading_info)
        draft.check_loaded(pretrained_model_name_or_path)
        if pretrained_model_name_or_path is not None:
            read_experience(draft, pretrained_model_name_or_path, location)
        return (draft, loading_info) if return_loading_info else draft

    def check_loaded(self, name_or_path: Any) -> None:
        """
        Checks weights whose values can be wrong, such as the tokens of a draft's own vocabulary.

        Args:
            name_or_path: the checkpoint.

        Raises:
            MSDCheckpointError: names the weight.
        """

    @property
    def reads_visual_states(self) -> bool:
        """Whether the draft reads hidden states of the target at visual rows."""
        return self.visual_positions not in ("dropped", "decoupled")

    @property
    def num_cache_layers(self) -> int:
        """Number of layers that keep keys and values."""
        return len(self.layers)

    def image_vectors(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """`None`: this kind of draft adds no vectors of images to text rows."""
        return None

    def compress_images(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Only asked of drafts whose `visual_positions` are "compressed"."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Whether `plain_forward` computes what `forward` computes."""
        return (
            self.config._attn_implementation == "sdpa"
            and self.rotary_emb.rope_type not in LENGTH_DEPENDENT_ROPE
            # Hooks of accelerate keep weights elsewhere until a module is called.
            and not any(hasattr(module, "_hf_hook") for module in self.modules())
        )

    def head_rows(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The rows of the target's head for `draft_vocab`. Only asked of drafts with one and without a head."""
        raise NotImplementedError


__all__ = ["LENGTH_DEPENDENT_ROPE", "DraftPreTrainedModel"]
