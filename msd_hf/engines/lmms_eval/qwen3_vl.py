"""`lmms-eval --model msd_qwen3_vl`: Qwen3-VL with a draft."""

from __future__ import annotations

from lmms_eval.models.chat.qwen3_vl import Qwen3_VL

from .with_draft import WithDraft


class MSDQwen3VL(WithDraft, Qwen3_VL):
    """lmms-eval's model class of Qwen3-VL, with the arguments of [`WithDraft`]."""


__all__ = ["MSDQwen3VL"]
