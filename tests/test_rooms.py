"""The folders of `msd_hf` form one order, and no import runs up.

The test reads the source, so that it sees every import, also one inside a function or under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import msd_hf


PACKAGE = Path(msd_hf.__file__).parent
# From bottom to top. A room imports rooms that stand before it, and modules of the root.
ROOMS = (
    "writing",
    "processes",
    "hub",
    "recurrent",
    "kv",
    "attention",
    "compiled",
    "tree",
    "draft",
    "target",
    "drafting",
    "decoding",
    "hook",
    "training",
    "evaluation",
    "engines",
    "serving",
    "toy",
    "web",
    "cli",
)
# What holds the package together may import rooms; all other modules of the root import only each other.
ENTRY_POINTS = ("__init__", "__main__")
MOST_ROOT_FILES = 12


def imports(source: str, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The modules of `msd_hf` that a source imports, as paths below the package.

    Args:
        source (`str`): of a module in `package`, a path below `msd_hf`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ("msd_hf", *package)[: len(package) + 2 - node.level]
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names] if len(module) == 1 else [module]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple((node.module or "").split("."))]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found += [name[1:] for name in names if name[0] == "msd_hf" and len(name) > 1]
    return found


def upward(source: str, package: tuple[str, ...], module: str) -> list[str]:
    """The imports of a module that run up, as sentences."""
    room = package[0] if package else None
    if room is None and module in ENTRY_POINTS:
        return []
    place = ROOMS.index(room) if room is not None else -1
    return [
        f"{'.'.join((*package, module))} imports {'.'.join(name)}"
        for name in imports(source, package)
        if name[0] in ROOMS and name[0] != room and ROOMS.index(name[0]) > place
    ]


def test_no_import_runs_up():
    found = []
    for path in PACKAGE.rglob("*.py"):
        *package, module = path.relative_to(PACKAGE).with_suffix("").parts
        found += upward(path.read_text(encoding="utf-8"), tuple(package), module)
    assert found == []


def test_every_folder_is_in_the_order():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)


def test_the_root_holds_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ROOT_FILES


@pytest.mark.parametrize(
    "line",
    [
        "from ..decoding.loop import msd_decoding",
        "from .. import hook",
        "import msd_hf.cli.train",
        "from msd_hf.training import MSDTrainer",
        "def late():\n    from ..toy import build",
        "if TYPE_CHECKING:\n    from ..target.adapter import TargetAdapter",
    ],
)
def test_an_import_that_runs_up_is_found(line):
    assert len(upward(line, ("tree",), "growth")) == 1


def test_modules_of_the_root_import_no_room():
    assert upward("from .kv.slots import ContextSlots", (), "saving") == ["saving imports kv.slots"]
    assert upward("from .hook.register import register", (), "__init__") == []


def test_imports_that_run_down_are_not_reported():
    source = "from ..errors import MSDError\nfrom ..kv.slots import ContextSlots\nfrom .candidate import CandidateTree"
    assert imports(source, ("tree",)) == [("errors",), ("kv", "slots"), ("tree", "candidate")]
    assert upward(source, ("tree",), "growth") == []
