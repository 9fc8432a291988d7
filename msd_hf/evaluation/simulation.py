"""Rounds of the decoding loop with an assumed acceptance.

No candidate of a draft with random weights is accepted, so such a draft cannot show the gain of a good one. Here the
loop runs as it is, but the logits of each verification are changed so that the target "chooses" a path of the assumed
length. The tokens mean nothing; only the time counts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDError
from ..observer import observing
from ..tree.candidate import CandidateTree
from ..tree.settings import TreeSettings
from .intercepted_loop import LoopEnd
from .timed_run import synchronize


FIRST_ROUNDS = 2  # rounds at the beginning of a call that are left out: compiled rounds are recorded there


@dataclass(frozen=True)
class SimulatedRounds:
    """
    The time of simulated rounds, and the tokens that they emitted.

    Args:
        seconds (`float`): seconds of all rounds together.
        lengths (`Sequence[int]`): tokens that each round emitted: the wanted length, or the longest path of the tree.
        first_seconds (`float`): seconds of the first rounds of the call, which `seconds` leaves out.
    """

    seconds: float
    lengths: Sequence[int]
    first_seconds: float

    @property
    def tau(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def seconds_per_round(self) -> float:
        return self.seconds / len(self.lengths)


def lengths_of_mean(mean: float, num_rounds: int) -> list[int]:
    """`num_rounds` integers next to `mean`, in an order that keeps their running mean near `mean`."""
    totals = [math.floor(mean * number + 0.5) for number in range(num_rounds + 1)]
    return [after - before for before, after in itertools.pairwise(totals)]


def check_assumed_length(mean: float, settings: TreeSettings) -> None:
    """
    Refuses an acceptance that no tree of these settings can reach.

    Raises:
        MSDError: when `mean` cannot be reached; the message says which range is possible.
    """
    most = min(settings.num_nodes, settings.depth + 2)
    if not 1 <= mean <= most:
        raise MSDError(f"--assume-tau {mean} is not possible: with this tree tau lies between 1 and {most}.")


def simulated_rounds(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    lengths: Sequence[int],
    on_start: Callable[[], None] = lambda: None,
) -> SimulatedRounds:
    """
    Runs and times one round for each of `lengths`, after [`FIRST_ROUNDS`] rounds that are left out. A round lasts from
    the end of one verification to the end of the next.

    Args:
        target (`PreTrainedModel`): must not end an answer by itself.
        draft (`MSDDraftModel`): its `generation_config` sets the size of the tree.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        lengths (`Sequence[int]`): tokens that each round should emit.
        on_start (`Callable`): called when the first rounds are over and the clock starts.
    """
    emitted: list[torch.Tensor] = []
    clock: list[float] = []
    wanted = [*[lengths[0]] * FIRST_ROUNDS, *lengths]

    def on_logits(tree: CandidateTree, logits: torch.Tensor) -> None:
        number = len(emitted)
        if number in (0, FIRST_ROUNDS, len(wanted)):
            synchronize(target)
            clock.append(time.perf_counter())
            if number == FIRST_ROUNDS:
                on_start()
            elif number:
                raise LoopEnd
        emitted.append(steer(logits, tree, wanted[number]))

    room = sum(wanted) + 2 * TreeSettings.from_generation_config(draft.generation_config).depth + 4
    with torch.no_grad(), suppress(LoopEnd), observing(on_logits=on_logits):
        target.generate(**inputs, max_new_tokens=room, do_sample=False, assistant_model=draft)
    first, started, ended = clock
    return SimulatedRounds(ended - started, torch.stack(emitted[FIRST_ROUNDS:]).tolist(), started - first)


def steer(logits: torch.Tensor, tree: CandidateTree, length: int) -> torch.Tensor:
    """
    Changes logits in place so that the argmax follows a path of the tree and leaves it after `length` nodes, the root
    included, or at the end of the deepest path. Reads nothing back from the device.

    Args:
        logits (`torch.Tensor` of shape `[1, N, V]`): the target's logits at the nodes.
        tree (`CandidateTree`): a batch of one tree.
        length (`int`): tokens to emit.

    Returns:
        `torch.LongTensor` of shape `[]`: tokens that will be emitted.
    """
    depths = tree.depths[0].clamp(max=length - 1)
    # The first node of the deepest wanted level; the path consists of that node and its ancestors.
    end = (depths * depths.shape[0] - torch.arange(depths.shape[0], device=depths.device)).argmax()
    on_path = tree.ancestors[0].index_select(0, end.unsqueeze(0))[0]
    tokens, parents = tree.tokens[0], tree.parents[0]
    # A child on the path wins over every token, a child beside it over none.
    values = torch.where(on_path, 1e4, -1e4)
    logits[0, parents[1:], tokens[1:]] = values[1:].to(logits.dtype)
    return on_path.sum()


__all__ = ["FIRST_ROUNDS", "SimulatedRounds", "check_assumed_length", "lengths_of_mean", "simulated_rounds", "steer"]
