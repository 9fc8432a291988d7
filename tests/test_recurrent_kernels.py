"""Recurrent layers over a tree give what the step-by-step recurrence gives on each of its paths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers.models.bamba import modeling_bamba
from transformers.models.jamba import modeling_jamba
from transformers.models.qwen3_5 import modeling_qwen3_5

from msd_hf.recurrent.convolution import columns_after, tree_convolution
from msd_hf.recurrent.gated_delta import tree_gated_delta
from msd_hf.recurrent.kernels import allow_trees, along_tree, restore_kernels
from msd_hf.recurrent.mamba1 import tree_mamba1
from msd_hf.recurrent.mamba2 import tree_mamba2
from msd_hf.recurrent.nodes import TreeNodes, convolution_windows
from msd_hf.tree.candidate import CandidateTree


BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
ROWS, HEADS, KEY, VALUE = 2, 3, 8, 5
NUM_TREES = 4


def random_tree(seed: int, num_nodes: int | None = None) -> CandidateTree:
    rng = random.Random(seed)
    num_nodes = num_nodes or rng.choice([1, 2, 5, 12, 24])
    # Some trees are bushy, some are almost chains.
    reach = rng.choice([2, 6, num_nodes])
    parents = [[0, *[rng.randrange(max(0, node - reach), node) for node in range(1, num_nodes)]] for _ in range(ROWS)]
    return CandidateTree.from_parents(
        torch.zeros(ROWS, num_nodes, dtype=torch.long), torch.tensor(parents), max(num_nodes - 1, 1)
    )


def path_to(tree: CandidateTree, row: int, node: int) -> list[int]:
    return tree.ancestors[row, node].nonzero()[:, 0].tolist()


def drawn(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


class GatedDelta:
    """The gated delta rule, one token at a time."""

    def __init__(self, seed: int, num_nodes: int, dtype: torch.dtype, by_channel: bool):
        draw = drawn(seed, dtype)
        shape = (ROWS, num_nodes, HEADS)
        self.query, self.key = unit(draw(*shape, KEY)), unit(draw(*shape, KEY))
        self.value, self.beta = draw(*shape, VALUE), draw(*shape).sigmoid()
        self.log_decay = -draw(*shape, *([KEY] if by_channel else [])).exp()
        self.state = draw(ROWS, HEADS, KEY, VALUE)

    def tree(self, tree: CandidateTree):
        return tree_gated_delta(
            self.query, self.key, self.value, self.log_decay, self.beta, self.state, tree.ancestors
        )

    def steps(self, row: int, path: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        state, output = self.state[row], self.state[row, :, 0]
        for node in path:
            decay = self.log_decay[row, node].exp()
            state = state * (decay[:, :, None] if decay.ndim == 2 else decay[:, None, None])
            key, beta = self.key[row, node], self.beta[row, node]
            update = beta[:, None] * (self.value[row, node] - torch.einsum("hk,hkv->hv", key, state))
            state = state + key[:, :, None] * update[:, None]
            output = torch.einsum("hk,hkv->hv", self.query[row, node], state)
        return output, state


class Mamba2:
    """The recurrence of Mamba 2, one token at a time. Three heads share one group."""

    def __init__(self, seed: int, num_nodes: int, dtype: torch.dtype):
        draw = drawn(seed, dtype)
        self.x, self.dt = draw(ROWS, num_nodes, HEADS, VALUE), draw(ROWS, num_nodes, HEADS).exp()
        self.A, self.D = -draw(HEADS).exp(), draw(HEADS)
        self.B, self.C = draw(ROWS, num_nodes, 1, KEY), draw(ROWS, num_nodes, 1, KEY)
        self.state = draw(ROWS, HEADS, VALUE, KEY)

    def tree(self, tree: CandidateTree):
        return tree_mamba2(self.x, self.dt, self.A, self.B, self.C, self.D, self.state, tree.ancestors)

    def steps(self, row: int, path: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        state, output = self.state[row], self.state[row, :, :, 0]
        for node in path:
            x, dt = self.x[row, node], self.dt[row, node]
            state = (self.A * dt).exp()[:, None, None] * state
            state = state + (dt[:, None] * x)[:, :, None] * self.B[row, node, 0]
            output = state @ self.C[row, node, 0] + self.D[:, None] * x
        return output, state


class Mamba1:
    """The recurrence of Mamba 1, one token at a time."""

    def __init__(self, seed: int, num_nodes: int, dtype: torch.dtype):
        draw = drawn(seed, dtype)
        self.x, self.dt = draw(ROWS, num_nodes, VALUE), draw(ROWS, num_nodes, VALUE).exp()
        self.A, self.D = -draw(VALUE, KEY).exp(), draw(VALUE)
        self.B, self.C = draw(ROWS, num_nodes, KEY), draw(ROWS, num_nodes, KEY)
        self.state = draw(ROWS, VALUE, KEY)

    def tree(self, tree: CandidateTree):
        return tree_mamba1(self.x, self.dt, self.A, self.B, self.C, self.D, self.state, tree.parents)

    def steps(self, row: int, path: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        state, output = self.state[row], self.state[row, :, 0]
        for node in path:
            x, dt = self.x[row, node], self.dt[row, node]
            state = (dt[:, None] * self.A).exp() * state + (dt * x)[:, None] * self.B[row, node]
            output = state @ self.C[row, node] + self.D * x
        return output, state


KERNELS = {
    "gated delta": lambda *args: GatedDelta(*args, by_channel=False),
    "gated delta by channel": lambda *args: GatedDelta(*args, by_channel=True),
    "mamba 2": Mamba2,
    "mamba 1": Mamba1,
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("seed", range(NUM_TREES))
@pytest.mark.parametrize("name", KERNELS)
def test_outputs_and_states_on_every_path(name, seed, dtype):
    tree = random_tree(seed)
    num_nodes = tree.tokens.shape[1]
    kernel = KERNELS[name](seed, num_nodes, dtype)
    outputs, kept = kernel.tree(tree)
    for node in range(num_nodes):
        paths = [path_to(tree, row, node) for row in range(ROWS)]
        length = max(map(len, paths))
        padded = torch.tensor([path + [0] * (length - len(path)) for path in paths])
        states = kept.state_after(padded, torch.tensor([len(path) for path in paths]))
        for row, path in enumerate(paths):
            output, state = kernel.steps(row, path)
            assert largest(outputs[row, node], output) < BOUNDS[dtype]
            assert largest(states[row], state) < BOUNDS[dtype]


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_that_accepts_nothing_keeps_its_state(name):
    tree = random_tree(0, num_nodes=6)
    kernel = KERNELS[name](0, 6, torch.float64)
    _, kept = kernel.tree(tree)
    states = kept.state_after(torch.zeros(ROWS, 1, dtype=torch.long), torch.tensor([0, 1]))
    assert torch.equal(states[0], kernel.state[0])
    assert largest(states[1], kernel.steps(1, [0])[1]) < 1e-12


def test_strong_decays_stay_finite():
    """Differences of log decays between branches overflow if they are not masked before the exponential."""
    tree = random_tree(3, num_nodes=24)
    for by_channel in (False, True):
        kernel = GatedDelta(0, 24, torch.float32, by_channel)
        kernel.log_decay = kernel.log_decay * 50
        outputs, kept = kernel.tree(tree)
        assert bool(outputs.isfinite().all())
        assert bool(
            kept.state_after(torch.zeros(ROWS, 1, dtype=torch.long), torch.tensor([1] * ROWS)).isfinite().all()
        )


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("seed", range(NUM_TREES))
def test_convolutions_on_every_path(seed, width):
    tree, draw = random_tree(seed), drawn(seed, torch.float64)
    num_nodes, channels = tree.tokens.shape[1], 6
    before, nodes = draw(ROWS, channels, width), draw(ROWS, channels, num_nodes)
    weight, bias = draw(channels, width), draw(channels)
    windows = convolution_windows(tree.parents, width, width)
    outputs = tree_convolution(torch.cat([before, nodes], dim=2), windows, weight, bias)
    for node in range(num_nodes):
        for row in range(ROWS):
            path = path_to(tree, row, node)
            text = torch.cat([before[row], nodes[row][:, path]], dim=1)
            expected = torch.nn.functional.conv1d(text[None], weight[:, None], bias, groups=channels)[0, :, -1]
            assert largest(outputs[row, :, node], expected) < 1e-12
            columns = columns_after(before, nodes, torch.tensor([path] * ROWS), torch.tensor([len(path)] * ROWS))
            assert torch.equal(columns[row], text[:, -width:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_convolution_rounds_once(dtype):
    draw = drawn(0, dtype)
    columns, weight = draw(1, 4, 7), draw(4, 4)
    windows = convolution_windows(torch.tensor([[0, 0, 1]]), 4, 4)
    got = tree_convolution(columns, windows, weight)
    assert torch.equal(got, tree_convolution(columns.float(), windows, weight.float()).to(dtype))


class TestFunctionsOfTransformers:
    """What layers call: the same functions along a chain, and step by step."""

    @pytest.fixture(autouse=True)
    def _allowed(self):
        for file in (modeling_qwen3_5, modeling_bamba, modeling_jamba):
            allow_trees(_ModuleOf(file))
        yield
        restore_kernels()

    def test_gated_delta_rule(self):
        draw = drawn(0, torch.float32)
        query, key = draw(1, 6, 2, KEY), draw(1, 6, 2, KEY)  # two heads of keys, four of values
        value, beta, g = draw(1, 6, 4, VALUE), draw(1, 6, 4).sigmoid(), -draw(1, 6, 4).exp()
        arguments = {"initial_state": draw(1, 4, KEY, VALUE), "use_qk_l2norm_in_kernel": True}
        repeated = (part.repeat_interleave(2, dim=2) for part in (query, key))  # earlier releases leave that to layers
        expected, state = modeling_qwen3_5.torch_recurrent_gated_delta_rule(
            *repeated, value, g=g, beta=beta, output_final_state=True, **arguments
        )
        nodes = _chain_nodes(6)
        with along_tree(nodes):
            outputs, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, **arguments)
        assert largest(outputs, expected) < 1e-5
        assert largest(nodes.kept.state_after(torch.arange(6)[None], torch.tensor([6])), state) < 1e-5

    def test_mamba2_without_a_clamp_of_steps(self):
        draw = drawn(1, torch.float32)
        x, dt, A = draw(1, 5, 4, VALUE), draw(1, 5, 4), -draw(4).exp()
        B, C, D, bias = draw(1, 5, 2, KEY), draw(1, 5, 2, KEY), draw(4), draw(4)
        state = draw(1, 4, VALUE, KEY)
        stepped, expected = state.clone(), []
        for token in range(5):
            expected.append(
                modeling_bamba.mamba2_selective_state_update(
                    stepped,
                    x[:, token],
                    dt[:, token, :, None].expand(-1, -1, VALUE),
                    A[:, None, None].expand(-1, VALUE, KEY),
                    B[:, token],
                    C[:, token],
                    D[:, None].expand(-1, VALUE),
                    dt_bias=bias[:, None].expand(-1, VALUE),
                    dt_softplus=True,
                )
            )
        nodes = _chain_nodes(5)
        with along_tree(nodes):
            outputs, _ = modeling_bamba.mamba2_chunk_scan(
                x, dt, A, B, C, chunk_size=4, D=D, dt_bias=bias, dt_softplus=True, initial_states=state,
                dt_limit=(1.0, 2.0), return_final_states=True,
            )  # fmt: skip
        assert largest(outputs, torch.stack(expected, dim=1)) < 1e-5
        assert largest(nodes.kept.state_after(torch.arange(5)[None], torch.tensor([5])), stepped) < 1e-5

    def test_mamba1_starts_from_the_state(self):
        draw = drawn(2, torch.float32)
        x, dt, z = draw(1, VALUE, 5), draw(1, VALUE, 5), draw(1, VALUE, 5)
        A, B, C, D, bias = -draw(VALUE, KEY).exp(), draw(1, KEY, 5), draw(1, KEY, 5), draw(VALUE), draw(VALUE)
        state = draw(1, VALUE, KEY)
        stepped, expected = state.clone(), []
        for token in range(5):
            expected.append(
                modeling_jamba.mamba_selective_state_update(
                    stepped, x[..., token], dt[..., token], A, B[..., token], C[..., token], D,
                    z=z[..., token], dt_bias=bias, dt_softplus=True,
                )
            )  # fmt: skip
        nodes = _chain_nodes(5)
        nodes.state = state
        with along_tree(nodes):
            outputs, _ = modeling_jamba.mamba_selective_scan(
                x, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
            )
        assert largest(outputs, torch.stack(expected, dim=2)) < 1e-5
        assert largest(nodes.kept.state_after(torch.arange(5)[None], torch.tensor([5])), stepped) < 1e-5

    def test_other_calls_get_the_functions_that_stood_there(self):
        draw = drawn(3, torch.float32)
        x, weight = draw(1, 4, 6), draw(4, 3)
        outside = modeling_qwen3_5.causal_conv1d_fn(x, weight)
        with along_tree(_chain_nodes(2)):
            inside = modeling_qwen3_5.causal_conv1d_fn(x, weight)
            with along_tree(None):
                assert torch.equal(modeling_qwen3_5.causal_conv1d_fn(x, weight), outside)
        assert inside.shape[2] == 2
        assert largest(inside, outside[..., -2:]) < 1e-6
        before = modeling_qwen3_5.causal_conv1d_fn.__wrapped__
        restore_kernels()
        assert modeling_qwen3_5.causal_conv1d_fn is before


class _ModuleOf:
    """Looks like a decoder whose only module comes from one file of transformers."""

    def __init__(self, file):
        self._layer = type("Layer", (), {"__module__": file.__name__})()

    def modules(self):
        return [self._layer]


def _chain_nodes(num_nodes: int) -> TreeNodes:
    tree = CandidateTree.chain(torch.zeros(1, num_nodes, dtype=torch.long))
    return TreeNodes(tree.parents, tree.ancestors)
