"""A ViSpec draft computes what the program of its authors computes."""

from __future__ import annotations

from types import SimpleNamespace

import golden_drafts
import golden_sets
import pytest
import torch
from golden_drafts import ATOL_LOGITS, ATOL_STATES
from torch import nn
from transformers import DynamicCache

from msd_hf import AutoDraft, ViSpecDraftModel
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.target.adapter import TargetPrefill
from msd_hf.tree.settings import TreeSettings


SETS = sorted(path.stem for path in golden_drafts.FOLDER.glob("vispec_forward_*.json"))


def load(name, folder, dtype=torch.float64):
    values, info = golden_drafts.load(name)
    draft = AutoDraft.from_pretrained(golden_drafts.write_checkpoint(info["checkpoint"], folder), dtype=dtype)
    assert type(draft) is ViSpecDraftModel
    return draft, {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}


def close(got, expected, atol=ATOL_STATES):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", SETS)
def test_forward(name, tmp_path):
    """The compressed rows, the vectors of the images, the input of the layer and its output."""
    draft, values = load(name, tmp_path)
    embeds = values["inputs_embeds_shifted"]
    mask = torch.cat([values["image_mask"][:, 1:], torch.zeros(1, 1, dtype=torch.bool)], dim=1)
    embeds, vectors = draft.compress_images(embeds, mask)
    assert (vectors is None) == ("text" in name and "two" not in name)
    if vectors is None:
        assert "img_adapted" not in values
    rows = values["layer_position_ids"][0]
    compressed = embeds[:, rows][mask[:, rows]]
    if vectors is not None:
        close(compressed, values["img_adapted"][:, :-1].flatten(0, 1))
        vectors = vectors[:, rows]
    arguments = (embeds[:, rows], values["hidden_states"][:, rows], mask[:, rows])
    close(draft.fuse(*arguments, image_vectors=vectors), values["layer_input"])
    cache = DynamicCache()  # without one, transformers takes gaps between positions for several texts
    states = draft(*arguments, image_vectors=vectors, position_ids=rows.unsqueeze(0), past_key_values=cache)[0]
    close(states, values["layer_output"])
    close(states, values["out_hidden"][:, rows])


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [(SETS[0], torch.float32), *((name, torch.float64) for name in SETS)])
def test_prompt_steps_and_a_second_round(name, dtype, tmp_path):
    draft, values = load(name, tmp_path, dtype)
    table = golden_drafts.weights_of(golden_drafts.load(name)[1]["checkpoint"])["embed_tokens.weight"].to(dtype)
    embedding = nn.Embedding.from_pretrained(table)
    head = nn.Linear(64, 320, bias=False, dtype=dtype)
    head.weight.copy_(golden_sets.load("lm_head")[0]["lm_head.weight"])
    target = SimpleNamespace(
        embedding=embedding,
        embed=embedding,
        head_module=head,
        head=head,
        logit_cap=None,
        text_config=SimpleNamespace(vocab_size=320),
    )
    drafter = GrowingDrafter(draft, target)
    ids, root = values["prompt_ids"], values["sample_token"]
    prefill = TargetPrefill(
        logits=None,
        inputs_embeds=values["target_inputs_embeds"],
        hidden_states=values["hidden_states"],
        visual_mask=values["image_mask"],
        prompt_mask=None,
        next_position=None,
        num_slots=ids.shape[1],
        outputs=None,
        tokens=ids,
    )
    drafter.prefill(prefill, root)
    close(drafter.cache.layers[0].keys[:, :, : values["k_cache"].shape[2]], values["k_cache"])
    close(drafter.cache.layers[0].values[:, :, : values["v_cache"].shape[2]], values["v_cache"])
    assert drafter.cache.get_seq_length() == values["k_cache"].shape[2]
    assert int(drafter._next_positions[0, 0]) == int(values["real_length"])
    close(drafter._last_state[0, 0], values["step_hidden"][0])
    close(head(drafter._last_state)[0, 0], values["step_logits"][0], ATOL_LOGITS)
    tree = drafter.propose(root, TreeSettings(5, 3, 1))
    assert tree.tokens[0].tolist() == [int(root), *values["step_ids"].tolist()]
    drafter.accept(values["round2_tokens"], values["round2_hidden_states"], [3])
    drafter.feed_pending()
    close(drafter._last_state[0, 0], values["round2_out_hidden"][0, -1])
    assert int(drafter._next_positions[0, 0]) == int(values["round2_real_length"])
    tree = drafter.propose(values["round2_tokens"][:, -1], TreeSettings(3, 1, 1))
    assert tree.tokens[0, 1:].tolist() == values["round2_step_ids"].tolist()
