"""What the decoding loop asks of a draft model, of whatever kind. Each kind registers here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import MSDUnsupportedError
from .plain_forward import PlainForward
from .plain_modules import TensorFunction


EMBEDDINGS = -1  # stands for the decoder's input among the layers of the target that a draft reads

# What a draft is fed at visual positions: the embedding of the placeholder token; the image's embedding as the target
# has it; one row for each run of visual positions, the mean of its rows; no row at all; the image's embedding in place
# of the target's hidden states, too, as MSD feeds it. A draft that makes its own rows of each image is "compressed":
# that is no choice of the user.
VISUAL_POSITIONS = ("placeholder", "image_embedding", "pooled", "dropped", "decoupled")


@dataclass(frozen=True)
class TargetReads:
    """
    The hidden states of the target that a draft reads. They lie side by side in one tensor `[..., W]`: the outputs of
    `layers`, in order, then the last hidden state. W, in shapes everywhere, is `width`.

    Args:
        layers (`tuple[int, ...]`): decoder layers of the target, counted from 0, in increasing order; `EMBEDDINGS` for
            the input of layer 0.
        hidden_size (`int`): width of each hidden state.
        with_last (`bool`, defaults to `True`): whether the draft reads the last hidden state.
    """

    layers: tuple[int, ...]
    hidden_size: int
    with_last: bool = True

    @property
    def width(self) -> int:
        """Width of the joined hidden states."""
        return (len(self.layers) + self.with_last) * self.hidden_size

    def join(self, layer_states: list[torch.Tensor], last: torch.Tensor) -> torch.Tensor:
        """Joins the outputs of the layers and the last hidden state (each `[..., hidden_size]`) to `[..., width]`."""
        if not layer_states:
            return last
        return torch.cat([*layer_states, last] if self.with_last else layer_states, dim=-1)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Splits `[..., width]` into the outputs of the layers (`None` without layers) and the last hidden state."""
        if not self.layers:
            return None, states
        return states[..., : -self.hidden_size], states[..., -self.hidden_size :]


class Draft(Protocol):
    """The interface of a draft model. Shapes: B rows, T positions; H is the width of the draft, W that of
    [`TargetReads`]."""

    config: Any
    generation_config: Any  # the settings of the candidate tree
    draft_vocab: torch.Tensor | None  # [V']: the target's id of each row of the draft's head; `None`: the target's own
    visual_positions: str  # one of `VISUAL_POSITIONS`, or "compressed"
    rows_per_image: int  # rows that are left of each run of visual positions, if they are pooled or compressed
    own_embedding: nn.Module | None  # embedding of tokens; `None`: the target's
    own_head: nn.Module | None  # scores the tokens of `draft_vocab`; `None`: the target's head
    head_norm: nn.Module | None  # stands between the draft's output and its head
    rotary_emb: Any  # (states, position_ids [1, P]) -> cosines and sines [1, P, head_dim]

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def reads_layers(self) -> bool:
        """Whether the draft reads other hidden states of the target than the last one."""

    def reads_of(self, decoder: Any) -> TargetReads:
        """The hidden states that the draft reads of a target with this decoder."""

    @property
    def reads_visual_states(self) -> bool:
        """Whether the draft reads hidden states of the target at visual rows."""

    @property
    def num_cache_layers(self) -> int:
        """Number of layers that keep keys and values."""

    @property
    def is_plain(self) -> bool:
        """Whether `plain_forward` computes what the forward computes. If not, drafting is not compiled."""

    def read_target(self, states: torch.Tensor) -> torch.Tensor:
        """Combines hidden states of the target `[B, T, W]` into one input of the draft, `[B, T, H]`. Returns its
        argument if the draft reads the last hidden state alone."""

    def image_vectors(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The vectors `[B, T, H]` that the forward adds to the text rows of a prompt; `earlier` are the embeddings
        `[B, E, H]` of visual rows before it. The nodes of trees get the vector of the last row. `None` if the draft
        has no such vectors; then its forward gets no argument `image_vectors`."""

    def compress_images(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings `[B, T, H]` of a prompt with compressed images, each in the last `rows_per_image` rows of its
        run, and vectors as of `image_vectors`; `earlier` is the vector of the row before, `[B, 1, H]`. Only asked of
        drafts whose `visual_positions` are "compressed"."""

    def plain_forward(self, convert: Callable[[nn.Module], TensorFunction] = ...) -> PlainForward:
        """The forward over a few nodes of a tree, with `convert(module)` in place of each module."""

    def head_rows(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The rows of the target's head for `draft_vocab`: weight `[V', H]`, and bias `[V']` if the head has one;
        `None` if no rows can be taken from the head."""

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def __call__(
        self,
        *,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        last_row_only: bool = False,
    ) -> Any:
        """Runs the draft over a prompt, or over a few nodes. `hidden_states` `[B, T, H]` are results of `read_target`
        or of the draft; the result has a `last_hidden_state` of this shape, or `[B, 1, H]` with `last_row_only`.
        `inputs_embeds` `[B, T, E]` are as wide as the embedding. At visual positions they are as `visual_positions`
        says; the draft decides whether its input is another one there."""


_KINDS: dict[Any, type] = {}  # configuration class -> model class


def register_draft(config_class: type, model_class: type) -> None:
    """Registers a kind of draft, so that `generate` takes its models as `assistant_model`. [`msd_hf.register`] tells
    the Auto classes about it."""
    _KINDS[config_class] = model_class


def draft_kinds() -> dict[Any, type]:
    """The registered kinds: configuration class -> model class."""
    return dict(_KINDS)


def is_draft(model: Any) -> bool:
    """Whether a model is a draft of a registered kind."""
    return isinstance(model, tuple(_KINDS.values()))


_target_checks: list[Callable[[Any], None]] = []


def register_target_check(check: Callable[[Any], None]) -> None:
    """Registers what refuses targets that cannot be served. It belongs to a room above this one, and a new draft must
    not promise what `generate` refuses."""
    _target_checks.append(check)


def check_target_of_draft(target: Any) -> None:
    """
    Refuses to make a draft for a target that `generate` would refuse.

    Args:
        target (`PreTrainedModel` or `PreTrainedConfig`): the target, or its configuration.

    Raises:
        MSDUnsupportedError: the sentence of `generate`, and what to do.
    """
    for check in _target_checks:
        try:
            check(target)
        except MSDUnsupportedError as error:
            raise MSDUnsupportedError(f"{error} To make a draft for it all the same, give `check=False`.") from error


__all__ = [
    "EMBEDDINGS",
    "VISUAL_POSITIONS",
    "Draft",
    "TargetReads",
    "check_target_of_draft",
    "draft_kinds",
    "is_draft",
    "register_draft",
    "register_target_check",
]
