"""A draft that is given to a pipeline is used, and the text is that of the pipeline alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TextStreamer,
    pipeline,
)
from transformers.pipelines import any_to_any, base

import msd_hf
from msd_hf.hook import register
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


VLM, LLM = "image-text-to-text", "text-generation"
CHAT = [{"role": "user", "content": [{"type": "text", "text": "Count from 3 to 9."}]}]
INPUTS: dict[str, Any] = {VLM: {"text": CHAT}, LLM: {"text_inputs": "USER: Count from 3 to 9. ASSISTANT:"}}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(TARGET_DIR)


@pytest.fixture(scope="module")
def draft() -> msd_hf.MSDDraftModel:
    return msd_hf.MSDDraftModel.from_pretrained(DRAFT_DIR)


@pytest.fixture
def used(monkeypatch) -> list[Any]:
    """The drafts that calls of `generate` have used, one entry a call."""
    drafts, loop = [], register.msd_decoding

    def decoding(*args, **kwargs):
        drafts.append(kwargs["draft"])
        return loop(*args, **kwargs)

    monkeypatch.setattr(register, "msd_decoding", decoding)
    return drafts


@pytest.fixture
def build(target, toy_processor):
    def build_pipeline(task: str, model: Any = target, **options: Any) -> base.Pipeline:
        parts = {"tokenizer": toy_processor.tokenizer} if task == LLM else {"processor": toy_processor}
        return pipeline(task, model, device="cpu", **parts, **options)

    return build_pipeline


def call(pipe: base.Pipeline, **options: Any) -> Any:
    """Calls a pipeline. Arguments of `generate` are given as the pipeline takes them."""
    arguments = {**GREEDY, **options} if pipe.task == LLM else {"generate_kwargs": GREEDY, **options}
    return pipe(**INPUTS[pipe.task], **arguments)


@pytest.mark.parametrize("name", [False, True], ids=["model", "folder"])
@pytest.mark.parametrize(
    "task, place",
    # A text-generation pipeline has no `generate_kwargs`: it takes arguments of `generate` as its own.
    [(VLM, "construction"), (VLM, "call"), (VLM, "generate_kwargs"), (LLM, "construction"), (LLM, "call")],
)
def test_the_draft_is_used(task, place, name, build, draft, used):
    given = str(DRAFT_DIR) if name else draft
    plain = build(task)
    expected = call(plain)
    assert not used
    if place == "construction":
        pipe, options = build(task, assistant_model=given), {}
    elif place == "call":
        pipe, options = plain, {"assistant_model": given}
    else:
        pipe, options = plain, {"generate_kwargs": {**GREEDY, "assistant_model": given}}
    assert [call(pipe, **options), call(pipe, **options)] == [expected, expected]
    assert len(used) == 2 and used[0] is used[1]  # a name is loaded once
    assert used[0] is draft or name
    assert (used[0].dtype, used[0].device) == (pipe.model.dtype, pipe.model.device)


def test_the_model_and_the_draft_are_given_by_name(used):
    pipe = pipeline(VLM, str(TARGET_DIR), assistant_model=str(DRAFT_DIR), dtype=torch.float64, device="cpu")
    assert call(pipe) == call(pipe, assistant_model=None)
    assert len(used) == 1 and used[0].dtype == torch.float64


@pytest.mark.parametrize("place", ["construction", "call"])
def test_any_to_any(place, build, draft, used, monkeypatch):
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *args: None)  # torchvision is for videos
    pipe = build("any-to-any", **({"assistant_model": draft} if place == "construction" else {}))
    options = {"assistant_model": draft} if place == "call" else {}
    output = pipe(text=CHAT, generate_kwargs=GREEDY, **options)
    assert used == [draft]
    assert pipe(text=CHAT, generate_kwargs=GREEDY, assistant_model=None) == output and len(used) == 1


def test_none_in_the_call_leaves_the_draft_out(build, draft, used):
    pipe = build(VLM, assistant_model=draft)
    assert call(pipe, assistant_model=None) == call(build(VLM))
    assert not used


def test_arguments_of_the_pipeline_stay(build, draft, used):
    """A draft in the call does not replace the other arguments that the pipeline was made with."""
    pipe = build(VLM, generate_kwargs=dict(GREEDY))
    expected = pipe(text=CHAT)
    assert pipe(text=CHAT, assistant_model=draft) == expected
    with_draft = build(VLM, assistant_model=draft, generate_kwargs=dict(GREEDY))
    assert with_draft(text=CHAT) == expected
    assert with_draft(text=CHAT, max_new_tokens=5) == build(VLM)(text=CHAT, max_new_tokens=5)
    assert len(used) == 3


@pytest.mark.parametrize("task", [VLM, LLM])
def test_a_generation_config(task, build, draft, used):
    config = GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.2)
    before = config.to_dict()
    outputs = [
        build(task, **options)(**INPUTS[task], **{"generation_config": config} if task == LLM else {
            "generate_kwargs": {"generation_config": config}
        })
        for options in ({}, {"assistant_model": draft})
    ]  # fmt: skip
    assert outputs[0] == outputs[1] and used == [draft]
    assert config.to_dict() == before and copy.deepcopy(config).to_dict() == before


@pytest.mark.parametrize("field", ["vocab_size", "eos_token_id"])
def test_no_tokenizer_is_asked_for(field, build, draft, toy_processor, used):
    """The config of a LLaVA draft has a vocabulary of 32,000, that of its target one of 32,064."""
    other = copy.deepcopy(draft)
    setattr(other.config, field, 500)
    expected = call(build(LLM))
    assert call(build(LLM, assistant_model=other)) == expected
    assert call(build(LLM, assistant_model=other, assistant_tokenizer=toy_processor.tokenizer)) == expected
    assert len(used) == 2


@pytest.mark.parametrize("task", [VLM, LLM])
def test_many_inputs(task, build, draft, used):
    """In batches, one by one, and from a generator."""
    if task == LLM:
        inputs = [INPUTS[LLM]["text_inputs"], "USER: How do I bake a cake? ASSISTANT:", "USER: Hi. ASSISTANT:"]
        options: dict[str, Any] = dict(GREEDY)
        sizes = (1, 3)
    else:
        inputs = [CHAT, [{"role": "user", "content": [{"type": "text", "text": "How do I bake a cake?"}]}]]
        options = {"generate_kwargs": GREEDY}
        sizes = (1,)  # such a pipeline cannot put chats of different lengths into a batch
    plain, pipe = build(task), build(task, assistant_model=draft)
    for batch_size in sizes:
        used.clear()
        assert pipe(inputs, batch_size=batch_size, **options) == plain(inputs, batch_size=batch_size, **options)
        assert len(used) == len(inputs) / batch_size
    used.clear()
    assert list(pipe((one for one in inputs), **options)) == list(plain((one for one in inputs), **options))
    assert len(used) == len(inputs)


def test_streaming(build, draft, used, toy_processor, capsys):
    printed = []
    for assistant in (None, draft):
        streamer = TextStreamer(toy_processor.tokenizer)
        call(build(VLM), generate_kwargs={**GREEDY, "streamer": streamer, "assistant_model": assistant})
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != "" and used == [draft]


def test_a_pipeline_with_a_draft_can_be_copied(build, draft, used):
    pipe = build(VLM, assistant_model=draft)
    expected = call(pipe)
    assert call(pickle.loads(pickle.dumps(pipe))) == call(copy.deepcopy(pipe)) == expected
    assert len(used) == 3


def test_a_draft_given_twice_is_refused(build, draft, used):
    with pytest.raises(msd_hf.MSDUnsupportedError, match="given twice"):
        call(build(VLM), assistant_model=draft, generate_kwargs={"assistant_model": draft})
    assert not used


@pytest.mark.parametrize("task", [VLM, LLM])
def test_a_name_that_leads_nowhere_is_an_error(task, build, tmp_path):
    for where in (build, lambda task, **options: call(build(task), **options)):
        with pytest.raises(OSError, match=r"config\.json|missing"):
            where(task, assistant_model=str(tmp_path / "missing"))


def build_assistant(target, folder) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=target.config.text_config.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **{
            name: getattr(target.config.text_config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")
        },
    )
    assistant = LlamaForCausalLM(config).eval()
    assistant.save_pretrained(folder)
    return assistant


def test_other_assistants_are_left_alone(build, target, tmp_path, toy_processor, used):
    assistant = build_assistant(target, tmp_path)
    toy_processor.tokenizer.save_pretrained(tmp_path)
    outputs = []
    try:
        for hooked in (True, False):
            if not hooked:
                msd_hf.unregister()
            for given in (None, assistant, str(tmp_path)):
                pipe = build(LLM, assistant_model=given)
                outputs.append(call(pipe))
                assert type(pipe.assistant_model) is (type(None) if given is None else LlamaForCausalLM)
            outputs.append(call(build(VLM, assistant_model=assistant)))
    finally:
        msd_hf.register()
    assert outputs[:4] == outputs[4:] and not used


def test_unregister_restores_pipelines():
    hooked = ("run_single", "get_iterator")
    assert all(hasattr(vars(base.Pipeline)[name], "__wrapped__") for name in hooked)
    assert hasattr(base.load_assistant_model, "__wrapped__")
    try:
        msd_hf.unregister()
        assert not any(hasattr(vars(base.Pipeline)[name], "__wrapped__") for name in hooked)
        assert not hasattr(base.load_assistant_model, "__wrapped__")
    finally:
        msd_hf.register()


def test_a_draft_is_no_model_of_a_pipeline(build, draft):
    with pytest.raises(msd_hf.MSDUnsupportedError, match="cannot generate by itself"):
        call(build(LLM, draft))


def test_a_draft_is_placed_beside_the_target(build, target, draft, monkeypatch):
    """A pipeline moves its model; the draft follows, unless accelerate has placed one of them."""
    moves = []
    monkeypatch.setattr(msd_hf.MSDDraftModel, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(msd_hf.MSDDraftModel, "to", lambda self, device: moves.append(device) or self)
    build(VLM, assistant_model=draft)
    assert moves == [target.device]
    monkeypatch.setattr(draft, "hf_device_map", {"": "cpu"}, raising=False)
    build(VLM, assistant_model=draft)
    assert len(moves) == 1
