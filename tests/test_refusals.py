"""Each refusal in the table of `examples/SUPPORT.md` is raised with its sentence, and the table lacks none."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import re
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import refusals_table
import survey_pairs
import tiny
import torch
from families import FAMILIES
from recurrent_families import RECURRENT_FAMILIES
from transformers import (
    AttentionInterface,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MllamaConfig,
    MllamaForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import msd_hf
from msd_hf import MSDDraftModel, MSDError
from msd_hf.compat import CACHE_NAME
from msd_hf.decoders import decoder_of
from msd_hf.decoding.pair import state_of
from msd_hf.hook.refusals import REFUSED_ARGUMENTS
from msd_hf.recurrent import kernels
from msd_hf.target import layer_kinds, support
from msd_hf.target.adapter import TargetAdapter


# The modules that raise refusals. Each refusal has its own `raise`.
MODULES = (
    "hook/assistant",
    "hook/refusals",
    "target/support",
    "target/adapter",
    "target/tree_forward",
    "decoding/self_check",
    "decoding/trial",
    "tree/settings",
    "compiled/compile",
)

INPUTS = tiny.make_prompt(4, 7, (3,))
SIZES = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def build_draft(**overrides: Any) -> MSDDraftModel:
    return tiny.build_draft(tiny.pair(0).target, **overrides)


def other_cache(target, draft):
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=64)
    return target, draft, {CACHE_NAME: cache}


def encoder_decoder(target, draft):
    config = T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES)
    return never_running(T5ForConditionalGeneration(config)), draft, {"pixel_values": None}


def without_head(target, draft):
    target.get_output_embeddings = lambda: None
    return target, draft, {}


def cross_attention(target, draft):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, **SIZES, "cross_attention_layers": [0], "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0]}
    target = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=59))
    return never_running(target), draft, {"pixel_values": None}


def linear_attention(target, draft):
    target.config.text_config.layer_types = ["full_attention", "linear_attention"]
    for module in decoder_of(target).modules():
        if hasattr(module, "layer_idx"):  # by which a module finds its states in the cache
            del module.layer_idx
    return target, draft, {}


def with_a_cache_of_its_own(target, draft):
    target._supports_default_dynamic_cache = lambda: False
    return target, draft, {}


def linear_attention_of_early_releases(target, draft):
    target.config.text_config.layer_types = ["full_attention", "linear_attention"]
    return target, draft, {"around": mock.patch.object(support, "KEEPS_STATES", False)}


def with_unknown_kernels(target, draft):
    """Recurrent layers whose functions do not go through what `allow_trees` replaces."""
    kernels.restore_kernels()
    target = RECURRENT_FAMILIES["qwen3_5_text"].build()
    draft = tiny.sized(MSDDraftModel.from_target(target))
    known = {"causal_conv1d_fn": kernels._KERNELS["causal_conv1d_fn"]}
    return target, draft, {"pixel_values": None, "around": mock.patch.object(kernels, "_KERNELS", known)}


def compiled_with_recurrent_layers(target, draft):
    target = RECURRENT_FAMILIES["lfm2"].build()
    draft = tiny.sized(MSDDraftModel.from_target(target))
    draft.generation_config.compile = True
    return never_running(target), draft, {"pixel_values": None}


def compiled_chains(target, draft):
    target, draft, _ = two_chains(target, draft)
    draft.generation_config.compile = True
    return target, draft, {}


def compiled_without_tree_masks(target, draft):
    target, draft, _ = two_chains(target, draft)
    state_of(target, draft).masks_attention = True
    draft.generation_config.compile = True
    return target, draft, {}


def compiled_with_further_inputs(target, draft):
    target = survey_pairs.build_target("idefics")
    draft = tiny.sized(MSDDraftModel.from_target(target))
    draft.generation_config.compile = True
    return never_running(target), draft, {"pixel_values": None}


def padding_before_a_window(target, draft):
    text_config = target.config.text_config
    text_config.layer_types, text_config.sliding_window = ["reference_sliding_attention"] * 2, 2
    ids = torch.tensor([[0, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": ids.sign(), "pixel_values": None}
    return target, draft, {**inputs, CACHE_NAME: DynamicCache()}


def two_chains(target, draft):
    """A target that was found to be right in chains alone."""
    target = copy.deepcopy(tiny.pair(0).target)
    target.config.model_type = "unheard_of"
    draft = build_draft(target_model_type=None)
    state_of(target, draft).is_chain = True
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]])
    return target, draft, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": None}


def with_layers_of_type(kind):
    def change(target, draft):
        target.config.text_config.layer_types = ["full_attention", kind]
        return target, draft, {}

    return change


def with_keys_in_modules(target, draft):
    target.config.text_config.index_topk = 4
    decoder_of(target).layers[0].register_buffer("_cached_keys", None, persistent=False)
    return target, draft, {}


def compiled_with_indexers(target, draft):
    target.config.text_config.layer_types = ["indexed_attention"] * 2
    draft = build_draft()
    draft.generation_config.compile = True
    return target, draft, {}


def compiled_with(family):
    def change(target, draft):
        target = FAMILIES[family].build()
        draft = tiny.sized(MSDDraftModel.from_target(target))
        draft.generation_config.compile = True
        return never_running(target), draft, {"pixel_values": None}

    return change


def recurrent(target, draft):
    target._is_stateful = True
    return target, draft, {}


def with_virtual_tokens(target, draft):
    config = peft.PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", token_dim=32, num_layers=2, num_attention_heads=4
    )
    return peft.get_peft_model(target, config), draft, {}


def with_an_adapter_for_each_row(target, draft):
    model = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model.eval(), draft, {"adapter_names": ["default"]}


def unknown_target(target, draft):
    """A target of unknown kind whose logits over a tree differ from those of plain decoding."""
    target = copy.deepcopy(tiny.pair(0).target)
    target.config.model_type = "unheard_of"
    original = TargetAdapter.verify

    @functools.wraps(original)
    def verify(*args, **kwargs):
        verification = original(*args, **kwargs)
        verification.logits *= 2
        return verification

    return target, build_draft(target_model_type=None), {"verify": verify}


def with_equal_logits(target, draft):
    target, draft, _ = unknown_target(target, draft)
    torch.nn.init.zeros_(target.get_output_embeddings().weight)
    return target, draft, {}


def without_positions(target, draft):
    decoder = target.get_decoder()
    decoder.forward = functools.partial(lambda input_ids: None)
    return target, draft, {}


def without_cache(target, draft):
    decoder = target.get_decoder()
    decoder.forward = functools.partial(lambda input_ids, position_ids: None)
    return target, draft, {}


def with_narrow_embeddings(target, draft):
    target.get_input_embeddings().embedding_dim = 16
    return target, draft, {}


def failing_at_a_tree(target, draft):
    def verify(*args, **kwargs):
        raise ValueError("a mask of four dimensions")

    target, draft, _ = unknown_target(target, draft)
    return target, draft, {"verify": verify}


def with_dynamic_rope(target, draft):
    text_config = target.config.get_text_config()
    text_config.rope_parameters = {**text_config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    text_config.max_position_embeddings = 8
    return target, draft, {}


def compiled_with_layers(target, draft):
    draft = build_draft(target_layers=[0])
    draft.generation_config.compile = True
    return target, draft, {}


def with_causal_attention(target):
    """A target of an attention function that takes no tree mask."""
    AttentionInterface.register("causal_only", sdpa_attention_forward)
    target = copy.deepcopy(tiny.pair(0).target)
    target.set_attn_implementation({"text_config": "causal_only"})
    return target


def compiled_of_unknown_kind(target, draft):
    target = never_running(with_causal_attention(target))
    target.config.model_type = "unheard_of"
    draft = build_draft(target_model_type=None)
    draft.generation_config.compile = True
    return target, draft, {}


def with_layers_of_their_own(target, draft):
    target = with_causal_attention(target)
    for layer in target.get_decoder().layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
    return target, draft, {}


def with_tree(**settings):
    def change(target, draft):
        draft = build_draft()
        for name, value in settings.items():
            setattr(draft.generation_config, name, value)
        return target, draft, {}

    return change


CASES = {
    "trees with too many candidates": with_tree(tree_depth=400, tree_top_k=400),
    "more candidates after a node than the target has tokens": with_tree(tree_top_k=500),
    "`custom_generate`": lambda target, draft: (target, draft, {"custom_generate": lambda **_: None}),
    "the name of a draft": lambda target, draft: (target, "my-draft", {}),
    "the class or the configuration of a draft": lambda target, draft: (target, type(draft), {}),
    "a module around a draft": lambda target, draft: (target, torch.nn.Sequential(draft), {}),
    "`assistant_tokenizer`": lambda target, draft: (target, draft, {"assistant_tokenizer": tiny.tokenizer()}),
    "a cache that is not a plain `DynamicCache`": other_cache,
    "an encoder-decoder target": encoder_decoder,
    "a target without decoder or head": without_head,
    "cross-attention in the first layer": cross_attention,
    "layers that compress tokens (DeepSeek V4)": with_layers_of_type("compressed_sparse_attention"),
    "indexers that keep their keys in the model (GLM-MoE-DSA in early releases of transformers)": with_keys_in_modules,
    "`draft.generation_config.compile=True`, with layers that have an indexer": compiled_with_indexers,
    "`draft.generation_config.compile=True`, with cross-attention layers": compiled_with("mllama"),
    "`draft.generation_config.compile=True`, with a decoder that reads images in every forward (Idefics 1)": (
        compiled_with_further_inputs
    ),
    "`draft.generation_config.compile=True`, with a decoder that takes no tree mask": compiled_without_tree_masks,
    "padding before a window that spares the prompt (Unlimited-OCR)": padding_before_a_window,
    "`draft.generation_config.compile=True`, with layers that scale queries by place (Llama 4)": compiled_with(
        "llama4_text"
    ),
    "recurrent or convolutional layers, with transformers before 5.17": linear_attention_of_early_releases,
    "a target with a cache of its own kind (MiniMax)": with_a_cache_of_its_own,
    "recurrent layers that keep their states in their modules (RecurrentGemma)": linear_attention,
    "recurrent layers with functions that cannot follow a tree": with_unknown_kernels,
    "`draft.generation_config.compile=True`, with recurrent or convolutional layers": compiled_with_recurrent_layers,
    "several prompts at once, with a target that verifies chains only": two_chains,
    "`draft.generation_config.compile=True`, with a target that verifies chains only": compiled_chains,
    "layers of a kind that is not known": with_layers_of_type("deepseek_sparse_attention"),
    "a recurrent target": recurrent,
    "a target with a prompt-learning adapter": with_virtual_tokens,
    "an adapter for each row, or from some position on (`adapter_names`, aLoRA)": with_an_adapter_for_each_row,
    "a target of unknown kind that fails the check at its first call": unknown_target,
    "a target of unknown kind whose logits are no measure": with_equal_logits,
    "a target of unknown kind that fails at a tree": failing_at_a_tree,
    "a decoder without `position_ids`": without_positions,
    "a decoder without a cache": without_cache,
    "embeddings of another size than hidden states": with_narrow_embeddings,
    "rotary embeddings that would change within the call (`dynamic`, `longrope`)": with_dynamic_rope,
    "a draft of another width": lambda target, draft: (
        target,
        tiny.build_draft(tiny.build_target(0, hidden_size=64)),
        {},
    ),
    "a draft for another kind of target": lambda target, draft: (target, build_draft(target_model_type="x"), {}),
    "`draft.generation_config.compile=True`, with a draft that reads layers of the target": compiled_with_layers,
    "`draft.generation_config.compile=True`, with a target of an untested kind whose attention takes no tree "
    "mask": compiled_of_unknown_kind,
    "layers that do not look up their attention where transformers registers it, if it takes no tree "
    "mask": with_layers_of_their_own,
    "a draft that reads layers the target does not have": lambda target, draft: (
        target,
        build_draft(target_layers=[7]),
        {},
    ),
}


def never_running(target):
    """A target whose forward fails the test."""

    @functools.wraps(target.forward)  # `generate` reads its signature
    def fail(*args, **kwargs):
        raise AssertionError("the target was run")

    target.forward = fail
    return target


@functools.cache
def refusal_of(refused: str, by_name: bool = False) -> MSDError:
    """Makes the call that a row of the table refuses; returns its error."""
    target, draft, options = never_running(copy.deepcopy(tiny.pair(0).target)), tiny.pair(0).draft, {}
    setting = re.fullmatch(r"`(draft\.generation_config\.)?(\w+)=(.*)`", refused)
    if setting is None:
        target, draft, options = CASES[refused](target, draft)
    else:
        of_draft, name, value = setting[1], setting[2], ast.literal_eval(setting[3])
        if of_draft:
            draft = copy.deepcopy(draft)
            setattr(draft.generation_config, name, value)
        elif by_name or name in inspect.signature(GenerationMixin.generate).parameters:
            options = {name: value}
        else:
            options = {"generation_config": GenerationConfig(max_new_tokens=3)}
            setattr(options["generation_config"], name, value)
    options = {"trust_remote_code": True, **INPUTS, **options}
    if "generation_config" not in options:
        options["max_new_tokens"] = 3
    options = {name: value for name, value in options.items() if value is not None}
    with (
        pytest.raises(MSDError) as caught,
        options.pop("around", contextlib.nullcontext()),
        mock.patch.object(TargetAdapter, "verify", options.pop("verify", TargetAdapter.verify)),
    ):
        target.generate(**options, assistant_model=draft)
    return caught.value


# Releases of transformers that are too early for recurrent layers refuse them before anything else.
OF_LATER_RELEASES = {
    "recurrent layers that keep their states in their modules (RecurrentGemma)",
    "recurrent layers with functions that cannot follow a tree",
    "`draft.generation_config.compile=True`, with recurrent or convolutional layers",
}


def rows_of_this_release() -> list[str]:
    return [
        refused for refused in refusals_table.rows() if layer_kinds.KEEPS_STATES or refused not in OF_LATER_RELEASES
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refused", rows_of_this_release())
def test_refusal_of_the_table(refused):
    """The call is refused before the target has run, except by the check at the first call."""
    sentence = refusals_table.rows()[refused]
    error = refusal_of(refused)
    assert refusals_table.matches(sentence, str(error)), f"{error}"
    assert isinstance(error, ValueError)


def test_refused_by_name_as_well_as_in_a_generation_config():
    fields = set(vars(GenerationConfig()))
    for refused, sentence in refusals_table.rows().items():
        setting = re.fullmatch(r"`(\w+)=(.*)`", refused)
        if setting is not None and setting[1] in fields:
            assert refusals_table.matches(sentence, str(refusal_of(refused, by_name=True)))


@pytest.mark.parametrize("name, value", [("num_assistant_tokens", 20), ("assistant_confidence_threshold", 0.4)])
def test_values_that_generate_fills_in_are_refused_if_given(name, value):
    assert f"`{name}={value!r}`" in str(refusal_of(f"`{name}={value!r}`", by_name=True))


@pytest.mark.filterwarnings("ignore")
def test_no_refusal_is_missing_from_the_table():
    assert REFUSED_ARGUMENTS.keys() <= refusals_table.names()
    package = Path(msd_hf.__file__).parent
    sites = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((package / f"{module}.py").read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                sites.add((module, node.lineno))
    seen = set()
    for refused in rows_of_this_release():
        place = refusal_of(refused).__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        path = Path(place.tb_frame.f_code.co_filename).relative_to(package).with_suffix("")
        seen.add((path.as_posix(), place.tb_lineno))
    assert seen == sites if layer_kinds.KEEPS_STATES else seen < sites


@pytest.mark.parametrize("value", ["offloaded", "quantized", "offloaded_static", "hybrid", "sliding_window"])
def test_other_caches_are_refused(value):
    assert f"`cache_implementation={value!r}`" in str(refusal_of(f"`cache_implementation={value!r}`", by_name=True))


def test_continuous_batching_is_refused_by_generate_itself():
    with pytest.raises(NotImplementedError, match="assistant_model is not supported for continuous batching"):
        tiny.pair(0).target.generate(
            torch.tensor([[5, 6]]), cache_implementation="paged", assistant_model=tiny.pair(0).draft
        )


@pytest.mark.parametrize(
    "name, value", [("temperature", 1.0), ("do_sample", False), ("num_assistant_tokens_schedule", "constant")]
)
def test_settings_of_the_draft_that_are_off_are_accepted(name, value):
    draft = copy.deepcopy(tiny.pair(0).draft)
    setattr(draft.generation_config, name, value)
    output = tiny.pair(0).target.generate(**INPUTS, max_new_tokens=3, assistant_model=draft)
    assert torch.equal(output, tiny.pair(0).target.generate(**INPUTS, max_new_tokens=3))


def test_compile_config_gets_the_warning_of_generate(monkeypatch):
    """`generate` warns because a dynamic cache cannot be compiled."""
    warnings = []
    monkeypatch.setattr(utils.logger, "warning_once", warnings.append)
    options = {"max_new_tokens": 3, "compile_config": CompileConfig(), "assistant_model": tiny.pair(0).draft}
    tiny.pair(0).target.generate(**INPUTS, **options)
    assert any("`compile_config`" in warning for warning in warnings)


def test_custom_generate_from_a_folder_receives_the_draft(tmp_path):
    """The custom code decides how to use the draft."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids, assistant_model=None, **kwargs):\n"
        "    return model.generate(input_ids, assistant_model=assistant_model, max_new_tokens=5,\n"
        "                          return_dict_in_generate=True)\n"
    )
    output = tiny.pair(0).target.generate(
        input_ids=torch.tensor([[5, 6, 7]]),
        custom_generate=str(tmp_path),
        trust_remote_code=True,
        assistant_model=tiny.pair(0).draft,
    )
    assert type(output) is msd_hf.MSDGenerateOutput
