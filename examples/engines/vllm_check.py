"""
Serves small pairs with vLLM and compares: tokens with those of vLLM alone, tau with that of `generate` drafting chains
of the same length on the same prompts. Greedy, float32. `vllm_cpu.sh` makes an environment and runs it.

    python examples/engines/vllm_check.py [--work DIR] [--only NAME ...] [--prompts 24]

Exit status 1 if a token differs, or if tau is more than 3% below the chain's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from check_pairs import KINDS, build, build_eagle3
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from msd_hf import AutoDraft, MSDDraftModel
from msd_hf.decoders import head_of
from msd_hf.draft.eagle3.formats import FLAT, FORMATS, SPECULATORS, write_format
from msd_hf.engines.vllm.export import export_draft
from msd_hf.loading import load_target, load_target_and_processor
from msd_hf.prompts import build_chat_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, TEXT_KINDS, VISUAL_KINDS, make_prompts


# vLLM reads these when it is imported.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes all cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CHAIN = 5  # tokens of a draft
MAX_NEW_TOKENS = 100
TEXT_ONLY = "text only"  # the name of a pair without a vision tower
EAGLE, EAGLE3 = "eagle", "eagle3"  # vLLM's methods
LARGEST_LOSS = 0.03  # of tau, relative to our own chain


@dataclass
class Question:
    """A user turn with its pictures."""

    text: str
    images: list[Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        parts = [{"type": "image"}] * len(self.images) + [{"type": "text", "text": self.text}]
        return [{"role": "user", "content": parts}]


@dataclass
class Answers:
    """The tokens of each answer, and tau: tokens per verification, without the token of the prefill."""

    tokens: list[list[int]]
    tau: float


@dataclass
class Pair:
    """A target, as transformers and as vLLM load it, and its draft."""

    name: str
    target: Path
    served: Path  # with the names of weights that vLLM expects
    draft: Any
    alone: dict[str, Answers] = field(default_factory=dict)  # of vLLM, by kind of question


def questions(kind: str, number: int) -> list[Question]:
    """`number` held-out questions about one picture (`image`), about two (`two images`), or without any (`text`)."""
    kinds = list(TEXT_KINDS if kind == "text" else VISUAL_KINDS)
    per_kind = -(-number // len(kinds))
    prompts = [prompt for name in kinds for prompt in make_prompts("test", per_kind, 0, name)][:number]
    if kind == "two images":
        others = prompts[1:] + prompts[:1]
        return [Question(one.question, [other.image, one.image]) for one, other in zip(prompts, others, strict=True)]
    return [Question(prompt.question, [prompt.image] if prompt.image else []) for prompt in prompts]


# ---- targets ----


def for_vllm(source: Path, folder: Path) -> Path:
    """A copy of a target with the names of weights that vLLM 0.32 expects of a LLaVA; those that transformers writes
    since 5.2x lack one part."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "llava":
        short, long = "vision_tower.", "vision_tower.vision_model."
        weights = {
            name.replace(short, long) if short in name and long not in name else name: weight
            for name, weight in weights.items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(pair: Pair) -> tuple[Any, Any]:
    """The target in transformers, and its processor or tokenizer."""
    if pair.name != TEXT_ONLY:
        return load_target_and_processor(pair.target, "float32")
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype="float32")
    return target, AutoTokenizer.from_pretrained(pair.target)


def text_only(source: Path, folder: Path) -> Path:
    """The language model of a LLaVA as a target of its own, with the tokenizer."""
    target = load_target(source, "float32")
    llama = LlamaForCausalLM(target.config.text_config)
    llama.model.load_state_dict(target.get_decoder().state_dict())
    llama.lm_head.load_state_dict(head_of(target).state_dict())
    llama.save_pretrained(folder)
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, folder)
    return folder


# ---- answers ----


@contextmanager
def engine(target: Path, draft: Path | None, method: str = EAGLE, **options: Any) -> Iterator[Any]:
    """vLLM on the CPU, with or without a draft."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if draft is not None:
        options["speculative_config"] = {"method": method, "model": str(draft), "num_speculative_tokens": CHAIN}
    llm = LLM(
        str(target),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 1,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "use_tqdm_on_load": False,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask_vllm(llm: Any, processor: Any, asked: Sequence[Question]) -> Answers:
    """Answers of vLLM to questions that it is given at once."""
    from vllm import SamplingParams

    def count() -> int:
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts")

    prompts = []
    for question in asked:
        text = processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        data = {"multi_modal_data": {"image": question.images}} if question.images else {}
        prompts.append({"prompt": text, **data})
    before = count()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS), use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    rounds = count() - before
    return Answers(tokens, sum(len(answer) - 1 for answer in tokens) / rounds if rounds else float("nan"))


def ask_chain(target: Any, processor: Any, draft: Any, asked: Sequence[Question]) -> Answers:
    """Answers of `generate` with the draft as a chain."""
    draft.generation_config.update(
        num_assistant_tokens=CHAIN + 1, tree_depth=CHAIN - 1, tree_top_k=1, max_visual_rows=None
    )
    tokens, lengths = [], []
    for question in asked:
        inputs = build_chat_inputs(processor, question.messages, question.images)
        output = target.generate(
            **inputs,
            assistant_model=draft,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
        tokens.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        lengths += output.acceptance_lengths[0]
    return Answers(tokens, sum(lengths) / len(lengths))


# ---- the table ----


class Check:
    """Fills the table, row by row."""

    def __init__(self, work: Path, pairs: Path, num_prompts: int, only: Sequence[str]):
        self.work, self.pairs, self.num_prompts, self.only = work, pairs, num_prompts, only
        self.rows: list[tuple[str, ...]] = []
        self.failed: list[str] = []
        self.console = Console(width=120)

    def wants(self, name: str, variant: str | None = None) -> bool:
        """Whether rows of a pair, or these rows of it, were asked for."""
        words = [word.split(": ") for word in self.only]
        return not words or any(
            word[0] in name and (variant is None or len(word) == 1 or word[1] in variant) for word in words
        )

    def pair(self, name: str, target: Path, draft: Any, served: Path | None = None) -> Pair:
        return Pair(name, target, served or for_vllm(target, self.work / f"{name} for vllm"), draft)

    def run(
        self,
        pair: Pair,
        variant: str,
        kinds: Sequence[str],
        draft: Any = None,
        times: int = 1,
        is_judged: bool = True,
        to: str | None = None,
        **options: Any,
    ) -> None:
        """
        Adds a row for each kind of question.

        Args:
            pair: target and draft.
            variant: what is special about these rows.
            kinds: kinds of questions.
            draft: another draft than the pair's.
            times: how often vLLM is asked; the last answers count.
            is_judged: whether a loss of tau is a failure.
            to: the format in which vLLM reads the draft, an EAGLE-3 one, without the plugin; `None`: the export.
            options: of vLLM.
        """
        if not self.wants(pair.name, variant):
            return
        draft = draft or pair.draft
        limits = {} if pair.name == TEXT_ONLY else {"limit_mm_per_prompt": {"image": 2}}
        target, processor = load(pair)
        folder = self.work / f"{pair.name} {variant}"
        if to is None:
            export_draft(draft, folder, head_of(target), target.config.get_text_config().vocab_size)
        else:
            write_format(draft, folder, to)
            draft = AutoDraft.from_pretrained(folder, visual_positions=draft.config.visual_positions)  # and back
        asked = {kind: questions(kind, self.num_prompts) for kind in kinds}
        missing = [kind for kind in kinds if kind not in pair.alone]
        if missing:
            with engine(pair.served, None, **limits) as llm:
                for kind in missing:
                    pair.alone[kind] = ask_vllm(llm, processor, asked[kind])
        answers = {}
        with engine(pair.served, folder, EAGLE if to is None else EAGLE3, **limits, **options) as llm:
            for kind in kinds:
                for _ in range(times):
                    answers[kind] = ask_vllm(llm, processor, asked[kind])
        for kind in kinds:
            chain = ask_chain(target, processor, draft, asked[kind])
            self._add(f"{pair.name}: {variant}", kind, answers[kind], pair.alone[kind], chain, is_judged)

    def _add(self, name: str, kind: str, got: Answers, alone: Answers, chain: Answers, is_judged: bool) -> None:
        same = sum(one == other for one, other in zip(got.tokens, alone.tokens, strict=True))
        change = got.tau / chain.tau - 1
        self.rows.append(
            (name, kind, f"{same}/{len(got.tokens)}", f"{got.tau:.2f}", f"{chain.tau:.2f}", f"{change:+.1%}")
        )
        self.console.print(*self.rows[-1], sep="  ", highlight=False)
        if same < len(got.tokens):
            self.failed.append(f"{name}, {kind}: {len(got.tokens) - same} answers differ from vLLM's alone")
        if is_judged and change < -LARGEST_LOSS:
            self.failed.append(f"{name}, {kind}: tau is {-change:.1%} below the chain's")

    def table(self) -> Table:
        table = Table()
        for column in ("pair", "questions", "tokens equal", "tau in vLLM", "tau of our chain", "difference"):
            table.add_column(column, justify="left" if column in ("pair", "questions") else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def coupled(folder: Path) -> MSDDraftModel:
    """The draft with visual rows through `fc`, as a plain EAGLE draft has them."""
    return MSDDraftModel.from_pretrained(folder, decouple_visual_tokens=False)


def with_vocabulary(folder: Path) -> MSDDraftModel:
    """The draft with every token but each fifth as its own vocabulary."""
    draft = MSDDraftModel.from_pretrained(folder)
    draft.set_draft_vocab([token for token in range(draft.config.vocab_size) if token % 5])
    return draft


def eagle3_row(to: str) -> str:
    """The name of the rows of an EAGLE-3 draft in a format."""
    return f"EAGLE-3 draft, {to} format"


def check_all(check: Check) -> None:
    logging.disable_progress_bar()
    both = ("image", "text")
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    bundled = check.pair("bundled LLaVA", TARGET_DIR, draft)
    check.run(bundled, "as it is", both)
    check.run(bundled, "not decoupled", ("image",), coupled(DRAFT_DIR))
    check.run(bundled, "draft vocabulary", both, with_vocabulary(DRAFT_DIR))
    check.run(bundled, "two images", ("two images",))
    check.run(bundled, "8 at once", both, max_num_seqs=8)
    check.run(bundled, "prefix caching, asked twice", both, times=2, enable_prefix_caching=True)
    # Chunks that end inside an image.
    check.run(
        bundled,
        "chunked prefill, 8 at once",
        both,
        max_num_seqs=8,
        enable_chunked_prefill=True,
        max_num_batched_tokens=64,
    )
    if any(check.wants(bundled.name, eagle3_row(to)) for to in FORMATS):
        own = AutoDraft.from_pretrained(build_eagle3(check.pairs))
        for to, kinds in ((FLAT, (*both, "two images")), (SPECULATORS, both)):
            check.run(bundled, eagle3_row(to), kinds, own, to=to)
    if check.wants(TEXT_ONLY):
        folder = text_only(TARGET_DIR, check.work / TEXT_ONLY)
        of_llama = MSDDraftModel.from_pretrained(DRAFT_DIR, target_model_type="llama")
        check.run(check.pair(TEXT_ONLY, folder, of_llama, folder), "Llama", ("text",))
    for kind in KINDS:
        if not check.wants(kind):
            continue
        folder = build(kind, check.pairs)
        other = check.pair(kind, folder / "target", MSDDraftModel.from_pretrained(folder / "draft"))
        check.run(other, "as it is", both)
        check.run(other, "not decoupled", ("image",), coupled(folder / "draft"))
        check.run(other, "two images", ("two images",))
        check.run(
            other, "prefix caching, asked twice, 8 at once", both, times=2, max_num_seqs=8, enable_prefix_caching=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder that keeps the trained pairs; default: a temporary one")
    parser.add_argument("--only", nargs="+", default=[], help="pairs, or rows as PAIR: ROW, by parts of their names")
    parser.add_argument("--prompts", type=int, default=24, help="questions of each kind")
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as temporary:
        check = Check(Path(temporary), args.work or Path(temporary) / "pairs", args.prompts, args.only)
        check_all(check)
    if not check.rows:
        sys.exit(f"Error: --only {' '.join(args.only)} names no row.")
    check.console.print(check.table())
    if check.failed:
        sys.exit("\n".join(check.failed))


if __name__ == "__main__":
    main()
