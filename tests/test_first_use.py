"""`import msd_hf` and the help of the commands load neither torch nor transformers, and drafts work all the same."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
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
    """Names of msd_hf are never touched: the first call of an entry registers drafts. One process, because importing
    transformers takes long."""
    code = """
import json, os, sys
import msd_hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers import GenerationMixin, pipeline
from transformers.pipelines import base
from msd_hf.hook import first_use

def waits():
    entries = (GenerationMixin.generate, AutoConfig.from_pretrained, AutoConfig.for_model, base.Pipeline.__init__)
    return [entry.__code__.co_filename == first_use.__file__ for entry in entries]

def outcome():
    target = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
    draft = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    ids = AutoTokenizer.from_pretrained(sys.argv[1])("Count from 5 to 12.", return_tensors="pt").input_ids
    out = target.generate(ids, assistant_model=draft, max_new_tokens=8, return_dict_in_generate=True)
    same = out.sequences.tolist() == target.generate(ids, max_new_tokens=8).tolist()
    return type(draft).__name__, bool(out.acceptance_lengths), same

before = waits(), "msd_hf.decoding.loop" in sys.modules
child = os.fork()
if child == 0:
    pipe = pipeline("image-text-to-text", sys.argv[1], assistant_model=sys.argv[2])
    os._exit(0 if type(pipe.assistant_model).__name__ == "MSDDraftModel" else 1)
status = os.waitpid(child, 0)[1]
used = outcome(), waits(), type(sys.meta_path[0]).__module__
msd_hf.unregister()
names = [name for name in ("_assisted_decoding", "_validate_generation_mode")
         if hasattr(vars(GenerationMixin)[name], "__wrapped__")]
msd_hf.MSDDraftModel, msd_hf.MSDDraftConfig  # the first use of these names registers nothing again
try:
    AutoConfig.from_pretrained(sys.argv[2])
    known = True
except ValueError:
    known = False
print(json.dumps([before, status, used, names, known]))
"""
    before, status, used, names, known = run_python(code, TARGET_DIR, DRAFT_DIR)
    assert before == [[True] * 4, False] and status == 0
    assert used[:2] == [["MSDDraftModel", True, True], [False] * 4] and used[2] != first_use.__name__
    assert names == [] and known is False


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


def test_entries_that_were_wrapped_twice_leave_no_trace(waiting):
    """By the finder, and by the loop over modules that another thread was importing."""
    owner, originals, registered = waiting
    first_use._wrap_entries(SimpleNamespace(__name__="entries", Entries=owner))
    assert owner().generate(1, 2) == 3 and registered == [1]
    assert all(vars(owner)[name] is originals[name] for name in ("generate", "from_pretrained"))


def test_a_second_import_waits_no_second_time(waiting, monkeypatch):
    monkeypatch.setattr(first_use, "_HEAVY", "no such module")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        first_use.register_at_first_use()
    assert sys.meta_path.count(first_use._finder) == 1
    first_use.register_now()
    assert first_use._finder not in sys.meta_path


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
