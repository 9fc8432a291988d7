"""The hook into `generate` leaves other assistants alone, can be removed, and a call leaves nothing behind."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import msd_hf


HOOKED = ("_assisted_decoding", "_extract_generation_mode_kwargs", "_validate_generation_mode")


@pytest.fixture
def registered():
    """Registers the package again after the test."""
    yield
    msd_hf.unregister()
    msd_hf.register()


def build_llama(seed: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
    model.generation_config.eos_token_id = 2  # prompt lookup in transformers 5.10 needs one
    return model


def run_python(code: str) -> Any:
    """The JSON that a fresh interpreter prints last."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("do_sample", [False, True])
def test_other_assistants_are_left_alone(registered, do_sample):
    target, assistant = build_llama(0, 2), build_llama(1, 1)
    ids = torch.tensor([[5, 9, 11, 30]])

    def generate(**options):
        torch.manual_seed(0)
        state = target.generate(
            ids, max_new_tokens=16, do_sample=do_sample, return_dict_in_generate=True, output_scores=True, **options
        )
        return type(state), state.sequences.tolist(), [score.tolist() for score in state.scores], torch.rand(1).item()

    calls = [{}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}]
    hooked = [generate(**options) for options in calls]
    msd_hf.unregister()
    assert [generate(**options) for options in calls] == hooked


def test_other_assistants_are_passed_on_with_all_their_arguments(registered, monkeypatch):
    """transformers still demands tokenizers when vocabularies differ."""
    target, assistant = build_llama(0, 2), build_llama(1, 1)
    assistant.config.vocab_size = 61
    for _ in range(2):
        with pytest.raises(ValueError, match="different tokenizers") as caught:
            target.generate(torch.tensor([[5, 9]]), max_new_tokens=3, assistant_model=assistant)
        assert not isinstance(caught.value, msd_hf.MSDError)
        msd_hf.unregister()


def test_unregister_restores_the_very_same_functions():
    code = """
import json
from transformers import AutoConfig, AutoModel, GenerationMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

before = dict(vars(GenerationMixin))
configs, models = set(CONFIG_MAPPING.keys()), set(MODEL_MAPPING._extra_content)
import msd_hf
changed = sorted(name for name in vars(GenerationMixin) if vars(GenerationMixin)[name] is not before.get(name))
known = type(AutoConfig.for_model("msd_draft")).__name__
msd_hf.unregister()
after = dict(vars(GenerationMixin))
same = before.keys() == after.keys() and all(after[name] is before[name] for name in before)
try:
    AutoConfig.for_model("msd_draft")
    forgotten = False
except ValueError:
    forgotten = True
auto = set(CONFIG_MAPPING.keys()) == configs and set(MODEL_MAPPING._extra_content) == models
print(json.dumps([changed, known, same, forgotten, auto]))
"""
    assert run_python(code) == [sorted(HOOKED), "MSDDraftConfig", True, True, True]


def test_wrappers_keep_signature_and_original():
    import inspect

    for name in HOOKED:
        function = vars(GenerationMixin)[name]
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)
        assert not hasattr(function.__wrapped__, "__wrapped__")  # wrapped once


def test_registering_twice_is_registering_once(registered):
    hooked = {name: vars(GenerationMixin)[name] for name in HOOKED}
    msd_hf.register()
    assert all(vars(GenerationMixin)[name] is function for name, function in hooked.items())
    msd_hf.unregister()
    assert not any(hasattr(vars(GenerationMixin)[name], "__wrapped__") for name in HOOKED)
    originals = {name: vars(GenerationMixin)[name] for name in HOOKED}
    assert all(originals[name] is hooked[name].__wrapped__ for name in HOOKED)
    msd_hf.unregister()
    assert all(vars(GenerationMixin)[name] is function for name, function in originals.items())


def test_it_works_again_after_unregister_and_register(registered, tmp_path):
    pair, inputs = tiny.pair(0), tiny.make_prompt(1, 6, (2,))
    draft = pair.with_tree(12, 4, 3)
    draft.save_pretrained(tmp_path)
    expected = pair.target.generate(**inputs, max_new_tokens=12)
    msd_hf.unregister()
    with pytest.raises(ValueError, match="msd_draft"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - transformers' own loop cannot use the draft, whatever it says
        pair.target.generate(**inputs, max_new_tokens=12, assistant_model=draft)
    msd_hf.register()
    output = pair.target.generate(**inputs, max_new_tokens=12, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected) and output.acceptance_lengths
    assert type(AutoModel.from_pretrained(tmp_path)) is msd_hf.MSDDraftModel


def test_a_wrapper_of_somebody_else_is_not_undone(registered, caplog):
    ours = vars(GenerationMixin)["_assisted_decoding"]

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    GenerationMixin._assisted_decoding = theirs
    try:
        msd_hf.unregister()
        assert vars(GenerationMixin)["_assisted_decoding"] is theirs
        assert not hasattr(vars(GenerationMixin)["_validate_generation_mode"], "__wrapped__")
        pair, inputs = tiny.pair(0), tiny.make_prompt(1, 6)
        pair.target.generate(**inputs, max_new_tokens=3)
    finally:
        GenerationMixin._assisted_decoding = ours.__wrapped__


# Nothing is left behind.


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """The state of a model and of its classes that a call could change."""
    hooks = {
        f"{name}.{kind}": dict(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in vars(module)
        if "hook" in kind and isinstance(getattr(module, kind), dict)
    }
    instances = {
        name: {
            key: value if callable(value) or isinstance(value, (int, float, str, bool, type(None))) else type(value)
            for key, value in vars(module).items()
            if not key.startswith("_forward") and not key.startswith("_backward")
        }
        for name, module in model.named_modules()
    }
    classes = {
        f"{cls.__module__}.{cls.__qualname__}": dict(vars(cls))
        for cls in dict.fromkeys(
            base for module in (model, *model.modules()) for base in type(module).__mro__ if base is not object
        )
    }
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "weights": {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "gradients": {name: (value.requires_grad, value.grad is None) for name, value in model.named_parameters()},
        "hooks": hooks,
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation_config": model.generation_config.to_dict(),
        "instances": instances,
        "classes": classes,
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key, value in before.items():
            assert_same(value, after[key], f"{where}/{key}")
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, tuple):
        assert len(before) == len(after), where
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert before is after or before == after, f"{where}: {before!r}, {after!r}"


class Interruption(Exception):
    pass


class RaisingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= 16:
            raise Interruption
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class RaisingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= 16:
            raise Interruption
        return scores


class RaisingStreamer(BaseStreamer):
    def __init__(self):
        self.count = 0

    def put(self, value):
        self.count += 1
        if self.count > 6:
            raise Interruption

    def end(self):
        pass


class RaisingLayer(nn.Module):
    """A layer that fails in its second forward; in the target, that is the verification of a tree."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.count = 0

    def forward(self, *args, **kwargs):
        self.count += 1
        if self.count > 1:
            raise Interruption
        return self.layer(*args, **kwargs)


INTERRUPTIONS: dict[str, Any] = {
    "stopping criterion": lambda: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion()])},
    "logits processor": lambda: {"logits_processor": LogitsProcessorList([RaisingProcessor()])},
    "logits processor, sampling": lambda: {
        "logits_processor": LogitsProcessorList([RaisingProcessor()]),
        "do_sample": True,
    },
    "streamer": lambda: {"streamer": RaisingStreamer()},
}


@pytest.fixture
def own_pair() -> tiny.Pair:
    """A copy of a pair that a test may change. The user's hook on its decoder must stay."""
    pair = copy.deepcopy(tiny.pair(0))
    pair.with_tree(24, 4, 5)
    pair.target.get_decoder().register_forward_pre_hook(lambda module, args: None)
    return pair


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"return_dict_in_generate": True}], ids=str)
def test_nothing_is_left_behind(own_pair, options):
    inputs = tiny.make_prompt(2, 6, (2,))
    plain = own_pair.target.generate(**inputs, max_new_tokens=20)
    given = {name: value.clone() for name, value in inputs.items()}
    before = snapshot(own_pair.target), snapshot(own_pair.draft)
    own_pair.target.generate(**inputs, max_new_tokens=20, assistant_model=own_pair.draft, **options)
    assert_same(before, (snapshot(own_pair.target), snapshot(own_pair.draft)))
    assert_same(given, inputs)
    assert torch.equal(own_pair.target.generate(**inputs, max_new_tokens=20), plain)


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_nothing_is_left_behind_by_an_exception(own_pair, where):
    inputs = tiny.make_prompt(2, 6, (2,))
    plain = own_pair.target.generate(**inputs, max_new_tokens=20)
    before = snapshot(own_pair.target), snapshot(own_pair.draft)
    with pytest.raises(Interruption):
        own_pair.target.generate(**inputs, max_new_tokens=20, assistant_model=own_pair.draft, **INTERRUPTIONS[where]())
    assert_same(before, (snapshot(own_pair.target), snapshot(own_pair.draft)))
    assert torch.equal(own_pair.target.generate(**inputs, max_new_tokens=20), plain)
    again = own_pair.target.generate(**inputs, max_new_tokens=20, assistant_model=own_pair.draft)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_nothing_is_left_behind_by_a_model_that_fails(own_pair, part):
    inputs = tiny.make_prompt(2, 6, (2,))
    owner = own_pair.target.get_decoder() if part == "target" else own_pair.draft
    owner.layers[0] = RaisingLayer(owner.layers[0])
    before = snapshot(own_pair.target), snapshot(own_pair.draft)
    with pytest.raises(Interruption):
        own_pair.target.generate(**inputs, max_new_tokens=20, assistant_model=own_pair.draft)
    assert owner.layers[0].count == 2
    owner.layers[0].count = 0
    assert_same(before, (snapshot(own_pair.target), snapshot(own_pair.draft)))


def test_a_refused_call_leaves_nothing_behind(own_pair):
    inputs = tiny.make_prompt(2, 6, (2,))
    before = snapshot(own_pair.target), snapshot(own_pair.draft)
    for options in ({"num_beams": 2}, {"guidance_scale": 2.0}):
        with pytest.raises(msd_hf.MSDUnsupportedError):
            own_pair.target.generate(**inputs, max_new_tokens=5, assistant_model=own_pair.draft, **options)
    assert_same(before, (snapshot(own_pair.target), snapshot(own_pair.draft)))


def test_the_comparison_detects_every_kind_of_trace(own_pair):
    """`assert_same` fails for each kind of change that a call could leave behind."""
    target = own_pair.target
    before = snapshot(target)
    handle = target.get_decoder().register_forward_hook(lambda *args: None)
    traces = [lambda: handle]

    def differs() -> bool:
        try:
            assert_same(before, snapshot(target))
        except AssertionError:
            return True
        return False

    assert traces and differs()
    handle.remove()
    assert not differs()
    target.config.text_config.rms_norm_eps *= 2
    assert differs()
    target.config.text_config.rms_norm_eps /= 2
    target.generation_config.max_new_tokens = 3
    assert differs()
    target.generation_config.max_new_tokens = None
    target.extra = 1
    assert differs()
    del target.extra
    type(target).extra = 1
    assert differs()
    del type(target).extra
    weight = target.lm_head.weight.data
    weight[0, 0] += 1
    assert differs()
    weight[0, 0] -= 1
    assert not differs()


def test_a_draft_serves_several_targets_in_turn():
    """A call uses no state of an earlier call or of another target."""
    targets = [tiny.build_target(seed) for seed in (0, 11)]
    draft = tiny.build_draft(targets[0])
    draft.generation_config.num_assistant_tokens = 12
    inputs = tiny.make_prompt(2, 6, (2,))
    expected = [target.generate(**inputs, max_new_tokens=10) for target in targets]
    for _ in range(2):
        for target, tokens in zip(targets, expected, strict=True):
            assert torch.equal(target.generate(**inputs, max_new_tokens=10, assistant_model=draft), tokens)
