"""The check of an unknown target: sound models pass in every dtype, broken ones do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES
from test_odd_calls import small_draft, small_target
from thinning import thinned
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from msd_hf import MSDDraftModel, MSDUnsupportedError
from msd_hf.attention.masks import tree_attention_mask
from msd_hf.decoders import decoder_of
from msd_hf.decoding import pair, self_check, trial
from msd_hf.decoding.self_check import NUM_SIBLINGS
from msd_hf.kv.in_place import InPlaceLayer
from msd_hf.target import tree_forward
from msd_hf.tree.settings import DEFAULT_TREE_DEPTH


WINDOW = 12  # longer than the made-up context that shows siblings
TREES = (NUM_SIBLINGS + 1, NUM_SIBLINGS + 3)  # the nodes of a trial's tree: with one level, and with two
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = torch.arange(3, 14).unsqueeze(0)
TWICE = IDS.expand(2, -1)  # a batch gets no chains in place of trees
ALTERNATING = ["sliding_attention", "full_attention"]


def chameleon() -> Any:
    """Masks the logits of image tokens with the smallest number of the dtype."""
    config = ChameleonConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        vq_config={
            "embed_dim": 32,
            "num_embeddings": 16,
            "latent_channels": 32,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
        },
        vocabulary_map={"<image>": 5} | {f"IMGIMG{chr(65 + number)}Z": 60 + number for number in range(16)},
    )
    torch.manual_seed(0)
    return ChameleonForConditionalGeneration._from_config(config).eval()


def chunked() -> Any:
    """Llama 4 without experts, under another name. In low precision experts may change with the rounding."""
    target = FAMILIES["llama4_text"].build(attention_chunk_size=WINDOW, moe_layers=[], dtype=torch.float32)
    target.config.model_type = "chunked"
    return target


KINDS: dict[str, Callable[[], Any]] = {
    "chunked": chunked,
    "gpt_neox": lambda: small_target("gpt_neox"),
    "chameleon": chameleon,
    "starcoder2": lambda: small_target("starcoder2", sliding_window=WINDOW, num_key_value_heads=2),
    "olmo3": lambda: small_target("olmo3", sliding_window=WINDOW, num_key_value_heads=2, layer_types=ALTERNATING),
}


def build(kind: str, dtype: torch.dtype) -> Any:
    """A target whose logits depend on what it attends to; random ones are usually decided by the last token."""
    target = KINDS[kind]().to(dtype)
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    torch.manual_seed(1)
    for name, parameter in target.named_parameters():
        if parameter.dim() > 1 and "vq" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return target


def generate(target: Any, max_new_tokens: int = 12, **inputs: Any) -> torch.Tensor:
    draft = small_draft().to(target.dtype)
    draft.generation_config.num_assistant_tokens = 12
    return target.generate(**{"inputs": IDS, **inputs}, max_new_tokens=max_new_tokens, assistant_model=draft)


# Mistakes. Each is made in forwards over the trees of a trial alone.


def mask_becomes(monkeypatch: Any, change: Callable[[torch.Tensor, int], None]) -> None:
    """Changes the mask of a tree, whichever way it goes to attention."""

    def build_mask(visible, *args, **kwargs):
        mask = tree_attention_mask(visible, *args, **kwargs)
        if visible.shape[1] in TREES:
            change(mask, visible.shape[1])
        return mask

    monkeypatch.setattr(tree_forward, "tree_attention_mask", build_mask)


def siblings_are_seen(target: Any, monkeypatch: Any) -> None:
    mask_becomes(monkeypatch, lambda mask, length: mask[..., -length:].zero_())


def windows_are_ignored(target: Any, monkeypatch: Any) -> None:
    mask_becomes(monkeypatch, lambda mask, length: mask[..., :-length].zero_())


def places_count_as_positions(target: Any, monkeypatch: Any) -> None:
    def before(module, args, kwargs):
        named = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        positions = named["position_ids"]
        if positions.shape[-1] in TREES:
            named["position_ids"] = positions[..., :1] + torch.arange(positions.shape[-1])
        return (), named

    decoder_of(target).rotary_emb.register_forward_pre_hook(before, with_kwargs=True)


def slots_are_not_moved(target: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(InPlaceLayer, "keep_slots", lambda self, start, slots: self.truncate(start + slots.shape[1]))


def nothing_is_a_number(target: Any, monkeypatch: Any) -> None:
    def after(module, args, output):
        if output[0].shape[1] in TREES:
            output["last_hidden_state"] = torch.full_like(output[0], float("nan"))
        return output

    decoder_of(target).register_forward_hook(after)


FAULTS = {
    siblings_are_seen: tuple(KINDS),
    windows_are_ignored: ("starcoder2", "olmo3", "chunked"),
    places_count_as_positions: ("gpt_neox", "olmo3"),
    slots_are_not_moved: ("gpt_neox", "olmo3"),
    nothing_is_a_number: ("gpt_neox", "chameleon"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_target_passes(kind, dtype):
    target = build(kind, dtype)
    output = generate(target)
    if dtype == torch.float64:
        assert torch.equal(output, target.generate(IDS, max_new_tokens=12))


@thinned("fault,kind,dtype", [(fault, kind, d) for fault, kinds in FAULTS.items() for kind in kinds for d in DTYPES])
def test_a_broken_target_is_refused(fault, kind, dtype, monkeypatch):
    target = build(kind, dtype)
    fault(target, monkeypatch)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        generate(target, inputs=TWICE)


@pytest.mark.parametrize("fault", [siblings_are_seen, places_count_as_positions, slots_are_not_moved])
def test_a_target_that_is_right_in_chains_alone_gets_chains(fault, monkeypatch):
    target, draft = build("gpt_neox", torch.float64), small_draft()
    expected = target.generate(IDS, max_new_tokens=12)
    fault(target, monkeypatch)
    lengths = []
    target.get_decoder().register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    draft.generation_config.num_assistant_tokens, draft.generation_config.suffix_nodes = 30, 4
    for _ in range(2):
        lengths.clear()
        output = target.generate(IDS, max_new_tokens=12, assistant_model=draft)
        assert torch.equal(output, expected)
    assert pair.state_of(target, draft).is_chain
    assert max(lengths[1:]) == DEFAULT_TREE_DEPTH + 2  # the root and a chain
    for inputs in ({"inputs": TWICE}, batch_of(5, 11)):
        with pytest.raises(MSDUnsupportedError, match="chains only, of one sequence without padding"):
            target.generate(**inputs, max_new_tokens=12, assistant_model=draft)


@pytest.mark.parametrize("does", ["rejects", "misreads"])
def test_a_decoder_that_takes_no_mask_of_a_tree(does):
    """Its attention functions get the mask, also in a batch with padding, and plain forwards are as before."""
    target, draft = build("gpt_neox", torch.float64), small_draft()
    inputs = batch_of(5, 11, 8)
    expected = target.generate(**inputs, max_new_tokens=12)

    def before(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            if does == "rejects":
                raise ValueError("too many values to unpack (expected 2)")
            kwargs["attention_mask"] = torch.zeros_like(mask)
        return args, kwargs

    target.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    for _ in range(2):
        assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), expected)
    state = pair.state_of(target, draft)
    assert state.masks_attention and not state.is_chain
    assert torch.equal(target.generate(**inputs, max_new_tokens=12), expected)


def test_a_target_that_is_wrong_in_chains_too_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TREES", (*TREES, 2, 3))
    target = build("gpt_neox", torch.float64)
    siblings_are_seen(target, monkeypatch)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        generate(target)


@pytest.mark.parametrize("node", [0, 1, NUM_SIBLINGS, NUM_SIBLINGS + 1, NUM_SIBLINGS + 2])
def test_each_node_of_both_branches_counts(node):
    target = build("gpt_neox", torch.float64)

    def after(module, args, output):
        if output[0].shape[1] == TREES[1]:
            output[0][:, node] *= -1

    decoder_of(target).register_forward_hook(after)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        generate(target, inputs=TWICE)


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    ids = torch.arange(3, 3 + longest).expand(len(lengths), -1) % 70
    return {"inputs": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts(kind, monkeypatch):
    target, inputs = build(kind, torch.float64), batch_of(5, 11, 8)
    expected = target.generate(**inputs, max_new_tokens=12)
    assert torch.equal(generate(target, **inputs), expected)
    siblings_are_seen(target, monkeypatch)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        generate(target, **inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_family_would_pass(name, monkeypatch):
    """Images, positions of several dimensions, windows, capped logits, prompts of different lengths."""
    monkeypatch.setattr(self_check, "KNOWN_MODEL_TYPES", frozenset())
    family = FAMILIES[name]
    target, num_images = family.build(), int(family.has_images)
    prompts = [family.prompt(1, num_images), family.prompt(2, num_images, num_text=15)]
    if "sdpa" not in family.attentions:
        prompts = prompts[1:]  # eager attention gives no numbers for padded rows in float64
    inputs = family.collate(prompts)
    expected = target.generate(**inputs, max_new_tokens=8)
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    assert torch.equal(target.generate(**inputs, max_new_tokens=8, assistant_model=draft), expected)
    assert pair.state_of(target, draft).is_checked


def test_numbers_at_padding_do_not_matter(monkeypatch):
    """Attention kernels may leave anything there."""
    target, inputs = build("gpt_neox", torch.float64), batch_of(5, 11)
    original = trial._made_up

    def made_up(slots, *arguments):
        for layer in slots.cache.layers:
            layer.keys[0, :, :6] = layer.values[0, :, :6] = torch.nan
        made = original(slots, *arguments)
        for layer in slots.cache.layers:
            layer.keys[0, :, :6] = layer.values[0, :, :6] = 0
        return made

    monkeypatch.setattr(trial, "_made_up", made_up)
    assert torch.equal(generate(target, **inputs), target.generate(**inputs, max_new_tokens=12))


def test_a_long_prompt_hides_nothing(monkeypatch):
    """Among 400 tokens, a few siblings that are seen change a logit by less than bfloat16 rounds it."""
    target = build("gpt_neox", torch.bfloat16)
    siblings_are_seen(target, monkeypatch)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        generate(target, inputs=torch.arange(400).expand(2, -1) % 70 + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FAULTS[windows_are_ignored])
def test_a_window_is_tried_by_the_first_call_that_can_leave_it(kind, dtype, monkeypatch):
    target, draft = build(kind, dtype), small_draft().to(dtype)
    windows_are_ignored(target, monkeypatch)
    options = {"inputs": TWICE[:, :3], "assistant_model": draft}
    output = target.generate(**options, max_new_tokens=WINDOW - 3)
    if dtype == torch.float64:
        assert torch.equal(output, target.generate(TWICE[:, :3], max_new_tokens=WINDOW - 3))
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        target.generate(**options, max_new_tokens=40)


def test_what_was_tried_is_not_tried_again():
    target, draft = build("olmo3", torch.float64), small_draft()
    trees = []
    decoder_of(target).register_forward_hook(lambda module, args, output: trees.append(output[0].shape[1]))
    draft.generation_config.num_assistant_tokens = 3
    numbers = []
    for max_new_tokens in (3, 5, 5, 12, 40, 40):
        target.generate(IDS[:, :3], max_new_tokens=max_new_tokens, assistant_model=draft)
        numbers.append(sum(trees.count(length) for length in TREES))
    # One level, in two contexts; two levels, in two contexts; a short way beyond the window; far beyond it.
    assert numbers == [2, 4, 4, 5, 6, 6]
    state = pair.state_of(target, draft)
    assert state.is_checked and state.is_window_checked


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_logits_that_say_nothing_are_no_proof(weight):
    target = build("gpt_neox", torch.float32)
    torch.nn.init.constant_(target.get_output_embeddings().weight, weight)
    with pytest.raises(MSDUnsupportedError, match="nothing can be learnt from its logits"):
        generate(target)


def test_the_check_draws_no_random_numbers():
    target = build("olmo3", torch.float64)
    outputs = []
    for draft in (None, small_draft()):
        torch.manual_seed(0)
        outputs.append(target.generate(IDS, max_new_tokens=12, do_sample=True, assistant_model=draft).tolist())
    assert outputs[0] == outputs[1]


# The comparison.


def logits(*rows: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([rows], dtype=dtype)


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "got, expected, difference",
    [
        (logits([0.0, 2.0]), logits([0.0, 2.0]), 0.0),
        (logits([0.5, 2.0]), logits([0.0, 2.0]), 0.5),
        (logits([0.0, 2.0, LEAST]), logits([0.0, 2.0, LEAST]), 0.0),
        (logits([0.5, 2.0, LEAST], dtype=torch.float32), logits([0.0, 2.0, LEAST], dtype=torch.float32), 0.5),
        (logits([0.0, 2.0, -torch.inf]), logits([0.0, 2.0, LEAST]), 0.0),
        (logits([0.0, 2.0, 1.0]), logits([0.0, 2.0, LEAST]), torch.inf),  # no longer masked
        (logits([0.0, LEAST, 2.0]), logits([0.0, 2.0, LEAST]), torch.inf),  # the other one is masked
        (logits([0.0, 2.0], [0.0, torch.nan]), logits([0.0, 2.0], [0.0, 2.0]), torch.inf),
        (logits([torch.nan, 2.0, LEAST]), logits([0.0, 2.0, LEAST]), torch.inf),
        (logits([0.0, 2.0], [1.1, 1.0]), logits([0.0, 2.0], [0.0, 2.0]), 2.0),  # another token is chosen
        (logits([0.0, 2.0], [0.5, 0.0]), logits([0.0, 2.0], [0.0, 0.0]), 0.5),
        (logits([0.0, 0.0], [0.5, 0.5]), logits([0.0, 0.0], [0.5, 0.5]), torch.nan),
        (logits([0.0, 2.0], [0.0, 2.0]), logits([0.0, 2.0], [torch.nan, 2.0]), torch.nan),
        (logits([LEAST, 2.0]), logits([LEAST, 2.0]), torch.nan),  # one logit alone
        (logits([0.0, torch.inf]), logits([0.0, torch.inf]), torch.nan),
    ],
)
def test_the_difference_of_logits(got, expected, difference):
    assert trial._difference(got, expected) == pytest.approx(difference, nan_ok=True)
