"""Tiny random LLaVA targets, prompts for them, and drafts that are random or fitted briefly to their target."""

from __future__ import annotations

import functools
import random
import string
from dataclasses import dataclass
from typing import Any

import shared_fits
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    set_seed,
)

from msd_hf import MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.tree.settings import default_size


VOCAB_SIZE = 60
IMAGE_TOKEN_ID = 59
PAD_TOKEN_ID = 0
IMAGE_SIZE = 16
NUM_IMAGE_TOKENS = 4


def build_target(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    num_layers: int = 2,
    num_kv_heads: int = 4,
    vocab_size: int = VOCAB_SIZE,
    initializer_range: float = 0.15,
    **text_fields: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, large enough that generated text varies. A larger `initializer_range` makes
    drafting harder."""
    text = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 512,
            "initializer_range": initializer_range,
            "pad_token_id": PAD_TOKEN_ID,
            **text_fields,
        }
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // 2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=vocab_size - 1, image_seq_length=NUM_IMAGE_TOKENS
    )
    with torch.random.fork_rng(devices=[]):
        set_seed(seed)
        target = LlavaForConditionalGeneration(config)
        torch.nn.init.normal_(target.get_input_embeddings().weight)
        torch.nn.init.normal_(target.get_output_embeddings().weight, std=0.5)
        # With the default initialisation, images would hardly change the decoder's output.
        for parameter in target.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = PAD_TOKEN_ID
    target.set_attn_implementation(attention)
    return target.to(dtype).eval()


def make_prompt(
    seed: int,
    num_text: int = 8,
    images_at: tuple[int, ...] = (),
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
    vocab_size: int = VOCAB_SIZE,
) -> dict[str, torch.Tensor]:
    """
    Inputs of `generate`: one prompt of random tokens.

    Args:
        num_text: text tokens.
        images_at: an image stands before each of these text tokens (`num_text`: after the last one).
        padding: number of padding tokens on the left; an `attention_mask` excludes them.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, vocab_size - 1, (num_text,), generator=generator).tolist()
    ids: list[int] = []
    for place in range(num_text + 1):
        ids += [vocab_size - 1] * (NUM_IMAGE_TOKENS * images_at.count(place))
        ids += text[place : place + 1]
    inputs = {"input_ids": torch.tensor([[PAD_TOKEN_ID] * padding + ids])}
    if padding:
        inputs["attention_mask"] = torch.tensor([[0] * padding + [1] * len(ids)])
    if images_at:
        shape = (len(images_at), 3, IMAGE_SIZE, IMAGE_SIZE)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(dtype)
    return inputs


def turns_on_one_cache(target: Any, draft: Any, images_by_turn: list[tuple[int, ...]]) -> list[list[list[list[int]]]]:
    """The sequences after each turn of a chat: of the target alone, and with the draft, each with its own cache.
    `images_by_turn`: argument `images_at` of `make_prompt`."""
    caches: list[dict[str, Any]] = [{}, {}]
    ids, turns = torch.zeros(1, 0, dtype=torch.long), []
    for turn, images_at in enumerate(images_by_turn):
        prompt = make_prompt(10 + turn, 6, images_at=images_at)
        prompt["input_ids"] = ids = torch.cat([ids, prompt["input_ids"]], dim=1)
        outputs = []
        for number, assistant in enumerate((None, draft)):
            output = target.generate(
                **prompt,
                **caches[number],
                max_new_tokens=8,
                return_dict_in_generate=True,
                suppress_tokens=[IMAGE_TOKEN_ID],
                assistant_model=assistant,
            )
            caches[number] = {CACHE_NAME: output[CACHE_NAME]}
            outputs.append(output.sequences.tolist())
        turns.append(outputs)
        ids = torch.tensor(outputs[0])
    return turns


def left_padded(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts of `make_prompt` as one batch."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {"input_ids": torch.full((len(prompts), length), PAD_TOKEN_ID)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, prompt in enumerate(prompts):
        ids = prompt["input_ids"][0]
        batch["input_ids"][row, length - len(ids) :] = ids
        batch["attention_mask"][row, length - len(ids) :] = 1
    images = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
    return batch | ({"pixel_values": torch.cat(images)} if images else {})


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Each id is a word of two letters, some with a space before; decoding adds no spaces between words."""
    letters = string.ascii_lowercase
    words = [" " * (n % 3 == 0) + letters[n % 26] + letters[(7 * n + n // 26) % 26] for n in range(VOCAB_SIZE)]
    words[IMAGE_TOKEN_ID] = "abcdef"  # `StopStringCriteria` decodes each token after this word
    assert len(set(words)) == VOCAB_SIZE
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False)


def build_draft(
    target: LlavaForConditionalGeneration, seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any
) -> MSDDraftModel:
    """A draft with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = sized(MSDDraftModel.from_target(target, **overrides).eval())
    return draft if dtype is None else draft.to(dtype)


def sized(draft: MSDDraftModel) -> MSDDraftModel:
    """Gives a draft trees of the default size. Automatic trees depend on the machine, and pause a draft of no use, so
    that tests would verify hardly any tree."""
    draft.generation_config.update(**default_size(draft.generation_config))
    return draft


def fit_draft(
    draft: MSDDraftModel, target: LlavaForConditionalGeneration, steps: int = 80, seed: int = 0
) -> MSDDraftModel:
    """Fits a draft to text that its target generates, so that some of its candidates are accepted. Takes about a
    second; both models are float32 during the fit."""
    target_dtype, draft_dtype = target.dtype, draft.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target.float()
        draft.float().train()
        batches = [_rollout(target, seed + number, images) for number, images in enumerate(((), (2,), (0, 5), (8,)))]
        head = target.get_output_embeddings()
        optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for step in range(steps):
            embeds, hidden, visual_mask, goal_states, goal_probs = batches[step % len(batches)]
            states = draft(embeds, hidden, visual_mask).last_hidden_state
            loss = torch.nn.functional.smooth_l1_loss(states, goal_states)
            loss = loss - (goal_probs * head(states).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        target.to(target_dtype)
        target.zero_grad()
    return draft.to(draft_dtype).eval()


@torch.no_grad()
def _rollout(
    target: LlavaForConditionalGeneration, seed: int, images_at: tuple[int, ...], rows: int = 32, num_tokens: int = 40
) -> tuple[torch.Tensor, ...]:
    """Inputs and goals of the draft on text that the target generates: shifted embeddings, hidden states and visual
    mask; the next hidden states, and the target's probabilities after them."""
    prompts = [make_prompt(1000 * seed + row, 8, images_at, dtype=torch.float32) for row in range(rows)]
    batch = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    image_id = target.config.image_token_id
    ids = target.generate(
        **batch, max_new_tokens=num_tokens, do_sample=True, temperature=0.5, suppress_tokens=[image_id]
    )
    seen: dict[str, torch.Tensor] = {}

    def record(module, args, kwargs, output):
        seen["embeds"], seen["states"] = kwargs["inputs_embeds"], output[0]

    handle = target.get_decoder().register_forward_hook(record, with_kwargs=True)
    logits = target(input_ids=ids, pixel_values=batch.get("pixel_values")).logits
    handle.remove()
    embeds, states = seen["embeds"].clone(), seen["states"].clone()
    visual_mask = ids == image_id
    return embeds[:, 1:], states[:, :-1], visual_mask[:, 1:], states[:, 1:], (2 * logits[:, 1:]).softmax(-1)


@dataclass
class Pair:
    """A target and a draft for it."""

    target: LlavaForConditionalGeneration
    draft: MSDDraftModel
    fitted: bool

    def with_tree(self, num_nodes: int, depth: int, top_k: int) -> MSDDraftModel:
        """Sets the size of the tree; returns the draft."""
        settings = self.draft.generation_config
        settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = num_nodes, depth, top_k
        return self.draft

    def set_attention(self, target: str, draft: str | None = None) -> None:
        self.target.set_attn_implementation(target)
        self.draft.set_attn_implementation(draft or target)


# Pairs differ in depth, in heads, in the kind of the draft's layers, and in its dtype.
_KINDS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "num_kv_heads": 2},
    {"num_kv_heads": 1, "draft": {"input_layernorm": True, "attention_bias": True}},
    {"initializer_range": 0.18, "draft": {"num_hidden_layers": 2}},
    {"num_layers": 3, "draft_dtype": torch.float32},
    {"draft_dtype": torch.bfloat16, "head_dim": 16},
    {"num_layers": 1, "draft": {"decouple_visual_tokens": False}},
    {"initializer_range": 0.12},
    {"fitted": False, "num_layers": 3, "num_kv_heads": 2},
]
NUM_PAIRS = len(_KINDS)


def is_fitted(number: int) -> bool:
    """Whether the draft of a pair was fitted to its target."""
    return _KINDS[number].get("fitted", True)


@functools.cache
def pair(number: int) -> Pair:
    """One of `NUM_PAIRS` pairs, built once a session. A test that changes a model must restore it."""
    kind = dict(_KINDS[number])
    draft_fields, draft_dtype = kind.pop("draft", {}), kind.pop("draft_dtype", None)
    fitted = kind.pop("fitted", True)
    target = build_target(seed=number, **kind)
    draft = build_draft(target, seed=number, **draft_fields)
    if fitted:
        shared_fits.fitted(f"pair-{number}", draft, lambda: fit_draft(draft, target, seed=number))
    return Pair(target, draft.to(draft_dtype or target.dtype), fitted)


def random_prompt(rng: random.Random) -> dict[str, torch.Tensor]:
    """A prompt with no, one or two images at random places."""
    num_text = rng.choice([1, 2, 5, 9, 14])
    images_at = rng.choice([(), (), (0,), (num_text // 2,), (num_text,), (0, num_text // 2 + 1)])
    return make_prompt(rng.randrange(10**6), num_text, images_at, padding=rng.choice([0, 0, 0, 1, 6]))
