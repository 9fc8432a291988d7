"""`generate` for requests: one after another, in one thread, with the draft unless a request asks for none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError
from transformers.utils import logging

from ..decoding.run_stats import last_run
from ..errors import MSDError
from ..prompts import move_inputs
from .call import Call, CallCancelled, current_call
from .refusals import RequestError, refused, server_error, server_stops
from .streamers import CallListener, CallStreamer


logger = logging.get_logger(__name__)


class Generation(GenerateManager):
    """
    Runs `generate` for the requests of a server.

    One thread runs one request after another: a seed then gives the same text whatever else is asked, and recorded
    CUDA graphs stay in their thread.

    Args:
        draft: the draft of the target.
        max_length (`int`, *optional*): most tokens of prompt and answer together.
    """

    def __init__(self, draft: Any, max_length: int | None):
        super().__init__()
        self._draft = draft
        self._max_length = max_length
        self._live: dict[int, Call] = {}

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, CallStreamer]:
        """Starts a request whose text is streamed. Raises [`RequestError`] for a prompt that is too long."""
        call, queue = current_call.get(), asyncio.Queue[Any]()
        self._check_length(call, inputs, gen_config)
        tokenizer = getattr(processor, "tokenizer", processor)
        streamer = CallStreamer(call, tokenizer._tokenizer, queue, response_parser)

        def work() -> None:
            self._run(call, model, processor, inputs, gen_config, streamer)
            if call.error is None:
                streamer.finish()
            elif not call.loop.is_closed():
                call.loop.call_soon_threadsafe(queue.put_nowait, _StreamError(str(call.error)))

        self._start(call, work)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        """
        Answers a request at once.

        Returns:
            the text, the length of the prompt, and the new tokens `[N]`.
        Raises:
            RequestError: when the prompt is too long, or `generate` refuses the request.
        """
        call = current_call.get()
        self._check_length(call, inputs, gen_config)
        answer: asyncio.Future[torch.Tensor] = call.loop.create_future()

        def work() -> None:
            tokens = self._run(call, model, processor, inputs, gen_config, CallListener(call))
            if not call.loop.is_closed():
                call.loop.call_soon_threadsafe(_settle, answer, tokens)

        self._start(call, work)
        tokens = await answer
        if call.error is not None:
            raise call.error
        return processor.decode(tokens, skip_special_tokens=True), call.prompt_tokens, tokens

    def stop(self, seconds: float = 10.0) -> None:
        """Gives up all requests, and waits for the one that is running."""
        calls = list(self._live.values())
        for call in calls:
            call.cancel()
        deadline = time.monotonic() + seconds
        for call in calls:
            if call.job is not None:
                with contextlib.suppress(Exception):
                    call.job.result(max(0.0, deadline - time.monotonic()))

    def _start(self, call: Call, work: Any) -> None:
        self._live[id(call)] = call
        call.job = self.submit(work)
        call.job.add_done_callback(lambda _: self._live.pop(id(call), None))

    def _check_length(self, call: Call, inputs: Any, gen_config: Any) -> None:
        call.prompt_tokens = inputs["input_ids"].shape[-1]
        if self._max_length is None:
            return
        left = self._max_length - call.prompt_tokens
        if left < 1:
            message = f"The prompt is too long: it has {call.prompt_tokens:,} tokens, and prompt and answer may have "
            raise refused(f"{message}{self._max_length:,}.", code="context_length_exceeded")
        if not call.sets_length:  # a request that asks for no length gets what is left
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, left)
        if gen_config.max_new_tokens > left:
            raise refused(
                f"The answer may have {left:,} tokens, not {gen_config.max_new_tokens:,}: prompt and answer together "
                f"may have {self._max_length:,}.",
                code="context_length_exceeded",
            )

    def _run(
        self, call: Call, model: Any, processor: Any, inputs: Any, gen_config: Any, streamer: Any
    ) -> torch.Tensor | None:
        """Generates, in the thread. Returns the new tokens `[N]`, or `None` with the reason in `call.error`."""
        arguments = {"assistant_model": self._draft} if call.wants_draft else {}
        try:
            call.go_on()
            before, started = last_run(model), time.perf_counter()
            with _seeded(call.seed, model.device):
                sequences = model.generate(
                    **move_inputs(inputs, model),
                    **arguments,
                    generation_config=gen_config,
                    tokenizer=getattr(processor, "tokenizer", processor),
                    streamer=streamer,
                )
            call.seconds = time.perf_counter() - started
            tokens = sequences[0, call.prompt_tokens :]
            call.new_tokens = len(tokens)
            stats = last_run(model)
            call.stats = stats if call.wants_draft and stats is not before else None
            return tokens
        except Exception as error:  # it must not end the thread
            call.error = _as_request_error(error)
            return None
        finally:
            call.note_begun()


class PairGenerationState(GenerationState):
    """
    Gives every request the same [`Generation`].

    Args:
        generation: runs the requests.
    """

    def __init__(self, generation: Generation):
        super().__init__()
        self.generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        return self.generation

    def shutdown(self) -> None:
        self.generation.stop()


def _as_request_error(error: BaseException) -> RequestError:
    """What a client is told of an error in `generate`. `ValueError`s are its refusals; others are logged in full."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CallCancelled):
        return server_stops()  # in the other cases nobody listens any more
    if isinstance(error, (MSDError, ValueError)):
        return refused(str(error))
    logger.error("A request failed.", exc_info=error)
    return server_error()


def _settle(answer: asyncio.Future, tokens: torch.Tensor | None) -> None:
    if not answer.done():  # the request may have been given up
        answer.set_result(tokens)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside the block random numbers are those of the seed; afterwards they go on as before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


__all__ = ["Generation", "PairGenerationState"]
