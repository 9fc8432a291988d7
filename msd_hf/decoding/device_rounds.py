"""Greedy rounds of one sequence that run on the device alone, while the host reads the emitted tokens.

What one round leaves to the next (accepted tokens and their hidden states, lengths, positions) stays on the device, in
tensors that keep their addresses. So a round can be recorded, and the next tree is drafted while the host still looks
at the tokens of this one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn import functional

from ..compiled.cuda_graphs import RecordedStep, Recorder
from ..drafting.fixed import DraftRoom, FixedDrafter
from ..kv.fixed import close_slots, move_slots, parts_of, reserve
from ..kv.in_place import KeysAndValues
from ..observer import phase
from ..target.tree_forward import TargetVerification
from ..tree.candidate import CandidateTree
from .call import DecodingCall
from .running_rows import RunningRows
from .verification import accepted_by_argmax


_NO_LIMIT = 1 << 40


class DeviceRounds:
    """
    Runs all rounds of a greedy call with one sequence and `compile=True` on the device.

    Args:
        call (`DecodingCall`): a call that `can_serve` accepts.
        running (`RunningRows`): the one row, after the prefill of target and draft.
    """

    def __init__(self, call: DecodingCall, running: RunningRows):
        assert isinstance(call.drafter, FixedDrafter)
        self.target = call.target
        self.drafter = call.drafter
        self.selector = call.selector
        self.running = running
        self.keeps_cache = call.keeps_cache
        self._on_logits = call.observer.on_logits
        self._tally = call.tally
        self._memory = call.pair.recordings
        start = self.drafter.state
        self._draft_context = start.context
        self._last_position = start.last_position
        self._block_length = self.drafter.block_length
        device = start.tokens.device
        left = self.selector.tokens_left
        with torch.inference_mode():  # the mode of all tensors of a drafting
            self._tokens = start.tokens.clone()  # [1, A]: the tokens of the last round, then padding
            self._hidden_states = start.hidden_states.clone()  # [1, A, W]
            vector = start.image_vector
            self._image_vector = None if vector is None else vector.clone()  # [1, 1, H]
            self._counts = torch.tensor(start.counts, device=device)  # [1]: how many tokens the last round emitted
            self._draft_lengths = torch.tensor(start.context.lengths, device=device)  # [1]
            self._draft_position = start.next_position.clone()  # [1, 1]
            self._lengths = torch.tensor(running.context.lengths, device=device)  # [1]
            self._position = running.next_position.clone()  # [..., 1, 1]
            self._tokens_left = torch.tensor([_NO_LIMIT if left is None else left], device=device)
        self._count = start.counts[0]  # `_counts` on the host, one round behind
        self._read_back = _ReadBack(1 + self._block_length, device)
        self._buffers: Sequence[KeysAndValues]
        self._parts: Sequence[torch.Tensor]  # the buffers as one tensor, if that is possible
        self._room: DraftRoom
        self._is_set_up = False

    @staticmethod
    def can_serve(call: DecodingCall) -> bool:
        """Whether the device needs no help from the host. The call must have one row and a compiled draft without
        suffix nodes. Each token must be the argmax of its logits. Logits, states and attentions must not be returned.
        Modules outside compiled code must have no hooks, and no measurement may replace the verification."""
        selector = call.selector
        return (
            not selector.finished
            and isinstance(call.drafter, FixedDrafter)
            and not call.settings.suffix_nodes
            and selector.batch_size == 1
            and selector.is_plain_argmax
            and not selector.keeps_logits
            and not call.flags
            and call.observer.on_verify is None
            and not any(module._forward_pre_hooks or module._forward_hooks for module in call.target.outer_modules())
        )

    def run(self) -> None:
        """Runs rounds until the sequence ends."""
        is_drafted = False
        num_emitted = 0  # tokens of the last round that were handed on
        try:
            while not self.selector.finished:
                if not is_drafted:
                    self._set_up()
                    self._draft()
                    self._note_fed()
                with phase("target forward"):
                    verification = self._verify_step()
                if self._on_logits is not None:
                    tree = self._draft_step.result
                    self._on_logits(tree, verification.logits[:, : tree.tokens.shape[1]])
                with phase("verification"):
                    self._read_back.send(self._accept_step())
                # Only drafting runs ahead; if the text ended, little work is wasted.
                is_drafted = not self.keeps_cache and self._has_room(self._block_length)
                if is_drafted:
                    self._draft()
                with phase("verification"):
                    num_emitted = self._hand_on(self._read_back.receive(), verification.logits)
                if is_drafted:
                    self._note_fed()
        finally:
            self._settle_caches()
            self._drop_steps()
        if self.keeps_cache:
            self.drafter.resume(self._draft_context, self._tokens, self._hidden_states, [num_emitted])

    def _set_up(self) -> None:
        """Makes buffers and recorded steps, at first and whenever the buffers have no room for another round."""
        if self._is_set_up and self._has_room(0):
            return
        self._settle_caches()
        self._buffers = reserve(self.running.slots.cache, self._num_slots)
        self._parts = parts_of(self._buffers)
        self._room = self.drafter.reserve(self._draft_context, self._last_position, self._hidden_states)
        self._drop_steps()
        self._recorder = Recorder(self._tokens.device, self._memory)
        self._draft_step = RecordedStep(self._draft_tree, self._recorder)
        self._verify_step = RecordedStep(self._verify, self._recorder)
        self._accept_step = RecordedStep(self._accept, self._recorder)
        self._is_set_up = True

    def _drop_steps(self) -> None:
        if self._is_set_up:
            for step in (self._draft_step, self._verify_step, self._accept_step):
                step.close()
            self._recorder.close()
            self._is_set_up = False

    def _settle_caches(self) -> None:
        """Makes the accepted slots the content of the caches."""
        if self._is_set_up:
            close_slots(self.running.slots.cache, self.running.context.num_slots)
            close_slots(self.drafter.cache, self._draft_context.num_slots)

    def _has_room(self, ahead: int) -> bool:
        """Whether there is room for a round that begins `ahead` tokens after the last token that the host knows."""
        buffers, draft_buffers = self._buffers[0][0], self._room.buffers[0][0]
        last_position = self._last_position + self._count + ahead
        return (
            self.running.context.num_slots + ahead + self._num_slots <= buffers.shape[2]
            and self._draft_context.num_slots + self._count + ahead + self.drafter.num_slots <= draft_buffers.shape[2]
            and last_position + self.drafter.num_positions <= len(self._room.rotations)
        )

    @property
    def _num_slots(self) -> int:
        """Slots behind the context that a verification and the acceptance write to."""
        return max(self.drafter.settings.num_nodes, self._block_length)

    def _draft(self) -> None:
        started = time.perf_counter()
        with phase("draft forward"):
            self._draft_step()
        self._tally.add_drafting(started)

    def _note_fed(self) -> None:
        """Counts the tokens that the last drafting has fed."""
        self._draft_context.grow([self._count])
        self._last_position += self._count

    def _hand_on(self, received: list[int], logits: torch.Tensor) -> int:
        """Emits the accepted tokens of a round, as read back from the device. Returns how many were emitted."""
        self._count = received[0]
        ((group, _, _),) = self.selector.groups()
        tokens = received[1 : self._count + 1]
        num_emitted = group.extend(tokens, logits[0], range(self._count))
        # Before the context grows: if a streamer raises here, the context holds what was handed on before.
        self.selector.end_round([num_emitted], [min(self._count - 1, num_emitted)])
        self._tally.drafted.append(True)
        self.running.context.grow([num_emitted])
        return num_emitted

    @torch.inference_mode()
    def _draft_tree(self) -> CandidateTree:
        lengths = torch.stack([self._counts, self._draft_lengths])
        tree = self.drafter.draft_tree(
            self._tokens,
            self._hidden_states,
            lengths,
            self._draft_position,
            self._room,
            self._image_vector,
            cuda_graphs=False,
        )
        self._draft_lengths += self._counts
        self._draft_position += self._counts.unsqueeze(1)
        return tree.with_depths_below(self._tokens_left)

    def _verify(self) -> TargetVerification:
        tree = self._draft_step.result.padded(self.drafter.settings.num_nodes)
        running = self.running
        return self.target.verify_in_buffers(
            tree, running.slots.cache, self._buffers, self._lengths, running.context, self._position
        )

    @torch.inference_mode()
    def _accept(self) -> torch.Tensor:
        """Makes the accepted path part of the context. Returns a tensor `[1 + A]`: the number of emitted tokens, then
        the tokens."""
        tree, verification = self._draft_step.result, self._verify_step.result
        choices, accepted = accepted_by_argmax(tree, verification.logits[:, : tree.tokens.shape[1]])
        counts = accepted.sum(1)
        # The nodes of the path in their order, then other nodes.
        nodes = accepted.sort(dim=1, descending=True, stable=True).indices[:, : self._block_length]
        nodes = functional.pad(nodes, (0, self._block_length - nodes.shape[1]))
        places = self._lengths + torch.arange(len(nodes[0]), device=nodes.device)
        move_slots(self._parts, self._lengths + nodes[0], places)
        states = verification.hidden_states
        self._tokens.copy_(choices.gather(1, nodes))
        self._hidden_states.copy_(states.gather(1, nodes.unsqueeze(2).expand(-1, -1, states.shape[2])))
        self._counts.copy_(counts)
        self._lengths += counts
        self._position += counts.unsqueeze(1)
        self._tokens_left -= counts
        return torch.cat([counts, self._tokens[0]])


class _ReadBack:
    """
    Integers on their way from the device to the host, which waits for them only when it needs them.

    Args:
        count (`int`): number of integers.
        device (`torch.device`): device that the integers come from.
    """

    def __init__(self, count: int, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._here = torch.empty(count, dtype=torch.long, pin_memory=self._event is not None)

    def send(self, values: torch.Tensor) -> None:
        self._here.copy_(values, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(values.device))

    def receive(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._here.tolist()


__all__ = ["DeviceRounds"]
