"""The drafts that vLLM cannot serve, each with its reason."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...draft.configuration_msd import MSDDraftConfig
from ...draft.modeling_msd import MSDDraftModel
from ...errors import MSDUnsupportedError


# vLLM hands the draft the target's embedding and head as they are, so targets that scale either are not among these.
DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3"})
# Kinds of targets around a decoder whose image embeddings vLLM hands on in the form in which they enter the decoder.
TARGETS = frozenset({"llava", "llava_next", "qwen2_5_vl", "qwen2_vl"})
ROPE_KINDS = frozenset({"default", "linear", "llama3", "yarn"})
# vLLM derives the scale of `yarn` from `factor` alone.
_YARN_FIELDS = ("attention_factor", "mscale", "mscale_all_dim")


def check_exportable(draft: Any) -> None:
    """
    Refuses a draft that vLLM cannot run as it is.

    Args:
        draft (`MSDDraftModel`): the draft.

    Raises:
        MSDUnsupportedError: names what vLLM lacks, and what to do.
    """
    reason = _reason(draft)
    if reason is not None:
        raise MSDUnsupportedError(f"This draft cannot be served by vLLM: {reason}")


def _reason(draft: Any) -> str | None:
    if type(draft) is not MSDDraftModel:
        return (
            f"a `{type(draft).__name__}` is no MSD draft, for which the plugin is. vLLM serves published EAGLE-3 "
            "drafts as they are."
        )
    config: MSDDraftConfig = draft.config
    if config.target_layers:
        return (
            f"it reads the target's layers {list(config.target_layers)} besides the last, which vLLM does not hand to "
            "an EAGLE draft. Train one without `target_layers`."
        )
    if config.global_image_vector:
        return (
            "it adds a vector of all images to its inputs, for which vLLM has no place. Train one without "
            "`global_image_vector`."
        )
    if not config.fc_bias:
        return "its `fc` has no bias, and the plugin's has one."
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised. Export the draft that was quantised."
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, and layers of the LLaMA kind have 'silu' in vLLM."
    rope: dict[str, Any] = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        return f"its rotary positions are of type {kind!r}, which vLLM computes in another way."
    scales = [name for name in _YARN_FIELDS if rope.get(name) is not None] if kind == "yarn" else []
    if scales:
        return f"`rope_parameters` have {', '.join(scales)}, which vLLM reads in another way."
    return None


def check_target_kind(config: PreTrainedConfig) -> None:
    """
    Refuses a target that vLLM serves in another form than transformers.

    Args:
        config (`PreTrainedConfig`): configuration of the target.

    Raises:
        MSDUnsupportedError: names the kinds that are served.
    """
    check_kinds(config.model_type, config.get_text_config(decoder=True).model_type)


def check_kinds(target: str | None, decoder: str | None) -> None:
    """[`check_target_kind`] by the `model_type`s of a target and its decoder, `None` where they are not known."""
    if target not in (None, *TARGETS, *DECODERS) or decoder not in (None, *DECODERS):
        raise MSDUnsupportedError(
            f"Drafts for a target of kind {target!r} with a decoder of kind {decoder!r} were not tried with vLLM. "
            f"Served are {', '.join(sorted(TARGETS))}, and without images {', '.join(sorted(DECODERS))}."
        )


__all__ = ["DECODERS", "ROPE_KINDS", "TARGETS", "check_exportable", "check_kinds", "check_target_kind"]
