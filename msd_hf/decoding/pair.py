"""What is kept between calls of `generate` for one pair of target and draft."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

from ..compiled.compile import CompiledFunctions
from ..compiled.cuda_graphs import RecordingMemory
from ..kv.fixed import SpareBuffers
from ..tree.experience import Experience
from ..tree.policy import AdaptiveTreePolicy, TreePolicy
from ..tree.saved_experience import Circumstances, forget, table_of
from ..tree.settings import TreeSettings
from .notice import AcceptanceNotice


@dataclass
class PairState:
    """
    What is kept for one pair of target and draft, as long as both models live, or until [`release`].

    Args:
        compiled (`CompiledFunctions`): compiled decoders of the target, and compiled drafting.
        target_buffers, draft_buffers (`SpareBuffers`): cache buffers that the last compiled call left.
        recordings (`RecordingMemory`): memory for CUDA graphs.
        experiences (`dict`): costs and acceptance of automatic trees, by the circumstances of a call and the settings.
        notice (`AcceptanceNotice`): warns once if the draft is of no use to the target.
        is_checked (`bool`): whether trees were compared with plain decoding on this target, see
            `check_tree_verification`.
        checked_inputs (`set[str]`): the further inputs of the decoder that were there in such a comparison.
        is_chain (`bool`): whether that check found that the target verifies chains only.
        masks_attention (`bool`): whether it found that the target's attention functions must get masks themselves, see
            [`TargetAdapter.masks_attention`].
        is_window_checked (`bool`): the same for a context that is longer than the target's sliding window.
        is_compared (`bool`): whether the target was compared with the one that the draft was made for.
    """

    compiled: CompiledFunctions = field(default_factory=CompiledFunctions)
    target_buffers: SpareBuffers = field(default_factory=SpareBuffers)
    draft_buffers: SpareBuffers = field(default_factory=SpareBuffers)
    recordings: RecordingMemory = field(default_factory=RecordingMemory)
    experiences: dict[Hashable, Experience] = field(default_factory=dict)
    notice: AcceptanceNotice = field(default_factory=AcceptanceNotice)
    is_checked: bool = False
    checked_inputs: set[str] = field(default_factory=set)
    is_chain: bool = False
    masks_attention: bool = False
    is_window_checked: bool = False
    is_compared: bool = False

    def tree_policy(
        self,
        settings: TreeSettings,
        circumstances: Circumstances,
        draft: Any,
        eos_token_ids: Collection[int] = (),
        num_rows: int = 1,
    ) -> TreePolicy:
        """
        Makes the tree policy that the settings ask for. Automatic trees use what earlier calls of the pair have
        measured.

        Args:
            settings (`TreeSettings`): settings of the draft's trees.
            circumstances (`Circumstances`): what the costs of a round depend on, besides the settings.
            draft (`Draft`): the draft, whose checkpoint may bring experience.
            eos_token_ids (`Collection[int]`): tokens that end a text.
            num_rows (`int`, defaults to 1): rows of the batch.
        """
        if not settings.is_auto:
            return TreePolicy(settings)
        with _lock:
            key = str(draft.device), circumstances, settings
            if key not in self.experiences:
                self.experiences[key] = table_of(draft).make(circumstances, settings)
            experience = self.experiences[key]
        return AdaptiveTreePolicy(settings, experience.for_rows(num_rows), eos_token_ids)


_lock = threading.RLock()  # threads share the tables below
_States = weakref.WeakKeyDictionary[Any, PairState]
_pairs: weakref.WeakKeyDictionary[Any, _States] = weakref.WeakKeyDictionary()  # target -> draft -> state
_companions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # target -> a draft that lives with it


def state_of(target: Any, draft: Any) -> PairState:
    """Returns what is kept for a pair, and makes it at the first call of the pair."""
    with _lock:
        of_target = _pairs.setdefault(target, weakref.WeakKeyDictionary())
        return of_target.setdefault(draft, PairState())


def companion_of(target: Any, make: Callable[[Any], Any]) -> Any:
    """Returns a draft that lives as long as the target, or until [`release`]. `make(target)` makes it at the first
    call. Measurements keep their own drafts in this way, because what was learnt about a draft is lost with it."""
    with _lock:
        if target not in _companions:
            _companions[target] = make(target)
        return _companions[target]


def release(target_or_draft: Any) -> None:
    """
    Frees what is kept between calls of `generate` for a target or a draft: buffers, compiled functions, recorded
    graphs, and what `num_assistant_tokens="auto"` has learnt. The next call starts afresh. Without this call all of it
    is freed together with the models.

    Args:
        target_or_draft (`PreTrainedModel`): every pair with this model is released.
    """
    # `generate` of a peft model runs its base model, so the pair is that of the base model.
    model = target_or_draft.get_base_model() if hasattr(target_or_draft, "get_base_model") else target_or_draft
    with _lock:
        forget(model)
        _pairs.pop(model, None)
        _companions.pop(model, None)
        for drafts in list(_pairs.values()):
            drafts.pop(model, None)


__all__ = ["PairState", "companion_of", "release", "state_of"]
