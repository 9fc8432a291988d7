"""The cache layer of a recurrent or convolutional layer: states that follow the accepted path of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from .convolution import columns_after
from .nodes import KeptNodes, TreeNodes
from .replay import MixerCall


States = dict[int, Any]  # by number of the state; a layer may have several


class RecurrentLayer(LinearAttentionLayer):
    """
    A `LinearAttentionLayer` that can keep one branch of a candidate tree.

    A forward over a tree (`expect`) leaves the states as they are; the layer keeps what the kernels computed, from
    which `advance` computes the states behind the accepted path. A forward over a root alone is a step of plain
    decoding, which changes states in place: it gets copies (`hold`). So does a forward over a chain on a layer of an
    unknown kind, whose mixer then runs again over the accepted tokens (`replay`). Outside of these the layer behaves
    as its base.

    Attributes:
        number_of_states (`int`): how many convolutions and recurrences the layer has.
        conv_states, recurrent_states (`dict[int, torch.Tensor | None]`): states of B rows.
    """

    conv_states: States
    recurrent_states: States

    def __init__(self, number_of_states: int = 1):
        super().__init__(number_of_states=number_of_states)
        self._nodes: TreeNodes | None = None
        self._columns: dict[int, torch.Tensor] = {}  # what the tree's convolutions have read, `[B, C, N]`
        self._kept: dict[int, KeptNodes] = {}  # what its recurrences have kept
        self._before: tuple[States, States] | None = None  # the states before a step, or before `advance`
        self._call: MixerCall | None = None  # that of a chain, which has changed the states

    # What a target's layer calls

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        nodes = self._nodes
        if nodes is None:
            return super().update_conv_state(conv_states, state_idx, **kwargs)
        self._columns[state_idx] = conv_states
        nodes.is_complete &= nodes.convolved is None  # else the convolution before this one ran in another way
        nodes.state = self.recurrent_states[state_idx]
        nodes.convolved = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        return nodes.convolved

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> Any:
        nodes = self._nodes
        if nodes is None:
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        if nodes.kept is not None:
            self._kept[state_idx], nodes.kept = nodes.kept, None
        return recurrent_states

    # What a transaction asks of every layer. States have no slots.

    def begin(self, text_length: int) -> None:
        """Nothing."""

    def truncate(self, length: int) -> None:
        """Nothing: `drop` and `advance` say where the states shall be."""

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        """Nothing, as above."""

    def move_slots(self, start: int, slots: torch.Tensor, places: torch.Tensor, length: int) -> None:
        """Nothing, as above."""

    # What a transaction asks of a layer with states

    def expect(self, nodes: TreeNodes) -> None:
        """Prepares a forward over trees of more than one node."""
        self._nodes = nodes

    def hold(self) -> None:
        """Prepares forwards that change the states in place. They change copies until `advance`, and `drop` returns to
        the states of now."""
        if self._before is None:
            self._before = self.conv_states, self.recurrent_states
        self.conv_states, self.recurrent_states = _copies(self.conv_states), _copies(self.recurrent_states)

    def replay(self, call: MixerCall) -> None:
        """Takes the call of the layer's mixer that has run a chain since `hold`."""
        self._call = call

    def has_kept_nodes(self) -> bool:
        """Whether the last forward over trees left what `advance` needs: every convolution and every recurrence of the
        layer ran along the trees."""
        nodes = self._nodes
        if nodes is None:
            return False
        if (not nodes.is_complete or nodes.convolved is not None) and not nodes.are_chains:
            return False
        has_columns = any(state is not None for state in self.conv_states.values())
        has_state = any(state is not None for state in self.recurrent_states.values())
        return (has_columns or has_state) and all(
            number in kept
            for states, kept in ((self.conv_states, self._columns), (self.recurrent_states, self._kept))
            for number, state in states.items()
            if state is not None
        )

    def advance(self, counts: Sequence[int], paths: torch.Tensor, row_counts: torch.Tensor) -> None:
        """
        Moves the states behind the accepted nodes. Until `settle`, `drop` returns to the states before.

        Args:
            counts (`Sequence[int]`): how many nodes each row accepts.
            paths (`torch.LongTensor` of shape `[B, A]`): the accepted nodes of each row, in order; entries behind a
                row's count are ignored.
            row_counts (`torch.LongTensor` of shape `[B]`): `counts`, made once for all layers.
        """
        if self._call is not None:
            (count,) = counts
            if count < self._call.num_tokens:
                assert self._before is not None
                self.conv_states, self.recurrent_states = (_copies(states) for states in self._before)
                if count:
                    self._call.repeat(count)
            return
        if self._nodes is None:
            if self._before is not None and min(counts) == 0:  # these rows take back the step
                stepped = row_counts > 0
                for states, before in zip((self.conv_states, self.recurrent_states), self._before, strict=True):
                    for number, state in states.items():
                        if state is not None:
                            mask = stepped.to(state.device).view(-1, *[1] * (state.ndim - 1))
                            states[number] = torch.where(mask, state, before[number])
            return
        conv_states, recurrent_states = dict(self.conv_states), dict(self.recurrent_states)
        for number, columns in self._columns.items():
            accepted = paths.to(columns.device), row_counts.to(columns.device)
            conv_states[number] = columns_after(self.conv_states[number], columns, *accepted)
        for number, kept in self._kept.items():
            state = self.recurrent_states[number]
            accepted = paths.to(state.device), row_counts.to(state.device)
            recurrent_states[number] = kept.state_after(*accepted).to(state.dtype)
        self._before = self.conv_states, self.recurrent_states
        self.conv_states, self.recurrent_states = conv_states, recurrent_states
        self._end_block()

    def settle(self) -> None:
        """Forgets the states before the last block."""
        self._before = None
        self._end_block()

    def drop(self) -> None:
        """Returns to the states before the block."""
        if self._before is not None:
            self.conv_states, self.recurrent_states = self._before
            self._before = None
        self._end_block()

    def _end_block(self) -> None:
        self._nodes = self._call = None
        self._columns, self._kept = {}, {}

    def select_rows(self, rows: Sequence[int], length: int) -> None:
        """Keeps the given rows of the batch, in that order. States have no slots, so `length` changes nothing."""
        self._keep_rows(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at the given indices. transformers' layer can reorder rows but has no method of this name."""
        self._keep_rows(indices.tolist())

    def _keep_rows(self, rows: Sequence[int]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                if state is not None:
                    states[number] = state[list(rows)]

    def take_row(self, row: int, length: int) -> tuple[States, States]:
        """Copies of the states of a row, `[1, ...]`."""
        rows = slice(row, row + 1)
        return _copies(self.conv_states, rows), _copies(self.recurrent_states, rows)

    def put_rows(self, rows: Sequence[tuple[States, States]]) -> None:
        """Replaces the content of the layer by rows that `take_row` returned."""
        for kind, states in enumerate((self.conv_states, self.recurrent_states)):
            for number, state in states.items():
                if state is not None:
                    states[number] = torch.cat([row[kind][number] for row in rows])


def _copies(states: States, rows: slice = slice(None)) -> States:
    """Copies of states, of all rows of the batch or of some."""
    return {number: None if state is None else state[rows].clone() for number, state in states.items()}


def copy_states(source: LinearAttentionLayer, target: LinearAttentionLayer) -> None:
    """Replaces the states of all rows of a layer by copies of those of another layer."""
    target.conv_states, target.recurrent_states = _copies(source.conv_states), _copies(source.recurrent_states)
    for name in (
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    ):
        setattr(target, name, dict(getattr(source, name)))
    if isinstance(target, RecurrentLayer):
        target.settle()
    target.record_past = source.record_past
    if source.device is not None:
        target.device, target.dtype = source.device, source.dtype


__all__ = ["RecurrentLayer", "copy_states"]
