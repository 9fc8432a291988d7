"""The gated delta rule over candidate trees, with a decay for each head or for each channel (Kimi Delta Attention).

The chunk form of the recurrence, with the tree's ancestors in place of the causal triangle. With log decays g, state
S0 before the tree, and `cum_i` the sum of g over node i and its ancestors:

    A_ij = beta_i exp(cum_i - cum_j) k_i . k_j      for j above i
    (I + A) U = beta v - beta exp(cum) k S0
    o_i = exp(cum_i) q_i S0 + sum over j at or above i of exp(cum_i - cum_j) (q_i . k_j) u_j
    S_e = exp(cum_e) S0 + sum over j at or above e of exp(cum_e - cum_j) k_j (x) u_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .nodes import is_accepted, picked


@dataclass
class GatedDeltaNodes:
    """
    What the gated delta rule keeps of N nodes.

    Args:
        state (`torch.Tensor` of shape `[B, H, K, V]`): the state before the root.
        keys (`torch.Tensor` of shape `[B, H, N, K]`): keys.
        updates (`torch.Tensor` of shape `[B, H, N, V]`): U, what each node writes at its key.
        decays (`torch.Tensor` of shape `[B, H, N, 1]` or `[B, H, N, K]`): log decay from the state to each node.
    """

    state: torch.Tensor
    keys: torch.Tensor
    updates: torch.Tensor
    decays: torch.Tensor

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state behind accepted nodes, `[B, H, K, V]`; see [`KeptNodes.state_after`]."""
        keys, updates, decays = (picked(part, paths) for part in (self.keys, self.updates, self.decays))
        last = (counts - 1).clamp(min=0)[:, None, None, None].expand(-1, decays.shape[1], 1, decays.shape[3])
        accepted = is_accepted(paths, counts)[:, None, :, None]
        # A row that accepts nothing has no decay, and weights of 0.
        end = torch.where(accepted[:, :, :1], decays.gather(2, last), 0)  # [B, H, 1, 1 or K]
        weights = torch.where(accepted, end - decays, -torch.inf).exp()
        written = (keys * weights).mT.flatten(0, 1), updates.flatten(0, 1)
        return torch.baddbmm((end.mT.exp() * self.state).flatten(0, 1), *written).view_as(self.state)


def tree_gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    ancestors: torch.Tensor,
) -> tuple[torch.Tensor, GatedDeltaNodes]:
    """
    The gated delta rule at each node of a tree, in the dtype of its arguments.

    Args:
        query, key (`torch.Tensor` of shape `[B, N, H, K]`): normalised and scaled.
        value (`torch.Tensor` of shape `[B, N, H, V]`): values.
        log_decay (`torch.Tensor` of shape `[B, N, H]` or `[B, N, H, K]`): g, a decay for each head or each channel.
        beta (`torch.Tensor` of shape `[B, N, H]`): share of a key's old value that is replaced.
        state (`torch.Tensor` of shape `[B, H, K, V]`): S0, the state before the root.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): `[b, i, j]` is true if node j is node i or above it.

    Returns:
        Outputs `[B, N, H, V]`, and what [`GatedDeltaNodes.state_after`] needs.
    """
    if log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    query, key, value, log_decay = (part.transpose(1, 2) for part in (query, key, value, log_decay))
    beta = beta.transpose(1, 2).unsqueeze(-1)
    ancestors = ancestors.unsqueeze(1)
    decays = ancestors.to(log_decay.dtype) @ log_decay
    from_state = decays.exp()
    way = _decays_between(decays, ancestors)
    system = beta * _decayed_products(key, key, way)
    written = beta * (value - (from_state * key) @ state)
    # `unitriangular` takes the diagonal of the system as ones, whatever stands there.
    updates = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    outputs = (from_state * query) @ state + _decayed_products(query, key, way) @ updates
    return outputs.transpose(1, 2).contiguous(), GatedDeltaNodes(state, key, updates, decays)


def _decays_between(decays: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """The decay from each node to those below it, `[B, H, N, N]` or `[B, H, N, N, K]`, 0 between other nodes."""
    # Masked before the exponential, because differences between branches may overflow.
    if decays.shape[-1] == 1:
        return torch.where(ancestors, decays - decays.mT, -torch.inf).exp()
    between = decays.unsqueeze(3) - decays.unsqueeze(2)
    return between.masked_fill_(~ancestors.unsqueeze(-1), -torch.inf).exp_()


def _decayed_products(left: torch.Tensor, right: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """Products `[B, H, N, N]` of vectors `[B, H, N, K]` of each node with those at or above it, decayed on the way."""
    if way.ndim == 4:
        return (left @ right.mT) * way
    return torch.einsum("bhik,bhijk,bhjk->bhij", left, way, right)


__all__ = ["GatedDeltaNodes", "tree_gated_delta"]
