"""
Times one recurrent layer over a candidate tree: the closed form and the state behind an accepted path, against the
functions with which transformers runs a block of tokens (chunk form) and single tokens, without its optional kernels.

    python examples/studies/bench_recurrent.py --nodes 16 60

Sizes are those of one layer of Qwen3.5-27B (48 heads of 128 x 128, 16 key heads), Falcon-H1-7B (Mamba 2) and Jamba
(Mamba 1). All sides take turns in one run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan, mamba2_selective_state_update
from transformers.models.jamba.modeling_jamba import mamba_selective_scan, mamba_selective_state_update
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from msd_hf.recurrent.gated_delta import tree_gated_delta
from msd_hf.recurrent.mamba1 import tree_mamba1
from msd_hf.recurrent.mamba2 import tree_mamba2
from msd_hf.tree.candidate import CandidateTree


PATH_LENGTH = 4
Work = dict[str, Callable[[], object]]


def random_tree(num_nodes: int) -> CandidateTree:
    rng = random.Random(0)
    parents = [0, *(max(0, node - rng.randint(1, 8)) for node in range(1, num_nodes))]
    return CandidateTree.from_parents(
        torch.zeros(1, num_nodes, dtype=torch.long), torch.tensor([parents]), max(1, num_nodes - 1)
    )


def gated_delta(tree: CandidateTree) -> Work:
    num_nodes, heads, size = tree.tokens.shape[1], 48, 128
    query, key, value = (torch.randn(1, num_nodes, heads, size) * size**-0.5 for _ in range(3))
    g, beta, state = (
        -torch.rand(1, num_nodes, heads),
        torch.rand(1, num_nodes, heads),
        torch.randn(1, heads, size, size),
    )
    _, kept = tree_gated_delta(query, key, value, g, beta, state, tree.ancestors)
    path, counts = torch.arange(PATH_LENGTH)[None], torch.tensor([PATH_LENGTH])

    def native(function: Callable[..., object]) -> Callable[[], object]:
        return lambda: function(query, key, value, g=g, beta=beta, initial_state=state, output_final_state=True)

    return {
        "tree": lambda: tree_gated_delta(query, key, value, g, beta, state, tree.ancestors),
        "state": lambda: kept.state_after(path, counts),
        "chunk": native(torch_chunk_gated_delta_rule),
        "steps": native(torch_recurrent_gated_delta_rule),
    }


def mamba2(tree: CandidateTree) -> Work:
    num_nodes, heads, size, width = tree.tokens.shape[1], 24, 128, 256
    x, dt, A, D = (
        torch.randn(1, num_nodes, heads, size),
        torch.rand(1, num_nodes, heads),
        -torch.rand(heads),
        torch.rand(heads),
    )
    B, C, state = (
        torch.randn(1, num_nodes, 1, width),
        torch.randn(1, num_nodes, 1, width),
        torch.randn(1, heads, size, width),
    )
    _, kept = tree_mamba2(x, dt, A, B, C, D, state, tree.ancestors)
    path, counts = torch.arange(PATH_LENGTH)[None], torch.tensor([PATH_LENGTH])

    def steps() -> None:
        stepped = state.clone()
        for node in range(num_nodes):
            mamba2_selective_state_update(
                stepped,
                x[:, node],
                dt[:, node, :, None].expand(-1, -1, size),
                A[:, None, None].expand(-1, size, width),
                B[:, node],
                C[:, node],
                D[:, None].expand(-1, size),
            )

    return {
        "tree": lambda: tree_mamba2(x, dt, A, B, C, D, state, tree.ancestors),
        "state": lambda: kept.state_after(path, counts),
        "chunk": lambda: mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=256, D=D, initial_states=state, return_final_states=True
        ),
        "steps": steps,
    }


def mamba1(tree: CandidateTree) -> Work:
    num_nodes, channels, width = tree.tokens.shape[1], 8192, 16
    x, dt, A = torch.randn(1, num_nodes, channels), torch.rand(1, num_nodes, channels), -torch.rand(channels, width)
    B, C, D = torch.randn(1, num_nodes, width), torch.randn(1, num_nodes, width), torch.rand(channels)
    state = torch.randn(1, channels, width)
    _, kept = tree_mamba1(x, dt, A, B, C, D, state, tree.parents)
    path, counts = torch.arange(PATH_LENGTH)[None], torch.tensor([PATH_LENGTH])

    def steps() -> None:
        stepped = state.clone()
        for node in range(num_nodes):
            mamba_selective_state_update(stepped, x[:, node], dt[:, node], A, B[:, node], C[:, node], D)

    return {
        "tree": lambda: tree_mamba1(x, dt, A, B, C, D, state, tree.parents),
        "state": lambda: kept.state_after(path, counts),
        "chunk": lambda: mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D=D, return_last_state=True),
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 60])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print("milliseconds a layer: median (lower and upper quartile)")
    for num_nodes in arguments.nodes:
        tree = random_tree(num_nodes)
        for name, make in (("gated delta", gated_delta), ("Mamba 2", mamba2), ("Mamba 1", mamba1)):
            work = make(tree)
            seconds: dict[str, list[float]] = {side: [] for side in work}
            for repeat in range(arguments.repeats + 2):
                for side, run in work.items():
                    start = time.perf_counter()
                    run()
                    if repeat >= 2:  # warm
                        seconds[side].append(time.perf_counter() - start)
            cells = []
            for side, values in seconds.items():
                lower, median, upper = (1000 * value for value in statistics.quantiles(values, n=4))
                cells.append(f"{side} {median:.2f} ({lower:.2f}-{upper:.2f})")
            print(f"{num_nodes:3} nodes  {name:12} {', '.join(cells)}")


if __name__ == "__main__":
    main()
