"""
Load on `msd-hf serve` with the bundled pair: several clients at once, half of the requests with pictures, some left in
the middle, some broken. Every full answer must be that of `generate`, every broken request must get its status, no
request may hang, and the memory of the server must stay the same.

    python examples/studies/serve_load.py --requests 200 --clients 8
    python examples/studies/serve_load.py --speed  # tokens/s of one client, with and without the draft, in turns

The server is a process of its own. Exit status 1 if anything is wrong. With `--speed` nothing else may run on the
machine.
"""

from __future__ import annotations

import base64
import collections
import io
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import psutil
from transformers import HfArgumentParser

from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts


MODEL, MOST_TOKENS = "toy", 140
SECONDS = 300.0  # a request that takes longer hangs
TOO_LONG = "Count from 5 to 12. " * 500
NO_DRAFT = {"msd_hf": {"draft": False}}
# A generation that only its client's leaving ends soon.
ENDLESS = {"generation_config": json.dumps({"max_new_tokens": 1900, "min_new_tokens": 1900})}


@dataclass
class Arguments:
    requests: int = field(default=200, metadata={"help": "Requests of a pass."})
    clients: int = field(default=8, metadata={"help": "Clients at once."})
    passes: int = field(default=3, metadata={"help": "Passes; memory is compared after the first and the last."})
    prompts_per_kind: int = field(default=2, metadata={"help": "Held-out questions of each kind."})
    speed: bool = field(default=False, metadata={"help": "Measure tokens/s of one client instead."})
    repeats: int = field(default=3, metadata={"help": "With --speed: runs of each question."})


@dataclass(frozen=True)
class Question:
    """A question, its picture as a data URL, and what the target alone answers."""

    text: str
    url: str | None
    answer: str

    @property
    def messages(self) -> list[Any]:
        picture = [{"type": "image_url", "image_url": {"url": self.url}}] if self.url else []
        return [{"role": "user", "content": [*picture, {"type": "text", "text": self.text}]}]

    @property
    def input(self) -> list[Any]:
        picture = [{"type": "input_image", "image_url": self.url}] if self.url else []
        return [{"role": "user", "content": [*picture, {"type": "input_text", "text": self.text}]}]


def make_questions(per_kind: int) -> list[Question]:
    """As many questions with pictures as without, in turns, with their answers."""
    target, processor = load_target_and_processor(TARGET_DIR)
    groups: dict[bool, list[Question]] = {True: [], False: []}
    for prompt in make_evaluation_prompts(per_kind, seed=0):
        inputs = build_inputs(processor, prompt.question, prompt.image)
        ids = target.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        url = None
        if prompt.image is not None:
            file = io.BytesIO()
            prompt.image.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        groups[url is not None].append(Question(prompt.question, url, text))
    return [question for pair in zip(groups[True], groups[False], strict=False) for question in pair]


@contextmanager
def serving() -> Iterator[tuple[openai.OpenAI, psutil.Process]]:
    """A server, and a client for it."""
    pair = ["--target", str(TARGET_DIR), "--draft", str(DRAFT_DIR)]
    limits = ["--model-name", MODEL, "--port", "0", "--max-new-tokens", str(MOST_TOKENS), "--timeout", str(SECONDS)]
    command = [sys.executable, "-m", "msd_hf", "serve", *pair, *limits]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            address = next((line.split()[1] for line in lines if line.startswith("serving")), None)
            if address is None:
                sys.exit("The server did not start.")
            # Its log must not fill the pipe.
            threading.Thread(target=collections.deque, args=(lines, 0), daemon=True).start()
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=SECONDS)
            yield client, psutil.Process(process.pid)
        finally:
            process.terminate()


def chat(client: openai.OpenAI, question: Question, **arguments: Any) -> str:
    reply = client.chat.completions.create(model=MODEL, messages=question.messages, **arguments)
    return reply.choices[0].message.content


def chat_streamed(client: openai.OpenAI, question: Question, **arguments: Any) -> str:
    stream = client.chat.completions.create(model=MODEL, messages=question.messages, stream=True, **arguments)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def responses(client: openai.OpenAI, question: Question, **arguments: Any) -> str:
    return client.responses.create(model=MODEL, input=question.input, **arguments).output_text


def responses_streamed(client: openai.OpenAI, question: Question, **arguments: Any) -> str:
    stream = client.responses.create(model=MODEL, input=question.input, stream=True, **arguments)
    return "".join(event.delta for event in stream if event.type == "response.output_text.delta")


WAYS: list[Callable[..., str]] = [chat, chat_streamed, responses, responses_streamed]


def full(client: openai.OpenAI, question: Question, number: int) -> str:
    arguments = {"extra_body": NO_DRAFT} if number % 5 == 0 else {}
    answer = WAYS[number % len(WAYS)](client, question, **arguments)
    return "identical" if answer == question.answer else "OTHER ANSWER"


def left_while_streaming(client: openai.OpenAI, question: Question, number: int) -> str:
    messages: Any = question.messages
    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True, extra_body=ENDLESS)
    got = "".join(chunk.choices[0].delta.content or "" for chunk in itertools.islice(stream, 8))
    stream.close()
    return "left" if question.answer.startswith(got[:8]) else "OTHER ANSWER"


def left_while_waiting(client: openai.OpenAI, question: Question, number: int) -> str:
    try:
        client.with_options(timeout=0.5).chat.completions.create(
            model=MODEL, messages=question.messages, extra_body=ENDLESS
        )
    except openai.APITimeoutError:
        return "left"
    return "NOT LEFT"


def broken(client: openai.OpenAI, question: Question, number: int) -> str:
    picture = Question(question.text, "data:image/png;base64,iVBORw0KGgo=", "")
    cases: list[tuple[int, dict[str, Any]]] = [
        (404, {"model": "another"}),
        (400, {"messages": picture.messages}),
        (400, {"messages": Question(TOO_LONG, None, "").messages}),
        (400, {"messages": Question("", "http://127.0.0.1/a.png", "").messages}),
        (400, {"messages": Question("", "file:///etc/hostname", "").messages}),
        (400, {"max_tokens": 100_000}),
        (422, {"extra_body": {"nonsense": 1}}),
    ]
    status, changes = cases[number // 10 % len(cases)]
    try:
        arguments: dict[str, Any] = {"model": MODEL, "messages": question.messages, **changes}
        client.chat.completions.create(**arguments, stream=number % 20 < 10)
    except openai.APIStatusError as error:
        return "refused" if error.status_code == status else f"STATUS {error.status_code}, NOT {status}"
    return "NOT REFUSED"


# Of ten requests, seven are full.
KINDS = {3: left_while_streaming, 6: broken, 8: left_while_waiting}


def run_pass(client: openai.OpenAI, questions: list[Question], requests: int, clients: int) -> collections.Counter:
    """Returns how often each kind of request ended how."""

    def ask(number: int) -> tuple[str, str]:
        kind = KINDS.get(number % 10, full)
        try:
            # The order of kinds repeats after 10 requests, that of pictures after 2.
            return kind.__name__, kind(client, questions[(number + number // 10) % len(questions)], number)
        except Exception as error:  # what can go wrong is what this script is to find
            return kind.__name__, f"{type(error).__name__}: {error}"[:120].upper()

    with ThreadPoolExecutor(clients) as pool:
        return collections.Counter(pool.map(ask, range(requests)))


def running(client: openai.OpenAI) -> float:
    """How many requests the server holds."""
    with urllib.request.urlopen(str(client.base_url.join("/metrics")), timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("msd_hf_requests_running")).split()[1])


def load(arguments: Arguments, questions: list[Question]) -> bool:
    is_right, memory = True, []
    with serving() as (client, process):
        for number in range(arguments.passes):
            started = time.perf_counter()
            outcomes = run_pass(client, questions, arguments.requests, arguments.clients)
            print(f"pass {number + 1} ({time.perf_counter() - started:.0f} s)")
            for (kind, outcome), count in sorted(outcomes.items()):
                print(f"  {kind:22} {outcome:10} {count}")
                is_right &= outcome in ("identical", "left", "refused")
            deadline = time.monotonic() + 30
            while (held := running(client)) and time.monotonic() < deadline:
                time.sleep(0.1)
            memory.append(process.memory_info().rss / 2**20)
            print(f"  held by the server     {held:.0f}\n  memory of the server   {memory[-1]:.0f} MiB")
            is_right &= held == 0
    if len(memory) > 1:
        print(f"memory: {memory[0]:.0f} MiB after the first pass, {memory[-1]:.0f} MiB after the last")
        is_right &= memory[-1] < 1.05 * memory[0]
    return is_right


def measure(arguments: Arguments, questions: list[Question]) -> bool:
    speeds: dict[str, list[float]] = {"with the draft": [], "without it": []}
    is_right = True
    with serving() as (client, _):
        for _, question in itertools.product(range(arguments.repeats), questions):
            for name, extra in (("with the draft", {}), ("without it", NO_DRAFT)):
                messages: Any = question.messages
                started = time.perf_counter()
                reply = client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
                seconds = time.perf_counter() - started
                speeds[name].append(reply.usage.completion_tokens / seconds)
                is_right &= reply.choices[0].message.content == question.answer
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    for name, values in {**speeds, "speedup": ratios}.items():
        low, middle, high = statistics.quantiles(values, n=4)
        unit = "" if name == "speedup" else " tokens/s"
        print(f"{name:15} {middle:.2f}{unit} (quartiles {low:.2f} to {high:.2f}, {len(values)} answers)")
    print(f"identical       {'yes' if is_right else 'NO'}")
    return is_right


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    questions = make_questions(arguments.prompts_per_kind)
    is_right = measure(arguments, questions) if arguments.speed else load(arguments, questions)
    print("all as it must be" if is_right else "SOMETHING IS WRONG")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
