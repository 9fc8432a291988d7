"""A draft with one vector of all images: what the vector is, and that every way of decoding gives nodes the same."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import tiny
import torch

from msd_hf import MSDCheckpointError, MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import pair as pair_states
from msd_hf.draft.global_image import GlobalImage
from msd_hf.engines.vllm.refusals import check_exportable
from msd_hf.errors import MSDUnsupportedError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments, new_draft
from msd_hf.training.checkpoint_space import count_parameters
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states


@pytest.fixture(scope="module")
def pair():
    target = tiny.build_target(seed=1, num_layers=3, num_kv_heads=2)
    draft = tiny.build_draft(target, seed=1, global_image_vector=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in (draft.global_image.score, draft.global_image.proj):
            torch.nn.init.normal_(part.weight, std=0.1)  # a new draft adds zeros
    return tiny.Pair(target, draft, False)


def generate(pair: Any, inputs: dict[str, Any], budget: Any = None, is_compiled: bool = False, **options: Any) -> Any:
    draft = pair.with_tree(24, 4, 4)
    draft.generation_config.max_visual_rows, draft.generation_config.compile = budget, is_compiled
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "do_sample": False, **options}
    return pair.target.generate(**inputs, **options, assistant_model=draft)


def check_cache(pair, output, pixel_values):
    """The draft's keys and values are those of one pass over all rows that it holds."""
    memory, ids = output[CACHE_NAME]._msd_draft_memory, output.sequences
    adapter = TargetAdapter(pair.target)
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    features = adapter.features(input_ids=ids, attention_mask=torch.ones_like(ids), **images)
    rows = torch.tensor(memory.rows)
    with torch.no_grad():
        cache = pair.draft(
            inputs_embeds=features.inputs_embeds[:, rows + 1],
            hidden_states=features.hidden_states[:, rows],
            visual_mask=features.visual_mask[:, rows + 1],
            position_ids=rows.unsqueeze(0),
            attention_mask=torch.ones(1, len(rows), dtype=torch.long),
            use_cache=True,
        )[CACHE_NAME]
    assert len(rows) > output.sequences.shape[1] // 3
    for ours, theirs in zip(memory.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, : len(rows)], theirs.keys, atol=1e-9, rtol=0)
        torch.testing.assert_close(ours.values[:, :, : len(rows)], theirs.values, atol=1e-9, rtol=0)


def test_it_is_attention_to_the_visual_rows_before_a_row():
    torch.manual_seed(0)
    pool = GlobalImage(6, 1e-6).double()
    embeds = 30 * torch.randn(2, 9, 6, dtype=torch.float64)
    visual_mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 0], [0] * 9]).bool()
    got = pool(embeds, visual_mask)
    normed = torch.nn.functional.rms_norm(embeds, (6,), eps=1e-6)
    for row in range(9):
        seen = normed[0, : row + 1][visual_mask[0, : row + 1]]
        expected = torch.zeros(6, dtype=torch.float64)
        if len(seen):
            weights = (10 * torch.tanh(pool.score(seen) / 10)).softmax(0)
            expected = pool.proj((weights * seen).sum(0))
        torch.testing.assert_close(got[0, row], expected)
    assert not got[1].any()
    torch.testing.assert_close(pool(embeds[:1, 4:], visual_mask[:1, 4:], embeds[:1, 1:3]), got[:1, 4:])
    huge = torch.randn(1, 9, 6).half() * 60000  # overflows to infinity
    assert GlobalImage(6, 1e-6).half()(huge.nan_to_num(), visual_mask[:1]).isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [None, 3])
def test_one_prompt(budget, attention, pair):
    pair.draft.set_attn_implementation(attention)
    inputs = tiny.make_prompt(1, 8, (2, 5))
    output = generate(pair, inputs, budget)
    pair.draft.set_attn_implementation("sdpa")
    assert torch.equal(output.sequences, pair.target.generate(**inputs, max_new_tokens=16))
    check_cache(pair, output, inputs["pixel_values"])


def test_rows_of_a_batch_have_their_own(pair):
    """Rows with two images, one and none, of different lengths, of which the first ends early."""
    prompts = [tiny.make_prompt(1, 4, (0, 3)), tiny.make_prompt(2, 5, (0,)), tiny.make_prompt(3, 11)]
    inputs = tiny.left_padded(prompts)
    end = {"eos_token_id": int(pair.target.generate(**prompts[0], max_new_tokens=3)[0, -1])}
    vectors = []
    hook = pair.draft.global_image.register_forward_hook(lambda *arguments: vectors.append(arguments[2][:, -1]))
    output = generate(pair, inputs, 3, **end)
    assert torch.equal(output.sequences, pair.target.generate(**inputs, max_new_tokens=16, **end))
    assert output.acceptance_lengths == [generate(pair, prompt, 3, **end).acceptance_lengths[0] for prompt in prompts]
    hook.remove()
    torch.testing.assert_close(vectors[0], torch.cat(vectors[1:]))
    assert len(output.acceptance_lengths[0]) < len(output.acceptance_lengths[1])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_turns_go_on_with_the_images_of_earlier_ones(is_compiled, pair, monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())
    first, second = tiny.make_prompt(1, 8, (2,)), tiny.make_prompt(7, 6, (2, 4))
    output = generate(pair, first, is_compiled=is_compiled)
    check_cache(pair, output, first["pixel_values"])
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
    answer = generate(pair, given, is_compiled=is_compiled, **{CACHE_NAME: output[CACHE_NAME]})
    assert torch.equal(answer.sequences, pair.target.generate(**{**given, "pixel_values": pixels}, max_new_tokens=16))
    check_cache(pair, answer, pixels)
    # A turn without an image, after a copy of the cache was cut back to the first image.
    other = copy.deepcopy(answer[CACHE_NAME])
    end = int((first["input_ids"][0] == tiny.IMAGE_TOKEN_ID).nonzero()[-1]) + 2
    other.crop(end - other.get_seq_length())
    ids = torch.cat([output.sequences[:, :end], torch.tensor([[7, 9, 4]])], dim=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = generate(pair, given, is_compiled=is_compiled, **{CACHE_NAME: other})
    check_cache(pair, again, first["pixel_values"])


def test_a_budget_drops_rows_of_earlier_turns_from_it(pair):
    first, second = tiny.make_prompt(1, 8, (2,)), tiny.make_prompt(7, 6, (2, 4))
    output = generate(pair, first, 4)
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    memory = generate(pair, given, 4, **{CACHE_NAME: output[CACHE_NAME]})[CACHE_NAME]._msd_draft_memory
    features = TargetAdapter(pair.target).features(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat([first["pixel_values"], second["pixel_values"]]),
    )
    rows = torch.tensor(memory.rows)[torch.tensor(memory.visual)]
    assert len(rows) == 4 and rows[0] < output.sequences.shape[1]
    torch.testing.assert_close(memory.visual_embeds, features.inputs_embeds[:, rows + 1])


def test_training_reads_it_and_knows_which_rows_are_read(pair, tmp_path):
    target = pair.target
    args = MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", global_image_vector=True)
    draft = new_draft(target, args).double()
    assert draft.num_parameters() == count_parameters(target.config, args)
    features = TargetAdapter(target).features(**tiny.make_prompt(0, 12, (3,)))
    rows = draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, ~features.visual_mask)
    plain = draft.image_vectors(rows.inputs_embeds, rows.visual_mask)
    assert not plain.any()  # a new draft starts without it
    list(unrolled_states(draft, rows, 2))[1].sum().backward()
    assert draft.global_image.proj.weight.grad.any()
    seen = []
    draft.global_image.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    left_out = torch.zeros_like(rows.visual_mask)
    left_out[0, rows.visual_mask[0].nonzero().squeeze(1)[1:]] = True
    list(unrolled_states(draft, rows.without(left_out), 2))
    assert len(seen) == 2 and all(int(mask.sum()) == 1 for mask in seen)


def test_it_is_saved_and_a_draft_without_its_weights_is_refused(pair, tmp_path):
    pair.draft.save_pretrained(tmp_path)
    loaded = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.global_image.score.weight, pair.draft.global_image.score.weight)
    assert torch.equal(loaded.global_image.proj.weight, pair.draft.global_image.proj.weight)
    other = tiny.build_draft(pair.target)
    other.config.global_image_vector = True
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MSDCheckpointError, match=r"global_image\."):
        MSDDraftModel.from_pretrained(tmp_path / "other")
    with pytest.raises(MSDUnsupportedError, match="Train one without `global_image_vector`"):
        check_exportable(loaded)
