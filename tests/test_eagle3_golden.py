"""EAGLE-3 and EAGLE-1 drafts compute what the programs that they come from compute."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import golden_drafts
import golden_sets
import pytest
import torch
from golden_drafts import ATOL_LOGITS, ATOL_STATES, AUX_IDS
from torch import nn
from transformers import DynamicCache

from msd_hf import AutoDraft
from msd_hf.drafting.embedding import prompt_embeds
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.drafting.step import DraftingStep
from msd_hf.target.adapter import TargetPrefill
from msd_hf.tree.settings import TreeSettings


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def load(name, folder, dtype=torch.float32, **fields):
    checkpoint = golden_drafts.write_checkpoint(name, folder)
    if name.startswith("eagle3"):
        fields = {"eagle_aux_hidden_state_layer_ids": AUX_IDS, **fields}
    return AutoDraft.from_pretrained(checkpoint, dtype=dtype, **fields)


def inputs_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[1, L]` after the shift, and the target's hidden states `[1, L, 3 * H]`."""
    values = golden_drafts.load("eagle3_inputs")[0]
    prefix = "h48." if "hidden48" in name else ""
    return values[f"{prefix}input_ids_shifted"], values[f"{prefix}aux_hidden_states"]


def embed(draft, ids: torch.Tensor) -> torch.Tensor:
    if draft.own_embedding is not None:
        return draft.own_embedding(ids)
    table = golden_drafts.load("eagle3_inputs")[0]["target_embed_tokens.weight"]
    return nn.functional.embedding(ids, table.to(draft.dtype))


def head(draft, states: torch.Tensor) -> torch.Tensor:
    return draft.own_head(states if draft.head_norm is None else draft.head_norm(states))


def close(got, expected, atol=ATOL_STATES):
    torch.testing.assert_close(got.float(), expected, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, dtype", [("eagle3_forward_base", torch.float32), *((name, torch.float64) for name in golden_drafts.SETS)]
)
def test_forward_and_steps(name, dtype, tmp_path):
    values, info = golden_drafts.load(name)
    draft = load(golden_drafts.checkpoint_of(name), tmp_path, dtype, **golden_drafts.flags_of(name))
    ids, aux = inputs_of(name)
    given = draft.read_target(aux.to(dtype))
    close(given, values["fc_out"])
    cache, step = DynamicCache(), DraftingStep(draft)
    assert draft.is_plain
    states = draft(embed(draft, ids), given, past_key_values=cache).last_hidden_state
    # What is fed back.
    kind = "postnorm" if info["config"]["norm_output"] else "prenorm"
    close(states, values[f"prefill_hidden_{kind}"])
    close(head(draft, states), values["prefill_logits"], ATOL_LOGITS)
    if "k_cache" in values:
        close(cache.layers[0].keys, values["k_cache"])
        close(cache.layers[0].values, values["v_cache"])
    states = states[:, -1:]
    vocabulary = torch.arange(320) if draft.draft_vocab is None else draft.draft_vocab
    for number in range(5):
        close(states[0, 0], values[f"step_hidden_{kind}"][number])
        logits = head(draft, states)
        close(logits[0, 0], values["step_logits"][number], ATOL_LOGITS)
        row = int(logits[0, 0].argmax())
        token = int(vocabulary[row])
        assert (row, token) == (int(values["step_draft_ids"][number]), int(values["step_target_ids"][number]))
        position = torch.tensor([[ids.shape[1] + number]])
        states = step(embed(draft, torch.tensor([[token]])), states, position, None, cache, int(position))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in golden_drafts.SETS if "hidden48" not in name])
def test_steps_with_given_tokens_behind_a_shorter_prompt(name, tmp_path):
    values, info = golden_drafts.load(name)
    draft = load(golden_drafts.checkpoint_of(name), tmp_path, torch.float64, **golden_drafts.flags_of(name))
    ids, aux = inputs_of(name)
    given = draft.read_target(aux.double())
    for row in (4, 9):
        cache = DynamicCache()
        states = draft(embed(draft, ids[:, : row + 1]), given[:, : row + 1], past_key_values=cache)[0][:, -1:]
        for number in range(3):
            if not info["config"]["norm_output"]:
                close(states[0, 0], values["ttt_hidden_prenorm"][number, row])
            close(head(draft, states)[0, 0], values["ttt_logits"][number, row], ATOL_LOGITS)
            if row + number < 11:
                token = ids[:, row + number + 1 : row + number + 2]
                states = draft(embed(draft, token), states, past_key_values=cache)[0]


def drafter_of(draft, dtype=torch.float64) -> tuple[GrowingDrafter, SimpleNamespace]:
    """A drafter with a stand-in for the target."""
    table = golden_drafts.load("eagle3_inputs")[0]["target_embed_tokens.weight"].to(dtype)
    embedding = nn.Embedding.from_pretrained(table)
    target = SimpleNamespace(
        embedding=embedding,
        embed=embedding,
        head_module=nn.Linear(64, 320, bias=False, dtype=dtype),
        head=None,
        logit_cap=None,
        text_config=SimpleNamespace(vocab_size=320),
        tokens_of=lambda prefill: prefill.tokens,
    )
    return GrowingDrafter(draft, target), target


def prefill_of(ids, embeds, aux, visual_mask=None) -> TargetPrefill:
    return TargetPrefill(
        logits=None,
        inputs_embeds=embeds,
        hidden_states=aux,
        visual_mask=torch.zeros_like(ids, dtype=torch.bool) if visual_mask is None else visual_mask,
        prompt_mask=None,
        next_position=None,
        num_slots=ids.shape[1],
        outputs=None,
        tokens=ids,
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tree_of_two_rounds(dtype, tmp_path):
    values, info = golden_drafts.load("eagle3_tree_base")
    given = golden_drafts.load("eagle3_inputs")[0]
    draft = load(info["checkpoint"], tmp_path, dtype)
    drafter, target = drafter_of(draft, dtype=dtype)
    settings = TreeSettings(info["total_tokens"], info["depth"], info["top_k"])
    ids = given["prompt_ids"]
    drafter.prefill(prefill_of(ids, target.embed(ids), given["aux_hidden_states"].to(dtype)), given["sample_token"])
    root = given["sample_token"]
    for number in (1, 2):
        if number == 2:
            tokens = torch.cat([values["round2.accepted_draft_ids"], values["round2.new_token"]]).unsqueeze(0)
            drafter.accept(tokens, values["round2.hidden_states"].to(dtype), [3])
            root = values["round2.new_token"]
        tree = drafter.propose(root, settings)
        assert tree.tokens.tolist() == values[f"round{number}.draft_tokens"].tolist()
        assert tree.depths[0].tolist() == values[f"round{number}.tree_position_ids"].tolist()
        assert torch.equal(tree.ancestors[0], values[f"round{number}.tree_mask"][0, 0].bool())


@torch.no_grad()
@pytest.mark.parametrize("policy,prefix", [("image_embedding", "image_embeds"), ("placeholder", "placeholder_embeds")])
def test_image(policy, prefix, tmp_path):
    values, info = golden_drafts.load("eagle3_forward_image")
    draft = load(info["checkpoint"], tmp_path, torch.float64, visual_positions=policy)
    _, target = drafter_of(draft)
    ids = values["prompt_ids"]
    aux = values["aux_hidden_states"].double()
    prefill = prefill_of(ids, values["target_inputs_embeds"].double(), aux, values["image_mask"])
    embeds = prompt_embeds(draft, target, prefill, values["sample_token"])[:, 1:]
    cache = DynamicCache()
    states = draft(embeds, draft.read_target(aux), past_key_values=cache)[0]
    close(states, values[f"{prefix}.prefill_hidden_prenorm"])
    states = states[:, -1:]
    for number in range(5):
        close(states[0, 0], values[f"{prefix}.step_hidden_prenorm"][number])
        close(head(draft, states)[0, 0], values[f"{prefix}.step_logits"][number], ATOL_LOGITS)
        token = draft.draft_vocab[head(draft, states)[0, 0].argmax()]
        assert int(token) == int(values[f"{prefix}.step_target_ids"][number])
        states = draft(target.embed(token.view(1, 1)), states, past_key_values=cache)[0]


@torch.no_grad()
def test_eagle1(tmp_path):
    values, info = golden_drafts.load("eagle1_forward_text")
    draft = load(info["checkpoint"], tmp_path, torch.float64)
    table = golden_drafts.weights_of(info["checkpoint"])["embed_tokens.weight"].double()
    lm_head = golden_sets.load("lm_head")[0]["lm_head.weight"].double()
    assert not draft.config.decouple_visual_tokens
    cache = DynamicCache()
    embeds = nn.functional.embedding(values["input_ids_shifted"], table)
    visual_mask = torch.ones_like(values["input_ids_shifted"], dtype=torch.bool)  # is of no account to EAGLE
    states = draft(embeds, values["hidden_states"].double(), visual_mask, past_key_values=cache)[0]
    close(states, values["out_hidden"])
    close(states @ lm_head.T, values["prefill_logits"], ATOL_LOGITS)
    states = states[:, -1:]
    for number in range(4):
        close(states[0, 0], values["step_hidden"][number])
        token = (states @ lm_head.T)[0, 0].argmax()
        assert int(token) == int(values["step_ids"][number])
        states = draft(nn.functional.embedding(token.view(1, 1), table), states, past_key_values=cache)[0]
