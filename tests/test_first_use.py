"""`import msd_hf` and the help of the commands load neither torch nor transformers, and drafts work all the same."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any

import pytest

import msd_hf
from msd_hf.hook import first_use
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


def run_python(code: str, *arguments: object) -> Any:
    """The JSON that a fresh interpreter prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import msd_hf",
        "from msd_hf import MSDError, __version__",
        "import msd_hf.toy",
        "from msd_hf.cli import app; app(['--help'], standalone_mode=False)",
        "from msd_hf.cli import app; app(['bench', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported(statement):
    code = f"""
import json, sys
{statement}
print(json.dumps([name for name in ("torch", "transformers", "numpy", "accelerate") if name in sys.modules]))
"""
    assert run_python(code) == []


def test_import_alone_is_enough():
    """Names of msd_hf are never touched: the Auto classes and `generate` register drafts at their first call."""
    code = """
import json, sys
import msd_hf
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationMixin
from transformers.models.auto.configuration_auto import AutoConfig

before = "msd_hf.decoding.loop" in sys.modules
target = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
draft = AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Count from 5 to 12.", return_tensors="pt").input_ids
out = target.generate(ids, assistant_model=draft, max_new_tokens=8, return_dict_in_generate=True)
same = out.sequences.tolist() == target.generate(ids, max_new_tokens=8).tolist()
left = [hasattr(function, "__wrapped__") and function.__wrapped__.__module__.startswith("msd_hf")
        for function in (GenerationMixin.generate, AutoConfig.from_pretrained)]
print(json.dumps([before, type(draft).__module__, bool(out.acceptance_lengths), same, left]))
"""
    assert run_python(code, TARGET_DIR, DRAFT_DIR) == [False, "msd_hf.draft.modeling_msd", True, True, [False, False]]


def test_pipelines_register_too_and_unregister_takes_back_what_waits():
    code = """
import json, sys
import msd_hf
from transformers.pipelines import base
from transformers import AutoConfig, GenerationMixin, pipeline

waits = hasattr(base.Pipeline.__init__, "__wrapped__")
pipe = pipeline("image-text-to-text", sys.argv[1], assistant_model=sys.argv[2])
kind = type(pipe.assistant_model).__name__
msd_hf.unregister()
finders = [type(finder).__module__ for finder in sys.meta_path]
names = [name for name in ("_assisted_decoding", "_validate_generation_mode")
         if hasattr(vars(GenerationMixin)[name], "__wrapped__")]
msd_hf.MSDDraftModel, msd_hf.MSDDraftConfig  # the first use of these names registers nothing again
try:
    AutoConfig.from_pretrained(sys.argv[2])
    known = True
except ValueError:
    known = False
print(json.dumps([waits, kind, "msd_hf.hook.first_use" in finders, names, known]))
"""
    assert run_python(code, TARGET_DIR, DRAFT_DIR) == [True, "MSDDraftModel", False, [], False]


def test_names_are_found_and_listed():
    assert set(msd_hf.__all__) <= set(dir(msd_hf))
    assert msd_hf.training.MSDTrainer and msd_hf.observer.observing
    with pytest.raises(AttributeError, match="no attribute 'MSDDraft'"):
        _ = msd_hf.MSDDraft


@pytest.fixture
def waiting(monkeypatch):
    """The state before the first use, with a module of two entries in place of those of transformers."""
    registered = []
    module = ModuleType("entries")

    class Entries:
        def generate(self, *numbers):
            return sum(numbers)

        @classmethod
        def from_pretrained(cls, name="a"):
            return cls.__name__ + name

    module.Entries = Entries
    monkeypatch.setattr(first_use, "_done", False)
    monkeypatch.setattr(first_use, "_put_back", [])
    monkeypatch.setattr(first_use, "_ENTRIES", {"entries": (("Entries", "generate"), ("Entries", "from_pretrained"))})
    monkeypatch.setattr("msd_hf.hook.register.register", lambda: registered.append(time.sleep(0.02) or 1))
    originals = dict(vars(Entries))
    first_use._wrap_entries(module)
    return Entries, originals, registered


@pytest.mark.parametrize("entry", ["generate", "from_pretrained"])
def test_the_first_call_registers_and_leaves_no_trace(waiting, entry):
    owner, originals, registered = waiting
    assert not registered and owner().generate.__name__ == "generate"
    assert (owner().generate(1, 2) == 3) if entry == "generate" else (owner.from_pretrained("b") == "Entriesb")
    assert registered == [1] and vars(owner)["generate"] is originals["generate"]
    assert vars(owner)["from_pretrained"] is originals["from_pretrained"]


def test_a_wrapper_around_ours_stays(waiting):
    owner, originals, registered = waiting
    ours = owner.generate

    def theirs(*args):
        return ours(*args) + 1

    owner.generate = theirs
    assert owner().generate(1) == 2 and owner().generate(1) == 2
    assert owner.generate is theirs and registered == [1]
    assert vars(owner)["from_pretrained"] is originals["from_pretrained"]


def test_threads_register_once(waiting):
    owner, _, registered = waiting
    together = threading.Barrier(8)
    results = []

    def call():
        together.wait()
        results.append(owner().generate(1, 1))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2] * 8 and registered == [1]
