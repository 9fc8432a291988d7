"""
Trains and extracts on two hosts, which are two network namespaces of this machine, and compares with one process:

    python examples/studies/two_hosts.py

The hosts have an address each, reach each other over one link, and share nothing but the disk. Each runs the command
that TRAINING.md gives. One host is then killed: the other must end by itself, and the same commands must go on. Needs
root and the command `ip` (iproute2), since it makes network namespaces, and removes them at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from msd_hf.toy import TARGET_DIR, write_dataset


HOSTS = ("msd-host-0", "msd-host-1")
LINKS = ("msd-link-0", "msd-link-1")
ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = "29511"
CONFIG = Path(__file__).parent.parent / "configs" / "cpu.yaml"
LIMIT = 900  # seconds for a command


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces with one link between them."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", LINKS[0], "netns", HOSTS[0], "type", "veth", "peer", "name", LINKS[1], "netns", HOSTS[1])
        for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", host, "link", "set", link, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, stderr=subprocess.DEVNULL)


def start(rank: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """The command of TRAINING.md on one host."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launch += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    launch += ["--main_process_ip", ADDRESSES[0], "--main_process_port", PORT, "-m", "msd_hf"]
    return subprocess.Popen(
        ["ip", "netns", "exec", HOSTS[rank], *launch, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINKS[rank]},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def kill_all(host: str) -> None:
    """Kills all processes of a host, the launcher too, as if the host had lost its power."""
    found = subprocess.run(["ip", "netns", "pids", host], check=False, capture_output=True, text=True)
    for process in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def run(arguments: list[str], logs: Path, is_time: Callable[[], bool] | None = None) -> tuple[list[int], list[str]]:
    """
    Runs a command on both hosts. Returns their exit statuses and what they printed.

    Args:
        is_time (*optional*): says when host 1 is to be killed.
    """
    files = [logs / f"host-{rank}.log" for rank in (0, 1)]
    hosts = [start(rank, arguments, file) for rank, file in enumerate(files)]
    deadline = time.monotonic() + LIMIT
    try:
        if is_time is not None:
            while not is_time() and hosts[1].poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            kill_all(HOSTS[1])
        statuses = [host.wait(max(1.0, deadline - time.monotonic())) for host in hosts]
    finally:
        for name in HOSTS:
            kill_all(name)
    return statuses, [file.read_text(errors="replace") for file in files]


def alone(arguments: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "msd_hf", *arguments], check=True, env=environment, capture_output=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(output: Path) -> list[float]:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def last_line(text: str) -> str:
    """The error that a process has printed, without what its launcher adds."""
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    return lines[-1] if lines else "(no error)"


def require(is_so: bool, what: str) -> None:
    print(f"{'ok' if is_so else 'FAILED':8}{what}", flush=True)
    if not is_so:
        raise SystemExit(1)


def make_world(folder: Path) -> None:
    """The toy target with its first three layers, and data."""
    config = AutoConfig.from_pretrained(TARGET_DIR)
    config.text_config.num_hidden_layers = 3
    AutoModelForImageTextToText.from_pretrained(TARGET_DIR, config=config).save_pretrained(folder / "target")
    AutoProcessor.from_pretrained(TARGET_DIR).save_pretrained(folder / "target")
    samples = json.loads(write_dataset(folder, "train", 80, seed=0).read_text())
    for name, has_image in (("text", False), ("visual", True)):
        chosen = [sample for sample in samples if ("image" in sample) is has_image]
        (folder / f"{name}.json").write_text(json.dumps(chosen))


def check_extraction(folder: Path) -> None:
    data = ["--target", str(folder / "target"), "--data", str(folder / "train.json"), "--samples-per-shard", "4"]
    command = ["extract", *data, "--output"]
    alone([*command, str(folder / "one")])
    statuses, printed = run([*command, str(folder / "two")], folder)
    require(statuses == [0, 0], f"extract on two hosts ends with {statuses}")
    require(contents(folder / "one") == contents(folder / "two"), "its cache has the bytes of one process's")

    cut = folder / "cut"
    statuses, printed = run([*command, str(cut)], folder, lambda: len(list(cut.glob("shard-*.json"))) >= 3)
    require(statuses[0] == 1, f"host 1 is killed, and host 0 ends with {statuses[0]}: {last_line(printed[0])}")
    left = len(list(cut.glob("shard-*.safetensors")))
    statuses, printed = run([*command, str(cut)], folder)
    require(statuses == [0, 0], f"the same command goes on after {left} shards")
    require(contents(folder / "one") == contents(cut), "the cache has the same bytes")


def check_training(folder: Path) -> None:
    data = ["--text-data", folder / "text.json", "--visual-data", folder / "visual.json", "--image-folder", folder]
    command = ["train", "--target", folder / "target", *data, "--max-steps", 16, "--save-steps", 4]
    command += ["--logging-steps", 1, "--curriculum", "mixed", "--report-to", "none", "--use-cpu", True]
    command += ["--warmup-steps", 2, "--learning-rate", 1e-3, "--resume-from-checkpoint", True]
    command = [str(word) for word in command]
    one, two, cut = (folder / f"draft-{name}" for name in ("one", "two", "cut"))
    alone([*command, "--per-device-train-batch-size", "4", "--output-dir", str(one)])
    command += ["--per-device-train-batch-size", "2", "--ddp-backend", "gloo", "--output-dir"]
    statuses, printed = run([*command, str(two)], folder)
    require(statuses == [0, 0], f"train on two hosts ends with {statuses}")
    gap = max(abs(first / second - 1) for first, second in zip(losses(one), losses(two), strict=True))
    require(gap < 1e-3, f"its losses over 16 steps are those of one process, up to a part of {gap:.1g}")

    statuses, printed = run([*command, str(cut)], folder, (cut / "checkpoint-8" / "trainer_state.json").exists)
    require(statuses[0] == 1, f"host 1 is killed, and host 0 ends with {statuses[0]}: {last_line(printed[0])}")
    statuses, printed = run([*command, str(cut)], folder)
    require(statuses == [0, 0], "the same command goes on")
    weights = [load_file(output / "model.safetensors") for output in (two, cut)]
    is_same = all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    require(is_same, "the draft has the weights of the run that was not killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("Error: this needs root and the command `ip` (iproute2), to make network namespaces.")
    with tempfile.TemporaryDirectory() as name, two_hosts():
        folder = Path(name)
        make_world(folder)
        check_extraction(folder)
        check_training(folder)


if __name__ == "__main__":
    main()
