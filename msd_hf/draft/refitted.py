"""The weights of a draft under another configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights

from ..errors import MSDUnsupportedError


def with_fields(
    draft: Any, *, device: torch.device | None = None, dtype: torch.dtype | None = None, **fields: Any
) -> Any:
    """
    A draft with the same weights, and with other values of fields of its configuration that fit them, such as
    `rope_parameters` or `norm_before_residual`. On the same device and in the same dtype the two drafts share memory.

    Args:
        draft (`PreTrainedModel`): a draft of any kind. It stays as it is.
        device (`torch.device`, *optional*), dtype (`torch.dtype`, *optional*): of the new draft; default: those of the
            old one.
        fields: fields of the draft's configuration.

    Raises:
        MSDUnsupportedError: when the draft's weights are quantised.
        ValueError: when a value is not allowed.
        RuntimeError: when the weights do not fit the fields.
    """
    if getattr(draft.config, "quantization_config", None) is not None:
        raise MSDUnsupportedError("The weights of this draft are quantised: give the draft with its full weights.")
    config = type(draft.config)(**{**draft.config.to_dict(), **fields})
    config._attn_implementation = draft.config._attn_implementation
    config._name_or_path = draft.config._name_or_path
    with init_empty_weights(include_buffers=False):  # a rotary embedding computes its buffers
        made = type(draft)(config)
    device, dtype = device or draft.device, dtype or draft.dtype
    weights = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in draft.state_dict().items()
    }
    made.load_state_dict(weights, assign=True)
    made.generation_config = copy.deepcopy(draft.generation_config)
    return made.to(device).eval()


__all__ = ["with_fields"]
