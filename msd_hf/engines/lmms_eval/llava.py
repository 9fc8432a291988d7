"""`lmms-eval --model msd_llava`: LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision with a draft."""

from __future__ import annotations

from lmms_eval.models.chat.llava_hf import LlavaHf

from .with_draft import WithDraft


class MSDLlava(WithDraft, LlavaHf):
    """lmms-eval's model class of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, with the arguments of [`WithDraft`]."""


__all__ = ["MSDLlava"]
