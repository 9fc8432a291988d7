"""
The effect of `draft.generation_config.suffix_nodes`: rounds, tau and tokens/s with and without it, in turns, on toy
questions that are asked again in a conversation, on follow-up questions, and on single questions.

    python examples/studies/bench_suffix.py --suffix_nodes 8
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from msd_hf import MSDDraftModel
from msd_hf.evaluation import Method, compare, mean_acceptance_length, timed_generate
from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_chat_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, TEXT_KINDS, VISUAL_KINDS, make_prompts, make_samples


@dataclass
class BenchArguments:
    suffix_nodes: int = field(default=8, metadata={"help": "Nodes of the suffix branch."})
    prompts_per_kind: int = field(default=4, metadata={"help": "Held-out questions of each kind."})
    conversations: int = field(default=16, metadata={"help": "Conversations with follow-up questions."})
    max_new_tokens: int = field(default=140, metadata={"help": "Length limit of an answer."})
    repeats: int = field(default=3, metadata={"help": "Runs with and without; the median of the ratios is reported."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    num_assistant_tokens: str = field(default="24", metadata={"help": "Nodes of the tree, or auto."})


def user(text: str, with_image: bool = False) -> dict[str, Any]:
    image = [{"type": "image"}] if with_image else []
    return {"role": "user", "content": [*image, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def make_groups(args: BenchArguments, processor: Any) -> dict[str, list[Any]]:
    """The inputs of each group of calls. Earlier answers are the reference answers of the toy world."""
    groups: dict[str, list[Any]] = {
        name: [] for name in ("asked again", "follow-up", "single: repeating", "single: other text", "single: visual")
    }
    for kind in (*TEXT_KINDS, *VISUAL_KINDS):
        for prompt in make_prompts("test", args.prompts_per_kind, 0, kind):
            images = [] if prompt.image is None else [prompt.image]
            chat = [user(prompt.question, bool(images))]
            again = [*chat, assistant(prompt.answer), user(prompt.question)]
            groups["asked again"].append(build_chat_inputs(processor, again, images))
            name = "visual" if images else "repeating" if kind == "repeating" else "other text"
            groups[f"single: {name}"].append(build_chat_inputs(processor, chat, images))
    for sample in make_samples("test", args.conversations, 0, "text"):
        said = [turn["value"] for turn in sample["conversations"]]
        for number in range(2, len(said), 2):
            chat = [assistant(text) if place % 2 else user(text) for place, text in enumerate(said[: number + 1])]
            groups["follow-up"].append(build_chat_inputs(processor, chat))
    return groups


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    target, processor = load_target_and_processor(TARGET_DIR)
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    num_nodes = args.num_assistant_tokens
    if num_nodes == "auto":
        draft.generation_config.tree_depth = None
    draft.generation_config.num_assistant_tokens = num_nodes if num_nodes == "auto" else int(num_nodes)
    methods = [
        Method(name, "", drafted=True, tree={"suffix_nodes": count})
        for name, count in (("without", 0), ("with", args.suffix_nodes))
    ]
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    groups = make_groups(args, processor)
    compare(target, draft, groups["follow-up"][0], methods=methods, **options)  # to warm up

    table = Table()
    for column in ("calls", "number", "rounds", "tau", "tokens/s: median ratio", "quartiles", "sum", "identical"):
        table.add_column(column, justify="left" if column == "calls" else "right")
    for name, calls in groups.items():
        results = [compare(target, draft, call, args.repeats, methods=methods, **options).runs for call in tqdm(calls)]
        alone = [timed_generate(target, call, **options).tokens for call in calls]
        lengths = {method.name: [runs[method.name][0].acceptance_lengths for runs in results] for method in methods}
        ratios = [
            statistics.median(a.seconds / b.seconds for a, b in zip(runs["without"], runs["with"], strict=True))
            for runs in results
        ]
        seconds = {
            method.name: sum(statistics.median(run.seconds for run in runs[method.name]) for runs in results)
            for method in methods
        }
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        same = sum(
            all(run.tokens == tokens for method in methods for run in runs[method.name])
            for runs, tokens in zip(results, alone, strict=True)
        )
        table.add_row(
            name,
            str(len(calls)),
            " -> ".join(str(sum(map(len, lengths[method.name]))) for method in methods),
            " -> ".join(f"{mean_acceptance_length(lengths[method.name]):.2f}" for method in methods),
            f"{median:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{seconds['without'] / seconds['with']:.3f}",
            f"{same}/{len(calls)}",
        )
    console = Console(width=120)
    console.print(
        f"{args.num_assistant_tokens} nodes, {args.suffix_nodes} more in the branch, {target.dtype}, {args.threads} "
        "threads; whole calls, prefill included"
    )
    console.print(table)


if __name__ == "__main__":
    main()
