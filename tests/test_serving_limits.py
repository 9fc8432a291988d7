"""The limits of `msd-hf serve` without a model: the gate around applications that wait, and pictures of requests."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import socket
import threading
from concurrent.futures import Future

import pytest
import transformers
from PIL import Image

from msd_hf.errors import MSDError
from msd_hf.serving import installed, remote_images
from msd_hf.serving.fields import check_fields
from msd_hf.serving.images import RequestImages
from msd_hf.serving.installed import check_installed
from msd_hf.serving.limits import ServingLimits
from msd_hf.serving.messages import RequestMessages
from msd_hf.serving.refusals import RequestError


try:
    check_installed()
    from msd_hf.serving import gate as gate_module
    from msd_hf.serving.call import CallCancelled, current_call
    from msd_hf.serving.gate import CLIENT_LEFT, Gate
    from msd_hf.serving.server import open_socket
except MSDError as error:
    Gate, problem = None, str(error)
needs_server = pytest.mark.skipif(Gate is None, reason="the packages of [serve] are missing, or transformers is old")

PATH = "/v1/chat/completions"


class Connection:
    """One request to an ASGI application: sends the messages that it is given, then leaves or waits."""

    def __init__(self, *messages, leaves=False, path=PATH, headers=()):
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        self.messages, self.leaves, self.sent = list(messages), leaves, []

    async def receive(self):
        if self.messages:
            return self.messages.pop(0)
        if not self.leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def body(content=b"{}", more=False):
    return {"type": "http.request", "body": content, "more_body": more}


def start(kind):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


async def endless(scope, receive, send):
    await receive()
    await asyncio.Event().wait()


async def endless_stream(scope, receive, send):
    await send(start(b"text/event-stream"))
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
    await asyncio.Event().wait()


def count(gate, status):
    return f'msd_hf_requests_total{{path="{PATH}",status="{status}"}} 1.0' in gate.metrics.text().decode()


@needs_server
class TestGate:
    def test_a_body_arrives_whole(self):
        async def echo(scope, receive, send):
            content = (await receive())["body"]
            await send(start(b"text/plain"))
            await send({"type": "http.response.body", "body": content, "more_body": False})

        gate, connection = Gate(echo, ServingLimits()), Connection(body(b"ab", True), body(b"cd"))
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert connection.text == "abcd" and count(gate, 200)

    @pytest.mark.parametrize("headers", [[], [(b"content-length", b"12")]])
    def test_a_large_body_is_read_to_its_end_and_refused(self, headers):
        connection = Connection(body(b"a" * 6, True), body(b"b" * 6), headers=headers)
        gate = Gate(endless, ServingLimits(max_body_bytes=10))
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert connection.status == 413 and not connection.messages
        assert json.loads(connection.text)["error"]["code"] == "request_too_large"

    def test_a_body_that_is_far_too_large_is_not_read(self):
        connection = Connection(body(b"a"), headers=[(b"content-length", b"99999")])
        gate = Gate(endless, ServingLimits(max_body_bytes=10))
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert connection.status == 413 and connection.messages

    @pytest.mark.parametrize(
        "connection, app, status",
        [(Connection(body(b"{", True)), endless, 408), (Connection(body()), endless, 504)],
    )
    def test_timeouts(self, connection, app, status):
        gate = Gate(app, ServingLimits(timeout=0.1))
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert connection.status == status and json.loads(connection.text)["error"]["code"] == "timeout"
        assert count(gate, status)

    @pytest.mark.parametrize("path", [PATH, "/v1/responses"])
    def test_a_timeout_in_a_stream_is_its_last_event(self, path):
        connection = Connection(body(), path=path)
        gate = Gate(endless_stream, ServingLimits(timeout=0.1))
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        event = json.loads(connection.text.split("\n\n")[1].removeprefix("data: "))
        assert (event.get("error") or event)["code"] == "timeout" and not connection.sent[-1]["more_body"]
        assert path == PATH or event["type"] == "error"

    def test_a_client_that_stops_reading_loses_its_place(self, monkeypatch):
        monkeypatch.setattr(gate_module, "_SEND_SECONDS", 0.05)

        async def stalled(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def run():
            gate, connection = Gate(endless_stream, ServingLimits(timeout=0.05)), Connection(body())
            await asyncio.wait_for(gate(connection.scope, connection.receive, stalled), 5)
            return gate.metrics.text().decode()

        assert "msd_hf_requests_running 0.0" in asyncio.run(run())

    @pytest.mark.parametrize("app", [endless, endless_stream])
    def test_a_client_that_leaves_cancels_its_call(self, app):
        calls = []

        async def noted(scope, receive, send):
            calls.append(current_call.get())
            await app(scope, receive, send)

        async def run():
            gate, connection = Gate(noted, ServingLimits()), Connection(body(), leaves=True)
            await asyncio.wait_for(gate(connection.scope, connection.receive, connection.send), 5)
            return gate

        gate = asyncio.run(run())
        assert count(gate, CLIENT_LEFT)
        with pytest.raises(CallCancelled):
            calls[0].go_on()

    def test_too_many_requests(self):
        """A request counts until its generation has ended, also if its client has left."""

        async def run():
            job = Future()

            async def app(scope, receive, send):
                current_call.get().job = job
                await endless(scope, receive, send)

            gate = Gate(app, ServingLimits(max_requests=1))
            first, second = Connection(body(), leaves=True), Connection(body())
            await gate(first.scope, first.receive, first.send)
            await gate(second.scope, second.receive, second.send)
            assert second.status == 429 and (b"retry-after", b"1") in second.sent[0]["headers"]
            job.set_result(None)
            await asyncio.sleep(0.05)
            third = Connection(body(), leaves=True)
            await gate(third.scope, third.receive, third.send)
            assert third.status is None

        asyncio.run(run())

    def test_a_failure_is_not_told_to_clients(self):
        async def fails(scope, receive, send):
            raise RuntimeError("/home/someone/secret")

        gate, connection = Gate(fails, ServingLimits()), Connection(body())
        asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert connection.status == 500 and "secret" not in connection.text

    def test_metrics_have_few_labels(self):
        gate = Gate(endless, ServingLimits(timeout=0.01))
        for number in range(3):
            connection = Connection(body(), path=f"/{number}")
            asyncio.run(gate(connection.scope, connection.receive, connection.send))
        assert 'path="other",status="504"} 3.0' in gate.metrics.text().decode()

    def test_a_port_that_is_taken(self):
        with open_socket("127.0.0.1", 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(MSDError, match=f"--port {port} cannot be used: Address already in use"):
                open_socket("127.0.0.1", port)
        with pytest.raises(MSDError, match=r"--host no\.such\.host\.invalid --port 1"):
            open_socket("no.such.host.invalid", 1)


def png(width=4, height=4, **arguments):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, arguments.pop("format", "PNG"), **arguments)
    return file.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class TestImages:
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_kinds(self, format):
        image = RequestImages(ServingLimits()).read(data_url(png(format=format)), "here")
        assert image.mode == "RGB" and image.size == (4, 4)

    @pytest.mark.parametrize(
        "url, message",
        [
            (5, "here must be a URL, not 5"),
            ("data:image/png,abc", "a data URL of a picture reads"),
            ("data:image/png;base64,*", "is not base64"),
            (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"), "no picture that can be read"),
            (data_url(png(90, 90)[:90]), "no picture that can be read"),
            (data_url(png(format="PPM")), "no picture that can be read"),  # Pillow reads more than the server does
            ("ftp://host/a.png", "must be a data URL"),
            ("a.png", "must be a data URL"),
        ],
    )
    def test_broken_ones(self, url, message):
        with pytest.raises(RequestError, match=message) as found:
            RequestImages(ServingLimits()).read(url, "here")
        assert found.value.status == 400

    def test_pixels_are_counted_before_they_are_read(self):
        images = RequestImages(ServingLimits(max_image_pixels=30))
        images.read(data_url(png()), "first")
        with pytest.raises(RequestError, match=r"second: the pictures .* 30 pixels together, .* have 32") as found:
            images.read(data_url(png()[:60]), "second")  # only its header is there
        assert found.value.status == 413

    def test_number(self):
        images = RequestImages(ServingLimits(max_images=1))
        images.read(data_url(png()), "first")
        with pytest.raises(RequestError, match="may have 1 pictures; second"):
            images.read(data_url(png()), "second")

    def test_files(self, tmp_path):
        folder = tmp_path / "my pictures é"
        folder.mkdir()
        (folder / "a b.png").write_bytes(png())
        (tmp_path / "out.png").write_bytes(png())
        (folder / "link.png").symlink_to(tmp_path / "out.png")
        images = RequestImages(ServingLimits(image_folder=folder, max_images=20))
        assert images.read((folder / "a b.png").as_uri(), "here").size == (4, 4)
        for url in (
            (tmp_path / "out.png").as_uri(),
            folder.as_uri() + "/../out.png",
            folder.as_uri() + "/%2e%2e/out.png",
            (folder / "link.png").as_uri(),
            folder.as_uri(),
            (folder / "none.png").as_uri(),
            "file://elsewhere" + (folder / "a b.png").as_uri()[7:],
            "file:///" + "a" * 5000,
            "file:///%00",
        ):
            with pytest.raises(RequestError, match="no such picture in the image folder"):
                images.read(url, "here")


@pytest.fixture
def web():
    """A web server on loopback: a picture, a redirect to it, and bytes without an end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/a.png?x=1")
                self.end_headers()
                return
            self.send_response(200 if self.path != "/none" else 404)
            self.end_headers()
            if self.path == "/slow":
                while not stopped.wait(0.02):
                    self.wfile.write(b"a")
            self.wfile.write(png())

        def log_message(self, *arguments):
            pass

    stopped = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


class TestRemoteImages:
    allowed = ServingLimits(remote_images=True)

    @pytest.mark.parametrize("path", ["/a.png", "/moved"])
    def test_a_picture_is_fetched(self, web, path, monkeypatch):
        monkeypatch.setattr(remote_images, "is_public", lambda address: True)
        assert RequestImages(self.allowed).read(web + path, "here").size == (4, 4)

    def test_what_only_this_machine_reaches_is_not_fetched(self, web):
        """Open ports, closed ports and names give the same answer."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        for url in (web + "/a.png", f"http://127.0.0.1:{port}/", "http://no.such.host.invalid/", "http://[::1"):
            with pytest.raises(RequestError, match=r"^here: the picture cannot be fetched from its address\.$"):
                RequestImages(self.allowed).read(url, "here")

    @pytest.mark.parametrize("path", ["/none", "/slow"])
    def test_failures_and_slow_servers(self, web, path, monkeypatch):
        monkeypatch.setattr(remote_images, "is_public", lambda address: True)
        monkeypatch.setattr(remote_images, "SECONDS", 0.2)
        with pytest.raises(RequestError, match="cannot be fetched"):
            RequestImages(self.allowed).read(web + path, "here")

    def test_size(self, web, monkeypatch):
        monkeypatch.setattr(remote_images, "is_public", lambda address: True)
        with pytest.raises(RequestError, match="larger than a request") as found:
            RequestImages(ServingLimits(remote_images=True, max_body_bytes=20)).read(web + "/a.png", "here")
        assert found.value.status == 413

    @pytest.mark.parametrize(
        "address, public",
        [
            ("93.184.216.34", True),
            ("2606:2800:220:1::1", True),
            ("127.0.0.1", False),
            ("10.0.0.1", False),
            ("169.254.169.254", False),
            ("100.64.0.1", False),
            ("0.0.0.0", False),
            ("::1", False),
            ("fe80::1%eth0", False),
            ("fd00::1", False),
            ("::ffff:127.0.0.1", False),
            ("224.0.0.1", False),
        ],
    )
    def test_addresses(self, address, public):
        assert remote_images.is_public(address) == public


class TestMessages:
    def messages(self, takes_images=True, most_characters=100):
        return RequestMessages(ServingLimits(), takes_images, most_characters)

    def test_pictures_take_the_place_of_urls(self):
        parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "a"}]
        (message,) = self.messages().chat([{"role": "user", "content": parts}])
        assert message["content"][0]["image_url"]["url"].size == (4, 4) and message["content"][1] == parts[1]
        flat = self.messages().responses([{"type": "input_image", "image_url": data_url(png())}])
        assert flat[0]["image_url"]["url"].size == (4, 4)

    def test_roles_and_tool_calls(self):
        given = [{"role": "developer", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
        developer, assistant = self.messages().chat(given)
        assert developer["role"] == "system" and assistant["tool_calls"] == [{}]

    @pytest.mark.parametrize(
        "given, message",
        [
            ("hi", "must be a list of messages"),
            ([1], r"messages\[0\] must be an object with a `role`"),
            ([{"role": "user"}], r"messages\[0\].content must be a text, not None"),
            ([{"role": "user", "content": [1]}], r"messages\[0\].content\[0\] must be a part"),
            ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\].text must be a text"),
            ([{"role": "user", "content": [{"type": "video_url"}]}], "must be a part"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "must be a URL, not None"),
            ([{"role": "user", "content": "a" * 60}] * 2, "more than 100 characters"),
        ],
    )
    def test_bad_ones(self, given, message):
        with pytest.raises(RequestError, match=message):
            self.messages().chat(given)

    def test_a_target_without_pictures(self):
        part = {"type": "image_url", "image_url": {"url": data_url(png())}}
        with pytest.raises(RequestError, match="reads text only"):
            self.messages(takes_images=False).chat([{"role": "user", "content": [part]}])


class TestFields:
    template = "{{ messages }}{{ images }}{% if enable_thinking %}{% endif %}{{ size }}"

    def check(self, **given):
        check_fields({"chat_template_kwargs": given}, self.template)

    def test_what_the_template_uses_is_taken(self):
        self.check(enable_thinking=False)

    @pytest.mark.parametrize(
        "given",
        [{"images": "http://127.0.0.1"}, {"messages": "a"}, {"chat_template": "a"}, {"size": 10**6}, {"other": True}],
    )
    def test_what_reaches_the_processor_is_not(self, given):
        with pytest.raises(RequestError, match="that the chat template uses"):
            self.check(**given)


class TestInstalled:
    def test_an_old_transformers(self, monkeypatch, run):
        monkeypatch.setattr(transformers, "__version__", "5.10.4")
        code, _, err = run("serve", "--draft", "D")
        assert code == 1 and err.startswith("Error: `msd-hf serve` needs transformers 5.24 or newer, and 5.10.4 is")
        assert err.count("\n") == 1

    def test_missing_packages(self, monkeypatch):
        monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "uvicorn" else object())
        monkeypatch.setattr(transformers, "__version__", "5.24.0.dev0")
        with pytest.raises(MSDError, match=r'needs uvicorn: pip install "msd-hf\[serve\]"'):
            check_installed()


@needs_server
@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-folder", "nowhere"], "There is no image folder 'nowhere'"),
        (["--dtype", "float3"], "--dtype 'float3' is not known"),
        (["--device", "toaster"], "--device 'toaster' cannot be used"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--timeout", "inf"], "not a finite number"),
    ],
)
def test_the_command_checks_its_options_first(run, options, message, monkeypatch):
    def refuse(*arguments, **others):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr("msd_hf.loading.AutoModelForImageTextToText.from_pretrained", refuse)
    from msd_hf.toy import DRAFT_DIR, TARGET_DIR

    code, _, err = run("serve", "--target", TARGET_DIR, "--draft", DRAFT_DIR, "--port", 0, *options)
    assert code in (1, 2) and message in err and err.count("\n") == 1
