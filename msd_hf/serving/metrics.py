"""What the server has done: a line in the log for each request, and figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from transformers.utils import logging

from ..terminal import one_line
from .call import Call
from .replies import CHAT, RESPONSES


logger = logging.get_logger(__name__)

_PATHS = (CHAT, RESPONSES, "/load_model")


class ServerMetrics:
    """
    Counts requests, tokens and rounds. The mean tau is `msd_hf_round_tokens_total / msd_hf_rounds_total`.

    Args:
        count_requests: returns how many requests are running or waiting.
    """

    def __init__(self, count_requests: Callable[[], float]):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "msd_hf_requests", "Requests that have ended", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter("msd_hf_tokens", "Tokens of answers", ["draft"], registry=self._registry)
        self._generation = Counter("msd_hf_generation_seconds", "Time in generate", ["draft"], registry=self._registry)
        self._rounds = Counter("msd_hf_rounds", "Verifications by the target", registry=self._registry)
        self._round_tokens = Counter("msd_hf_round_tokens", "Tokens that rounds emitted", registry=self._registry)
        self._seconds = Histogram(
            "msd_hf_request_seconds",
            "Time of a request, queue included",
            registry=self._registry,
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
        )
        running = Gauge("msd_hf_requests_running", "Requests that run or wait", registry=self._registry)
        running.set_function(count_requests)

    def note(self, path: str, status: int, seconds: float, call: Call) -> None:
        """Counts and logs a request that has ended. Its texts are not logged."""
        if path not in _PATHS:  # each label takes memory
            path = "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)
        line = f"{status} {path} in {seconds:.2f} s"
        if call.new_tokens:
            draft = str(call.wants_draft).lower()
            self._tokens.labels(draft).inc(call.new_tokens)
            self._generation.labels(draft).inc(call.seconds)
            line += (
                f", {call.prompt_tokens:,} tokens in, {call.new_tokens:,} out, {call.tokens_per_second:.1f} tokens/s"
            )
        if call.stats is not None and call.stats.rounds:
            self._rounds.inc(call.stats.rounds)
            self._round_tokens.inc(call.stats.rounds * call.stats.tau)
            line += f", tau {call.stats.tau:.2f}"
        elif call.new_tokens:
            line += ", no draft" * (not call.wants_draft)
        if call.error is not None:
            line += f": {call.error}"
        logger.info(one_line(line))

    def text(self) -> bytes:
        """The figures in Prometheus' format."""
        return generate_latest(self._registry)


__all__ = ["ServerMetrics"]
