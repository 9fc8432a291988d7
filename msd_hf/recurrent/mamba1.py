"""The selective scan of Mamba 1 over candidate trees.

Its decays differ between channels and states, so there is no closed form without a matrix of nodes for each of them.
The scan goes through the nodes in order: each starts from the state of its parent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Mamba1Nodes:
    """
    What Mamba 1 keeps of N nodes. It computes the state behind a path again, because a state for each node would take
    many times the memory.

    Args:
        state (`torch.Tensor` of shape `[B, C, S]`): the state before the root.
        inputs (`torch.Tensor` of shape `[B, N, C]`): `dt x`.
        dt (`torch.Tensor` of shape `[B, N, C]`): step sizes.
        A (`torch.Tensor` of shape `[C, S]`): negative; `A dt` are the log decays.
        keys (`torch.Tensor` of shape `[B, N, S]`): B.
    """

    state: torch.Tensor
    inputs: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    keys: torch.Tensor

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state behind accepted nodes, `[B, C, S]`; see [`KeptNodes.state_after`]."""
        inputs, dt, keys = (
            part.gather(1, paths.unsqueeze(2).expand(-1, -1, part.shape[2]))
            for part in (self.inputs, self.dt, self.keys)
        )
        state = self.state
        for step in range(paths.shape[1]):
            decays = (dt[:, step].unsqueeze(2) * self.A).exp()
            stepped = state * decays + inputs[:, step].unsqueeze(2) * keys[:, step].unsqueeze(1)
            state = torch.where((counts > step)[:, None, None], stepped, state)
        return state


@dataclass
class Mamba1Heads:
    """What the scans of several heads keep, in order. The state has one more dimension, `[B, heads, C, S]`."""

    heads: list[Mamba1Nodes] = field(default_factory=list)

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state behind accepted nodes, `[B, heads, C, S]`; see [`KeptNodes.state_after`]."""
        return torch.stack([head.state_after(paths, counts) for head in self.heads], dim=1)


def tree_mamba1(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    parents: torch.Tensor,
) -> tuple[torch.Tensor, Mamba1Nodes]:
    """
    The selective scan of Mamba 1 at each node of a tree, in the dtype of its arguments.

    Args:
        x (`torch.Tensor` of shape `[B, N, C]`): inputs.
        dt (`torch.Tensor` of shape `[B, N, C]`): step sizes, positive.
        A (`torch.Tensor` of shape `[C, S]`): negative; `A dt` are the log decays.
        B, C (`torch.Tensor` of shape `[B, N, S]`): what writes to and reads from the state.
        D (`torch.Tensor` of shape `[C]`, *optional*): weight of the input in the output.
        state (`torch.Tensor` of shape `[B, C, S]`): the state before the root.
        parents (`torch.LongTensor` of shape `[B, N]`): parent of each node, in flat order; the root is its own.

    Returns:
        Outputs `[B, N, C]`, and what [`Mamba1Nodes.state_after`] needs.
    """
    kept = Mamba1Nodes(state, x * dt, dt, A, B)
    batch_size, num_nodes = parents.shape
    rows = torch.arange(batch_size, device=parents.device)
    states = x.new_empty(batch_size, num_nodes, *state.shape[1:])
    outputs = []
    for node in range(num_nodes):  # one node at a time stays in the processor's cache
        before = states[rows, parents[:, node]] if node else state
        written = kept.inputs[:, node].unsqueeze(2) * B[:, node].unsqueeze(1)
        states[:, node] = torch.addcmul(written, before, (dt[:, node].unsqueeze(2) * A).exp())
        outputs.append((states[:, node] @ C[:, node].unsqueeze(2)).squeeze(2))
    stacked = torch.stack(outputs, dim=1)
    return (stacked if D is None else stacked + D * x), kept


__all__ = ["Mamba1Heads", "Mamba1Nodes", "tree_mamba1"]
