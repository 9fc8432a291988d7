"""`lmms-eval --model msd_qwen2_5_vl`: Qwen2.5-VL with a draft."""

from __future__ import annotations

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

from .with_draft import WithDraft


class MSDQwen25VL(WithDraft, Qwen2_5_VL):
    """lmms-eval's model class of Qwen2.5-VL, with the arguments of [`WithDraft`]."""


__all__ = ["MSDQwen25VL"]
