"""
Random calls of `generate`, each from its number alone, and what their user brings along: streamers, processors,
criteria and hooks, which may raise.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tiny_pairs
import torch
from tiny_pairs import TEXT, TEXT_ONLY
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


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
    kind = rng.choices(["plain", "chat", "embeds", "error", "interrupt", "refused"], [46, 20, 6, 14, 11, 3])[0]
    # Two families take no embeddings.
    family = rng.choice(
        [name for name in tiny_pairs.CONFIGS if kind != "embeds" or name not in ("Gemma3", "PaliGemma")]
    )
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
