"""Multimodal speculative decoding (MSD, arXiv 2505.14260) as a drop-in for Hugging Face transformers.

`import msd_hf` is enough for `generate(assistant_model=draft)` to work; `unregister()` takes it back.

[`AutoDraft`] loads drafts of several kinds. [`MSDDraftModel`] is a draft, and its `generation_config` holds its
settings. `generate` returns an
[`MSDGenerateOutput`]. All errors are [`MSDError`]s. `msd_hf.training` trains drafts, `msd_hf.evaluation` measures
them, and `msd_hf.toy` has a small pair to try everything with.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import MSDCacheError, MSDCheckpointError, MSDError, MSDPairingError, MSDUnsupportedError
from .hook.first_use import register_at_first_use, register_now
from .version import __version__


if TYPE_CHECKING:
    from .decoding.pair import release
    from .decoding.result import MSDGenerateOutput
    from .decoding.run_stats import MSDRunStats, last_run
    from .draft.auto import AutoDraft
    from .draft.configuration_msd import MSDDraftConfig
    from .draft.eagle3.configuration import Eagle3DraftConfig
    from .draft.eagle3.modeling import Eagle3DraftModel
    from .draft.modeling_msd import MSDDraftModel
    from .draft.vispec.configuration import ViSpecDraftConfig
    from .draft.vispec.modeling import ViSpecDraftModel
    from .hook.register import register, unregister
else:
    # Importing these needs torch and transformers, which takes seconds. A command's help needs neither.
    _MODULES = {
        "AutoDraft": ".draft.auto",
        "Eagle3DraftConfig": ".draft.eagle3.configuration",
        "Eagle3DraftModel": ".draft.eagle3.modeling",
        "MSDDraftConfig": ".draft.configuration_msd",
        "MSDDraftModel": ".draft.modeling_msd",
        "MSDGenerateOutput": ".decoding.result",
        "MSDRunStats": ".decoding.run_stats",
        "ViSpecDraftConfig": ".draft.vispec.configuration",
        "ViSpecDraftModel": ".draft.vispec.modeling",
        "last_run": ".decoding.run_stats",
        "register": ".hook.register",
        "release": ".decoding.pair",
        "unregister": ".hook.register",
    }
    _ROOMS = ("evaluation", "observer", "toy", "training")

    def __getattr__(name):
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        register_now()
        value = getattr(import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES, *_ROOMS})


register_at_first_use()

__all__ = [
    "AutoDraft",
    "Eagle3DraftConfig",
    "Eagle3DraftModel",
    "MSDCacheError",
    "MSDCheckpointError",
    "MSDDraftConfig",
    "MSDDraftModel",
    "MSDError",
    "MSDGenerateOutput",
    "MSDPairingError",
    "MSDRunStats",
    "MSDUnsupportedError",
    "ViSpecDraftConfig",
    "ViSpecDraftModel",
    "__version__",
    "last_run",
    "register",
    "release",
    "unregister",
]
