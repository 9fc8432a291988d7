"""`lmms-eval --model msd_qwen2_vl`: Qwen2-VL with a draft."""

from __future__ import annotations

from lmms_eval.models.simple.qwen2_vl import Qwen2_VL

from .with_draft import WithDraft


class MSDQwen2VL(WithDraft, Qwen2_VL):
    """lmms-eval's model class of Qwen2-VL, with the arguments of [`WithDraft`]."""


__all__ = ["MSDQwen2VL"]
