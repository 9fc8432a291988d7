"""
Lets eight threads generate with one target: four with a draft of their own, two with a shared draft, two without one;
some stream, some generate batches, some are stopped by an exception of their streamer. Every answer must be that of
the target alone, and afterwards everything that threads share must be as before.

    python examples/studies/threads.py --calls 2000

The calls are divided among the variants of the target and its drafts in `VARIANTS`. Targets are float64, decoding is
greedy, as threads share the generator of random numbers. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tiny_pairs
import torch
import transformers
from torch._dynamo import eval_frame
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import sdpa_mask

import msd_hf
from msd_hf.compiled import compile as compiled_by_us


NUM_PROMPTS, NEW_TOKENS = 6, (5, 12, 24)
SWITCH_INTERVAL = 1e-4  # seconds; Python's own is 0.005
NO_TREE_MASK = "causal_only"
# Each thread's draft: a number is a draft of its own, "shared" is used by several.
THREADS: tuple[int | str | None, ...] = (0, 1, 2, 3, "shared", "shared", None, None)


def causal_only(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **_: Any):
    """Attention that hides padding and the future, and no more, as flash attention does. Gives other tokens if it is
    used for a tree."""
    groups, (num_queries, num_keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        visible = visible & attention_mask[:, :, -1:]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def plain(target: Any) -> None:
    """sdpa."""


def without_tree_mask(target: Any) -> None:
    """An attention function that takes no tree mask."""
    AttentionInterface.register(NO_TREE_MASK, causal_only)
    AttentionMaskInterface.register(NO_TREE_MASK, sdpa_mask)
    target.set_attn_implementation({"text_config": NO_TREE_MASK})


def compiled_target(target: Any) -> None:
    """A target that its user has compiled. Threads without a draft run the compiled code."""
    target.compile(backend="eager", dynamic=True)  # few shapes are traced


def compiled_drafts(target: Any) -> None:
    """Drafts with `compile=True`."""


VARIANTS: dict[str, Callable[[Any], None]] = {
    "sdpa": plain,
    "no tree mask": without_tree_mask,
    "compiled target": compiled_target,
    "compile=True": compiled_drafts,
}


class StoppedByUser(Exception):
    pass


class Listener(BaseStreamer):
    """Keeps the tokens it gets. Stops the call at the token `stop`, if given."""

    def __init__(self, stop: int | None):
        self.tokens: list[Any] = []
        self.stop = stop

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if self.stop is not None and len(self.tokens) >= self.stop:
            raise StoppedByUser

    def end(self) -> None:
        pass


class SharedTarget:
    """One target, its drafts, prompts, and what the target alone answers."""

    def __init__(self, variant: str):
        self.target = copy.deepcopy(tiny_pairs.target("Llava", 0))
        self.target.set_attn_implementation("sdpa")
        VARIANTS[variant](self.target)
        kinds = ["plain", "vocabulary", "wide", "layers"] if variant != "compile=True" else ["plain", "vocabulary"] * 2
        self.drafts: dict[int | str, Any] = {}
        for name in (0, 1, 2, 3, "shared"):
            draft = copy.deepcopy(tiny_pairs.draft("Llava", 0, "plain" if name == "shared" else kinds[int(name)]))
            settings = {"num_assistant_tokens": 12, "tree_depth": 3, "tree_top_k": 4}
            if variant == "compile=True":
                settings["compile"] = True
            elif name in ("shared", 0):
                settings = {"num_assistant_tokens": "auto"}
            for setting, value in settings.items():
                setattr(draft.generation_config, setting, value)
            self.drafts[name] = draft.train(name in ("shared", 1))
        generator = torch.Generator().manual_seed(0)
        rows = [[(5, 0)], [(9, 1)], [(12, 2)], [(3, 1)], [(4, 1), (9, 0)], [(8, 0), (3, 0), (6, 2)]]
        self.prompts = [tiny_pairs.prompt("Llava", row, generator) for row in rows[:NUM_PROMPTS]]
        self.expected: dict[tuple[int, int], torch.Tensor] = {}
        for number, inputs in enumerate(self.prompts):
            for count in NEW_TOKENS:
                alone = self.target.generate(**inputs, max_new_tokens=count, do_sample=False)
                self.expected[number, count] = alone

    def call(self, draft: Any, number: int) -> str:
        """One call; says what came of it."""
        prompt, count = number % len(self.prompts), NEW_TOKENS[number // 7 % len(NEW_TOKENS)]
        inputs, expected = self.prompts[prompt], self.expected[prompt, count]
        is_single = len(expected) == 1
        stops = number % 17 == 3 and is_single
        length = inputs["input_ids"].shape[1]
        listener = Listener(length + 4 if stops else None) if number % 3 == 0 or stops else None
        options: dict[str, Any] = {"return_dict_in_generate": number % 5 == 0, "streamer": listener}
        try:
            output = self.target.generate(
                **inputs, max_new_tokens=count, do_sample=False, assistant_model=draft, **options
            )
        except StoppedByUser:
            assert listener is not None
            return "stopped" if listener.tokens == expected[0, : len(listener.tokens)].tolist() else "OTHER TOKENS"
        except Exception as error:  # the kinds of failures are what this script is to find
            return f"{type(error).__name__}: {error}"
        if not torch.equal(getattr(output, "sequences", output), expected):
            return "OTHER TOKENS"
        if listener is not None and is_single and listener.tokens != expected[0].tolist():
            return "OTHER TOKENS STREAMED"
        return "identical"

    def state(self) -> dict[str, Any]:
        """What threads share and calls must leave as it was."""
        state: dict[str, Any] = {"stance": str(eval_frame._stance.stance), "implementation": None}
        for owner, model in (("target", self.target), *self.drafts.items()):
            for name, module in model.named_modules():
                own = vars(module)
                hooks = [len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])]
                methods = [own.get(method) for method in ("forward", "_call_impl", "_compiled_call_impl")]
                state[f"{owner}.{name}"] = [module.training, *hooks, *methods]
                if hasattr(module, "config"):
                    state[f"{owner}.{name}"].append(module.config._attn_implementation)
        return state


@contextlib.contextmanager
def _eager_backend() -> Iterator[None]:
    """Lets `compile=True` trace and run as it is: kernels for a CPU take long to build."""
    before, compiled_by_us.BACKEND = compiled_by_us.BACKEND, "eager"
    try:
        yield
    finally:
        compiled_by_us.BACKEND = before


def run_variant(variant: str, num_calls: int) -> tuple[collections.Counter[tuple[str, str]], list[str]]:
    """Runs `num_calls` calls in all threads together. Returns how often each kind of thread had each outcome, and
    what is not as before."""
    shared = SharedTarget(variant)
    # What the target and transformers set up in the first forwards belongs to the state before.
    with _eager_backend():
        for draft in shared.drafts.values():
            shared.call(draft, 0)
    before = shared.state()
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        name = THREADS[number]
        kind = "without a draft" if name is None else "shared draft" if name == "shared" else "draft of its own"
        for call in range(number, num_calls, len(THREADS)):
            outcome = shared.call(None if name is None else shared.drafts[name], call)
            with lock:
                seen[kind, outcome] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        with _eager_backend():
            threads = [threading.Thread(target=work, args=(number,)) for number in range(len(THREADS))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    after = shared.state()
    changed = [name for name in before if before[name] != after[name]]
    msd_hf.release(shared.target)
    return seen, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--variant", choices=list(VARIANTS), help="Only this one.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    variants = [arguments.variant] if arguments.variant else list(VARIANTS)
    is_right = True
    for variant in variants:
        start = time.perf_counter()
        seen, changed = run_variant(variant, arguments.calls // len(variants))
        print(f"{variant} ({time.perf_counter() - start:.0f} s)")
        for (kind, outcome), count in sorted(seen.items()):
            print(f"  {kind:18} {outcome:10} {count}")
            is_right &= outcome in ("identical", "stopped")
        print(f"  not as before: {', '.join(changed) or 'nothing'}")
        is_right &= not changed
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
