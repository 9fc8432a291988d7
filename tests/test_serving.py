"""`msd-hf serve`: what clients of OpenAI's API and `transformers chat` get from the bundled pair over loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import pytest
import torch
from pages import ROOT, blocks

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError
from msd_hf.images import read_image
from msd_hf.loading import load_target
from msd_hf.prompts import build_inputs
from msd_hf.serving.installed import check_installed
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


try:
    check_installed()
except MSDError as error:
    pytest.skip(str(error), allow_module_level=True)

import openai
from transformers.cli.chat import Chat, RichInterface

from msd_hf.serving import server as serving_server
from msd_hf.serving.app import build_app
from msd_hf.serving.call import Call
from msd_hf.serving.limits import ServingLimits
from msd_hf.serving.pair import ServedPair
from msd_hf.serving.server import make_server, open_socket
from msd_hf.serving.streamers import CallStreamer


NAME, LENGTH = "toy/llava", 20
COUNT, PICTURE = "Count from 5 to 12.", "What is in the picture?"
URL = f"data:image/png;base64,{base64.b64encode(DEMO_IMAGE.read_bytes()).decode()}"
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
# An answer of seconds: nothing but its end by others ends it soon.
ENDLESS = {"generation_config": json.dumps({"max_new_tokens": 1900, "min_new_tokens": 1900})}


@pytest.fixture(scope="module")
def target():
    return load_target(TARGET_DIR)


@pytest.fixture(scope="module")
def server(target, toy_processor):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.generation_config.num_assistant_tokens = 24  # a tree of set size: tau is the same in each run
    app = build_app(ServedPair(NAME, target, toy_processor, draft), ServingLimits(max_new_tokens=LENGTH))
    socket = open_socket("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    socket.listen()
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def answers(target, toy_processor):
    """The answers of the target alone."""

    def answer(question, image=None):
        inputs = build_inputs(toy_processor, question, image)
        ids = target.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return toy_processor.decode(ids, skip_special_tokens=True)

    return {COUNT: answer(COUNT), PICTURE: answer(PICTURE, read_image(DEMO_IMAGE))}


def chat(question, url=None):
    parts = [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * (url is not None) + parts}
    ]


def responses_input(question, *parts):
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": question}]}]


def post(server, path, body, timeout=60):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(server):
    with urllib.request.urlopen(f"{server}/metrics") as reply:
        lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def wait_until_idle(server, seconds):
    """Waits until no request runs. Returns whether that came soon enough."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if metrics(server)["msd_hf_requests_running"] == 0:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("question, url", [(COUNT, None), (PICTURE, URL)])
def test_chat_completions(client, answers, question, url):
    """At once and streamed, the text is the target's, and `usage` holds the acceptance."""
    reply = client.chat.completions.create(model=NAME, messages=chat(question, url))
    assert reply.choices[0].message.content == answers[question] and reply.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(model=NAME, messages=chat(question, url), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers[question]
    assert len(chunks) > 5 and chunks[-1].choices[0].finish_reason == "length"
    for usage in (reply.usage, chunks[-1].usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        figures = usage.msd_hf
        # The prefill emits a token too.
        assert figures["rounds"] * figures["tau"] == pytest.approx(usage.completion_tokens - 1, abs=0.01)
        assert figures["tau"] > 1.5 and figures["tokens_per_second"] > 0 and figures["draft"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": URL},
        {"type": "input_file", "filename": "a.png", "file_data": URL},
    ],
)
def test_responses(client, answers, part):
    given = responses_input(PICTURE, part)
    reply = client.responses.create(model=NAME, input=given)
    assert reply.output_text == answers[PICTURE] and reply.usage.msd_hf["tau"] > 1.5
    events = list(client.responses.create(model=NAME, input=given, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answers[PICTURE] == events[-1].response.output_text
    assert events[-1].type == "response.completed" and events[-1].response.usage.msd_hf["tau"] > 1.5


def test_a_request_may_ask_for_no_draft(client, answers):
    extra = {"msd_hf": {"draft": False}}
    reply = client.chat.completions.create(model=NAME, messages=chat(COUNT), extra_body=extra)
    assert reply.choices[0].message.content == answers[COUNT]
    assert reply.usage.msd_hf.keys() == {"draft", "tokens_per_second"} and not reply.usage.msd_hf["draft"]


def test_a_seed_gives_the_text_of_generate(client, target, toy_processor):
    """With other requests beside it, and without a change to the random numbers of the process."""
    inputs = build_inputs(toy_processor, PICTURE)
    torch.manual_seed(3)
    ids = target.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=1.5, top_k=0)
    expected = toy_processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    state = torch.get_rng_state()

    def ask(seed):
        settings = json.dumps({"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 0})
        body = {"generation_config": settings}
        reply = client.chat.completions.create(model=NAME, messages=chat(PICTURE), seed=seed, extra_body=body)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, [3, 4, 3, 5, 3, 6]))
    assert got[0::2] == [expected] * 3 and len(set(got)) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_samples(client, answers):
    texts = {
        client.chat.completions.create(
            model=NAME, messages=chat("Hi"), temperature=temperature, seed=seed, max_tokens=8
        )
        .choices[0]
        .message.content
        for temperature in (0, 2.0)
        for seed in (1, 2)
    }
    assert len(texts) > 1


def test_requests_at_once_get_their_own_answers(client, answers):
    def ask(number):
        question, url = ((COUNT, None), (PICTURE, URL))[number % 2]
        extra = {"msd_hf": {"draft": number % 3 != 0}}
        if number % 4 < 2:
            reply = client.chat.completions.create(model=NAME, messages=chat(question, url), extra_body=extra)
            return reply.choices[0].message.content == answers[question]
        stream = client.chat.completions.create(
            model=NAME, messages=chat(question, url), stream=True, extra_body=extra
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answers[question]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(8)))


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_generation(server, client, streams):
    before = metrics(server).get('msd_hf_requests_total{path="/v1/chat/completions",status="499"}', 0)
    if streams:
        stream = client.chat.completions.create(model=NAME, messages=chat(COUNT), stream=True, extra_body=ENDLESS)
        assert [next(iter(stream)) for _ in range(3)]
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model=NAME, messages=chat(COUNT), extra_body=ENDLESS, timeout=0.3)
    assert wait_until_idle(server, 5)
    assert metrics(server)['msd_hf_requests_total{path="/v1/chat/completions",status="499"}'] == before + 1


def test_metrics_count_tokens_and_rounds(server, client):
    before = metrics(server)
    reply = client.chat.completions.create(model=NAME, messages=chat(COUNT))
    assert wait_until_idle(server, 5)
    after = metrics(server)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added['msd_hf_tokens_total{draft="true"}'] == reply.usage.completion_tokens
    assert added["msd_hf_rounds_total"] == reply.usage.msd_hf["rounds"]
    assert added["msd_hf_round_tokens_total"] == pytest.approx(reply.usage.completion_tokens - 1)
    assert added['msd_hf_requests_total{path="/v1/chat/completions",status="200"}'] == 1


def test_lengths(client):
    reply = client.chat.completions.create(model=NAME, messages=chat(COUNT), max_tokens=1)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (1, "length")
    assert reply.usage.msd_hf["tau"] is None  # no round was needed
    reply = client.responses.create(model=NAME, input=COUNT, max_output_tokens=5)
    assert reply.usage.output_tokens == 5
    stops = client.chat.completions.create(model=NAME, messages=chat(COUNT), stop=["to"], max_tokens=60).choices[0]
    assert stops.message.content.endswith("to") and stops.finish_reason == "stop"


@pytest.mark.parametrize(
    "changes, status, words",
    [
        ({"model": "gpt-9"}, 404, f"answers as '{NAME}'"),
        ({"messages": chat(PICTURE, "data:image/png;base64,AAAA")}, 400, "is no picture"),
        ({"messages": chat(PICTURE, URL[:-400])}, 400, "is no picture"),
        ({"messages": chat(PICTURE, "http://127.0.0.1:1/a.png")}, 400, "--remote-images"),
        ({"messages": chat(PICTURE, DEMO_IMAGE.as_uri())}, 400, "--image-folder"),
        ({"messages": chat(PICTURE, str(DEMO_IMAGE))}, 400, "must be a data URL"),
        ({"messages": chat("count " * 3000)}, 400, "too long: it has"),
        ({"messages": chat("c" * 10**6)}, 400, "too long: its text"),
        ({"messages": chat("<image>")}, 400, "<image> tokens in the text"),
        ({"messages": []}, 400, "must be a list of messages"),
        ({"max_tokens": 5000}, 400, "not 5,000"),
        ({"max_tokens": 0}, 400, "above 0"),
        ({"temperature": -1}, 400, "from 0 to 100"),
        ({"temperature": 1e-30}, 400, "must be 0, or not below 0.001"),
        ({"logit_bias": {"5": float("nan")}}, 400, "`logit_bias` must map"),  # NaN is JSON for Python
        ({"logit_bias": {"x": 1}}, 400, "`logit_bias` must map"),
        ({"stop": ["a" * 300]}, 400, "`stop` must be a text of at most 256"),
        ({"generation_config": '{"stop_strings": ["a"] }', "stop": []}, 400, "`stop` must be"),
        ({"generation_config": '{"temperature": 1e-30}'}, 400, "`temperature` must be from 0.001"),
        ({"generation_config": '{"temperature": NaN}'}, 400, "must be a text that holds a JSON object"),
        ({"n": 2}, 400, "`n` is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "`response_format` is not supported"),
        ({"seed": -1}, 400, "`seed` must be"),
        ({"msd_hf": {"drift": 1}}, 400, "`msd_hf` must be"),
        ({"nonsense": 1}, 422, "nonsense"),
        ({"generation_config": '{"num_beams": 4}'}, 400, "may not set 'num_beams'"),
        ({"generation_config": '{"penalty_alpha": 0.5}'}, 400, "may not set 'penalty_alpha'"),
        ({"generation_config": "{"}, 400, "must be a text that holds a JSON object"),
        ({"generation_config": '{"min_p": 7.0, "do_sample": true}'}, 400, "min_p"),  # refused in `generate`
        ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"images": "http://127.0.0.1:1"}}, 400, "chat_template_kwargs.images"),
    ],
)
def test_bad_requests(server, changes, status, words):
    """Each gets a status and an error object, streamed or not."""
    for streams in (False, True):
        body = {"model": NAME, "messages": chat(PICTURE), "max_tokens": 4, "stream": streams, **changes}
        got, text = post(server, CHAT, body)
        error = json.loads(text)["error"]
        assert got == status and words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path, body, status",
    [
        (CHAT, b"{", 400),
        (CHAT, [], 400),
        (RESPONSES, {"input": 5}, 400),
        (RESPONSES, {"input": [{"type": "function_call_output"}]}, 400),
        (RESPONSES, {"input": "hi", "previous_response_id": "x"}, 400),
        (RESPONSES, b'{"input": "\\ud800"}', 400),
        ("/load_model", {"model": "gpt2"}, 404),
        ("/load_model", {"model": 5}, 404),
        ("/reset", {}, 404),  # of transformers' server, which unloads its models
        ("/v1/completions", {"prompt": "hi"}, 404),
        ("/v1/audio/transcriptions", {}, 404),
    ],
)
def test_bad_bodies_and_paths(server, path, body, status):
    got, text = post(server, path, body)
    assert got == status and json.loads(text)["error"]["message"]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_transformers_chat(server, answers, monkeypatch, capsys, tmp_path):
    """Two turns, with the settings that it sends."""
    typed = iter([COUNT, "And on?", "!exit"])
    monkeypatch.setattr(RichInterface, "input", lambda self: next(typed))
    monkeypatch.setattr(RichInterface, "clear", lambda self: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # its client refuses loopback too
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    Chat(NAME, server, ["do_sample=False", "max_new_tokens=120"])
    printed = capsys.readouterr().out
    assert answers[COUNT].strip() in printed and printed.count("tok/s") == 2


def test_a_stream_ends_when_the_figures_of_its_call_are_known(toy_processor):
    """`generate` ends its streamer before it returns; the reader would then find no figures."""

    async def run():
        queue = asyncio.Queue()
        streamer = CallStreamer(Call(asyncio.get_running_loop()), toy_processor.tokenizer._tokenizer, queue)
        streamer.end()
        await asyncio.sleep(0)
        assert queue.empty()
        streamer.finish()
        assert await queue.get() is None

    asyncio.run(run())


@pytest.fixture
def page(server, tmp_path, monkeypatch):
    """Returns the code of SERVING.md in a language, for this server, in a folder with the picture that it names."""
    monkeypatch.chdir(tmp_path)
    read_image(DEMO_IMAGE).save("photo.jpg")

    def code(language):
        (found,) = blocks(ROOT / "examples" / "SERVING.md", language)
        return found.replace("http://127.0.0.1:8000", server).replace("llava-hf/llava-1.5-7b-hf", NAME)

    return code


def test_the_python_of_the_page(page, capsys):
    exec(compile(page("python"), "SERVING.md", "exec"), {})
    assert "'tau'" in capsys.readouterr().out


def test_the_curl_of_the_page(page, answers):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = page("shell").partition("transformers chat")[0]
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    text = json.loads(result.stdout)["output"][0]["content"][0]["text"]
    assert text.startswith(answers[COUNT])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_the_command(run, monkeypatch):
    """Also while an answer is being written: exit status and line are those of other commands, and no thread stays."""
    monkeypatch.setattr(serving_server, "_SHUTDOWN_SECONDS", 0)
    with open_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    begun, ended = threading.Event(), []

    def ask():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=100)
        try:
            for _ in client.chat.completions.create(
                model="target", messages=chat(COUNT), stream=True, extra_body=ENDLESS
            ):
                begun.set()
        except Exception as error:  # httpx's, when the connection ends
            ended.append(error)

    def interrupt():
        if begun.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    threads = [threading.Thread(target=work) for work in (ask, interrupt)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    code, out, err = run("serve", "--target", TARGET_DIR, "--draft", DRAFT_DIR, "--port", port)
    for thread in threads:
        thread.join(10)
    assert code == 130 and err.splitlines()[-1] == "Error: Interrupted." and "Traceback" not in err
    assert f"serving  http://127.0.0.1:{port}/v1" in out and len(ended) == 1
    assert time.monotonic() - started < 30
