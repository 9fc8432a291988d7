"""The nodes of candidate trees as recurrent layers see them, for one forward of a target."""

from __future__ import annotations

from typing import Protocol

import torch


class KeptNodes(Protocol):
    """What a kernel keeps of a block of nodes, so that the state behind an accepted path can be computed."""

    def state_after(self, paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """
        The state behind the accepted nodes of each row, with the shape of the state before the block.

        Args:
            paths (`torch.LongTensor` of shape `[B, A]`): the accepted nodes of each row, in order; entries behind a
                row's count are ignored.
            counts (`torch.LongTensor` of shape `[B]`): how many nodes each row accepts; 0 leaves its state as it was.
        """
        ...


class TreeNodes:
    """
    The nodes of one forward. Kernels read the trees here, and leave here what the layer that calls them keeps. A layer
    runs its convolution and its recurrence one after the other, so there is one place for each.

    Args:
        parents (`torch.LongTensor` of shape `[B, N]`): parent of each node, in flat order; the root is its own.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): `[b, i, j]` is true if node j is node i or above it.

    Attributes:
        convolved (`torch.Tensor`, *optional*): what a layer has handed to a convolution that has not run yet.
        state (`torch.Tensor`, *optional*): the recurrent state before the block of the layer that runs, for kernels
            that transformers does not hand it to.
        kept (`KeptNodes`, *optional*): what the last recurrence has kept.
        is_complete (`bool`): whether every convolution so far was one that runs along trees.
    """

    def __init__(self, parents: torch.Tensor, ancestors: torch.Tensor):
        self.parents = parents
        self.ancestors = ancestors
        self.convolved: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.kept: KeptNodes | None = None
        self.is_complete = True
        self._windows: dict[tuple[int, int, torch.device], torch.Tensor] = {}
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def are_chains(self) -> bool:
        """Whether all trees are chains, along which any convolution runs as over a text."""
        before = torch.arange(self.parents.shape[1] - 1, device=self.parents.device)
        return bool((self.parents[:, 1:] == before).all())

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`parents` and `ancestors` on a device. Layers of one target may lie on several."""
        if device not in self._on_device:
            self._on_device[device] = self.parents.to(device), self.ancestors.to(device)
        return self._on_device[device]

    def windows(self, width: int, num_columns: int, device: torch.device) -> torch.Tensor:
        """
        The columns that a convolution reads at each node: the node, its ancestors, then the columns before the root.

        Args:
            width (`int`): width of the convolution's kernel, K.
            num_columns (`int`): number of columns before the root, S, at least `K - 1`.

        Returns:
            `torch.LongTensor` of shape `[B, N, K]`: indices into S columns and N nodes behind them.
        """
        key = width, num_columns, device
        if key not in self._windows:
            self._windows[key] = convolution_windows(self.on(device)[0], width, num_columns)
        return self._windows[key]


def convolution_windows(parents: torch.Tensor, width: int, num_columns: int) -> torch.Tensor:
    """Computes [`TreeNodes.windows`] from the parents `[B, N]` of the nodes."""
    batch_size, num_nodes = parents.shape
    before = torch.arange(-1, num_columns - 1, device=parents.device).clamp(min=0).expand(batch_size, -1)
    previous = torch.cat([before, parents + num_columns], dim=1)  # [B, S + N]: the column before each column
    previous[:, num_columns] = num_columns - 1  # the root is its own parent
    column = torch.arange(num_columns, num_columns + num_nodes, device=parents.device).expand(batch_size, -1)
    columns = [column]
    for _ in range(width - 1):
        column = previous.gather(1, column)
        columns.append(column)
    return torch.stack(columns[::-1], dim=2)


def is_accepted(paths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which entries of `paths` `[B, A]` are accepted nodes, and not padding behind a shorter path."""
    return torch.arange(paths.shape[1], device=paths.device) < counts.unsqueeze(1)


def picked(nodes: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """The entries `[B, H, A, D]` of the nodes on each row's path `[B, A]`, from those of all nodes `[B, H, N, D]`."""
    if len(paths) == 1:  # takes half the time of a gather
        return nodes.index_select(2, paths[0])
    return nodes.gather(2, paths[:, None, :, None].expand(-1, nodes.shape[1], -1, nodes.shape[3]))


__all__ = ["KeptNodes", "TreeNodes", "convolution_windows", "is_accepted", "picked"]
