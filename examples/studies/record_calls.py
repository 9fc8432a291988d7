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
from dataclasses import asdict, dataclass, field
from typing import Any

import tiny_pairs
import torch
import transformers
from tiny_pairs import PAD, TEXT, TEXT_ONLY
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import ALL_CACHE_NAMES


CACHE_NAME = ALL_CACHE_NAMES[0]  # `cache` from transformers 5.24 on, `past_key_values` before
TOLERANCE = 1e-9  # of the largest value of a tensor
ALONE_EVERY = 5  # of so many calls, one is compared with the target alone


# Calls


@dataclass
class Call:
    """
    One case: a call of `generate`, or several that share a cache.

    Args:
        kind (`str`): "plain", "chat", "embeds", "error", "interrupt" or "refused".
        rows (`list[tuple[int, int]]`): of the prompt, see `tiny_pairs.prompt`.
        options (`dict`): arguments of `generate`.
        tree (`dict`): settings of the draft.
        streamer (`str`, *optional*): "put" or "verified".
        cache (`str`, *optional*): what the call gets: an "empty" one, or one that knows the "config".
        extras (`list[str]`): of "mix" (a processor of the user's) and "stop" (a criterion).
        turns (`list[str]`): what happens before each further turn of a chat.
        raises (`tuple[str, int]`, *optional*): who raises, and the how manieth time it is called.
    """

    number: int
    seed: int  # of text, pictures and random draws
    kind: str
    family: str
    weights: int
    draft: str
    attention: str
    rows: list[tuple[int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    streamer: str | None = None
    cache: str | None = None
    extras: list[str] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    raises: tuple[str, int] | None = None
    training: bool = False

    @property
    def is_timed(self) -> bool:
        """Whether the size of its trees depends on time, so that only its tokens are always the same."""
        return self.tree.get("num_assistant_tokens") == "auto"


CHANGES = ["none", "none", "other end", "crop", "fork", "plain turn", "other draft"]  # between turns
REFUSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_beams": 2}, {}),
    ({"cache_implementation": "static"}, {}),
    ({"guidance_scale": 1.5}, {}),
    ({"prompt_lookup_num_tokens": 3}, {}),
    ({"use_cache": False}, {}),
    ({"dola_layers": "high"}, {}),
    ({}, {"tree_top_k": 0}),
    ({}, {"num_assistant_tokens": "many"}),
    ({}, {"temperature": 0.5}),
    ({}, {"compile": "yes"}),
    ({}, {"compile": True, "num_assistant_tokens": "auto"}),
]


def draw_call(seed: int, number: int) -> Call:
    """The call of a number."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(["plain", "chat", "embeds", "error", "interrupt", "refused"], [45, 20, 6, 14, 11, 4])[0]
    family = rng.choice(list(tiny_pairs.CONFIGS))
    attention = rng.choice(tiny_pairs.attentions(family))
    draft = rng.choice(["plain", *tiny_pairs.DRAFTS])
    rows = _draw_rows(rng, kind, family, attention)
    call = Call(number, rng.randrange(10**9), kind, family, rng.randrange(2), draft, attention, rows)
    call.options, call.tree = _draw_options(rng, call), _draw_tree(rng, call)
    call.streamer = rng.choice([None, None, "put", "verified"])
    call.cache = rng.choice([None, None, "empty", "config"])
    call.extras = [name for name in ("mix", "stop") if rng.random() < 0.08]
    call.training = rng.random() < 0.1
    if kind == "chat":
        call.turns = [rng.choice(CHANGES if len(call.rows) == 1 else CHANGES[:2]) for _ in range(rng.randint(1, 2))]
        if len(call.rows) == 1 and rng.random() < 0.3:
            call.turns = ["new tokens"] * len(call.turns)
    elif kind == "error":
        call.raises = (rng.choice(["streamer", "processor", "criterion"]), rng.randint(1, 20))
    elif kind == "interrupt":
        call.raises = ("hook", rng.choice([1, 2, 2, 3, 4, 6]))
    elif kind == "refused":
        options, tree = rng.choice(REFUSED)
        call.options, call.tree = {**call.options, **options}, {**call.tree, **tree}
    if call.raises:
        call.cache, call.streamer = call.cache or "empty", call.streamer or "put"
        call.options["max_new_tokens"] = rng.randint(8, 40)
    return call


def _draw_rows(rng: random.Random, kind: str, family: str, attention: str) -> list[tuple[int, int]]:
    size = rng.choices([1, 2, 3, 4], [6, 2, 2, 2])[0] if kind != "chat" else rng.choice([1, 1, 1, 1, 2, 3])
    most = 0 if family in TEXT_ONLY or rng.random() < 0.3 else 2
    rows = [(rng.randint(1, 14), rng.randint(min(most, 1), most)) for _ in range(size)]
    return [rows[0]] * size if attention == "eager" else rows


def _draw_options(rng: random.Random, call: Call) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, *[rng.randint(3, 40)] * 10])}
    options["do_sample"] = rng.random() < 0.4
    if options["do_sample"]:
        options["temperature"] = rng.choice([0.3, 0.6, 1.0])
        options["top_k"], options["top_p"] = rng.choice([0, 5, 20]), rng.choice([1.0, 0.9, 0.6])
    options["eos_token_id"] = rng.sample(TEXT, rng.choice([2, 5])) if rng.random() < 0.7 else None
    if call.attention == "eager" and call.kind != "plain":
        options["eos_token_id"] = None  # padding in a history is too much for it
    for name, values, chance in (
        ("repetition_penalty", [1.1, 1.5], 0.12),
        ("no_repeat_ngram_size", [2, 3], 0.08),
        ("bad_words_ids", [[[token] for token in rng.sample(TEXT, 5)], [rng.sample(TEXT, 2)]], 0.08),
        ("suppress_tokens", [rng.sample(TEXT, 8)], 0.05),
        ("min_new_tokens", [4, 9], 0.05),
    ):
        if rng.random() < chance:
            options[name] = rng.choice(values)
    if rng.random() < 0.65 or call.kind == "chat":
        options["return_dict_in_generate"] = True
        for name, chance in (("output_scores", 0.3), ("output_logits", 0.3), ("output_hidden_states", 0.25)):
            options[name] = rng.random() < chance
        options["output_attentions"] = call.attention == "eager" and rng.random() < 0.4
    return options


def _draw_tree(rng: random.Random, call: Call) -> dict[str, Any]:
    tree: dict[str, Any] = {"suffix_nodes": rng.choice([0, 0, 0, 1, 3, 6])}
    sizes = {
        "num_assistant_tokens": rng.choice([1, *[rng.randint(2, 30)] * 6]),
        "tree_depth": rng.choice([0, 1, 2, 3, 3, 4, 6]),
        "tree_top_k": rng.choice([1, 2, 3, 4, 6]),
    }
    if call.weights == 0 and call.draft in ("plain", "vocabulary") and rng.random() < 0.4:
        # Few shapes, since each of them is traced.
        shape = rng.choice([(12, 3, 4), (5, 4, 1)])
        sizes = dict(zip(sizes, shape, strict=True)) | {"compile": True}
        tree["suffix_nodes"] = rng.choice([0, 0, 3])
    elif call.kind in ("plain", "chat") and rng.random() < 0.06:
        sizes = {"num_assistant_tokens": "auto"}
    return {**tree, **sizes}


# What the user of a call brings along


class Stop:
    """Raises the `after`th time that it is asked."""

    def __init__(self, after: int | None, kind: type[BaseException] = RuntimeError):
        self.after, self.kind, self.calls = after, kind, 0

    def check(self) -> None:
        self.calls += 1
        if self.calls == self.after:
            raise self.kind(f"stopped at {self.calls}")


class Listener(BaseStreamer):
    """Keeps what it receives."""

    def __init__(self, stop: Stop):
        self.events: list[Any] = []
        self.stop = stop

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.tolist())
        self.stop.check()

    def end(self) -> None:
        self.events.append("end")

    def steps(self) -> list[list[int]]:
        """The tokens of all rows, step by step."""
        steps: list[list[int]] = []
        for event in self.events[1:]:
            if isinstance(event, dict):
                steps += [[token] for token in event["tokens"]]
            elif event != "end":
                steps.append(event)
        return steps


class RoundListener(Listener):
    """Takes the tokens of one verification at once."""

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        self.events.append({"tokens": tokens.tolist(), "drafted": num_draft_tokens})
        self.stop.check()


class MixRows(LogitsProcessor):
    """Rows depend on each other."""

    def __init__(self, stop: Stop, share: float):
        self.stop, self.share = stop, share

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.stop.check()
        return scores + self.share * scores.mean(0, keepdim=True)


class EndBySum(StoppingCriteria):
    """Ends a row by what it holds."""

    def __init__(self, stop: Stop, divisor: int):
        self.stop, self.divisor = stop, divisor

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.stop.check()
        return input_ids.sum(1) % self.divisor == 0


class Company:
    """Streamer, processors and criteria of one call of `generate`, and a hook on the target's decoder."""

    def __init__(self, call: Call, raises: bool = True):
        who, after = call.raises if call.raises and raises else (None, 0)
        kinds = ("streamer", "processor", "criterion")
        self.stops = {kind: Stop(after if kind == who else None) for kind in kinds}
        self.stops["hook"] = Stop(after if who == "hook" else None, KeyboardInterrupt)
        self.listener = {"put": Listener, "verified": RoundListener, None: None}[call.streamer]
        if self.listener:
            self.listener = self.listener(self.stops["streamer"])
        self.arguments: dict[str, Any] = {"streamer": self.listener} if self.listener else {}
        if "mix" in call.extras or who == "processor":
            processor = MixRows(self.stops["processor"], 0.5 if "mix" in call.extras else 0.0)
            self.arguments["logits_processor"] = LogitsProcessorList([processor])
        if "stop" in call.extras or who == "criterion":
            criterion = EndBySum(self.stops["criterion"], 13 if "stop" in call.extras else 10**9)
            self.arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
        self.hooked = who == "hook"

    @contextlib.contextmanager
    def hook(self, target: Any) -> Iterator[None]:
        if not self.hooked:
            yield
            return
        handle = target.get_decoder().register_forward_hook(lambda *_: self.stops["hook"].check())
        try:
            yield
        finally:
            handle.remove()


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
        self.generate("call", inputs, self.new_cache(), whole=inputs)

    def chat(self, inputs: dict[str, Any]) -> None:
        rng = random.Random(self.call.seed)
        whole, cache, draft = inputs, self.new_cache(), self.draft
        for turn, change in enumerate(["first", *self.call.turns]):
            if change == "plain turn":
                draft = None
            elif change == "other draft":
                draft = copy.deepcopy(self.draft)
            new_only = change == "new tokens"
            output = self.generate(f"turn {turn}", inputs, cache, None if new_only else whole, draft)
            draft, cache = self.draft, output[CACHE_NAME]
            ids = output.sequences
            if turn < len(self.call.turns):
                upcoming = self.call.turns[turn]
                if upcoming == "new tokens":
                    ids, mask_length = ids[:, -1:], cache.get_seq_length() + 1
                elif upcoming == "other end":
                    ids[:, -1] = 3
                elif upcoming == "crop":
                    count = min(5, ids.shape[1] - inputs["input_ids"].shape[1])
                    cache.crop(-count)
                    ids = ids[:, : cache.get_seq_length()]
                elif upcoming == "fork":
                    fork = copy.deepcopy(cache)
                    more = self.with_history(whole, torch.cat([ids, ids.new_full((len(ids), 2), 9)], dim=1))
                    self.generate(f"fork {turn}", more, cache, None)
                    cache = fork
                new = torch.tensor([[rng.choice(TEXT) for _ in range(3)] for _ in range(len(ids))])
                ids = torch.cat([ids, new], dim=1)
                if upcoming == "new tokens":
                    mask = torch.ones(1, mask_length + 3, dtype=torch.long)
                    inputs = {
                        "input_ids": ids,
                        "attention_mask": mask,
                        **tiny_pairs.token_types(self.call.family, ids),
                    }
                else:
                    inputs = self.with_history(whole, ids)
                    whole = {**whole, **inputs}

    def cut(self, inputs: dict[str, Any]) -> None:
        """A call that is interrupted, and another one with its cache."""
        cache = self.new_cache()
        with self.noting_errors("interruption"):
            self.generate("call", inputs, cache, whole=None)
        self.outcome.update(self.shown_cache("interrupted", cache))
        steps = self.company.listener.steps()
        known = torch.cat(
            [inputs["input_ids"], torch.tensor(steps, dtype=torch.long).reshape(-1, len(inputs["input_ids"])).T], dim=1
        )
        slots = cache.get_seq_length()
        if slots > known.shape[1]:
            cache.crop(known.shape[1])
        ids = torch.cat([known, torch.full((len(known), 3), 7)], dim=1)
        again = {**(inputs if slots == 0 else {}), **self.with_history(inputs, ids)}
        self.generate("again", again, cache, {**inputs, **again}, raises=False)

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
        draft: Any = "own",
        raises: bool = True,
    ) -> Any:
        """One call of `generate`, noted under a name; `whole` is what the target alone is given, if it is asked."""
        draft = self.draft if draft == "own" else draft
        self.company = company = Company(self.call, raises)
        start = torch.get_rng_state()
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
    _trace_only()
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
    print(f"ended in an exception, interruptions apart: {failed} of {len(runs)}")
    print(f"mean acceptance length: {emitted / max(rounds, 1):.2f}")
    return runs


def _trace_only() -> None:
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
