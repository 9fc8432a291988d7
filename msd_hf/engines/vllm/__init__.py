"""MSD drafts in vLLM: a plugin that teaches vLLM the architecture of exported drafts, and the export.

vLLM calls [`register`] in each of its processes, so it imports neither vLLM's models nor torch.
"""

from .folder import ARCHITECTURE


def register() -> None:
    """Tells vLLM where the class of exported drafts is. vLLM finds this function by the entry point group
    `vllm.general_plugins`."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:MSDDraftForVLLM")


__all__ = ["register"]
