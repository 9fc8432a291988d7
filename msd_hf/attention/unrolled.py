"""Causal attention of unrolled passes, in which a row also sees single keys of its own. No mask is made.

A mask over the keys of all passes would have length times passes times length entries. Here every pass is one causal
attention of the usual kind, so that memory grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


_MULTIPLE = 8  # kernels for GPUs want a head dimension that this number divides


def attend_with_own_keys(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: Sequence[torch.Tensor],
    own_values: Sequence[torch.Tensor],
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Attention in which row j sees, with E own keys, row j of the first min(E, j + 1) of `own_keys`, and the rows 0 to
    j - E of `keys`. Without own keys this is causal attention.

    For each set of own keys one key stands before the shared ones. It is the same for all rows, but further columns of
    the queries hold each row's score with its own key, and a further column of the values shows its weight.

    Args:
        queries (`torch.Tensor` of shape `[B, H, L, D]`): queries.
        keys, values (`torch.Tensor` of shape `[B, Hk, L, D]`): keys and values that rows share; H is a multiple of Hk.
        own_keys, own_values (sequences of E `torch.Tensor` of shape `[B, Hk, L, D]`): row j belongs to query j.
        scale: scale of the scores.
        dropout: share of the weights that are dropped.

    Returns:
        `torch.Tensor` of shape `[B, H, L, D]`.
    """
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:  # not every kernel takes fewer heads of keys; the others fall back to a quadratic form
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        own_keys = [own.repeat_interleave(groups, 1) for own in own_keys]
        own_values = [own.repeat_interleave(groups, 1) for own in own_values]
    if not own_keys:
        return scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True, scale=scale)
    count, (length, dim) = len(own_keys), queries.shape[-2:]
    columns = 2 * count + -(dim + 2 * count) % _MULTIPLE
    scores = torch.stack([_scores(queries, own) for own in own_keys], -1)  # [B, H, L, E]
    # In two columns, since one number of 16 bits would round a score more than kernels do.
    coarse = scores.detach().to(torch.bfloat16).to(scores.dtype)
    scores = torch.cat([coarse, scores - coarse], -1).to(queries.dtype)
    units = torch.eye(count, dtype=keys.dtype, device=keys.device)
    first_keys = pad(torch.cat([units, units], 1), (dim, columns - 2 * count))  # [E, D + columns]
    first_values = pad(units, (dim, columns - count)).to(values.dtype)
    num_shared = max(length - count, 0)
    attended = scaled_dot_product_attention(
        torch.cat([queries, pad(scores, (0, columns - 2 * count))], -1),
        _behind(first_keys, pad(keys[:, :, :num_shared], (0, columns)))[:, :, :length],
        _behind(first_values, pad(values[:, :, :num_shared], (0, columns)))[:, :, :length],
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
    )
    result, weights = attended[..., :dim], attended[..., dim : dim + count]
    for number, own in enumerate(own_values):
        result = result + weights[..., number : number + 1] * own
    return result


class UnrolledPass:
    """
    One pass over all rows. In pass k row j sees the rows up to j - k of pass 0, and row j - k + i of each pass i from
    1 to k.

    Args:
        earlier (`UnrolledPass`, *optional*): the pass before this one; `None`: this is pass 0.
    """

    def __init__(self, earlier: UnrolledPass | None = None):
        self.earlier = earlier
        # By layer. Checkpointing runs a layer again; later passes then still see what the first run has made.
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """
        The attention `[B, H, L, D]` of a layer in this pass.

        Args:
            layer: number of the layer.
            queries (`torch.Tensor` of shape `[B, H, L, D]`), keys, values (`[B, Hk, L, D]`): those of this pass.
            scale, dropout: as in [`attend_with_own_keys`].
        """
        self._states.setdefault(layer, (keys, values))
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        current = self
        while current.earlier is not None:
            shared = (keys, values) if current is self else current._states[layer]
            own.append((_shifted(shared[0], len(own)), _shifted(shared[1], len(own))))
            current = current.earlier
        first_keys, first_values = (keys, values) if current is self else current._states[layer]
        own_keys, own_values = [pair[0] for pair in own], [pair[1] for pair in own]
        return attend_with_own_keys(queries, first_keys, first_values, own_keys, own_values, scale, dropout)


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The scores `[B, H, L]` of each query with the key in its place, in at least float32."""
    products = queries * keys
    return products.sum(-1, dtype=torch.promote_types(products.dtype, torch.float32))


def _behind(first: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`states` `[B, H, S, W]` behind the rows `first` `[E, W]`."""
    return torch.cat([first.expand(*states.shape[:2], *first.shape), states], 2)


def _shifted(states: torch.Tensor, count: int) -> torch.Tensor:
    """Row j - `count` of `states` `[B, H, L, D]` in place of row j."""
    return pad(states, (0, 0, count, 0))[:, :, : states.shape[2]] if count else states


__all__ = ["UnrolledPass", "attend_with_own_keys"]
