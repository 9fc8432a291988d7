"""Every field of the installed `GenerationConfig`, every argument of `generate`: identical with a draft, or refused.

`IDENTICAL` lists the values to try of each. The refused ones and their messages come from the table in
`examples/SUPPORT.md`. A field that is new in transformers fails the first test until it is in one of the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import refusals_table
import tiny
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import ContinuousBatchingConfig, EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from msd_hf.compat import CACHE_NAME


FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
ARGUMENTS = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
# Keyword arguments of `generate` that its signature does not name.
MORE_ARGUMENTS = {"tokenizer", "assistant_tokenizer", "inputs_embeds", "attention_mask", "position_ids", CACHE_NAME}
# Fields that some supported releases lack.
NEWER_FIELDS = {"assistant_ensemble_weight", "max_cache_len", "speculation_type", "use_mtp"}


@dataclass
class Run:
    """A prompt and the tokens that it gives, on which the options of a case may depend."""

    inputs: dict[str, torch.Tensor]
    rows: list[list[int]]  # the new tokens without the case's options

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def eos(self) -> dict[str, Any]:
        """Options with EOS tokens that end the rows far apart."""
        return {"eos_token_id": [row[2 * place + 2] for place, row in enumerate(self.rows)], "pad_token_id": 0}

    @property
    def embeds(self) -> torch.Tensor:
        target = tiny.pair(0).target
        return target.get_input_embeddings()(self.inputs["input_ids"]).detach()


@dataclass
class Case:
    """
    Options to try, greedily and with sampling, on one prompt and on a ragged batch of three.

    Args:
        options: arguments of `generate`, or a function that makes them anew for each call.
        effect: whether the options change the output of the target alone in at least one of the runs.
        modes: values of `do_sample`.
        prompts: keys of `PROMPTS`.
    """

    options: dict[str, Any] | Callable[[Run], dict[str, Any]]
    effect: bool = True
    modes: tuple[bool, ...] = (False, True)
    prompts: tuple[str, ...] = ("one", "batch")
    attention: str = "sdpa"

    def make(self, run: Run) -> dict[str, Any]:
        return self.options(run) if callable(self.options) else dict(self.options)


PROMPTS: dict[str, dict[str, torch.Tensor]] = {
    "one": tiny.make_prompt(4, 7, (3,)),
    "batch": tiny.left_padded([tiny.make_prompt(1, 9), tiny.make_prompt(2, 4, (0,)), tiny.make_prompt(3, 6, (2, 5))]),
    "token": tiny.make_prompt(0, 1),
}


class CallCountingProcessor(LogitsProcessor):
    """Has state: favours another token at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        favoured = (7 * self.calls + input_ids.sum(-1)) % scores.shape[1]
        return scores.scatter_add(1, favoured.unsqueeze(1), torch.full_like(scores[:, :1], 4.0))


class StopsRowsAtLengths(StoppingCriteria):
    """Ends the first row four tokens after the prompt, and each further row two tokens later."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is not None and len(scores) == input_ids.shape[1] - self.length
        stops = [input_ids.shape[1] >= self.length + 4 + 2 * row for row in range(len(input_ids))]
        return torch.tensor(stops)


class Recorder(BaseStreamer):
    events: list[Any] = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


def stop_strings(run: Run) -> dict[str, Any]:
    texts = [tiny.tokenizer().decode(row[2 * place + 2 : 2 * place + 4]) for place, row in enumerate(run.rows)]
    return {"stop_strings": [text[1:] for text in texts], "tokenizer": tiny.tokenizer(), "pad_token_id": 0}


def cases(*options: Any, **settings: Any) -> list[Case]:
    return [Case(option, **settings) for option in options]


SAMPLED: dict[str, Any] = {"modes": (True,)}
WITHOUT_EFFECT: dict[str, Any] = {"effect": False, "modes": (True,), "prompts": ("batch",)}

IDENTICAL: dict[str, list[Case]] = {
    # Length.
    "max_length": cases(lambda run: {"max_length": run.length + 7, "max_new_tokens": None}),
    "max_new_tokens": cases({"max_new_tokens": 1}, {"max_new_tokens": 5}),
    "min_length": cases(lambda run: {**run.eos, "min_length": run.length + 5}),
    "min_new_tokens": cases(lambda run: {**run.eos, "min_new_tokens": 5}),
    "max_time": cases({"max_time": 0.0}),
    "stop_strings": cases(stop_strings),
    "eos_token_id": cases(lambda run: run.eos, lambda run: {"eos_token_id": run.rows[0][4]}),
    "pad_token_id": cases(
        lambda run: {**run.eos, "pad_token_id": 9},
        lambda run: {**run.eos, "pad_token_id": None},  # then `generate` pads with the first EOS token
    ),
    "bos_token_id": cases({"bos_token_id": 5}, prompts=("none",)) + cases({"bos_token_id": 5}, **WITHOUT_EFFECT),
    # Sampling.
    "do_sample": cases({"do_sample": True}, modes=(False,)),
    "temperature": cases({"temperature": 0.5}, **SAMPLED),
    "top_k": cases({"top_k": 3}, {"top_k": 0}, **SAMPLED),
    "top_p": cases({"top_p": 0.5}, **SAMPLED),
    "min_p": cases({"min_p": 0.2}, **SAMPLED),
    "top_h": cases({"top_h": 0.3}, **SAMPLED),
    "typical_p": cases({"typical_p": 0.5}, **SAMPLED),
    "epsilon_cutoff": cases({"epsilon_cutoff": 0.05}, **SAMPLED),
    "eta_cutoff": cases({"eta_cutoff": 0.1}, **SAMPLED),
    "num_return_sequences": cases(
        {"num_return_sequences": 2},
        lambda run: {"num_return_sequences": 2, "prefix_allowed_tokens_fn": lambda row, ids: range(3, 40 + row)},
        **SAMPLED,
    ),
    # Processors.
    "repetition_penalty": cases({"repetition_penalty": 1.5}),
    "encoder_repetition_penalty": cases({"encoder_repetition_penalty": 1.5}),
    "no_repeat_ngram_size": cases({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2, "top_k": 2}),
    "encoder_no_repeat_ngram_size": cases({"encoder_no_repeat_ngram_size": 1}),
    "bad_words_ids": cases(lambda run: {"bad_words_ids": [[row[1]] for row in run.rows] + [run.rows[0][3:5]]}),
    "renormalize_logits": cases({"renormalize_logits": True}),
    "forced_bos_token_id": cases({"forced_bos_token_id": 7}, prompts=("one", "batch", "token")),
    "forced_eos_token_id": cases({"forced_eos_token_id": 7}, {"forced_eos_token_id": [7, 8], "eos_token_id": 7}),
    "remove_invalid_values": cases({"remove_invalid_values": True, "bad_words_ids": [[7]]}),
    "exponential_decay_length_penalty": cases(
        {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": 7, "pad_token_id": 0}
    ),
    "suppress_tokens": cases(lambda run: {"suppress_tokens": run.rows[0][:3]}),
    "begin_suppress_tokens": cases(lambda run: {"begin_suppress_tokens": [row[0] for row in run.rows]}),
    "sequence_bias": cases(
        lambda run: {"sequence_bias": {(run.rows[0][1],): -9.0, tuple(run.rows[0][3:5]): -9.0}},
        {"sequence_bias": [[[7], 6.0]]},
    ),
    "watermarking_config": cases(
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
        {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 1, 4], ngram_len=3)},
        **SAMPLED,
    ),
    "logits_processor": cases(
        lambda run: {"logits_processor": LogitsProcessorList([CallCountingProcessor()])},
        lambda run: {"logits_processor": [CallCountingProcessor()], "repetition_penalty": 1.2, **run.eos},
    ),
    "prefix_allowed_tokens_fn": cases(
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + (int(ids[-1]) + 5 * n + row) % 50 for n in range(9)]}
    ),
    "stopping_criteria": cases(
        lambda run: {"stopping_criteria": StoppingCriteriaList([StopsRowsAtLengths(run.length)])},
        lambda run: {
            "stopping_criteria": [StopsRowsAtLengths(run.length), MaxLengthCriteria(run.length + 6)],
            **run.eos,
        },
        lambda run: {"stopping_criteria": [EosTokenCriteria(run.eos["eos_token_id"])], "pad_token_id": 0},
    ),
    # Outputs.
    "return_dict_in_generate": cases({"return_dict_in_generate": False}),
    "output_scores": cases({"output_scores": False}),
    "output_logits": cases({"output_logits": False}),
    "output_hidden_states": cases(
        {"output_hidden_states": True},
        lambda run: {"output_hidden_states": True, **run.eos},
        {"output_hidden_states": True, "return_dict_in_generate": False},
    ),
    "output_attentions": cases({"output_attentions": True}, attention="eager", prompts=("one",)),
    "streamer": cases(lambda run: {"streamer": Recorder(), **run.eos}),
    # Prompts.
    "inputs": cases(
        lambda run: {"inputs": run.inputs["input_ids"], "input_ids": None},
        **WITHOUT_EFFECT,
    ),
    "inputs_embeds": [
        *cases(lambda run: {"inputs_embeds": 1.1 * run.embeds, "pixel_values": None}, prompts=("one", "batch")),
        *cases(
            lambda run: {"inputs_embeds": 1.1 * run.embeds, "input_ids": None, "pixel_values": None},
            lambda run: {
                "inputs_embeds": 1.1 * run.embeds,
                "input_ids": None,
                "pixel_values": None,
                "repetition_penalty": 1.4,
                **run.eos,
            },
        ),
    ],
    "attention_mask": cases(
        lambda run: {"attention_mask": torch.cat([torch.zeros(1, 2), torch.ones(1, run.length - 2)], dim=1).long()},
        prompts=("one",),
    ),
    "position_ids": cases(
        lambda run: {"position_ids": 2 * torch.arange(run.length).unsqueeze(0) + 5}, prompts=("one",)
    ),
    CACHE_NAME: cases(lambda run: {CACHE_NAME: DynamicCache()}, **WITHOUT_EFFECT),
    # Settings.
    "generation_config": cases(
        lambda run: {
            "generation_config": GenerationConfig(max_new_tokens=7, repetition_penalty=1.3, **run.eos),
            "max_new_tokens": None,
        }
    ),
    "tokenizer": cases({"tokenizer": "a tokenizer"}, **WITHOUT_EFFECT),
    "kwargs": cases({"logits_to_keep": 1}, **WITHOUT_EFFECT),
    "use_cache": cases({"use_cache": True}, **WITHOUT_EFFECT),
    "cache_implementation": cases({"cache_implementation": "dynamic"}, **WITHOUT_EFFECT),
    "disable_compile": cases({"disable_compile": True}, **WITHOUT_EFFECT),
    "compile_config": cases({"compile_config": CompileConfig()}, **WITHOUT_EFFECT),
    "num_beams": cases({"num_beams": 1}, **WITHOUT_EFFECT),
    "guidance_scale": cases({"guidance_scale": 1.0}, **WITHOUT_EFFECT),
    "synced_gpus": cases({"synced_gpus": False}, **WITHOUT_EFFECT),
    "num_assistant_tokens_schedule": cases({"num_assistant_tokens_schedule": "constant"}, **WITHOUT_EFFECT),
    "assistant_confidence_threshold": cases({"assistant_confidence_threshold": 0.0}, **WITHOUT_EFFECT),
    # Options without effect on greedy decoding and sampling.
    "cache_config": cases({"cache_config": {"nbits": 4}}, **WITHOUT_EFFECT),
    "max_cache_len": cases({"max_cache_len": 64}, **WITHOUT_EFFECT),
    "early_stopping": cases({"early_stopping": True}, **WITHOUT_EFFECT),
    "length_penalty": cases({"length_penalty": 2.0}, **WITHOUT_EFFECT),
    "diversity_penalty": cases({"diversity_penalty": 0.5}, **WITHOUT_EFFECT),
    "num_beam_groups": cases({"num_beam_groups": 2}, **WITHOUT_EFFECT),
    "low_memory": cases({"low_memory": True}, **WITHOUT_EFFECT),
    "decoder_start_token_id": cases({"decoder_start_token_id": 5}, **WITHOUT_EFFECT),
    "continuous_batching_config": cases(
        lambda run: {"continuous_batching_config": ContinuousBatchingConfig()}, **WITHOUT_EFFECT
    ),
    "negative_prompt_ids": cases({"negative_prompt_ids": torch.tensor([[5, 6]])}, **WITHOUT_EFFECT),
    "negative_prompt_attention_mask": cases(
        {"negative_prompt_attention_mask": torch.tensor([[1, 1]])}, **WITHOUT_EFFECT
    ),
    "transformers_version": cases({"transformers_version": "5.10.0"}, **WITHOUT_EFFECT),
}

# The draft itself is not an argument of the target alone.
NOT_COMPARED = {"assistant_model"}


def test_every_field_and_argument_is_tried_or_refused():
    decided = IDENTICAL.keys() | refusals_table.names() | NOT_COMPARED
    known = FIELDS | ARGUMENTS | MORE_ARGUMENTS
    assert known - decided == set(), "neither tried in IDENTICAL nor refused in examples/SUPPORT.md"
    settings_of_the_draft = {"tree_depth", "tree_top_k", "suffix_nodes"}
    assert decided - known - settings_of_the_draft <= NEWER_FIELDS, "this release does not know them"


def generate(pair: tiny.Pair, draft: Any, run: Run, options: dict[str, Any], do_sample: bool) -> tuple[Any, float]:
    torch.manual_seed(11)
    arguments = {
        **run.inputs,
        "max_new_tokens": 8,
        "do_sample": do_sample,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **options,
    }
    if "generation_config" in options:
        config = options["generation_config"]
        for name in ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"):
            setattr(config, name, arguments.pop(name))
    arguments = {name: value for name, value in arguments.items() if value is not None or name == "pad_token_id"}
    output = pair.target.generate(**arguments, assistant_model=draft)
    return output, torch.rand(1).item()


def contents(output: Any) -> dict[str, Any]:
    """The parts of an output that can be compared."""
    if isinstance(output, torch.Tensor):
        return {"sequences": output}
    parts = {name: value for name, value in output.items() if name != "acceptance_lengths"}
    cache = parts.pop(CACHE_NAME)
    parts["cache"] = [tensor for layer in cache.layers for tensor in (layer.keys.shape, layer.values.shape)]
    return parts


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    try:
        torch.testing.assert_close(one, other, equal_nan=True)
    except AssertionError:
        return False
    return True


BASELINES: dict[tuple[str, bool, str], tuple[Run, dict[str, Any]]] = {}


def baseline(pair: tiny.Pair, prompt: str, do_sample: bool, attention: str) -> tuple[Run, dict[str, Any]]:
    key = (prompt, do_sample, attention)
    if key not in BASELINES:
        run = Run(PROMPTS.get(prompt, {}), [])
        output, _ = generate(pair, None, run, {"bos_token_id": 4} if prompt == "none" else {}, do_sample)
        run.rows = output.sequences[:, run.length if run.inputs else 1 :].tolist()
        BASELINES[key] = run, contents(output)
    return BASELINES[key]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in IDENTICAL if name in FIELDS | ARGUMENTS | MORE_ARGUMENTS])
def test_identical(name):
    pair = tiny.pair(0)
    draft = pair.with_tree(24, 4, 4)
    for number, case in enumerate(IDENTICAL[name]):
        pair.set_attention(case.attention)
        has_effect = False
        for prompt in case.prompts:
            for do_sample in case.modes:
                run, without = baseline(pair, prompt, do_sample, case.attention)
                options = [case.make(run), case.make(run)]
                for streamed in options:
                    if "streamer" in streamed:
                        streamed["streamer"].events = []
                expected, after = generate(pair, None, run, options[0], do_sample)
                output, after_drafted = generate(pair, draft, run, options[1], do_sample)
                message = f"{name}, case {number}, {prompt}, do_sample={do_sample}"
                # Eager attention computes its probabilities in float32.
                tolerance = {"atol": 1e-5, "rtol": 1e-5}
                torch.testing.assert_close(
                    contents(output),
                    contents(expected),
                    **tolerance,
                    equal_nan=True,
                    msg=lambda text, message=message: f"{message}: {text}",
                )
                assert after_drafted == after, message
                if "streamer" in options[0]:
                    assert options[1]["streamer"].events == options[0]["streamer"].events, message
                    assert options[1]["streamer"].events[-1] == "end"
                has_effect |= not is_same(contents(expected), without)
        assert has_effect == case.effect, (name, number)
    pair.set_attention("sdpa")
