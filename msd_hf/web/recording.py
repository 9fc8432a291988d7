"""What a call of `generate` emitted and when, as text: all that the page shows of it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from ..decoding.result import mean_acceptance_length


@dataclass(frozen=True)
class DraftedTree:
    """
    A candidate tree of one round.

    Args:
        texts (`tuple[str, ...]`): the text of each node; node 0 is the root, the last token before the round.
        parents (`tuple[int, ...]`): the parent of each node, which has a smaller number; the root is its own parent.
        accepted (`frozenset[int]`): the nodes that the target accepted.
    """

    texts: tuple[str, ...]
    parents: tuple[int, ...]
    accepted: frozenset[int]


@dataclass(frozen=True)
class Round:
    """
    What one forward of the target emitted.

    Args:
        seconds (`float`): when it emitted the tokens, from the start of the call.
        tokens (`tuple[int, ...]`): the tokens. The first `num_draft_tokens` of them were drafted and accepted.
        pieces (`tuple[str, ...]`): the text that each token added. A token that ends inside a character adds none.
        num_draft_tokens (`int`): 0 without a draft.
        tree (`DraftedTree`, *optional*): the candidates; `None` without a draft, and for the token of the prefill.
    """

    seconds: float
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    num_draft_tokens: int = 0
    tree: DraftedTree | None = None


@dataclass(frozen=True)
class Recording:
    """
    A call of `generate` up to some time.

    Args:
        rounds (`tuple[Round, ...]`): the prefill with its token, then one forward of the target each.
        seconds (`float`): what the clock of the call shows. It stops with the call.
        is_done (`bool`): whether the call has ended by then.
    """

    rounds: tuple[Round, ...] = ()
    seconds: float = 0.0
    is_done: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the answer so far."""
        return tuple(token for round_ in self.rounds for token in round_.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Tokens so far by the time so far, the prefill included; 0 at the start."""
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0

    @property
    def tau(self) -> float:
        """Tokens that a forward emitted on average, after the prefill; `nan` before the first."""
        return mean_acceptance_length([[len(round_.tokens) for round_ in self.rounds[1:]]])

    def until(self, seconds: float) -> Recording:
        """The same call at an earlier time, or itself if it had ended by then."""
        if seconds >= self.seconds:
            return self
        count = bisect.bisect_right(self.rounds, seconds, key=lambda round_: round_.seconds)
        return replace(self, rounds=self.rounds[:count], seconds=seconds, is_done=False)


__all__ = ["DraftedTree", "Recording", "Round"]
