"""The kinds of drafts that are trained, and what differs between them before a training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..draft.base import DraftPreTrainedModel
from ..draft.eagle3.configuration import default_aux_ids
from ..draft.eagle3.modeling import Eagle3DraftModel
from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDUnsupportedError
from .recipes import EAGLE3_RECIPES, RECIPES, Recipe


if TYPE_CHECKING:
    from .arguments import MSDTrainingArguments


@dataclass(frozen=True)
class TrainedKind:
    """
    A kind of draft that is trained. What differs in a step is asked of the draft ([`~msd_hf.draft.interface`]).

    Args:
        name: the kind, for messages.
        model_class: class of its drafts.
        recipes: its recipes by name.
        fields: makes the fields of a new draft's configuration of the arguments and of the layers of the target that
            it reads.
        auto_layers: the layers that `target_layers="auto"` means for a target of this many layers.
        needs_layers: whether its drafts read nothing but layers of the target, and not its last hidden state.
        unused: arguments that mean nothing for the kind: the value that they must keep, and what to do instead.
    """

    name: str
    model_class: Any
    recipes: Mapping[str, Recipe]
    fields: Callable[[MSDTrainingArguments, list[int] | None], dict[str, Any]]
    auto_layers: Callable[[int], list[int]]
    needs_layers: bool
    unused: Mapping[str, tuple[Any, str]]


def _msd_fields(args: MSDTrainingArguments, layers: list[int] | None) -> dict[str, Any]:
    recipe = args.make_recipe()
    return {
        "num_hidden_layers": recipe.draft_layers,
        "decouple_visual_tokens": args.decouple_visual_tokens,
        "global_image_vector": recipe.global_image_vector,
        "target_layers": layers,
    }


def _msd_layers(num_layers: int) -> list[int]:
    # The draft reads the last hidden state anyway, so the high layer lies some layers below the last one.
    return sorted({min(1, num_layers - 1), num_layers // 2, max(0, num_layers - 3)})


def _eagle3_fields(args: MSDTrainingArguments, layers: list[int] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_hidden_layers": args.make_recipe().draft_layers,
        # The configuration counts hidden states: the output of layer i is hidden state i + 1.
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers or ()],
        "draft_vocab_size": args.draft_vocab_size,
    }
    return fields if args.visual_positions is None else {**fields, "visual_positions": args.visual_positions}


def _eagle3_layers(num_layers: int) -> list[int]:
    """Those of the hidden states that a draft reads by default; of a target that is too small for them, evenly spaced
    ones."""
    states = default_aux_ids(num_layers)
    if not 2 < states[1] < states[2]:
        states = sorted({num_layers // 4, num_layers // 2, num_layers - num_layers // 4})
    return [state - 1 for state in states]


_OF_EAGLE3 = "only for an EAGLE-3 draft (`draft_kind`)"

KINDS = {
    "msd": TrainedKind(
        "an MSD draft",
        MSDDraftModel,
        RECIPES,
        _msd_fields,
        _msd_layers,
        False,
        {
            "visual_positions": (None, f"{_OF_EAGLE3}; an MSD draft has `decouple_visual_tokens`"),
            "draft_vocab_size": (None, f"{_OF_EAGLE3}; `msd-hf draft-vocab` gives a trained MSD draft a vocabulary"),
            "init_from_head": (False, f"{_OF_EAGLE3}; an MSD draft has no head of its own"),
        },
    ),
    "eagle3": TrainedKind(
        "an EAGLE-3 draft",
        Eagle3DraftModel,
        EAGLE3_RECIPES,
        _eagle3_fields,
        _eagle3_layers,
        True,
        {
            "feature_loss_weight": (
                0.0,
                "its outputs are no hidden states of the target; it learns from tokens alone",
            ),
            "init_from_last_layer": (False, "its layer has other inputs than the target's; there is `init_from_head`"),
            "global_image_vector": (False, "it has no such vector"),
            "decouple_visual_tokens": (True, "`visual_positions` says what it is fed"),
        },
    ),
}


def kind_of_draft(draft: Any) -> str | None:
    """The name in `KINDS` of the kind of a draft; `None` for one that is not trained."""
    # Not the class: one kind of draft may be made of another, as ViSpec's of MSD's.
    types = {kind.model_class.config_class.model_type: name for name, kind in KINDS.items()}
    return types.get(draft.config.model_type)


def check_kind(draft: DraftPreTrainedModel, args: MSDTrainingArguments) -> None:
    """
    Refuses to train a draft of another kind than the arguments are for.

    Raises:
        MSDUnsupportedError: names both kinds, and what to do.
    """
    kind = kind_of_draft(draft)
    if kind is None:
        raise MSDUnsupportedError(
            f"`MSDTrainer` does not train {type(draft).__name__.removesuffix('DraftModel')} drafts. It trains "
            f"{' or '.join(f'{known.name} ({name!r})' for name, known in KINDS.items())}."
        )
    if kind != args.draft_kind:
        raise MSDUnsupportedError(
            f"The draft is {KINDS[kind].name}, and the arguments are for {args.kind.name}: set `draft_kind` to "
            f"{kind!r}."
        )


__all__ = ["KINDS", "TrainedKind", "check_kind", "kind_of_draft"]
