"""Runs a call of `generate` in a thread of its own, and shows its recording while it grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoding.verified_streamer import VerifiedStreamer
from ..evaluation.clock import synchronize
from ..observer import observing
from ..tree.candidate import CandidateTree
from .pieces import Pieces
from .recording import DraftedTree, Recording, Round


def record(
    target: PreTrainedModel,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    interval: float,
    seed: int = 0,
    **arguments: Any,
) -> Iterator[Recording]:
    """
    Calls `generate`, and yields its recording every `interval` seconds and at its end. If the iterator is closed
    before, the call is stopped.

    Args:
        target, inputs, arguments: `target.generate(**inputs, **arguments)` is called, with one sequence.
        tokenizer (`PreTrainedTokenizerBase`): of the target.
        seed: of sampling.

    Raises:
        Exception: what the call raises.
    """
    call = _RecordedCall(target, inputs, seed, arguments)
    rounds: list[Round] = []
    pieces = Pieces(tokenizer)
    call.thread.start()
    try:
        while True:
            is_done = call.done.wait(interval)
            seconds = call.seconds if is_done else time.perf_counter() - call.started
            # Text is made here, so that the call does not wait for it.
            rounds += [_as_text(raw, tokenizer, pieces) for raw in call.rounds[len(rounds) :]]
            if is_done and call.error is not None:
                raise call.error
            yield Recording(tuple(rounds), seconds, is_done)
            if is_done:
                return
    finally:
        call.stopped.set()
        call.thread.join()


@dataclass(frozen=True)
class _RawRound:
    seconds: float
    tokens: list[int]
    num_draft_tokens: int
    tree: tuple[list[int], list[int]] | None  # tokens and parents of the nodes


class _Stopped(Exception):
    """Ends a call that nobody waits for."""


class _RecordedCall(VerifiedStreamer):
    def __init__(self, target: PreTrainedModel, inputs: Mapping[str, Any], seed: int, arguments: Mapping[str, Any]):
        super().__init__()
        self.rounds: list[_RawRound] = []
        self.done, self.stopped = threading.Event(), threading.Event()
        self.started = time.perf_counter()
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(target, inputs, seed, arguments), daemon=True)
        self._tree: tuple[list[int], list[int]] | None = None

    def _run(
        self, target: PreTrainedModel, inputs: Mapping[str, Any], seed: int, arguments: Mapping[str, Any]
    ) -> None:
        try:
            torch.manual_seed(seed)
            synchronize(target.device)
            self.started = time.perf_counter()
            with observing(on_logits=self._note_tree):
                target.generate(**inputs, **arguments, streamer=self)
            synchronize(target.device)
        except _Stopped:
            pass
        except BaseException as error:  # raised again where the recording is read
            self.error = error
        finally:
            self.seconds = time.perf_counter() - self.started
            self.done.set()

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        seconds = time.perf_counter() - self.started
        self.rounds.append(_RawRound(seconds, tokens.tolist(), num_draft_tokens, self._tree))
        self._tree = None

    def _note_tree(self, tree: CandidateTree, logits: torch.Tensor) -> None:
        self._tree = tree.tokens[0].tolist(), tree.parents[0].tolist()


def _as_text(raw: _RawRound, tokenizer: Any, pieces: Pieces) -> Round:
    tree = None
    if raw.tree is not None:
        nodes, parents = raw.tree
        texts = tuple(tokenizer.batch_decode([[node] for node in nodes]))
        tree = DraftedTree(texts, tuple(parents), accepted_nodes(nodes, parents, raw.tokens[: raw.num_draft_tokens]))
    texts = tuple(pieces.add(token) for token in raw.tokens)
    return Round(raw.seconds, tuple(raw.tokens), texts, raw.num_draft_tokens, tree)


def accepted_nodes(nodes: Sequence[int], parents: Sequence[int], accepted: Sequence[int]) -> frozenset[int]:
    """The nodes of a tree, given by their tokens and parents, that carry the accepted tokens below the root."""
    found, last = set(), 0
    for token in accepted:
        last = next(node for node in range(last + 1, len(nodes)) if parents[node] == last and nodes[node] == token)
        found.add(last)
    return frozenset(found)


__all__ = ["accepted_nodes", "record"]
