"""
Compares random calls on targets with recurrent or convolutional layers with the target alone: greedy and sampled with
one seed, batches, pictures, caches that are returned and used again. Models are float32.

    python examples/studies/recurrent_cases.py --cases 200
    python examples/studies/recurrent_cases.py --cases 200 --without-states     # the control: must fail

Where tokens differ, the logits before the first different token are compared too: the same text leads to them in both
runs, so they may differ by rounding only. A difference with equal logits is a tie that rounding has decided; any other
is a fault. Exit status 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from typing import Any

import torch
import transformers
from tiny_pairs import RECURRENT_CONFIGS, TEXT_ONLY, draft, prompt, target
from transformers import set_seed

from msd_hf.compat import CACHE_NAME
from msd_hf.recurrent.layer import RecurrentLayer


SEED = 21
ROUNDING = 1e-3  # logits are about 10


class Case:
    """One random call, or two that share a cache, from its number alone."""

    def __init__(self, family: str, number: int):
        rng = random.Random(f"{SEED} {family} {number}")
        generator = torch.Generator().manual_seed(rng.randrange(10**9))
        weights = rng.randrange(2)
        self.target, self.draft = (
            target(family, weights, torch.float32),
            draft(family, weights, "plain", torch.float32),
        )
        most = 0 if family in TEXT_ONLY or rng.random() < 0.3 else 2
        num_rows = rng.choices([1, 2, 3, 4], [5, 2, 2, 1])[0]
        rows = [(rng.randint(1, 14), rng.randint(min(most, 1), most)) for _ in range(num_rows)]
        self.inputs = {
            name: value.float() if value.is_floating_point() else value
            for name, value in prompt(family, rows, generator).items()
        }
        self.options: dict[str, Any] = {"max_new_tokens": rng.randint(3, 40), "do_sample": rng.random() < 0.5}
        if self.options["do_sample"]:
            self.options |= {"temperature": rng.choice([0.5, 1.0]), "top_k": rng.choice([0, 20])}
        if rng.random() < 0.3:
            self.options["eos_token_id"] = rng.randrange(3, 75)
        self.tree = {
            "num_assistant_tokens": rng.choice([1, 2, 8, 24, 40]),
            "tree_depth": rng.randint(1, 7),
            "tree_top_k": rng.randint(1, 8),
        }
        self.goes_on = num_rows == 1 and rng.random() < 0.4
        self.seed = rng.randrange(10**6)
        self.num_tokens = self.num_rounds = 0

    def run(self) -> list[str]:
        """Runs the case and returns its faults."""
        settings = self.draft.generation_config
        for name, value in self.tree.items():
            setattr(settings, name, value)
        alone, drafted = self._both(self.inputs, {}, {})
        faults = self._compared(alone, drafted)
        if self.goes_on and not faults and torch.equal(alone.sequences, drafted.sequences):
            ids = torch.cat([alone.sequences, torch.tensor([[9, 5]])], dim=1)
            others = {name: value for name, value in self.inputs.items() if name == "mm_token_type_ids"}
            if others:
                (types,) = others.values()
                others = {"mm_token_type_ids": torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))}
            caches = ({CACHE_NAME: output[CACHE_NAME]} for output in (alone, drafted))
            faults += self._compared(*self._both({"input_ids": ids, **others}, *caches))
        return faults

    def _both(self, inputs: dict[str, Any], cache_alone: dict[str, Any], cache_drafted: dict[str, Any]) -> tuple:
        flags = {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for arguments in ({**cache_alone}, {**cache_drafted, "assistant_model": self.draft}):
            set_seed(self.seed)
            outputs.append(self.target.generate(**inputs, **self.options, **flags, **arguments))
        lengths = [length for row in outputs[1].acceptance_lengths for length in row]
        self.num_tokens, self.num_rounds = self.num_tokens + sum(lengths), self.num_rounds + len(lengths)
        return tuple(outputs)

    def _compared(self, alone: Any, drafted: Any) -> list[str]:
        if alone.sequences.shape == drafted.sequences.shape and torch.equal(alone.sequences, drafted.sequences):
            return []
        new = len(alone.logits)
        expected, got = (
            alone.sequences[:, -new:],
            drafted.sequences[:, drafted.sequences.shape[1] - len(drafted.logits) :],
        )
        steps = min(expected.shape[1], got.shape[1])
        differ = (expected[:, :steps] != got[:, :steps]).any(0).nonzero()
        first = int(differ[0]) if len(differ) else steps - 1
        # Sampled rows of a batch are drawn together, so rows after the first different one say nothing.
        row = int((expected[:, first] != got[:, first]).nonzero()[0]) if len(differ) else 0
        rounding = float((alone.logits[first][row] - drafted.logits[first][row]).abs().max())
        if rounding < ROUNDING:
            print(f"    token {first} of row {row} differs, logits before it by {rounding:.1e}: a tie")
            return []
        return [f"token {first} of row {row} differs, logits before it by {rounding:.2g}"]


def leave_states(self: RecurrentLayer, *args: Any) -> None:
    """Takes the place of `RecurrentLayer.advance` in the control."""
    self.drop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="Cases for each family.")
    parser.add_argument("--families", nargs="+", default=list(RECURRENT_CONFIGS))
    parser.add_argument("--without-states", action="store_true", help="The control: states stay behind the tree.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if arguments.without_states:
        RecurrentLayer.advance = leave_states  # type: ignore[method-assign]
    failed = 0
    for family in arguments.families:
        start, faults, tokens, rounds, kinds = time.perf_counter(), 0, 0, 0, [0, 0, 0]
        for number in range(arguments.cases):
            case = Case(family, number)
            found = case.run()
            faults += bool(found)
            if found and not arguments.without_states:
                print(f"  {family} {number}: {'; '.join(found)}")
            tokens, rounds = tokens + case.num_tokens, rounds + case.num_rounds
            single = len(case.inputs["input_ids"]) == 1
            kinds = [kinds[0] + case.options["do_sample"], kinds[1] + (not single), kinds[2] + case.goes_on]
        sampled, batches, continued = kinds
        print(
            f"{family:12} {arguments.cases} cases ({sampled} sampled, {batches} batches, {continued} go on with the "
            f"cache): {faults} faults, {tokens / rounds:.2f} tokens a round, {time.perf_counter() - start:.0f} s"
        )
        failed += faults
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
