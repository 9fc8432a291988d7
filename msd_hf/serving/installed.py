"""What `msd-hf serve` needs beyond the package, checked before anything of it is imported."""

from __future__ import annotations

from importlib.util import find_spec

import transformers
from packaging.version import Version

from ..errors import MSDError


OLDEST_TRANSFORMERS = "5.24"  # earlier releases have another layout of `transformers.cli.serving`
_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client")


def check_installed() -> None:
    """
    Checks that the server can be imported.

    Raises:
        MSDError: when transformers is too old, or a package of the extra `[serve]` is missing.
    """
    if Version(Version(transformers.__version__).base_version) < Version(OLDEST_TRANSFORMERS):
        raise MSDError(
            f"`msd-hf serve` needs transformers {OLDEST_TRANSFORMERS} or newer, and {transformers.__version__} is "
            'installed: pip install "msd-hf[serve]".'
        )
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MSDError(f'`msd-hf serve` needs {", ".join(missing)}: pip install "msd-hf[serve]".')


__all__ = ["OLDEST_TRANSFORMERS", "check_installed"]
