"""Whatever a user gives as `assistant_model`, the draft in it is used, or one sentence says what to give."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import msd_hf
from msd_hf import MSDUnsupportedError


INPUTS = tiny.make_prompt(3, 7, (2,))


def generate(assistant_model: Any) -> Any:
    target = tiny.pair(0).target
    return target.generate(**INPUTS, max_new_tokens=24, assistant_model=assistant_model, return_dict_in_generate=True)


@pytest.fixture
def draft():
    return copy.deepcopy(tiny.pair(0).with_tree(12, 3, 4))


def assert_used(output: Any, draft: msd_hf.MSDDraftModel) -> None:
    """The tokens are those of the target alone, and the draft proposed what it proposes without a wrapper."""
    assert output.sequences.tolist() == generate(None).sequences.tolist()
    assert output.acceptance_lengths == generate(draft).acceptance_lengths
    assert max(output.acceptance_lengths[0]) > 1


WRAPPERS = {
    "torch.compile": lambda draft: torch.compile(draft, backend="eager"),
    "DataParallel": nn.DataParallel,
    "torch.compile, DataParallel": lambda draft: torch.compile(nn.DataParallel(draft), backend="eager"),
    "DataParallel, torch.compile": lambda draft: nn.DataParallel(torch.compile(draft, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_draft_is_used(wrapper, draft):
    assert_used(generate(WRAPPERS[wrapper](draft)), draft)


@contextmanager
def a_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_draft_of_distributed_training_is_used(draft):
    with a_process_group():
        assert_used(generate(nn.parallel.DistributedDataParallel(draft)), draft)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_draft_that_accelerate_has_prepared_is_used(mixed_precision, draft):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(draft)
        output = generate(prepared)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert output.sequences.tolist() == generate(None).sequences.tolist()
    assert max(output.acceptance_lengths[0]) > 1


def test_a_draft_with_an_adapter_of_peft_is_used_with_its_adapter(draft):
    config = peft.LoraConfig(target_modules=["fc", "q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(draft.float(), config).double().eval()
    adapted = generate(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is msd_hf.MSDDraftModel
    assert adapted.sequences.tolist() == generate(None).sequences.tolist()
    assert adapted.acceptance_lengths == generate(merged).acceptance_lengths
    with model.disable_adapter():
        assert generate(model).acceptance_lengths != adapted.acceptance_lengths


def test_torch_compile_around_a_draft_gets_a_warning(draft, monkeypatch):
    from msd_hf.hook import assistant

    warnings = []
    monkeypatch.setattr(assistant.logger, "warning_once", warnings.append)
    generate(torch.compile(draft, backend="eager"))
    assert len(warnings) == 1 and "`draft.generation_config.compile = True`" in warnings[0]


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_a_draft_that_an_auto_class_loads_is_used(auto_class, draft, tmp_path):
    """The documentation of transformers loads assistants with `AutoModelForCausalLM`."""
    draft.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is msd_hf.MSDDraftModel
    assert_used(generate(loaded), draft)


def test_unregister_takes_drafts_out_of_the_auto_classes(draft, tmp_path):
    draft.save_pretrained(tmp_path)
    try:
        msd_hf.unregister()
        with pytest.raises(ValueError, match="msd_draft"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        msd_hf.register()


class Wrapper(nn.Module):
    def __init__(self, draft: nn.Module):
        super().__init__()
        self.inner = nn.ModuleDict({"draft": draft})
        self.config = draft.config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda draft: "some/draft", "'some/draft'` is a name"),
        (type, "is the class `MSDDraftModel`"),
        (lambda draft: type(draft.config), "is the class `MSDDraftConfig`"),
        (lambda draft: draft.config, "is a `MSDDraftConfig`"),
        (Wrapper, "is a `Wrapper` around an MSD draft"),
        (lambda draft: nn.DataParallel(Wrapper(draft)), "is a `DataParallel` around an MSD draft"),
    ],
)
def test_what_is_no_draft_is_refused_in_one_sentence(make, message, draft):
    with pytest.raises(MSDUnsupportedError, match=message):
        generate(make(draft))


def test_a_draft_does_not_generate_by_itself(draft):
    with pytest.raises(MSDUnsupportedError, match="cannot generate by itself"):
        draft.generate(INPUTS["input_ids"], max_new_tokens=3)
