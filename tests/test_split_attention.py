"""Split attention gives what sdpa gives: on a CPU, where it calls sdpa, and in its kernels, run by an interpreter."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from thinning import covering
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from msd_hf.attention import split as split
from msd_hf.attention.split import split_attention, split_sdpa


# Heads, key heads, queries, slots, head dimension, and the range of visible slots; `None`: one slot per query.
SHAPES = {
    "one query": (4, 4, 1, 256, 64, (0, 256)),
    "one query, grouped": (8, 2, 1, 1024, 64, (0, 700)),
    "context in front": (2, 2, 59, 1024, 64, (0, 530)),
    "window": (2, 2, 7, 1024, 128, (301, 800)),
    "window, grouped": (4, 1, 59, 1024, 64, (450, 1000)),
    "more parts than blocks": (4, 2, 7, 1024, 16, (200, 290)),
    "end": (2, 2, 7, 256, 128, (250, 256)),
    "one slot for all": (2, 1, 7, 1024, 16, (640, 641)),
    "one slot each": (4, 2, 59, 1024, 16, None),
    "one slot each, short": (2, 2, 7, 256, 64, None),
    "odd length": (4, 2, 7, 1000, 64, (0, 1000)),
    "odd length, window": (2, 2, 59, 777, 16, (600, 777)),
    "long rows": (1, 1, 7, 256, 512, (0, 200)),
}
# Tolerances. The interpreter cannot multiply bfloat16.
DTYPES = {"float32": 1e-5, "float16": 2e-3}
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if (shape, dtype) != ("long rows", "float32")]
QUICK_CASES = [case for case in CASES if case in covering(CASES, strength=1)]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels need Triton, which is not installed"
)


def make_inputs(shape: str, dtype: torch.dtype):
    """Queries, keys, values and a mask, none contiguous. Hidden slots hold large values, so reading them shows."""
    num_heads, num_kv_heads, num_queries, num_slots, head_dim, seen = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    queries = randn(1, num_queries, num_heads + 3, head_dim).transpose(1, 2)[:, :num_heads]
    keys = randn(1, num_kv_heads, num_slots + 5, head_dim)[:, :, :num_slots]
    values = randn(1, num_slots, num_kv_heads, head_dim).transpose(1, 2)
    is_seen = torch.zeros(num_queries, num_slots, dtype=torch.bool)
    if seen is None:
        is_seen[torch.arange(num_queries), torch.randperm(num_slots, generator=generator)[:num_queries]] = True
    else:
        is_seen[:, slice(*seen)] = torch.rand(num_queries, seen[1] - seen[0], generator=generator) < 0.7
        is_seen[:, [seen[0], seen[1] - 1]] = True
    unused = ~is_seen.any(0)
    keys[:, :, unused] = 30.0
    values[:, :, unused] = 3e4
    mask = torch.zeros(1, 1, num_queries, num_slots + 8, dtype=dtype)[..., :num_slots]
    return queries, keys, values, mask.masked_fill_(~is_seen, torch.finfo(dtype).min)


def reference(queries, keys, values, mask, scale=None):
    parts = (part.double() for part in (queries, keys, values))
    return functional.scaled_dot_product_attention(*parts, mask.double(), scale=scale, enable_gqa=True)


def distance(attended: torch.Tensor, expected: torch.Tensor) -> float:
    return ((attended.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["one query, grouped", "context in front", "window, grouped"])
def test_is_sdpa_on_a_cpu(shape, dtype):
    inputs = make_inputs(shape, dtype)
    for scale in (None, 0.3):
        attended = split_attention(*inputs, scale)
        assert attended.dtype == dtype
        assert attended.shape == inputs[0].shape
        assert distance(attended, reference(*inputs, scale)) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_is_sdpa_for_several_rows_and_without_a_mask():
    queries, keys, values, mask = (part.repeat(2, 1, 1, 1) for part in make_inputs("window, grouped", torch.float32))
    mask[1, ..., :10] = 0
    assert distance(split_attention(queries, keys, values, mask, None), reference(queries, keys, values, mask)) < 1e-5
    expected = reference(queries, keys, values, torch.zeros_like(mask))
    assert distance(split_attention(queries, keys, values, None, None), expected) < 1e-5


@pytest.mark.parametrize("shape", ["one query", "one query, grouped", "context in front", "window, grouped"])
@pytest.mark.parametrize("kind", ["additive", "boolean", "of each head", "none"])
def test_attention_function_gives_what_sdpa_gives(shape, kind):
    queries, keys, values, mask = make_inputs(shape, torch.float32)
    module = SimpleNamespace(num_key_value_groups=queries.shape[1] // keys.shape[1], is_causal=False)
    masks = {"boolean": mask == 0, "of each head": mask.repeat(1, queries.shape[1], 1, 1), "none": None}
    inputs = (module, queries, keys, values, masks.get(kind, mask))
    attended, weights = split_sdpa(*inputs, scaling=0.2, dropout=0.0)
    expected, _ = sdpa_attention_forward(*inputs, scaling=0.2)
    assert weights is None
    assert attended.is_contiguous()
    assert attended.shape == expected.shape
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    "position_bias" not in inspect.signature(sdpa_attention_forward).parameters,
    reason="this release of transformers knows no position bias, so no target has one",
)
def test_attention_function_adds_a_position_bias():
    queries, keys, values, mask = make_inputs("context in front", torch.float32)
    bias = torch.linspace(-3, 3, mask.shape[3]).expand(1, queries.shape[1], *mask.shape[2:])
    inputs = (SimpleNamespace(is_causal=False), queries, keys, values)
    attended, _ = split_sdpa(*inputs, mask, position_bias=bias)
    torch.testing.assert_close(attended, sdpa_attention_forward(*inputs, mask + bias)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if SHAPES[shape][5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bounds_of_live_slots(shape, dtype):
    bounds = split.find_live_slots(make_inputs(shape, dtype)[3])
    assert bounds.dtype == torch.int32
    assert tuple(bounds.tolist()) == SHAPES[shape][5]


def interpreted_distances(cases: list[tuple[str, str]]) -> dict[str, float]:
    """The distance of the kernels from sdpa in each case. Runs in a process with `TRITON_INTERPRET` set."""
    from msd_hf.attention import split_kernels as kernels

    launch, num_parts = kernels.attend_in_parts, []
    kernels.attend_in_parts = lambda *args: num_parts.append(args[-1]) or launch(*args)
    split._DEVICE = "cpu"
    distances = {}
    for shape, dtype in cases:
        inputs = make_inputs(shape, getattr(torch, dtype))
        scale = None if CASES.index((shape, dtype)) % 4 < 2 else 0.2
        attended = split_attention(*inputs, scale)
        assert attended.dtype == inputs[0].dtype
        assert attended.shape == inputs[0].shape
        distances[f"{shape}, {dtype}"] = distance(attended, reference(*inputs, scale))
    # The kernels served every case.
    assert len(num_parts) == len(cases)
    assert {2, 7, 8} <= set(num_parts)

    queries, keys, values, mask = make_inputs("window, grouped", torch.float32)
    # A row that sees no slot gives finite numbers, with other rows and alone.
    mask[..., 3, :] = torch.finfo(mask.dtype).min
    attended = split_attention(queries, keys, values, mask, None)
    assert attended.isfinite().all()
    others = torch.arange(mask.shape[2]) != 3
    expected = reference(queries, keys, values, mask)[:, :, others]
    distances["a row that sees nothing"] = distance(attended[:, :, others], expected)
    assert split_attention(queries, keys, values, mask.fill_(torch.finfo(mask.dtype).min), None).isfinite().all()

    # The kernels leave these inputs to sdpa.
    num_parts.clear()
    inputs = make_inputs("window", torch.float32)
    split_attention(*(part.repeat(2, 1, 1, 1) for part in inputs), None)
    split_attention(*(part.repeat(2, 1, 1, 1) for part in inputs[:3]), inputs[3], None)
    split_attention(*(part.double() for part in inputs), None)
    split_attention(*(part[..., :48] for part in inputs[:3]), inputs[3], None)
    split_attention(*inputs[:3], inputs[3] == 0, None)
    split_attention(*inputs[:3], None, None)
    split_attention(inputs[0].clone().requires_grad_(), *inputs[1:], None).sum().backward()
    assert not num_parts
    return distances


def interpreted_answers() -> dict[str, list[list[int]]]:
    """Tokens of a target alone, and with `compile=True` and all attention to buffers in the kernels. Runs in a process
    with `TRITON_INTERPRET` set."""
    import tiny

    from msd_hf.attention import split_kernels as kernels
    from msd_hf.compiled import compile as compiled

    launch, num_live = kernels.attend_in_parts, []
    kernels.attend_in_parts = lambda *args: num_live.append(args[4]) or launch(*args)
    compiled._compile = lambda function, mode: function
    target = tiny.build_target(dtype=torch.float32, num_kv_heads=2, head_dim=16)
    draft = tiny.fit_draft(tiny.build_draft(target), target)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = 12, 2, 4
    answers: dict[str, list[list[int]]] = {"alone": [], "with the draft": [], "lengths": [], "lengths by sdpa": []}
    for seed, images_at in ((0, ()), (1, (2,))):
        inputs = tiny.make_prompt(seed, 8, images_at, dtype=torch.float32, padding=2 * seed)
        options = {"max_new_tokens": 16, "return_dict_in_generate": True}
        answers["alone"] += target.generate(**inputs, **options).sequences.tolist()
        settings.compile = True
        split._DEVICE = "cpu"
        output = target.generate(**inputs, **options, assistant_model=draft)
        split._DEVICE = "cuda"
        answers["with the draft"] += output.sequences.tolist()
        answers["lengths"] += output.acceptance_lengths
        by_sdpa = target.generate(**inputs, **options, assistant_model=draft)
        answers["lengths by sdpa"] += by_sdpa.acceptance_lengths
    num_rounds = sum(map(len, answers["lengths"]))
    # A round attends in each layer of the target, in the draft's pass over accepted tokens, and in each level.
    assert len(num_live) == num_rounds * (target.config.get_text_config().num_hidden_layers + 1 + 2)
    return answers


def run_interpreted(*arguments: str) -> dict[str, Any]:
    # Triton reads the variable when it is imported, which may have happened in this process.
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_interpreted()


@needs_triton
@pytest.mark.parametrize(("shape", "dtype"), QUICK_CASES)
def test_kernels_give_what_sdpa_gives(interpreted, shape, dtype):
    assert interpreted["distances"][f"{shape}, {dtype}"] < DTYPES[dtype]


@needs_triton
@pytest.mark.slow
def test_kernels_give_what_sdpa_gives_in_all_cases():
    distances = run_interpreted("all")["distances"]
    assert all(distances[f"{shape}, {dtype}"] < DTYPES[dtype] for shape, dtype in CASES)


@needs_triton
@pytest.mark.parametrize("case", ["a row that sees nothing"])
def test_kernels_with_odd_inputs(interpreted, case):
    assert interpreted["distances"][case] < DTYPES["float32"]


@needs_triton
def test_answers_through_the_kernels_are_those_of_the_target(interpreted):
    answers = interpreted["answers"]
    assert answers["with the draft"] == answers["alone"]
    assert answers["lengths"] == answers["lengths by sdpa"]  # the draft gets the right features
    assert any(length > 1 for lengths in answers["lengths"] for length in lengths)


if __name__ == "__main__":
    cases = CASES if "all" in sys.argv else QUICK_CASES
    print(json.dumps({"distances": interpreted_distances(cases), "answers": interpreted_answers()}))
