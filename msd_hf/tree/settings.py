"""The settings of the candidate tree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import MSDError, shown


if TYPE_CHECKING:
    from transformers import GenerationConfig

# The size of trees in compiled rounds, whose shape is fixed, and where a measurement must not depend on the machine.
DEFAULT_NUM_ASSISTANT_TOKENS = 59
DEFAULT_TREE_DEPTH = 5
DEFAULT_TREE_TOP_K = 10

# Field of a draft's generation config that sizes its trees -> the field of `TreeSettings`, its least and its largest
# value. The largest values are far above those that pay.
TREE_SETTINGS = {
    "num_assistant_tokens": ("num_nodes", 1, 1024),
    "tree_depth": ("depth", 0, 512),
    "tree_top_k": ("top_k", 1, 512),
    "suffix_nodes": ("suffix_nodes", 0, 1024),
}
# Each level has `tree_top_k` squared candidates, which take about 40 bytes each.
MAX_CANDIDATES = 2**22
# All fields of a draft's generation config that are read.
DRAFT_SETTINGS = (*TREE_SETTINGS, "compile", "max_visual_rows")

# `num_assistant_tokens="auto"`, the default, and the bounds that it implies.
AUTO = "auto"
AUTO_NUM_ASSISTANT_TOKENS = 64
AUTO_TREE_DEPTH = 40


@dataclass(frozen=True)
class TreeSettings:
    """Bounds of the size of a candidate tree.

    Args:
        num_nodes (`int`): nodes of the tree, the root included. 1 means no drafting at all.
        depth (`int`): expansions after the first; nodes reach at most `depth + 1` levels below the root.
        top_k (`int`): candidates per expanded node, and nodes expanded per level. 1 makes the tree a chain.
        is_auto (`bool`): whether each tree gets the most profitable size within these bounds.
        suffix_nodes (`int`): nodes that are added when the text repeats itself. 0: none.
    """

    num_nodes: int = DEFAULT_NUM_ASSISTANT_TOKENS
    depth: int = DEFAULT_TREE_DEPTH
    top_k: int = DEFAULT_TREE_TOP_K
    is_auto: bool = False
    suffix_nodes: int = 0

    def __post_init__(self) -> None:
        for name, (field, least, most) in TREE_SETTINGS.items():
            value = getattr(self, field)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or not least <= value <= most:
                expected = f"at most {most}" if is_integer and value > most else f"an integer of at least {least}"
                raise MSDError(f"`draft.generation_config.{name}` must be {expected}, got {shown(value)}.")
        num_candidates = (self.depth + 1) * self.top_k**2
        if num_candidates > MAX_CANDIDATES:
            raise MSDError(
                f"`draft.generation_config`: `tree_depth={self.depth}` and `tree_top_k={self.top_k}` make "
                f"{num_candidates:,} candidates a tree, at most {MAX_CANDIDATES:,} are allowed. Lower one of the two."
            )

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> TreeSettings:
        """Reads `num_assistant_tokens` (which may be `"auto"`), `tree_depth`, `tree_top_k` and `suffix_nodes` from a
        draft's generation config. A draft without a number of its own has automatic trees; with `compile=True`, trees
        of the default size.

        Raises:
            MSDError: when a setting is not an integer in its range, or a tree would have too many candidates.
        """

        def read(name: str, default: Any) -> Any:
            value = getattr(generation_config, name, None)
            return default if value is None else value

        is_compiled = getattr(generation_config, "compile", None) is True
        num_nodes = read("num_assistant_tokens", DEFAULT_NUM_ASSISTANT_TOKENS if is_compiled else AUTO)
        is_auto = num_nodes == AUTO
        return cls(
            num_nodes=AUTO_NUM_ASSISTANT_TOKENS if is_auto else num_nodes,
            depth=read("tree_depth", AUTO_TREE_DEPTH if is_auto else DEFAULT_TREE_DEPTH),
            top_k=read("tree_top_k", DEFAULT_TREE_TOP_K),
            is_auto=is_auto,
            suffix_nodes=read("suffix_nodes", 0),
        )

    @property
    def num_candidates(self) -> int:
        """Slots of the draft's cache for one tree: one for each expanded node below the root."""
        return self.depth * self.top_k

    def as_chain(self) -> TreeSettings:
        """Returns the settings of chains that are as deep."""
        return replace(self, top_k=1, num_nodes=min(self.num_nodes, self.depth + 2), suffix_nodes=0)

    def limited_to(self, tokens_left: int | None) -> TreeSettings:
        """Returns the settings without levels that are too deep to be emitted before the length limit."""
        if tokens_left is None:
            return self
        num_levels = tokens_left - 1  # the last token is the bonus token
        if num_levels <= 0:
            return replace(self, num_nodes=1, depth=0, suffix_nodes=0)
        depth = min(self.depth, num_levels - 1)
        return replace(self, depth=depth, suffix_nodes=min(self.suffix_nodes, num_levels - depth - 1))


def default_size(generation_config: GenerationConfig) -> dict[str, int]:
    """The settings of a draft with automatic trees that give it trees of the default size, by their names in its
    generation config; none for a draft whose trees have a size."""
    settings = TreeSettings.from_generation_config(generation_config)
    if not settings.is_auto:
        return {}
    top_k = min(settings.top_k, DEFAULT_TREE_TOP_K)
    return {
        "num_assistant_tokens": DEFAULT_NUM_ASSISTANT_TOKENS,
        "tree_depth": DEFAULT_TREE_DEPTH,
        "tree_top_k": top_k,
    }


__all__ = ["DRAFT_SETTINGS", "TREE_SETTINGS", "TreeSettings", "default_size"]
