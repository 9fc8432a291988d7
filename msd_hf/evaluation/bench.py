"""Runs all methods of decoding on all prompts of a benchmark. A report is made from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDError
from ..processes.group import ALONE, Processes
from .bench_prompts import BenchPrompt
from .comparison import Comparison, compare
from .differences import Difference, describe_difference, first_difference
from .methods import Method, check_methods
from .observation import observe
from .prompt_result import NAMELESS, PromptResult
from .timed_run import timed_generate


if TYPE_CHECKING:
    from .bench_journal import BenchJournal


WARM_UP_TOKENS = 16


@dataclass
class BenchResult:
    """
    The results of a benchmark.

    Args:
        methods: the methods that were compared.
        prompts: the results of each prompt that was kept.
        num_short: number of prompts that were left out because their answer was too short.
    """

    methods: Sequence[Method]
    prompts: list[PromptResult] = field(default_factory=list)
    num_short: int = 0


def run_bench(
    target: PreTrainedModel,
    draft: MSDDraftModel | None,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    repeats: int = 3,
    min_answer_tokens: int = 1,
    seed: int | None = None,
    processes: Processes = ALONE,
    journal: BenchJournal | None = None,
    **generate_arguments: Any,
) -> BenchResult:
    """
    Runs every method on every prompt, in turns, with a progress bar.

    Args:
        target: the target.
        draft (*optional*): the draft, on the target's device and in its dtype.
        prompts: the prompts.
        methods: the methods. `generate` alone must be among them.
        repeats: timed runs of each method on each prompt.
        min_answer_tokens: prompts that the target answers in fewer tokens are left out.
        seed (*optional*): seed that is set before each run.
        processes: the processes that share the prompts, [`~msd_hf.processes.group.launched`]. All of them make this
            call, and get the results of all prompts.
        journal (*optional*): has the results of an earlier run that was killed, and keeps those of this one.
        generate_arguments: arguments of `generate`; `max_new_tokens` is required.

    Raises:
        MSDError: when no answer is long enough; see also [`check_methods`].
    """
    check_methods(methods, target, generate_arguments)
    arguments: dict[str, Any] = {"seed": seed, **generate_arguments}
    own = {} if journal is None else journal.results()
    numbers = [number for number in processes.share(range(len(prompts))) if number not in own]
    is_warm = False
    bar = {"desc": "benchmark", "unit": "run", "leave": False, "disable": not processes.is_first}
    with tqdm(total=len(numbers) * len(methods), **bar) as progress:
        for number in numbers:
            inputs = prompts[number].make_inputs().to(target.device, dtype=target.dtype)
            if not is_warm:
                is_warm = True
                short = {**arguments, "max_new_tokens": min(WARM_UP_TOKENS, arguments["max_new_tokens"])}
                compare(target, draft, inputs, 1, methods=methods, **short)
            own[number] = None
            if min_answer_tokens > 1:
                answer = timed_generate(target, inputs, **arguments)
                if len(answer.tokens) < min_answer_tokens:
                    progress.update(len(methods))
                    if journal is not None:
                        journal.add(number, None)
                    continue
            for method in methods:
                if method.is_compiled:
                    timed_generate(target, inputs, draft, method, **arguments)
            comparison = compare(target, draft, inputs, repeats, methods=methods, **arguments)
            observations = {}
            for method in methods:
                observations[method.name] = observe(target, inputs, draft, method, **arguments)
                progress.update()
            result = own[number] = PromptResult(
                NAMELESS,
                inputs["input_ids"].shape[1],
                comparison,
                observations,
                _differences(target, inputs, comparison, generate_arguments),
            )
            if journal is not None:
                journal.add(number, result)
    return _joined(methods, prompts, processes.gather(own), min_answer_tokens)


def _joined(
    methods: Sequence[Method],
    prompts: Sequence[BenchPrompt],
    shares: Sequence[Mapping[int, PromptResult | None]],
    min_answer_tokens: int,
) -> BenchResult:
    """The results of all processes, in the order of the prompts."""
    results = dict(sorted(item for share in shares for item in share.items()))
    kept = [replace(result, prompt=prompts[number]) for number, result in results.items() if result is not None]
    if not kept:
        raise MSDError(f"None of {len(prompts)} answers has {min_answer_tokens} tokens or more.")
    return BenchResult(methods, kept, len(results) - len(kept))


def _differences(
    target: PreTrainedModel, inputs: Mapping[str, Any], comparison: Comparison, arguments: Mapping[str, Any]
) -> dict[str, Difference]:
    expected = comparison.vanilla[0].tokens
    differences = {}
    for name, runs in comparison.runs.items():
        positions = (first_difference(expected, run.tokens) for run in runs)
        position = next((position for position in positions if position is not None), None)
        if position is None:
            continue
        if arguments.get("do_sample"):
            # With sampling, the two largest logits say nothing about a difference, so they are not measured.
            differences[name] = Difference(position, float("nan"), float("nan"))
        else:
            differences[name] = describe_difference(target, inputs, position, **arguments)
    return differences


__all__ = ["BenchResult", "run_bench"]
