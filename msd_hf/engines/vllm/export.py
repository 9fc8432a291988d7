"""Writes a draft as a folder that vLLM takes as the `model` of its speculative configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...draft.modeling_msd import MSDDraftModel
from ...errors import MSDError, MSDUnsupportedError
from ...version import __version__
from ...writing.destination import check_destination, replaced_folder
from .folder import ARCHITECTURE, CONFIG_NAME, DRAFT_TOKENS, EXPORT_FOLDER, HEAD_WEIGHT, WEIGHTS_NAME
from .refusals import check_exportable, check_kinds


_COPIED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "input_layernorm",
    "decouple_visual_tokens",
    "draft_vocab_size",
    "target_name_or_path",
    "target_revision",
)


def export_draft(
    draft: MSDDraftModel,
    folder: str | Path,
    head: nn.Module | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a draft for vLLM. `vllm serve TARGET --speculative-config '{"method": "eagle", "model": FOLDER,
    "num_speculative_tokens": 5}'` serves it where this package is installed.

    Args:
        draft (`MSDDraftModel`): the draft.
        folder (`str` or `Path`): where to write.
        head (`nn.Module`, *optional*): the target's language-model head, of which a draft with a vocabulary of its own
            takes rows along. Other drafts need none.
        vocab_size (`int`, *optional*): vocabulary size of the target; default: what the draft's configuration says.
        overwrite (`bool`, defaults to `False`): replace the folder, if it holds only an exported draft.

    Returns:
        The folder's path.

    Raises:
        MSDUnsupportedError: when vLLM cannot serve the draft.
        MSDPairingError: when the head has too few rows.
        MSDError: when the head is missing or cannot be read, or the folder may not be written.
    """
    check_exportable(draft)
    check_kinds(draft.config.target_model_type, draft.config.target_text_model_type)
    path = check_destination(folder, EXPORT_FOLDER, overwrite)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in draft.named_parameters()}
    if draft.draft_vocab is not None:
        weights[HEAD_WEIGHT] = _head_rows(draft, head)
        weights[DRAFT_TOKENS] = draft.draft_vocab.cpu()
    config = json.dumps(_fields(draft, vocab_size), indent=2, sort_keys=True)
    with replaced_folder(folder, EXPORT_FOLDER, overwrite) as temporary:
        save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
    return path


def _fields(draft: MSDDraftModel, vocab_size: int | None) -> dict[str, Any]:
    """The `config.json`: a LLaMA configuration, which vLLM reads, with the draft's own fields besides."""
    config = draft.config
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "dtype": str(draft.dtype).removeprefix("torch."),
        "msd_hf_version": __version__,
        "rope_parameters": config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "vocab_size": vocab_size or config.vocab_size,
        # vLLM's name for biases that the output projection does not have.
        "attention_bias": False,
        "qkv_bias": config.attention_bias,
        **{name: getattr(config, name) for name in _COPIED if getattr(config, name) is not None},
        "draft_vocab_size": config.draft_vocab_size,
    }


def _head_rows(draft: MSDDraftModel, head: nn.Module | None) -> torch.Tensor:
    if head is None:
        raise MSDError(
            "The draft has a vocabulary of its own, for which vLLM needs rows of the target's head: give the target "
            "(--target)."
        )
    rows = draft.head_rows(head)
    if rows is None:
        raise MSDError("No rows can be taken from the target's head, because it is quantised, sharded or offloaded.")
    weight, bias = rows
    if bias is not None:
        raise MSDUnsupportedError("The target's head has a bias, which a head of vLLM's draft has not.")
    return weight.detach().cpu().contiguous()


__all__ = ["export_draft"]
