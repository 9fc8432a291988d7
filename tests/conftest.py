import os
import sys
from pathlib import Path


# The libraries read these variables at import, also in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"  # tests must not download anything
os.environ["OMP_NUM_THREADS"] = "1"  # the tests' models are so tiny that more threads only slow them down

import pytest
import shared_fits
from training_runs import NUM_SAMPLES, build_small_target
from transformers import AutoProcessor

from msd_hf import cli
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.dataset import ToySamples
from msd_hf.training import load_conversations


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes; their temporary folders lie side by side
        shared_fits.share_fits(Path(config.option.basetemp).parent / "fits")


@pytest.fixture(scope="session")
def toy_processor():
    return AutoProcessor.from_pretrained(TARGET_DIR)


@pytest.fixture
def small_target(toy_processor):
    return build_small_target(toy_processor)


@pytest.fixture(scope="session")
def raw_samples():
    """LLaVA-style samples of the toy world. A picture is drawn when its sample is read."""
    return {kind: ToySamples("train", NUM_SAMPLES, 0, kind) for kind in ("text", "visual")}


@pytest.fixture(scope="session")
def training_data(raw_samples):
    return {kind: load_conversations(samples) for kind, samples in raw_samples.items()}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `msd-hf ARGUMENTS`; returns exit status, standard output and standard error."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msd-hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return run_command
