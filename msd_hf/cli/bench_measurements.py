"""The measurements of `msd-hf bench`: a pair on prompts, and the shape of a large model with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MSDError
from .options import set_visual_rows


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..evaluation.bench_prompts import BenchPrompt
    from ..processes.group import Processes

# The keys of `METHODS` in `evaluation/methods.py`, whose import takes seconds.
BASELINES = (
    "vanilla",
    "compiled-generate",
    "prompt-lookup",
    "assisted-chain",
    "chain",
    "tree",
    "default-size",
    "auto",
    "compiled",
    "useless-draft",
)
_Number = TypeVar("_Number", int, float)


@dataclass
class PairBench:
    """
    A pair on prompts. The fields are the options of the command; without `data` it is a bundled pair.

    Args:
        world: the bundled pair and its questions, `"toy"` or `"hard"`.
        has_texts: whether the report holds questions and answers.
        has_trees: whether it also holds the candidate trees of a few prompts.
        processes: the processes that share the prompts.
        journal_folder: where the results of each prompt are kept until the report is written.
    """

    target: str | None
    draft: str | None
    data: str | None
    world: str
    split: str | None
    subset: str | None
    image_folder: Path | None
    num_prompts: int
    min_answer_tokens: int
    baselines: Sequence[str] | None
    repeats: int
    max_new_tokens: int
    temperature: float
    ignore_eos: bool
    seed: int
    dtype: str
    device: str
    max_visual_rows: str | None
    has_texts: bool
    has_trees: bool
    processes: Processes
    journal_folder: Path | None
    pictures: Mapping[str, Sequence[Image]] = field(default_factory=dict, init=False)

    @property
    def data_name(self) -> str:
        """The name of the data in a card."""
        if self.data is None:
            return f"{self.world} world"
        path = Path(self.data)
        return path.stem if path.suffix in (".json", ".jsonl", ".txt") else path.name

    @property
    def given(self) -> list[object]:
        """The arguments that name pair and data, for the command that comes next."""
        options = {
            "--target": self.target,
            "--draft": self.draft,
            "--data": self.data,
            "--split": self.split,
            "--subset": self.subset,
            "--image-folder": self.image_folder,
        }
        return [word for name, value in options.items() if value is not None for word in (name, value)]

    def run(self) -> dict[str, Any]:
        """
        Measures and makes the report. All arguments are checked before the target's weights are loaded.

        Raises:
            MSDError: when an argument cannot be used.
        """
        from ..draft.auto import AutoDraft
        from ..evaluation.html_report import NUM_TREES
        from ..evaluation.make_report import report_pair
        from ..evaluation.methods import DEFAULT_BASELINES, choose_methods
        from ..hub.names import target_or_named
        from ..loading import load_config, load_processor, load_target
        from ..target.support import check_pair

        methods = choose_methods(DEFAULT_BASELINES if self.baselines is None else self.baselines)
        if self.data is None:
            target_folder, draft_folder = self._bundled_pair()
            self.target, self.draft = self.target or str(target_folder), self.draft or str(draft_folder)
        if self.draft is None:
            raise MSDError("--data needs a --draft, and its --target if the draft does not name it.")
        draft = AutoDraft.from_pretrained(self.draft)
        set_visual_rows(draft, self.max_visual_rows)
        self.target = target_or_named(self.target, draft.config)
        check_pair(load_config(self.target), draft.config)
        processor = load_processor(self.target)
        prompts = self._prompts(processor)
        self.pictures = {prompt.name: prompt.images for prompt in prompts}
        target = load_target(self.target, self.dtype, self.processes.device(self.device))
        return report_pair(
            target,
            draft.to(device=target.device, dtype=target.dtype),
            prompts,
            methods,
            self.repeats,
            self.max_new_tokens,
            self.min_answer_tokens,
            self.temperature,
            self.seed,
            self.ignore_eos,
            tokenizer=getattr(processor, "tokenizer", processor) if self.has_texts else None,
            num_recorded=NUM_TREES if self.has_trees else 0,
            processes=self.processes,
            journal_folder=self.journal_folder,
        )

    def _bundled_pair(self) -> tuple[Path, Path]:
        from .. import toy
        from ..toy import hard

        world = toy if self.world == "toy" else hard
        return world.TARGET_DIR, world.DRAFT_DIR

    def _prompts(self, processor: Any) -> list[BenchPrompt]:
        from ..evaluation.bench_prompts import first_questions
        from ..toy.evaluate import toy_prompts
        from ..toy.hard.bench_prompts import hard_prompts
        from ..training.data.conversations import load_conversations

        if self.data is None:
            make = toy_prompts if self.world == "toy" else hard_prompts
            return make(processor, self.num_prompts, self.seed)
        conversations = load_conversations(
            self.data, self.image_folder, split=self.split, subset=self.subset, needs_answer=False
        )
        return first_questions(conversations, processor, self.num_prompts)


@dataclass
class ShapeBench:
    """Random weights in a published shape. The fields are the options of the command."""

    shape: str
    context: int
    assume_tau: str
    nodes: str
    repeats: int
    compile: bool
    draft_vocab_size: int | None
    dtype: str
    device: str
    data_name = ""
    given: Sequence[object] = ()
    pictures: Mapping[str, Sequence[Image]] = field(default_factory=dict, init=False)

    def run(self) -> dict[str, Any]:
        """
        Measures and makes the report.

        Raises:
            MSDError: when an argument cannot be used.
        """
        import torch

        from ..evaluation.make_report import report_shape
        from ..evaluation.shapes import build_pair, shape_config
        from ..loading import parse_device, parse_dtype
        from ..training.draft_vocab import check_size

        sizes = _numbers(int, self.nodes)
        if sizes is None or any(size < 1 for size in sizes):
            raise MSDError(f"--nodes {self.nodes!r} is not a list of numbers like 1,4,8.")
        taus = _numbers(float, self.assume_tau)
        if not taus:
            raise MSDError(f"--assume-tau {self.assume_tau!r} is not a number like 3.8, or a list like 3,4,5.")
        config = shape_config(self.shape)
        size = self.draft_vocab_size
        if size is not None:
            check_size(size, config.get_text_config(decoder=True).vocab_size)
        dtype, device = parse_dtype(self.dtype), parse_device(self.device)
        if isinstance(dtype, str):
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        target, draft = build_pair(config, dtype, device, draft_vocab_size=size)
        return report_shape(self.shape, target, draft, self.context, taus, sizes, self.repeats, self.compile)


def _numbers(kind: Callable[[str], _Number], text: str) -> list[_Number] | None:
    """Reads a list of numbers with commas; `None` if one of them is not a number."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return None


__all__ = ["BASELINES", "PairBench", "ShapeBench"]
