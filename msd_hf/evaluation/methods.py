"""The methods of decoding that are compared, as arguments of `generate` and settings of the draft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging import version
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel

from ..decoding.pair import companion_of
from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDError
from ..observer import current_observer, observing
from ..tree.settings import (
    DEFAULT_NUM_ASSISTANT_TOKENS,
    DEFAULT_TREE_DEPTH,
    DEFAULT_TREE_TOP_K,
    TreeSettings,
)
from .assisted_chain import assisted_chain


# Releases before 5.13 compare copied candidates with the EOS token, and fail if there is none.
PROMPT_LOOKUP_NEEDS_EOS = version.parse(transformers.__version__) < version.parse("5.13")


@dataclass(frozen=True)
class Method:
    """
    One method of decoding.

    Args:
        name: name in reports.
        description: one line for the reader of a report.
        drafted: whether `generate` gets the draft.
        assisted: whether the draft runs as a chain in the assisted loop of transformers instead of our loop.
        arguments: further arguments of `generate`.
        tree: fields of the draft's generation config that the method changes.
        copies_prompt: whether candidates are copied from the prompt. The tokens of visual positions are suppressed
            then, because the target would look for the images that belong to them.
        make_draft: makes the draft for a target; `None` for the user's draft.
        is_compiled: whether `generate` runs the target's forward under `torch.compile`, with a static cache. Each
            prompt is answered once before it is timed, because another length of the cache is compiled anew.
    """

    name: str
    description: str
    drafted: bool = False
    assisted: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tree: Mapping[str, Any] = field(default_factory=dict)
    copies_prompt: bool = False
    make_draft: Callable[[PreTrainedModel], MSDDraftModel] | None = None
    is_compiled: bool = False

    @property
    def has_own_loop(self) -> bool:
        """Whether our own loop decodes. Only that loop reports acceptance lengths and phases."""
        return self.drafted and not self.assisted

    @contextmanager
    def prepared(self, target: PreTrainedModel, draft: MSDDraftModel | None) -> Iterator[dict[str, Any]]:
        """
        Yields the arguments of `generate` for this method. Inside the `with` block the draft's generation config has
        the method's settings.

        Raises:
            MSDError: when the method needs a draft and there is none.
        """
        if not self.drafted:
            arguments = dict(self.arguments)
            if self.copies_prompt and (suppressed := visual_token_ids(target.config)):
                arguments["suppress_tokens"] = suppressed
            if self.is_compiled and target.device.type == "cpu":
                arguments["compile_config"] = _compile_on_cpu()
            yield arguments
            return
        if self.make_draft is not None:
            draft = self.make_draft(target)
        if draft is None:
            raise MSDError(f"The method {self.name!r} needs a draft.")
        own = draft.generation_config
        draft.generation_config = copy.deepcopy(own)
        try:
            for name, value in self.tree.items():
                setattr(draft.generation_config, name, value)
            if self.tree.get("compile") and TreeSettings.from_generation_config(own).is_auto:
                # A compiled tree has a fixed shape, so the default size replaces "auto".
                draft.generation_config.num_assistant_tokens = draft.generation_config.tree_depth = None
            is_users = self.make_draft is None
            with (
                assisted_chain(target, draft) if self.assisted else nullcontext(draft) as assistant,
                observing(notices=is_users and current_observer().notices),
            ):
                yield {**self.arguments, "assistant_model": assistant}
        finally:
            draft.generation_config = own


VANILLA = Method("vanilla", "`generate` alone")
COMPILED_GENERATE = Method(
    "compiled-generate",
    '`generate(cache_implementation="static")` alone, its forward under `torch.compile`, warm',
    arguments={"cache_implementation": "static"},
    is_compiled=True,
)
PROMPT_LOOKUP = Method(
    "prompt-lookup",
    "`generate(prompt_lookup_num_tokens=10)`: candidates are copied from the text so far",
    arguments={"prompt_lookup_num_tokens": 10},
    copies_prompt=True,
)
# A draft's own `num_assistant_tokens` counts the nodes of a tree. With `None` transformers uses its default length.
ASSISTED_CHAIN = Method(
    "assisted-chain",
    "the draft as a chain in transformers' own assisted loop, by its default settings: 20 tokens, or until the draft "
    "is unsure",
    drafted=True,
    assisted=True,
    tree={"num_assistant_tokens": None},
)
CHAIN = Method(
    "chain",
    "the draft with `tree_top_k=1` in our own loop: one candidate a level",
    drafted=True,
    tree={"tree_top_k": 1},
)
TREE = Method("tree", "the draft with its own settings", drafted=True)
DEFAULT_SIZE = Method(
    "default-size",
    f"the draft with trees of {DEFAULT_NUM_ASSISTANT_TOKENS} nodes, as compiled rounds draft by default",
    drafted=True,
    tree={
        "num_assistant_tokens": DEFAULT_NUM_ASSISTANT_TOKENS,
        "tree_depth": DEFAULT_TREE_DEPTH,
        "tree_top_k": DEFAULT_TREE_TOP_K,
    },
)
AUTO = Method(
    "auto",
    'the draft with `num_assistant_tokens="auto"`: the tree fits the machine',
    drafted=True,
    tree={"num_assistant_tokens": "auto"},
)
COMPILED = Method(
    "compiled",
    'the draft with `compile=True`, in trees of the default size where its own setting is "auto"',
    drafted=True,
    tree={"compile": True},
)


def random_draft(target: PreTrainedModel) -> MSDDraftModel:
    """A draft with random weights. Each call returns the same object, so that its tree policy keeps what it learnt."""
    return companion_of(target, _make_random_draft)


def _make_random_draft(target: PreTrainedModel) -> MSDDraftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MSDDraftModel.from_target(target).eval()


USELESS_DRAFT = Method(
    "useless-draft",
    'a draft with random weights and `num_assistant_tokens="auto"`: the cost of finding out that it is useless',
    drafted=True,
    tree={"num_assistant_tokens": "auto", "tree_depth": None},
    make_draft=random_draft,
)

METHODS = {
    method.name: method
    for method in (
        VANILLA,
        COMPILED_GENERATE,
        PROMPT_LOOKUP,
        ASSISTED_CHAIN,
        CHAIN,
        TREE,
        DEFAULT_SIZE,
        AUTO,
        COMPILED,
        USELESS_DRAFT,
    )
}
DEFAULT_BASELINES = ("prompt-lookup", "chain")


def _compile_on_cpu() -> CompileConfig:
    """Settings by which `generate` compiles on a CPU too. Some forwards break into several graphs there."""
    config = CompileConfig(mode="default", fullgraph=False)
    config._compile_all_devices = True
    return config


def visual_token_ids(config: PreTrainedConfig) -> list[int]:
    """The ids of the tokens that stand for visual positions."""
    names = ("image_token_id", "video_token_id")
    return [token for name in names if (token := getattr(config, name, None)) is not None]


def choose_methods(baselines: Sequence[str]) -> list[Method]:
    """
    Chooses the methods with these names, and always `generate` alone and the tree.

    Raises:
        MSDError: when a name is unknown.
    """
    unknown = sorted(set(baselines) - set(METHODS))
    if unknown:
        raise MSDError(f"Unknown baseline {unknown[0]!r}: choose from {', '.join(METHODS)}.")
    chosen = {"vanilla", "tree", *baselines}
    return [method for name, method in METHODS.items() if name in chosen]


def check_methods(methods: Sequence[Method], target: PreTrainedModel, generate_arguments: Mapping[str, Any]) -> None:
    """
    Refuses methods that the installed transformers cannot run with this target.

    Args:
        generate_arguments: arguments of `generate` that all methods get.

    Raises:
        MSDError: when a method cannot run; the message says what to do.
    """
    if generate_arguments.get("eos_token_id", target.generation_config.eos_token_id) is not None:
        return
    for method in methods:
        if method.copies_prompt and PROMPT_LOOKUP_NEEDS_EOS:
            raise MSDError(
                f"{method.name!r} needs a target with an EOS token in transformers {transformers.__version__}: choose "
                "other baselines, or transformers 5.13 or later."
            )


__all__ = [
    "ASSISTED_CHAIN",
    "AUTO",
    "CHAIN",
    "COMPILED",
    "COMPILED_GENERATE",
    "DEFAULT_BASELINES",
    "DEFAULT_SIZE",
    "METHODS",
    "PROMPT_LOOKUP",
    "TREE",
    "USELESS_DRAFT",
    "VANILLA",
    "Method",
    "check_methods",
    "choose_methods",
]
