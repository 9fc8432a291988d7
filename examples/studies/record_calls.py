"""
Records what seeded random calls of `generate` give, and compares a later run with the recording: a change of the
package that is to change nothing is right if all calls are as recorded.

    python examples/studies/record_calls.py record calls.pt
    python examples/studies/record_calls.py compare calls.pt

Calls, tiny models and prompts follow from seed and number alone. Only public names of the package are used, so that
the script itself stays as it is. A recording holds for the machine and the versions that it was made with.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import tiny_pairs
import torch
import transformers
from random_calls import Call, Company, draw_call
from tiny_pairs import PAD, TEXT
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from msd_hf import MSDDraftModel


CACHE_NAME = ALL_CACHE_NAMES[0]  # `cache` from transformers 5.24 on, `past_key_values` before
TOLERANCE = 1e-9  # of the largest value of a tensor
ALONE_EVERY = 5  # of so many calls, one is compared with the target alone


# Running a call


class Run:
    """One call, and in `outcome` all that came of it."""

    def __init__(self, call: Call):
        self.call = call
        self.target = tiny_pairs.target(call.family, call.weights)
        self.draft = tiny_pairs.draft(call.family, call.weights, call.draft)
        self.outcome: dict[str, Any] = {"description": json.dumps(asdict(call))}
        self.emitted = self.rounds = 0
        self.alone: list[bool] = []

    def run(self) -> "Run":
        call, target, draft = self.call, self.target, self.draft
        target.set_attn_implementation(call.attention)
        settings = draft.generation_config
        draft.generation_config = copy.deepcopy(settings)
        for name, value in call.tree.items():
            setattr(draft.generation_config, name, value)
        draft.train(call.training)
        before = _state(target, draft)
        torch.manual_seed(call.seed)
        inputs = tiny_pairs.prompt(call.family, call.rows, torch.Generator().manual_seed(call.seed))
        with self.noting_errors("exception"):
            {"chat": self.chat, "error": self.cut, "interrupt": self.cut}.get(call.kind, self.plain)(inputs)
        if not call.is_timed:
            self.outcome["random"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        after = _state(target, draft)
        self.outcome["changed"] = json.dumps({name: after.get(name) for name in after if after[name] != before[name]})
        draft.generation_config = settings
        draft.eval()
        return self

    @contextlib.contextmanager
    def noting_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not error.args:
                raise  # of the user's own
            self.outcome[name] = f"{type(error).__name__}: {error}"

    # Kinds of calls

    def plain(self, inputs: dict[str, Any]) -> None:
        if self.call.kind == "embeds":
            inputs = {"inputs_embeds": self.embeddings(inputs), "attention_mask": inputs["attention_mask"]}
        self.generate("call", inputs, self.new_cache(), inputs, self.draft)

    def chat(self, inputs: dict[str, Any]) -> None:
        rng = random.Random(self.call.seed)
        cache, whole = self.new_cache(), inputs
        for turn, change in enumerate(["first", *self.call.turns]):
            draft = copy.deepcopy(self.draft) if change == "other draft" else self.draft
            asked = whole if change != "new tokens" else None
            output = self.generate(f"turn {turn}", inputs, cache, asked, None if change == "plain turn" else draft)
            if turn == len(self.call.turns):
                break
            ids, cache = self.between(turn, output, whole)
            question = torch.tensor([[rng.choice(TEXT) for _ in range(3)] for _ in ids])
            ids = torch.cat([ids, question], dim=1)
            if self.call.turns[turn] == "new tokens":
                mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
                inputs = {"input_ids": ids, "attention_mask": mask, **tiny_pairs.token_types(self.call.family, ids)}
            else:
                inputs = self.with_history(whole, ids)
                whole = {**whole, **inputs}

    def between(self, turn: int, output: Any, whole: dict[str, Any]) -> tuple[torch.Tensor, DynamicCache]:
        """What the next turn of a chat goes on with."""
        ids, cache, change = output.sequences, output[CACHE_NAME], self.call.turns[turn]
        if change == "new tokens":
            ids = ids[:, -1:]
        elif change == "other end":
            ids[:, -1] = 3
        elif change == "crop":
            cache.crop(-min(5, ids.shape[1] - whole["input_ids"].shape[1]))
            ids = ids[:, : cache.get_seq_length()]
        elif change == "fork":
            fork = copy.deepcopy(cache)
            more = torch.cat([ids, ids.new_full((len(ids), 2), 9)], dim=1)
            self.generate(f"fork {turn}", self.with_history(whole, more), cache, None, self.draft)
            cache = fork
        return ids, cache

    def cut(self, inputs: dict[str, Any]) -> None:
        """A call that is interrupted, and another one with its cache."""
        cache, prompt = self.new_cache(), inputs["input_ids"]
        with self.noting_errors("interruption"):
            self.generate("call", inputs, cache, None, self.draft)
        self.outcome |= self.shown_cache("interrupted", cache)
        steps = torch.tensor(self.company.listener.steps(), dtype=torch.long).reshape(-1, len(prompt))
        ids = torch.cat([prompt, steps.T], dim=1)
        slots = cache.get_seq_length()
        if slots > ids.shape[1]:
            cache.crop(ids.shape[1])
        again = self.with_history(inputs, torch.cat([ids, torch.full((len(ids), 3), 7)], dim=1))
        whole = {**inputs, **again}
        self.generate("again", again if slots else whole, cache, whole, self.draft, raises=False)

    # Parts of them

    def new_cache(self) -> DynamicCache | None:
        kinds = {"empty": DynamicCache, "config": lambda: DynamicCache(config=self.target.config), None: lambda: None}
        return kinds[self.call.cache]()

    def embeddings(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the decoder reads of a prompt."""
        seen: list[dict[str, Any]] = []
        decoder = self.target.get_decoder()
        handle = decoder.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
        self.target(**inputs)
        handle.remove()
        embeds = seen[0].get("inputs_embeds")
        return self.target.get_input_embeddings()(inputs["input_ids"]).detach() if embeds is None else embeds.detach()

    def with_history(self, inputs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
        """Inputs for a conversation that has gone on; rows that ended early have padding in it."""
        mask = inputs["attention_mask"][:, : ids.shape[1]]
        mask = torch.cat([mask, (ids[:, mask.shape[1] :] != PAD).long()], dim=1)
        return {"input_ids": ids, "attention_mask": mask, **tiny_pairs.token_types(self.call.family, ids)}

    def generate(
        self,
        name: str,
        inputs: dict[str, Any],
        cache: DynamicCache | None,
        whole: dict[str, Any] | None,
        draft: MSDDraftModel | None,
        raises: bool = True,
    ) -> Any:
        """One call of `generate`, noted under a name; `whole` is what the target alone is given, if it is asked."""
        self.company = company = Company(self.call, raises)
        start = torch.get_rng_state()
        if self.call.family == "PaliGemma" and cache is not None and cache.get_seq_length():
            whole = None  # it reads a whole prompt in both directions, and so another past
        past = {} if cache is None else {CACHE_NAME: cache}
        options = {**self.call.options, "pad_token_id": PAD}
        try:
            with company.hook(self.target):
                output = self.target.generate(**inputs, **past, **options, **company.arguments, assistant_model=draft)
        finally:
            if not self.call.is_timed:
                events = company.listener.events if company.listener else None
                self.outcome[f"{name}: streamed"] = json.dumps(events)
                self.outcome[f"{name}: asked"] = json.dumps({kind: stop.calls for kind, stop in company.stops.items()})
        self.note(name, output, cache)
        if whole is not None and self.call.number % ALONE_EVERY == 0 and draft is not None:
            self.ask_alone(output, whole, options, start)
        return output

    def ask_alone(self, output: Any, whole: dict[str, Any], options: dict[str, Any], start: torch.Tensor) -> None:
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        alone = self.target.generate(**whole, **options, **Company(self.call, raises=False).arguments)
        torch.set_rng_state(end)
        sequences = [getattr(result, "sequences", result).tolist() for result in (output, alone)]
        self.alone.append(sequences[0] == sequences[1])

    # What is noted

    def note(self, name: str, output: Any, cache: DynamicCache | None) -> None:
        self.outcome[f"{name}: sequences"] = getattr(output, "sequences", output).clone()
        if self.call.is_timed:
            return
        if isinstance(output, dict):
            cache = output[CACHE_NAME]
            self.outcome[f"{name}: fields"] = json.dumps(sorted(output))
            for part in ("scores", "logits", "hidden_states", "attentions"):
                self.outcome |= _packed(f"{name}: {part}", output.get(part))
            lengths = output.get("acceptance_lengths")
            self.outcome[f"{name}: acceptance_lengths"] = json.dumps(lengths)
            self.emitted += sum(map(sum, lengths or []))
            self.rounds += sum(map(len, lengths or []))
        if cache is not None:
            self.outcome |= self.shown_cache(name, cache)

    def shown_cache(self, name: str, cache: DynamicCache) -> dict[str, Any]:
        layers = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
        return {f"{name}: slots": cache.get_seq_length(), **_packed(f"{name}: cache", layers)}


def _packed(name: str, nested: Any) -> dict[str, Any]:
    """Nested tuples of tensors as one tensor of all values, and their shapes as text."""
    values: list[torch.Tensor] = []

    def shapes(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            values.append(part.detach().double().flatten())
            return f"{part.dtype} {list(part.shape)}"
        return part if part is None else [shapes(inner) for inner in part]

    packed = {f"{name} (shapes)": json.dumps(shapes(nested))}
    return {**packed, name: torch.cat(values)} if values else packed


def _state(target: Any, draft: Any) -> dict[str, Any]:
    """What a call has to leave as it was."""
    state: dict[str, Any] = {"settings": str(draft.generation_config.to_dict())}
    for kind, model in (("target", target), ("draft", draft)):
        for name, module in model.named_modules():
            own = vars(module)
            hooks = [len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), "forward" in own]
            state[f"{kind}.{name}"] = [module.training, *hooks, len(own["_buffers"])]
            if hasattr(module, "config"):
                state[f"{kind}.{name}"].append(module.config._attn_implementation)
    return state


# Recordings


def run_calls(seed: int, numbers: list[int]) -> list[Run]:
    """Runs calls, and says what they are good for."""
    trace_only()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    runs = []
    for number in numbers:
        runs.append(Run(draw_call(seed, number)).run())
        if sys.stderr.isatty():
            print(f"\r{len(runs)} of {len(numbers)}", end="", file=sys.stderr)
    alone = [same for run in runs for same in run.alone]
    failed = sum("exception" in run.outcome for run in runs)
    emitted, rounds = (sum(getattr(run, name) for run in runs) for name in ("emitted", "rounds"))
    print(f"identical to the target alone: {sum(alone)} of {len(alone)}")
    others = [run.call.number for run in runs if not all(run.alone)]
    if others:
        print(f"not identical to it: calls {others}")
    print(f"ended in an exception, interruptions apart: {failed} of {len(runs)}")
    print(f"mean acceptance length: {emitted / max(rounds, 1):.2f}")
    return runs


def trace_only() -> None:
    """Lets `torch.compile` trace and run as it is: kernels for a CPU take long to build."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "msd_hf"]
    found = [module for module in modules if hasattr(module, "BACKEND")]
    if not found:
        raise SystemExit("No module of msd_hf has a global `BACKEND`: say here how to compile without inductor.")
    for module in found:
        module.BACKEND = "eager"  # type: ignore[attr-defined]


class Comparison:
    """Compares outcomes, and counts the tensors that are equal to the last bit."""

    def __init__(self) -> None:
        self.num_tensors = self.num_equal = 0

    def differences(self, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
        """What differs between two outcomes."""
        lines = []
        for name in [*old, *(name for name in new if name not in old)]:
            if name not in old or name not in new:
                lines.append(f"{name}: only {'now' if name in new else 'recorded'}")
            elif isinstance(old[name], torch.Tensor):
                lines += self._tensors(name, old[name], new[name])
            elif old[name] != new[name]:
                lines.append(f"{name}: {_first_difference(str(old[name]), str(new[name]))}")
        return lines

    def _tensors(self, name: str, old: torch.Tensor, new: torch.Tensor) -> list[str]:
        if old.shape != new.shape or old.dtype != new.dtype:
            return [f"{name}: {old.dtype} {list(old.shape)} was recorded, now {new.dtype} {list(new.shape)}"]
        if not old.is_floating_point():
            return [] if torch.equal(old, new) else [f"{name}: {int((old != new).sum())} of {old.numel()} differ"]
        self.num_tensors += 1
        self.num_equal += bool(torch.equal(old.view(torch.int64), new.view(torch.int64)))
        finite = old.isfinite()
        if not torch.equal(finite, new.isfinite()) or not torch.equal(
            old[~finite].nan_to_num(), new[~finite].nan_to_num()
        ):
            return [f"{name}: other infinite values"]
        old, new = old[finite], new[finite]
        if not len(old):
            return []
        largest, off = float(old.abs().max()), float((old - new).abs().max())
        return [f"{name}: off by {off:.1e}, the largest is {largest:.1e}"] if off > TOLERANCE * largest else []


def _first_difference(old: str, new: str) -> str:
    pairs = zip(old, new, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(old), len(new)))
    shown = slice(max(0, place - 20), place + 60)
    return f"{old[shown]!r} was recorded, now {new[shown]!r}"


def record(path: str, seed: int, numbers: list[int]) -> None:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    outcomes = {run.call.number: run.outcome for run in run_calls(seed, numbers)}
    torch.save({"seed": seed, "versions": versions, "outcomes": outcomes}, path)
    print(f"{len(outcomes)} calls recorded")


def compare(path: str, only: list[int] | None) -> bool:
    """Whether all calls are as recorded."""
    recording = torch.load(path, weights_only=True)
    if recording["versions"]["transformers"] != transformers.__version__:
        print(f"recorded with {recording['versions']}, this is transformers {transformers.__version__}")
    comparison, num_same = Comparison(), 0
    runs = run_calls(recording["seed"], only or list(recording["outcomes"]))
    for run in runs:
        lines = comparison.differences(recording["outcomes"][run.call.number], run.outcome)
        num_same += not lines
        if lines:
            print(f"call {run.call.number}: {run.outcome['description']}", *lines, sep="\n    ")
    print(f"equal to the last bit: {comparison.num_equal} of {comparison.num_tensors} tensors")
    print(f"{num_same} of {len(runs)} calls as recorded")
    return num_same == len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("file", help="the recording")
    parser.add_argument("--calls", type=int, default=500, help="how many are recorded")
    parser.add_argument("--seed", type=int, default=0, help="of what is recorded")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these calls")
    args = parser.parse_args()
    if args.command == "record":
        record(args.file, args.seed, args.only or list(range(args.calls)))
    elif not compare(args.file, args.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
