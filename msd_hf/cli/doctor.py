"""The command `msd-hf doctor`: says what is installed, what is missing, and whether the bundled pair works."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from ..errors import MSDError, describe_error
from ..version import __version__
from .next_step import print_next
from .options import console


PROMPT = "Count from 5 to 12."


def doctor() -> None:
    """Print versions, devices and extras, and check that the bundled pair gives the same answer with its draft."""
    problems: list[str] = []
    _print("msd-hf", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for step in (_packages, _extras, _devices, _hook, _pair):
        try:
            problems += step()
        except Exception as error:  # the command is there to say what is broken, whatever it is
            _print(_CHECKED[step], "failed")
            if not (problems and isinstance(error, ImportError)):  # else the missing package is named already
                problems.append(f"the check of {_CHECKED[step]} failed: {describe_error(error)}")
    if problems:
        raise MSDError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found: {'; '.join(problems)}")
    _print("result", "everything works")
    print_next("demo")


def _packages() -> Iterator[str]:
    from .installed import required_packages

    try:
        packages = required_packages()
    except metadata.PackageNotFoundError:
        _print("packages", "unknown: msd-hf is on the path but not installed (pip install -e .)")
        return
    for package in packages:
        _print(package.name, f"{package.installed or 'missing'} (needs {package.specifier or 'any version'})")
        problem = package.problem()
        if problem is not None:
            yield problem


def _extras() -> Iterator[str]:
    from .installed import DISTRIBUTION, extras

    try:
        by_name = extras()
    except metadata.PackageNotFoundError:
        return
    for name, packages in by_name.items():
        missing = ", ".join(package.name for package in packages if not package.fits)
        hint = f'without {missing}: pip install "{DISTRIBUTION}[{name}]"'
        _print(f"[{name}]", hint if missing else "installed")
    yield from ()  # an extra that is missing is no problem


def _devices() -> Iterator[str]:
    import torch

    _print("cpu", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _print(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        _print("mps", "available")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        _print("cuda", f"this torch is built for CUDA {torch.version.cuda}, but no GPU can be used")
    yield from ()


def _hook() -> Iterator[str]:
    from transformers import GenerationMixin

    from ..hook.first_use import register_now

    register_now()
    if not hasattr(GenerationMixin._assisted_decoding, "__wrapped__"):
        yield "another library has replaced the hook in `generate`: import msd_hf after it"


def _pair() -> Iterator[str]:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from ..draft.modeling_msd import MSDDraftModel
    from ..loading import load_target
    from ..prompts import build_inputs
    from ..toy import DRAFT_DIR, TARGET_DIR

    logging.disable_progress_bar()
    # In float64 the tokens are always the same. The tokenizer alone needs no Pillow.
    target = load_target(TARGET_DIR, "float64")
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR, dtype=torch.float64)
    inputs = build_inputs(AutoTokenizer.from_pretrained(TARGET_DIR), PROMPT)
    arguments = {"max_new_tokens": 24, "do_sample": False}
    alone = target.generate(**inputs, **arguments)
    output = target.generate(**inputs, **arguments, assistant_model=draft, return_dict_in_generate=True)
    rounds = len(output.acceptance_lengths[0])
    same = torch.equal(alone, output.sequences)
    tokens = alone.shape[1] - inputs["input_ids"].shape[1]
    _print("pair", f"{tokens} tokens in {rounds} verifications, {'the same' if same else 'not the same'} as without")
    if not same:
        yield "the bundled pair gives other tokens with its draft than without: please report this"


_CHECKED: dict[Callable[[], Iterator[str]], str] = {
    _packages: "packages",
    _extras: "extras",
    _devices: "devices",
    _hook: "the hook",
    _pair: "the bundled pair",
}


def _print(name: str, text: str) -> None:
    console.print(f"{name:18}{text}", soft_wrap=True)


__all__ = ["doctor"]
