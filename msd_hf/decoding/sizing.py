"""The tree policy of a call: its experience is kept for the pair of draft and target."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from ..draft.modeling_msd import MSDDraftModel
from ..target.adapter import TargetAdapter
from ..tree.experience import Experience
from ..tree.policy import AdaptiveTreePolicy, TreePolicy
from ..tree.settings import TreeSettings


_experiences: weakref.WeakKeyDictionary[MSDDraftModel, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()


def make_tree_policy(
    settings: TreeSettings,
    draft: MSDDraftModel,
    adapter: TargetAdapter,
    batch_size: int,
    eos_token_ids: Collection[int] = (),
) -> TreePolicy:
    """The policy that the settings ask for."""
    if not settings.is_auto:
        return TreePolicy(settings)
    of_targets = _experiences.setdefault(draft, weakref.WeakKeyDictionary())
    kinds = of_targets.setdefault(adapter.target, {})
    key = (
        str(draft.device),
        draft.dtype,
        adapter.target.dtype,
        batch_size,
        adapter.target.config._attn_implementation,
        settings,
    )
    experience = kinds.setdefault(key, Experience(settings.num_nodes))
    return AdaptiveTreePolicy(settings, experience, eos_token_ids)


__all__ = ["make_tree_policy"]
