"""
Compares seeded random calls of `generate` with the target alone: greedy and sampled, batches, settings, processors,
streamers, caches over the turns of a chat, interrupted calls and the calls after them. Tokens, streamed tokens and the
state of the random generator afterwards must be equal; targets are float64.

    python examples/studies/random_cases.py --calls 10000 --results cases.jsonl

A second run with the same file goes on where the first one has ended; `--part 0/2` and `--part 1/2` share the work of
two processes. Exit status 1 if any call differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from random_calls import Call, Company, draw_call
from record_calls import Run, trace_only


SEED = 20
COMPILED_EVERY = 50  # of so many numbers, one may be compiled


class Case(Run):
    """A call that is compared with the target alone wherever that can be asked."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.num_compared = self.num_drafted = 0
        self.differences: list[str] = []

    def ask_alone(self, output: Any, whole: dict[str, Any], options: dict[str, Any], start: torch.Tensor) -> None:
        streamed = self.company.listener
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        company = Company(self.call, raises=False)
        try:
            alone = self.target.generate(**whole, **options, **company.arguments)
        except ValueError as error:
            torch.set_rng_state(end)
            if "image tokens do not match" in str(error):  # the target has emitted some, and cannot read them anew
                return
            raise
        # Rows of a batch draw in another order; with a seed only single sequences are promised the same text.
        if len(self.call.rows) == 1 and not torch.equal(end, torch.get_rng_state()):
            self.differences.append("state of the generator")
        torch.set_rng_state(end)
        ours, theirs = (getattr(result, "sequences", result) for result in (output, alone))
        if not torch.equal(ours, theirs):
            self.differences.append(f"tokens: {theirs.tolist()} alone, {ours.tolist()} with a draft")
        if streamed and company.listener and streamed.steps() != company.listener.steps():
            self.differences.append("streamed tokens")
        self.num_compared += 1


class PlainRun(Run):
    """The same without a draft, for calls that end in an exception."""

    def generate(self, name: str, inputs: Any, cache: Any, whole: Any, draft: Any, raises: bool = True) -> Any:
        return super().generate(name, inputs, cache, None, None, raises)


def run_case(number: int) -> dict[str, Any]:
    """Runs a case and says what came of it."""
    call = draw_call(SEED, number)
    call.number = 0  # `Run` compares each call with this number
    if number % COMPILED_EVERY and call.kind != "refused":
        call.tree.pop("compile", None)  # tracing takes a hundred times as long as the call
    case = Case(call)
    start = time.perf_counter()
    case.run()
    failed = case.outcome.get("exception")
    if call.kind == "refused":
        case.differences += [] if failed else ["a call that was to be refused"]
    elif failed and failed != PlainRun(call).run().outcome.get("exception"):
        case.differences.append(f"exception: {failed}")
    is_as_plain = bool(case.differences) and call.kind == "chat" and same_tokens(case, PlainRun(call).run())
    return {
        "number": number,
        "kind": call.kind,
        "sampled": bool(call.options["do_sample"]),
        "rows": len(call.rows),
        "compared": case.num_compared,
        # A chat without a draft can also differ from a target that reads the whole text anew: after the target has
        # emitted the token of padding, the mask of the text hides it.
        "differences": [] if is_as_plain else case.differences,
        "as_plain_chat": is_as_plain,
        "emitted": case.emitted,
        "rounds": case.rounds,
        "seconds": round(time.perf_counter() - start, 3),
    }


def same_tokens(case: Run, plain: Run) -> bool:
    """Whether all turns have the tokens of the turns without a draft."""
    names = [name for name in case.outcome if name.endswith(": sequences")]
    return all(torch.equal(case.outcome[name], plain.outcome[name]) for name in names)


def print_summary(results: list[dict[str, Any]]) -> None:
    kinds = collections.Counter(result["kind"] for result in results)
    for kind in sorted(kinds):
        chosen = [result for result in results if result["kind"] == kind]
        compared, failed = sum(result["compared"] for result in chosen), sum(bool(r["differences"]) for r in chosen)
        print(f"{kind:10} {len(chosen):6} calls, {compared:6} compared with the target alone, {failed} differ")
    emitted, rounds = sum(result["emitted"] for result in results), sum(result["rounds"] for result in results)
    sampled, batches = sum(result["sampled"] for result in results), sum(result["rows"] > 1 for result in results)
    print(f"{sampled} sampled, {batches} batches; mean acceptance length {emitted / max(rounds, 1):.2f}")
    print(f"{sum(result['seconds'] for result in results) / 60:.0f} minutes")
    as_plain = [result["number"] for result in results if result.get("as_plain_chat")]
    print(f"other tokens than the whole text read anew, with and without a draft: calls {as_plain}")
    for result in results:
        for difference in result["differences"]:
            print(f"call {result['number']} ({result['kind']}): {difference}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=Path("cases.jsonl"))
    parser.add_argument("--part", default="0/1", help="Every so manieth call of all.")
    arguments = parser.parse_args()
    part, num_parts = map(int, arguments.part.split("/"))
    trace_only()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    arguments.results.touch()
    results = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    done = {result["number"] for result in results}
    with arguments.results.open("a", encoding="utf-8") as file:
        for number in range(part, arguments.calls, num_parts):
            if number not in done:
                results.append(run_case(number))
                file.write(json.dumps(results[-1]) + "\n")
                file.flush()
    print_summary(results)
    sys.exit(any(result["differences"] for result in results))


if __name__ == "__main__":
    main()
