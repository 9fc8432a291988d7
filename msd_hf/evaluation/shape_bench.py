"""Measures the cost of a round at the sizes of a published model, against one step of `generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..decoders import decoder_of, head_of
from ..draft.modeling_msd import MSDDraftModel
from ..tree.settings import TreeSettings
from .clock import synchronize
from .intercepted_loop import compilation
from .memory import PeakMemory
from .metrics import spread
from .phase_timer import PhaseTimer
from .round_timing import RoundTiming
from .simulation import SimulatedRounds, check_assumed_length, lengths_of_mean, simulated_rounds
from .summary import summarize_rounds
from .timed_run import timed_generate
from .verification_cost import verification_seconds


EAGER = "eager"
COMPILED = "compiled"


def bench_shape(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    assumed_taus: Sequence[float],
    nodes: Sequence[int] = (),
    num_rounds: int = 16,
    repeats: int = 5,
    compile: bool = False,
) -> dict[str, Any]:
    """
    Measures steps of `generate`, simulated rounds and verifications in turns.

    Args:
        target, draft: a pair of [`build_pair`].
        inputs: inputs of `generate` for one prompt.
        assumed_taus: mean numbers of tokens that a simulated round emits. Each of them is measured.
        nodes: sizes of the trees whose verification is timed.
        num_rounds: number of rounds, and of steps of `generate`, in each measurement.
        repeats: measurements of each kind.
        compile: whether to measure compiled rounds too.

    Returns:
        Figures, ready for JSON. Figures that depend on the assumed acceptance have "simulated" in their names.

    Raises:
        MSDError: when the tree is too small for one of the taus.
    """
    settings = TreeSettings.from_generation_config(draft.generation_config)
    for tau in assumed_taus:
        check_assumed_length(tau, settings)
    ways = [EAGER, COMPILED] if compile else [EAGER]
    rounds: dict[tuple[str, float], list[SimulatedRounds]] = {(way, tau): [] for way in ways for tau in assumed_taus}
    steps: list[float] = []
    verifications: dict[int, list[float]] = {number: [] for number in nodes}
    arguments: dict[str, Any] = {"max_new_tokens": num_rounds + 1, "do_sample": False}

    def simulate(way: str, tau: float, **options: Any) -> SimulatedRounds:
        with compilation(draft, way == COMPILED):
            return simulated_rounds(target, draft, inputs, lengths_of_mean(tau, num_rounds), **options)

    timed_generate(target, inputs, **arguments)
    with PeakMemory(target.device) as memory:
        timed_generate(target, inputs, **arguments)
    peaks = {"alone": memory.num_bytes}
    for way in ways:
        simulate(way, max(assumed_taus))  # the first call compiles
        with PeakMemory(target.device) as memory:
            simulate(way, assumed_taus[0])
        peaks[f"with the draft, {way}"] = memory.num_bytes
    for _ in tqdm(range(repeats), desc="rounds", leave=False):
        steps.append(timed_generate(target, inputs, **arguments).decode_seconds / num_rounds)
        for (way, tau), simulated in rounds.items():
            simulated.append(simulate(way, tau))
        if nodes:
            for number, seconds in verification_seconds(target, draft, inputs, nodes, repeats=3).items():
                verifications[number].append(statistics.median(seconds))
    timings = {}
    for way in ways:
        with PhaseTimer(target.device) as timer:
            simulate(way, assumed_taus[0], on_start=timer.clear)
        timings[way] = RoundTiming.from_phases(timer.inside("decode"), num_rounds)

    bandwidth = memory_bandwidth(target.device)
    floor = bytes_read_per_step(target, inputs["input_ids"].shape[1]) / bandwidth
    return {
        "step_milliseconds": asdict(spread(1e3 * step for step in steps)),
        "tokens_per_second": 1 / statistics.median(steps),
        "rounds": [_summarize(way, simulated, steps) for (way, _), simulated in rounds.items()],
        "round": {way: summarize_rounds(timing) for way, timing in timings.items()},
        "verification": [
            {
                "nodes": number,
                "milliseconds": 1e3 * statistics.median(seconds),
                "steps": statistics.median(s / step for s, step in zip(seconds, steps, strict=True)),
            }
            for number, seconds in verifications.items()
        ],
        "bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "share_of_bandwidth": {
            "step": floor / statistics.median(steps),
            **{
                f"target forward of a round, {way}": floor / (timing.seconds["target forward"] / num_rounds)
                for way, timing in timings.items()
            },
        },
        "peak_memory_bytes": peaks,
    }


def _summarize(way: str, simulated: Sequence[SimulatedRounds], steps: Sequence[float]) -> dict[str, Any]:
    """Figures of one kind of rounds. `steps` are the seconds of a step of `generate`, measured in the same turns."""
    seconds = [measured.seconds_per_round for measured in simulated]
    lengths = [length for measured in simulated for length in measured.lengths]
    tau = sum(lengths) / len(lengths)
    costs = [round_ / step for round_, step in zip(seconds, steps, strict=True)]
    return {
        "way": way,
        "simulated_tau": tau,
        "milliseconds": asdict(spread(1e3 * value for value in seconds)),
        "first_rounds_milliseconds": 1e3 * statistics.median(measured.first_seconds for measured in simulated),
        "cost_in_steps": asdict(spread(costs)),
        "simulated_tokens_per_second": tau / statistics.median(seconds),
        "simulated_decode_speedup": asdict(spread(tau / cost for cost in costs)),
    }


def bytes_read_per_step(target: PreTrainedModel, context: int) -> int:
    """Bytes that a forward of one token must read: weights of decoder and head, keys and values."""
    decoder = decoder_of(target)
    embedding = target.get_input_embeddings()
    head = head_of(target)
    weights = {parameter for module in (decoder, head) for parameter in module.parameters()}
    if head.weight is not embedding.weight:
        weights -= set(embedding.parameters())
    config = target.config.get_text_config(decoder=True)
    return sum(weight.numel() * weight.element_size() for weight in weights) + context * slot_bytes(
        config, target.dtype
    )


def slot_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, in all layers of a decoder."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def memory_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Memory bandwidth in bytes/s: bytes read and written in the fastest of several copies of a large tensor."""
    if num_bytes is None:
        num_bytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / min(seconds)


__all__ = ["COMPILED", "EAGER", "bench_shape", "bytes_read_per_step", "memory_bandwidth", "slot_bytes"]
