"""A cache that has lost slots of a sliding window refuses a crop back to them, also after calls with a draft."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW
from transformers import AutoModelForCausalLM, DynamicCache

from msd_hf import MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled


# A window on every layer, and on some; chunks on some.
KINDS = ("mistral", "gemma3_text", "gemma3_text, full layer first", "llama4_text")
LENGTH = 2 * WINDOW + 4


@functools.cache
def pair(kind: str) -> tuple[Any, MSDDraftModel]:
    family = FAMILIES[kind.split(",")[0]]
    config = family.config()
    if "full layer first" in kind:
        config.layer_types = sorted(config.layer_types)
        assert config.layer_types[0] == "full_attention"
    if kind == "llama4_text":
        config.attention_chunk_size = WINDOW
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = AutoModelForCausalLM.from_config(config).double().eval()
        torch.nn.init.normal_(target.get_input_embeddings().weight, std=family.embedding_std or 1.0)
    target.set_experts_implementation("eager")
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    draft = MSDDraftModel.from_target(target).eval()
    draft.generation_config.num_assistant_tokens = 12
    return target, draft


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def extend(kind: str, cache: Any, ids: torch.Tensor, draft: Any, count: int = 6) -> torch.Tensor:
    options = {} if draft is None else {"assistant_model": draft}
    return pair(kind)[0].generate(ids, max_new_tokens=count, **{CACHE_NAME: cache}, **options)


def filled(kind: str, first: Any, second: Any, length: int = LENGTH) -> tuple[DynamicCache, torch.Tensor]:
    """A cache that two calls have filled, the first one with or without a draft, and the tokens in it."""
    cache = DynamicCache(config=pair(kind)[0].config)
    ids = extend(kind, cache, ids_of(length), first)
    ids = extend(kind, cache, torch.cat([ids, ids_of(3, 1)], dim=1), second)
    return cache, ids[:, : cache.get_seq_length()]


def assert_exact_or_refused(kind: str, cache: DynamicCache, ids: torch.Tensor, kept: int, draft: Any) -> bool:
    """Crops a cache and goes on with other tokens; returns whether the crop was refused. Then nothing has changed."""
    length = cache.get_seq_length()
    try:
        cache.crop(kept - length)
    except (RuntimeError, ValueError):
        assert {layer.get_seq_length() for layer in cache.layers} == {length}
        kept, refused = length, True
    else:
        refused = False
    ids = torch.cat([ids[:, :kept], ids_of(3, 2)], dim=1)
    expected = pair(kind)[0].generate(ids, max_new_tokens=6)
    assert torch.equal(extend(kind, cache, ids, draft), expected)
    return refused


@pytest.mark.parametrize("second", [False, True], ids=["plain", "draft"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_lost_without_a_draft_stays_lost(kind, second):
    draft = pair(kind)[1]
    for kept in (1, WINDOW - 1, WINDOW, LENGTH - 1, LENGTH + 2, LENGTH + 6):
        cache, ids = filled(kind, None, draft)
        refused = assert_exact_or_refused(kind, cache, ids, kept, draft if second else None)
        assert refused == (kept < LENGTH + 5)  # the first call left so many tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_only_a_draft_has_filled_may_be_cropped_anywhere(kind):
    draft = pair(kind)[1]
    for kept in (1, WINDOW, LENGTH - 1, LENGTH + 6):
        cache, ids = filled(kind, draft, draft)
        assert not assert_exact_or_refused(kind, cache, ids, kept, draft)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_shorter_than_the_window_may_be_cropped_anywhere(kind):
    draft = pair(kind)[1]
    cache, ids = filled(kind, None, draft, length=2)
    assert not assert_exact_or_refused(kind, cache, ids, 3, draft)


CHANGES = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "copy": copy.deepcopy,
    "rows": lambda cache: cache.batch_select_indices(torch.tensor([0])) or cache,
    "repeated rows": lambda cache: (
        cache.batch_repeat_interleave(2) or cache.batch_select_indices(torch.tensor([1])) or cache
    ),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])) or cache,
    "small crop": lambda cache: cache.crop(-1) or cache,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_lost_stays_lost_after(change):
    draft = pair("mistral")[1]
    cache, ids = filled("mistral", None, draft)
    cache = CHANGES[change](cache)
    ids = ids[:, : cache.get_seq_length()]
    assert assert_exact_or_refused("mistral", cache, ids, LENGTH, draft)


def test_what_was_lost_stays_lost_after_more_calls():
    """Each call makes new layers."""
    draft = pair("mistral")[1]
    cache, ids = filled("mistral", None, draft)
    for turn in range(2):
        ids = extend("mistral", cache, torch.cat([ids, ids_of(3, turn)], dim=1), draft)
    ids = ids[:, : cache.get_seq_length()]
    assert assert_exact_or_refused("mistral", cache, ids, LENGTH, draft)


def test_what_was_lost_stays_lost_after_a_compiled_call(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    draft = copy.deepcopy(pair("mistral")[1])
    draft.generation_config.compile = True
    cache, ids = filled("mistral", None, draft)
    assert assert_exact_or_refused("mistral", cache, ids, LENGTH, draft)
    assert not assert_exact_or_refused("mistral", cache, torch.cat([ids, ids_of(3, 2)], 1), LENGTH + 12, draft)
