"""What an installation promises: the declared packages are those that are imported, and extras hold what they say."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import msd_hf


tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "pillow": "PIL"}
# Imported where a target, a draft or an option needs it; `tokenizers` and `jinja2` come with transformers.
OPTIONAL = {"datasets", "PIL", "matplotlib", "triton", "tokenizers", "jinja2", "gradio"}
ENGINES = {"lmms_eval", "vllm"}  # imported by modules that the engine itself loads
OPTIONAL |= {"fastapi", "starlette", "uvicorn", "prometheus_client"}  # of `[serve]`


def names(requirements):
    return {Requirement(text).name for text in requirements}


def test_every_import_is_declared():
    found = set()
    for path in Path(msd_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    declared = {MODULES.get(name, name) for name in names(PROJECT["dependencies"])}
    assert found - declared - set(sys.stdlib_module_names) - {"msd_hf"} - OPTIONAL - ENGINES == set()


def test_the_version_has_its_section_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {msd_hf.__version__}\n" in text


def test_all_holds_every_extra_that_fits_every_build_of_torch():
    (everything,) = (Requirement(text) for text in EXTRAS["all"])
    assert everything.extras == EXTRAS.keys() - {
        "all",
        "vision",
        "vllm",
        "lmms-eval",
        "docs",
        "test",
        "studies",
        "dev",
    }
    assert "torchvision" in names(EXTRAS["vision"])
    assert "torchvision" not in {name for extra in everything.extras for name in names(EXTRAS[extra])}
    # The suite runs where only a CPU build of torch is installed.
    assert "torchvision" not in names(EXTRAS["test"]) and "vision" not in "".join(EXTRAS["test"])


def test_pythons_are_named():
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if " :: 3." in line]
    assert named[0] == PROJECT["requires-python"].removeprefix(">=") and named == ["3.10", "3.11", "3.12", "3.13"]


def test_an_index_shows_no_link_that_leads_nowhere():
    """An index shows README alone. Links to pages become their text, other links stay."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](examples/SUPPORT.md)" in text and "](examples/demo.svg)" in text
    for rule in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []
    assert "| SUPPORT.md | What works" in text and "](https://arxiv.org/abs/2505.14260)" in text
    assert "demo.svg" not in text
