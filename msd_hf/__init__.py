"""Multimodal speculative decoding (MSD, arXiv 2505.14260) as a drop-in for Hugging Face transformers.

`import msd_hf` is enough for `generate(assistant_model=draft)` to work; `unregister()` takes it back.
"""

from .configuration_msd import MSDDraftConfig
from .errors import MSDCheckpointError, MSDError, MSDPairingError, MSDUnsupportedError
from .generation import MSDGenerateOutput
from .integration import register, unregister
from .modeling_msd import MSDDraftModel
from .version import __version__


register()

__all__ = [
    "MSDCheckpointError",
    "MSDDraftConfig",
    "MSDDraftModel",
    "MSDError",
    "MSDGenerateOutput",
    "MSDPairingError",
    "MSDUnsupportedError",
    "__version__",
    "register",
    "unregister",
]
