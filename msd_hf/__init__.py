"""Multimodal speculative decoding (MSD, arXiv 2505.14260) as a drop-in for Hugging Face transformers.

`import msd_hf` is enough for `generate(assistant_model=draft)` to work; `unregister()` takes it back.
"""

from .decoding.pair import release
from .decoding.result import MSDGenerateOutput
from .decoding.run_stats import MSDRunStats, last_run
from .draft.configuration_msd import MSDDraftConfig
from .draft.modeling_msd import MSDDraftModel
from .errors import MSDCacheError, MSDCheckpointError, MSDError, MSDPairingError, MSDUnsupportedError
from .hook.register import register, unregister
from .version import __version__


register()

__all__ = [
    "MSDCacheError",
    "MSDCheckpointError",
    "MSDDraftConfig",
    "MSDDraftModel",
    "MSDError",
    "MSDGenerateOutput",
    "MSDPairingError",
    "MSDRunStats",
    "MSDUnsupportedError",
    "__version__",
    "last_run",
    "register",
    "release",
    "unregister",
]
