"""
Loads damaged drafts, and decodes with those that load: an error of msd_hf, or the tokens of the target alone.

    python examples/studies/fuzz_drafts.py                  # 600 drafts, about five minutes
    python examples/studies/fuzz_drafts.py --cases 40 --seed 7
    python examples/studies/fuzz_drafts.py --only 123       # one case, with its error

Each draft is loaded in a process of its own, for at most 20 seconds and with less than 1 GB of memory. The errors that
count are those of msd_hf, and the `OSError` of transformers for files that are missing. Exits with 1 if a case ends in
another way. Needs Linux.
"""

import argparse
import collections
import functools
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import draft_damage
import torch
from fuzz_runs import run_forked
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.utils import logging

from msd_hf import MSDDraftModel, MSDError
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


IDENTICAL = "identical"
MAX_NEW_TOKENS = 12


@functools.cache
def toy_target() -> Any:
    """The toy target in float64, where its tokens with a draft are those without."""
    return AutoModelForImageTextToText.from_pretrained(TARGET_DIR, dtype=torch.float64).eval()


def prompt() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(10, 200, (1, 12), generator=generator), "max_new_tokens": MAX_NEW_TOKENS}


@functools.cache
def expected() -> torch.Tensor:
    return toy_target().generate(**prompt(), do_sample=False)


def write_formats(folder: Path) -> list[Path]:
    """Writes a sound draft in each format; returns their folders."""
    formats = {name: folder / name for name in ("ours", "shards", "pickle", "vocabulary", "layers", "original")}
    shutil.copytree(DRAFT_DIR, formats["ours"])
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.save_pretrained(formats["shards"], max_shard_size="200KB")
    shutil.copytree(DRAFT_DIR, formats["pickle"])
    torch.save(draft.state_dict(), formats["pickle"] / "pytorch_model.bin")
    (formats["pickle"] / "model.safetensors").unlink()
    draft.set_draft_vocab(range(0, 512, 4))
    draft.save_pretrained(formats["vocabulary"])
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    layers = {"num_hidden_layers": 2, "target_layers": [0], "rope_parameters": rope}
    MSDDraftModel.from_target(toy_target(), **layers).float().save_pretrained(formats["layers"])
    _write_original(formats["original"])
    return list(formats.values())


def _write_original(folder: Path) -> None:
    draft = MSDDraftModel.from_target(toy_target(), input_layernorm=False).float()
    draft.save_pretrained(folder)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
    )
    fields = {name: getattr(draft.config, name) for name in names}
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "llava", "num_hidden_layers": 1}))
    torch.save(draft.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_case(formats: list[Path], seed: int, number: int, folder: Path) -> tuple[str, Any]:
    """Writes a damaged draft to `folder`; returns what is wrong with it, and the class that loads it. The same numbers
    give the same draft."""
    rng = random.Random(f"{seed}/{number}")
    sound = formats[number % len(formats)]
    shutil.copytree(sound, folder)
    what = draft_damage.damage(folder, rng)
    return f"{sound.name}: {what}", class_for(folder, sound, number)


def class_for(folder: Path, sound: Path, number: int) -> Any:
    """The class that loads a case. `AutoModel` reads the configuration itself, so it gets sound configurations."""
    config = folder / "config.json"
    is_sound = config.is_file() and config.read_bytes() == (sound / "config.json").read_bytes()
    return AutoModel if is_sound and sound.name != "original" and number % 2 else MSDDraftModel


def outcome_of(folder: Path, model_class: Any = MSDDraftModel) -> tuple[str, str]:
    """
    Loads a draft, and decodes with it.

    Returns:
        What happened: "identical" or the name of an error that a user may see, and the error's message.

    Raises:
        Exception: any other error.
        AssertionError: when tokens differ, code of a file was run, or an error does not say where.
    """
    try:
        draft = model_class.from_pretrained(folder)
        output = toy_target().generate(**prompt(), do_sample=False, assistant_model=draft)
    except (MSDError, OSError) as error:
        message = str(error)
        assert "\n" not in message or isinstance(error, OSError), "the error has several lines"
        assert len(message) < 4000, "the error is long"
        if type(error).__name__ == "MSDCheckpointError":
            assert folder.name in message, f"the error does not say where: {message}"
        return type(error).__name__, message
    finally:
        assert not (folder / "executed").exists(), "code of a file was run"
    assert torch.equal(output, expected()), "other tokens than those of the target"
    return IDENTICAL, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a single case, whose error is printed")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    numbers = range(args.cases) if args.only is None else [args.only]
    counts: collections.Counter[str] = collections.Counter()
    failures = 0
    slowest, largest = 0.0, 0
    expected()
    with tempfile.TemporaryDirectory(prefix="fuzz-drafts-") as work:
        formats = write_formats(Path(work, "sound"))
        for sound in formats:
            assert outcome_of(sound)[0] == IDENTICAL, sound
        for number in numbers:
            folder = Path(work, f"case-{number}", "draft")
            folder.parent.mkdir()
            what, model_class = make_case(formats, args.seed, number, folder)
            result = run_forked(functools.partial(_print_outcome, folder, model_class))
            problems = result.problems()
            slowest, largest = max(slowest, result.seconds), max(largest, result.num_bytes)
            last_error = (result.errors.strip().splitlines() or [""])[-1]
            counts[result.output.split(":")[0].strip() if not problems else f"FAILED, {problems[0]}"] += 1
            if problems:
                failures += 1
                print(f"case {number}: {what}\n    {', '.join(problems)}: {last_error[:200]}", flush=True)
            if args.only is not None:
                print(what, result.output, result.errors, sep="\n")
            shutil.rmtree(folder.parent)
    for outcome, count in counts.most_common():
        print(f"{count:5}  {outcome}")
    print(f"{len(numbers)} drafts, seed {args.seed}: {failures} failures")
    print(f"at most {slowest:.1f} s and {largest / 1e9:.2f} GB for a draft")
    sys.exit(failures > 0)


def _print_outcome(folder: Path, model_class: Any) -> None:
    print(": ".join(outcome_of(folder, model_class)))


if __name__ == "__main__":
    main()
