"""Greedy rounds of one sequence that a device goes through by itself, while the host reads what was emitted.

What a round leaves to the next one (accepted tokens and their hidden states, lengths, positions) stays on the device,
in tensors that keep their places. So a round can be recorded, and the next tree is drafted while the host still looks
at the tokens of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from ..compiled.cuda_graphs import RecordedStep, Recorder
from ..drafting.fixed import DraftRoom
from ..drafting.generator import MSDCandidateGenerator
from ..kv.fixed import Buffers, close_slots, move_slots, parts_of, reserve
from ..phases import phase
from ..target.adapter import TargetAdapter, TargetVerification
from ..tree.candidate import CandidateTree
from ..tree.settings import TreeSettings
from .batch_selection import BatchSelector
from .running_rows import RunningRows
from .verification import argmax_choices, match_argmax, show_logits


_NO_LIMIT = 1 << 40


class DeviceRounds:
    """
    Decodes with `compile=True` until the sequence ends.

    Args:
        adapter (`TargetAdapter`): the target.
        generator (`MSDCandidateGenerator`): the draft, after its prefill.
        running (`RunningRows`): the one row.
        selector (`BatchSelector`): takes the tokens; see `can_serve`.
        keeps_cache (`bool`): whether someone may look at the caches afterwards.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        generator: MSDCandidateGenerator,
        running: RunningRows,
        selector: BatchSelector,
        keeps_cache: bool,
    ):
        self.adapter = adapter
        self.generator = generator
        self.running = running
        self.selector = selector
        self.keeps_cache = keeps_cache
        start = generator.hand_over()
        self._static, self._draft_context = start.static, start.context
        self._last_position = start.last_position
        self._max_tokens = self._static.max_tokens
        device = start.tokens.device
        left = selector.tokens_left
        with torch.inference_mode():  # as all tensors of a drafting
            self._tokens = start.tokens.clone()  # [1, A]: what the last round emitted, then anything
            self._hidden_states = start.hidden_states.clone()  # [1, A, H]
            self._counts = torch.tensor(start.counts, device=device)  # [1]: how many these are
            self._draft_lengths = torch.tensor(start.context.lengths, device=device)  # [1]
            self._draft_position = start.next_position.clone()  # [1, 1]
            self._lengths = torch.tensor(running.context.lengths, device=device)  # [1]
            self._position = running.next_position.clone()  # [..., 1, 1]
            self._tokens_left = torch.tensor([_NO_LIMIT if left is None else left], device=device)
        self._count = start.counts[0]  # the same on the host, a round behind
        self._numbers = _ReadBack(1 + self._max_tokens, device)
        self._buffers: Sequence[Buffers]
        self._parts: Sequence[torch.Tensor]  # all of them at once, if that is possible
        self._room: DraftRoom
        self._is_set_up = False

    @staticmethod
    def can_serve(
        adapter: TargetAdapter, generator: MSDCandidateGenerator, selector: BatchSelector, settings: TreeSettings
    ) -> bool:
        """Whether the device needs no help: one row, a plain draft that looks for no repetitions, each token the
        argmax of logits that nobody asks for, and no hook of the user's that would have to run each time."""
        return (
            generator.static_tokens is not None
            and not settings.suffix_nodes
            and selector.batch_size == 1
            and selector.is_plain_argmax
            and not selector.keeps_logits
            and not any(module._forward_pre_hooks or module._forward_hooks for module in adapter.outer_modules())
        )

    def run(self) -> None:
        """Decodes."""
        is_drafted = False
        emitted = 0  # by the last round, as far as it was handed on
        try:
            while not self.selector.finished:
                if not is_drafted:
                    self._set_up()
                    self._draft()
                    self._note_fed()
                with phase("target forward"):
                    verification = self._verify_step()
                tree = self._draft_step.result
                show_logits(tree, verification.logits[:, : tree.tokens.shape[1]])
                with phase("verification"):
                    self._numbers.send(self._accept_step())
                # Drafting alone goes ahead: if the text has ended, little was done in vain.
                is_drafted = not self.keeps_cache and self._has_room(self._max_tokens)
                if is_drafted:
                    self._draft()
                with phase("verification"):
                    emitted = self._hand_on(self._numbers.receive(), verification.logits)
                if is_drafted:
                    self._note_fed()
        finally:
            self._settle_caches()
            self._drop_steps()
        if self.keeps_cache:
            self.generator.take_back(self._draft_context, self._tokens, self._hidden_states, [emitted])

    def _set_up(self) -> None:
        """Sees to it that there is room for a round, where it is recorded anew if the old one was too small."""
        if self._is_set_up and self._has_room(0):
            return
        self._settle_caches()
        cache, draft_cache = self.running.cache, self.generator.cache
        self._buffers = reserve(cache, self._num_slots)
        self._parts = parts_of(self._buffers)
        self._room = self._static.reserve(draft_cache, self._draft_context, self._last_position, self._hidden_states)
        self._drop_steps()
        self._recorder = Recorder(self._tokens.device)
        self._draft_step = RecordedStep(self._draw, self._recorder)
        self._verify_step = RecordedStep(self._forward, self._recorder)
        self._accept_step = RecordedStep(self._accept, self._recorder)
        self._is_set_up = True

    def _drop_steps(self) -> None:
        if self._is_set_up:
            for step in (self._draft_step, self._verify_step, self._accept_step):
                step.close()
            self._recorder.close()
            self._is_set_up = False

    def _settle_caches(self) -> None:
        """Makes the caches hold what was accepted."""
        if self._is_set_up:
            close_slots(self.running.cache, self.running.context.num_slots)
            close_slots(self.generator.cache, self._draft_context.num_slots)

    def _has_room(self, ahead: int) -> bool:
        """Whether there is room for a round behind so many tokens more than the host knows of."""
        buffers, draft_buffers = self._buffers[0][0], self._room.buffers[0][0]
        last_position = self._last_position + self._count + ahead
        return (
            self.running.context.num_slots + ahead + self._num_slots <= buffers.shape[2]
            and self._draft_context.num_slots + self._count + ahead + self._static.num_slots <= draft_buffers.shape[2]
            and last_position + self._static.num_positions <= len(self._room.rotations)
        )

    @property
    def _num_slots(self) -> int:
        """Slots behind the context that a verification and the acceptance write to."""
        return max(self._static.settings.num_nodes, self._max_tokens)

    def _draft(self) -> None:
        with phase("draft forward"):
            self._draft_step()

    def _note_fed(self) -> None:
        """Takes note of the tokens that the last drafting has fed."""
        self._draft_context.grow([self._count])
        self._last_position += self._count

    def _hand_on(self, numbers: list[int], logits: torch.Tensor) -> int:
        """Emits what was accepted. Returns how many tokens were."""
        self._count = numbers[0]
        ((group, _, _),) = self.selector.groups()
        tokens = numbers[1 : self._count + 1]
        emitted = group.extend(tokens, logits[0], range(self._count))
        # First: if a streamer raises here, the context is what was handed on before.
        self.selector.end_round([emitted], [min(self._count - 1, emitted)])
        self.running.context.grow([emitted])
        return emitted

    @torch.inference_mode()
    def _draw(self) -> CandidateTree:
        numbers = torch.stack([self._counts, self._draft_lengths])
        tree = self._static.draw(
            self._tokens, self._hidden_states, numbers, self._draft_position, self._room, cuda_graphs=False
        )
        self._draft_lengths += self._counts
        self._draft_position += self._counts.unsqueeze(1)
        # As `CandidateTree.with_emittable_depths`.
        deepest = (self._tokens_left - 1).clamp(min=0).unsqueeze(1)
        return replace(tree, depths=tree.depths.minimum(deepest))

    def _forward(self) -> TargetVerification:
        tree = self._draft_step.result.padded(self._static.settings.num_nodes)
        running = self.running
        return self.adapter.verify_in_buffers(
            tree, running.cache, self._buffers, self._lengths, running.context, self._position
        )

    @torch.inference_mode()
    def _accept(self) -> torch.Tensor:
        """Makes what was accepted part of the context. Returns how many tokens that is, and which, `[1 + A]`."""
        tree, verification = self._draft_step.result, self._verify_step.result
        num_nodes = tree.tokens.shape[1]
        choices = argmax_choices(verification.logits[:, :num_nodes])
        accepted = match_argmax(tree, choices)
        counts = accepted.sum(1)
        # Nodes of the path in their order, then others.
        nodes = accepted.sort(dim=1, descending=True, stable=True).indices[:, : self._max_tokens]
        nodes = functional.pad(nodes, (0, self._max_tokens - nodes.shape[1]))
        move_slots(
            self._parts, self._lengths + nodes[0], self._lengths + torch.arange(len(nodes[0]), device=nodes.device)
        )
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
    Numbers on their way from the device to the host, which does not wait for them until it needs them.

    Args:
        count (`int`): how many.
        device (`torch.device`): from where.
    """

    def __init__(self, count: int, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._here = torch.empty(count, dtype=torch.long, pin_memory=self._event is not None)

    def send(self, numbers: torch.Tensor) -> None:
        self._here.copy_(numbers, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(numbers.device))

    def receive(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._here.tolist()


__all__ = ["DeviceRounds"]
