"""The scalar-decay state space of Mamba 2 over candidate trees.

The chunk form of the recurrence, with the tree's ancestors in place of the causal triangle. With `cum_i` the sum of
the log decays `A dt` over node i and its ancestors, and S0 the state before the tree:

    y_i = exp(cum_i) C_i S0^T + sum over j at or above i of exp(cum_i - cum_j) (C_i . B_j) dt_j x_j + D x_i
    S_e = exp(cum_e) S0 + sum over j at or above e of exp(cum_e - cum_j) dt_j x_j (x) B_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .nodes import is_accepted, picked


@dataclass
class Mamba2Nodes:
    """
    What Mamba 2 keeps of N nodes.

    Args:
        state (`torch.Tensor` of shape `[B, H, P, S]`): the state before the root.
        inputs (`torch.Tensor` of shape `[B, H, N, P]`): `dt x`.
        keys (`torch.Tensor` of shape `[B, G, N, S]`): B, shared by `H / G` heads each.
        decays (`torch.Tensor` of shape `[B, H, N]`): log decay from the state to each node.
    """

    state: torch.Tensor
    inputs: torch.Tensor
    keys: torch.Tensor
    decays: torch.Tensor

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state behind accepted nodes, `[B, H, P, S]`; see [`KeptNodes.state_after`]."""
        inputs, keys, decays = (picked(part, paths) for part in (self.inputs, self.keys, self.decays.unsqueeze(3)))
        last = (counts - 1).clamp(min=0)[:, None, None, None].expand(-1, decays.shape[1], 1, 1)
        accepted = is_accepted(paths, counts)[:, None, :, None]
        # A row that accepts nothing has no decay, and weights of 0.
        end = torch.where(accepted[:, :, :1], decays.gather(2, last), 0)  # [B, H, 1, 1]
        weights = torch.where(accepted, end - decays, -torch.inf).exp()
        keys = keys.repeat_interleave(inputs.shape[1] // keys.shape[1], dim=1)
        written = (inputs * weights).mT.flatten(0, 1), keys.flatten(0, 1)
        return torch.baddbmm((end.exp() * self.state).flatten(0, 1), *written).view_as(self.state)


def tree_mamba2(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    ancestors: torch.Tensor,
) -> tuple[torch.Tensor, Mamba2Nodes]:
    """
    The state space of Mamba 2 at each node of a tree, in the dtype of its arguments.

    Args:
        x (`torch.Tensor` of shape `[B, N, H, P]`): inputs.
        dt (`torch.Tensor` of shape `[B, N, H]`): step sizes, positive.
        A (`torch.Tensor` of shape `[H]`): negative; `A dt` are the log decays.
        B, C (`torch.Tensor` of shape `[B, N, G, S]`): what writes to and reads from the state, for G groups of heads.
        D (`torch.Tensor` of shape `[H]`, *optional*): weight of the input in the output.
        state (`torch.Tensor` of shape `[B, H, P, S]`): the state before the root.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): `[b, i, j]` is true if node j is node i or above it.

    Returns:
        Outputs `[B, N, H, P]`, and what [`Mamba2Nodes.state_after`] needs.
    """
    num_heads, num_groups = x.shape[2], B.shape[2]
    x, B, C = (part.transpose(1, 2) for part in (x, B, C))
    dt = dt.transpose(1, 2)  # [B, H, N]
    ancestors = ancestors.unsqueeze(1)
    decays = ((A.unsqueeze(1) * dt).unsqueeze(2) * ancestors).sum(-1)  # [B, H, N]
    way = torch.where(ancestors, decays.unsqueeze(3) - decays.unsqueeze(2), -torch.inf).exp()
    inputs = x * dt.unsqueeze(3)
    scores = (C @ B.mT).repeat_interleave(num_heads // num_groups, dim=1)
    read = C.repeat_interleave(num_heads // num_groups, dim=1) @ state.mT
    outputs = (scores * way) @ inputs + decays.exp().unsqueeze(3) * read
    if D is not None:
        outputs = outputs + D[:, None, None] * x
    return outputs.transpose(1, 2).contiguous(), Mamba2Nodes(state, inputs, B, decays)


__all__ = ["Mamba2Nodes", "tree_mamba2"]
