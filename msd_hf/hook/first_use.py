"""Registers drafts when a program first uses transformers, so that `import msd_hf` itself takes no time.

The hook needs torch and most of transformers, whose import takes seconds. If a program has loaded them already, drafts
are registered at once. Otherwise the functions with which a program begins to use drafts wait for their first call:
that call registers drafts and goes on as usual. The functions are wrapped when their module has been imported.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


# The functions with which a program begins to use drafts, by module: `generate`, the Auto classes, pipelines.
_ENTRIES = {
    "transformers.generation.utils": (("GenerationMixin", "generate"),),
    "transformers.models.auto.configuration_auto": (("AutoConfig", "from_pretrained"), ("AutoConfig", "for_model")),
    "transformers.pipelines.base": (("Pipeline", "__init__"),),
}
# If this module is loaded, so is most of what the hook needs.
_HEAVY = "transformers.generation.utils"


def register_at_first_use() -> None:
    """Registers drafts: at once if transformers is loaded, else at the first call of one of the entries."""
    if _HEAVY in sys.modules:
        register_now()
        return
    if _finder in sys.meta_path:  # `importlib.reload(msd_hf)`
        return
    sys.meta_path.insert(0, _finder)
    for name in _ENTRIES:
        if name in sys.modules:
            _wrap_entries(importlib.import_module(name))  # waits if another thread is importing it


def register_now() -> None:
    """Registers drafts, unless this function has done so before: what `unregister` undid stays undone."""
    global _done
    if _done:
        return
    from .register import register

    with _lock:
        if _done:
            return
        register()
        # Only now, so that other threads wait for the lock rather than go on without drafts.
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        for put_back in reversed(_put_back):  # two threads may have wrapped an entry, one around the other
            put_back()
        _done = True


class _Finder(MetaPathFinder):
    """Has the entries of a module wrapped as soon as the module has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _ENTRIES else None
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module  # the loader is left as it was
            execute(module)
            _wrap_entries(module)

        loader.exec_module = exec_module
        return spec


def _wrap_entries(module: Any) -> None:
    for class_name, name in _ENTRIES[module.__name__]:
        owner = getattr(module, class_name)
        original = vars(owner)[name]
        is_classmethod = isinstance(original, classmethod)
        wrapper = _registering(original.__func__ if is_classmethod else original)
        wrapped = classmethod(wrapper) if is_classmethod else wrapper
        setattr(owner, name, wrapped)
        _put_back.append(functools.partial(_restore, owner, name, wrapped, original))


def _registering(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def entry(*args: Any, **kwargs: Any) -> Any:
        register_now()
        return function(*args, **kwargs)

    return entry


def _restore(owner: Any, name: str, wrapped: Any, original: Any) -> None:
    if vars(owner)[name] is wrapped:  # otherwise another library has wrapped ours, which now only passes calls on
        setattr(owner, name, original)


_finder = _Finder()
_put_back: list[Callable[[], None]] = []
_lock = threading.Lock()
_done = False

__all__ = ["register_at_first_use", "register_now"]
