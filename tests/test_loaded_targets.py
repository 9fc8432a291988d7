"""Targets in low precision, offloaded, quantized, adapted, compiled or sharded give the tokens that they give alone.

bitsandbytes needs a GPU and is not run here. The tests with torchao and with integer weights cover what it needs: the
embedding and the head are called as modules, and a head with integer weights gets states in the target's dtype.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import tiny
import torch
from torch import nn
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, LlavaForConditionalGeneration, TorchAoConfig
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from msd_hf import MSDUnsupportedError
from msd_hf.evaluation import find_disagreement
from msd_hf.target import tree_forward
from msd_hf.target.adapter import TargetAdapter


PROMPTS = ((1, ()), (2, (2,)), (3, (0, 5)))
LANGUAGE_MODEL = "model.language_model"


def copy_of_target(dtype: torch.dtype = torch.float64) -> LlavaForConditionalGeneration:
    return copy.deepcopy(tiny.pair(0).target).to(dtype)


def draft(dtype: torch.dtype = torch.float64):
    return copy.deepcopy(tiny.pair(0).with_tree(24, 4, 4)).to(dtype)


def assert_same_tokens(
    target: Any,
    dtype: torch.dtype = torch.float64,
    prompts=PROMPTS,
    least_tau: float = 2.0,
    **options: Any,
) -> None:
    """Compares tokens, greedy and sampled, with and without images. The mean acceptance shows that features fit."""
    assistant = draft(dtype)
    lengths = []
    for seed, images_at in prompts:
        inputs = tiny.make_prompt(seed, 8, images_at, dtype=dtype)
        for do_sample in (False, True):
            arguments = {"max_new_tokens": 16, "do_sample": do_sample, **options}
            torch.manual_seed(seed)
            expected = target.generate(**inputs, **arguments)
            torch.manual_seed(seed)
            output = target.generate(**inputs, **arguments, assistant_model=assistant, return_dict_in_generate=True)
            assert output.sequences.tolist() == expected.tolist(), (seed, do_sample)
            if not do_sample:
                lengths += output.acceptance_lengths[0]
    assert sum(lengths) / len(lengths) >= least_tau, lengths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    """If tokens differ, the target's two best logits must be closer than their rounding errors."""
    target, assistant = copy_of_target(dtype), draft(dtype)
    reference = copy.deepcopy(target).double()
    for seed in range(8):
        inputs = tiny.make_prompt(seed, 8, ((), (2,), (0, 5))[seed % 3], dtype=dtype)
        found = find_disagreement(target, assistant, inputs, reference, max_new_tokens=24)
        assert found is None or found.is_explained, found


def test_a_difference_that_rounding_does_not_explain():
    """Only a wrong loop would give such a difference; here the second call suppresses a token of the first."""
    target, assistant = copy_of_target(torch.bfloat16), draft(torch.bfloat16)
    reference = copy.deepcopy(target).double()
    inputs = tiny.make_prompt(1, 8, (2,), dtype=torch.bfloat16)
    generate, calls = target.generate, []

    def broken_with_a_draft(*args, **kwargs):
        calls.append(kwargs)
        suppressed = [generated[0]] if kwargs.get("assistant_model") is not None else None
        output = generate(*args, **kwargs, suppress_tokens=suppressed)
        generated.append(output.sequences[0, -4].item())
        return output

    generated: list[int] = []
    target.generate = broken_with_a_draft
    found = find_disagreement(target, assistant, inputs, reference, max_new_tokens=12)
    assert len(calls) == 2 and found is not None and not found.is_explained
    assert 0 < found.rounding < 0.5 < found.gap


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draft_dtype", [torch.float32, torch.float16], ids=str)
def test_a_draft_in_another_dtype(target_dtype, draft_dtype):
    target, assistant = copy_of_target(target_dtype), draft(draft_dtype)
    reference = copy.deepcopy(target).double()
    inputs = tiny.make_prompt(3, 8, (0, 5), dtype=target_dtype)
    found = find_disagreement(target, assistant, inputs, reference, max_new_tokens=24)
    assert found is None or (target_dtype != torch.float64 and found.is_explained)
    assert assistant.dtype == draft_dtype and target.dtype == target_dtype


def test_weights_offloaded_to_the_cpu():
    """accelerate leaves meta tensors in the model, and its hooks load the weights for each forward."""
    target = accelerate.cpu_offload(copy_of_target(), execution_device="cpu")
    assert target.lm_head.weight.device.type == target.get_input_embeddings().weight.device.type == "meta"
    assert_same_tokens(target)


def test_a_device_map_with_layers_on_disk(tmp_path):
    copy_of_target().save_pretrained(tmp_path / "target")
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        f"{LANGUAGE_MODEL}.embed_tokens": "disk",
        f"{LANGUAGE_MODEL}.layers.0": "cpu",
        f"{LANGUAGE_MODEL}.layers.1": "disk",
        f"{LANGUAGE_MODEL}.norm": "cpu",
        f"{LANGUAGE_MODEL}.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    target = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "target", dtype=torch.float64, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert target.lm_head.weight.device.type == "meta"
    assert_same_tokens(target)


@pytest.mark.parametrize("with_head", [False, True])
def test_torchao_int8_weights(tmp_path, with_head):
    from torchao.quantization import Int8WeightOnlyConfig

    copy_of_target(torch.float32).save_pretrained(tmp_path)
    quantization = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=with_head)
    target = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization
    )
    quantized = {name for name, weight in target.named_parameters() if type(weight) is not nn.Parameter}
    assert f"{LANGUAGE_MODEL}.layers.0.self_attn.q_proj.weight" in quantized
    assert ("lm_head.weight" in quantized) == with_head
    assert_same_tokens(target, torch.float32)


def test_a_head_of_integer_weights():
    """The weights have another dtype than the arithmetic, like those of bitsandbytes."""

    class Int8Head(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
            self.register_buffer("scale", scale.detach())

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            assert states.dtype == self.scale.dtype
            return states @ (self.weight.to(states.dtype) * self.scale).mT

    target = copy_of_target(torch.float32)
    target.lm_head = Int8Head(target.lm_head)
    assert_same_tokens(target, torch.float32)


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "embedding_and_head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved_embedding_and_head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def build_adapted_target(**fields: Any) -> peft.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(copy_of_target(), config)
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                nn.init.normal_(parameter.data, std=0.3 if "lora" in name else 0.5)
    return model.double().eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_targets_with_lora(kind):
    """The draft reads the adapted model and drafts with the adapted embedding and head."""
    model, assistant = build_adapted_target(**ADAPTERS[kind]), draft()
    adapter = TargetAdapter(model.get_base_model())
    ids = tiny.make_prompt(1, 8)["input_ids"]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(adapter.embed(ids), states[0])
    torch.testing.assert_close(adapter.head(states[-1]), model(input_ids=ids).logits)
    assert_same_tokens(model, least_tau=1.0)
    with model.disable_adapter():
        assert_same_tokens(model)
    assert assistant.dtype == torch.float64


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", token_dim=32, num_layers=2, num_attention_heads=4
    )
    model = peft.get_peft_model(copy_of_target(), config).double().eval()
    inputs = tiny.make_prompt(1, 8)
    with pytest.raises(MSDUnsupportedError, match=r"PROMPT_TUNING.*virtual tokens"):
        model.generate(**inputs, assistant_model=draft(), max_new_tokens=8)
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_tokens(model.get_base_model())


@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_adapters_of_some_rows_or_positions_are_refused(argument):
    """Rows that end leave the batch, and peft counts aLoRA positions from the end of each forward."""
    inputs = tiny.left_padded([tiny.make_prompt(seed, 8) for seed in (1, 2)])
    if argument == "adapter_names":
        model, options = build_adapted_target(target_modules=["q_proj"]), {"adapter_names": ["default", "__base__"]}
    else:
        invocation = inputs["input_ids"][0, -2:].tolist()
        model, options = build_adapted_target(target_modules=["q_proj"], alora_invocation_tokens=invocation), {}
    model.generate(**inputs, **options, max_new_tokens=2)
    with pytest.raises(MSDUnsupportedError, match=f"`{argument}`"):
        model.generate(**inputs, **options, assistant_model=draft(), max_new_tokens=2)


def compile_target(target: LlavaForConditionalGeneration, how: str, backend: Any) -> Any:
    if how == "model":
        return torch.compile(target, backend=backend)
    if how == "in place":
        target.compile(backend=backend)
    elif how == "forward":
        target.forward = torch.compile(target.forward, backend=backend)
    else:
        target.model.language_model = torch.compile(target.model.language_model, backend=backend)
    return target


@pytest.mark.parametrize(
    "how, is_used_before",
    [
        ("in place", False),
        ("forward", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("model", False), ("in place", True), ("decoder", True)]
        ),
    ],
)
def test_compiled_targets(how, is_used_before):
    """A compiled forward may ignore hooks that are added later, or compile again for them at every call. Calls with a
    draft must therefore compile nothing."""
    torch._dynamo.reset()
    target = copy_of_target()
    if is_used_before:
        assert_same_tokens(target, prompts=PROMPTS[:1])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    target = compile_target(target, how, backend)
    inputs = tiny.make_prompt(1, 8)
    target.generate(**inputs, max_new_tokens=3)
    assert bool(graphs) == (how != "model")  # there `generate` runs the model inside, which is not compiled
    num_graphs = len(graphs)
    target.generate(**inputs, assistant_model=draft(), max_new_tokens=5)
    assert len(graphs) == num_graphs
    assert_same_tokens(target, prompts=PROMPTS[:1])


@pytest.fixture
def warnings_once(monkeypatch):
    """Collects every warning that is normally shown once in a process."""
    messages: list[str] = []
    monkeypatch.setattr(tree_forward.logger, "warning_once", messages.append)
    return messages


def attention_without_a_mask(module, query, key, value, attention_mask, **kwargs):
    assert attention_mask is None
    kwargs["is_causal"] = query.shape[2] > 1
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def test_an_attention_function_that_takes_no_mask(warnings_once):
    """A user registered the function; flash attention is of this kind too. Trees are verified with sdpa instead."""
    AttentionInterface.register("without_a_mask", attention_without_a_mask)
    target = copy_of_target()
    target.set_attn_implementation("without_a_mask")
    assert_same_tokens(target)
    assert target.get_decoder().config._attn_implementation == "without_a_mask"
    assert "'without_a_mask' takes no tree mask" in warnings_once[0] and "verified with sdpa" in warnings_once[0]


@pytest.mark.slow  # imports the compiler, and scores are computed by vmap
def test_flex_attention(warnings_once, monkeypatch):
    """Flex attention runs uncompiled: compiling it takes minutes on a CPU and gives wrong results there for heads of
    this width in torch 2.13 (a key length 8 above a multiple of 16). It does not support float64."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention.flex_attention)
    target = copy_of_target(torch.float32)
    target.set_attn_implementation("flex_attention")
    assert_same_tokens(target, torch.float32, PROMPTS[1:])
    assert "'flex_attention' takes no tree mask" in warnings_once[0]


def test_tensor_parallel(tmp_path):
    """Two processes hold half of the weights each, and both generate what a single process generates. Embedding and
    head are halved too if the plan of the installed release names them."""
    target = copy_of_target()
    sizes = {name: weight.numel() for name, weight in target.named_parameters()}
    target.save_pretrained(tmp_path / "target")
    draft().save_pretrained(tmp_path / "draft")
    inputs = tiny.make_prompt(2, 8, (2,))
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("tensor_parallel_run.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for do_sample in (False, True):
        torch.manual_seed(0)
        expected = target.generate(**inputs, max_new_tokens=12, do_sample=do_sample)
        for rank in range(2):
            report = json.loads((tmp_path / f"{rank}.json").read_text())
            planned = {name for name in sizes for part in report["plan"] if fnmatch(name, f"{part}.weight")}
            assert any("q_proj" in name for name in planned)
            assert report["sizes"] == {name: size // 2 if name in planned else size for name, size in sizes.items()}
            assert report["tokens"][do_sample] == expected[0].tolist()
            assert do_sample or max(report["acceptance_lengths"][do_sample]) > 2
