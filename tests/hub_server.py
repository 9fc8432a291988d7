"""A small server that speaks the Hub's endpoints for downloads, uploads and lists, for its own client."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, close_session, constants, get_session


class HubHandler(http.server.BaseHTTPRequestHandler):
    """
    Answers like the Hub: files of a repository with the Hub's headers, and the Hub's 404 responses; new repositories,
    commits, large files, lists by tag, and the check of a card's metadata.
    """

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"
    root: Path
    requests: list[str]
    bodies: list[bytes]  # all that was sent to the server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models?"):
            return self.list_models()
        if self.path.startswith("/api/whoami"):
            return self.send({"name": "me", "type": "user"})
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        owner, _, rest = path.strip("/").partition("/")
        name, _, rest = rest.partition("/")
        repository = self.root / owner / name
        marker, _, rest = rest.partition("/")
        revision, _, file_name = rest.partition("/")
        if marker != "resolve" or not repository.is_dir():
            self.refuse("RepoNotFound", "Repository not found")
        elif revision not in ("main", self.commit):
            self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")
        elif not (repository / file_name).is_file():
            self.refuse("EntryNotFound", "Entry not found")
        else:
            content = (repository / file_name).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    def list_models(self) -> None:
        """The repositories whose cards have all tags of the filter."""
        wanted = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("filter", [])
        self.requests.append(f"LIST {' '.join(wanted)}")
        found = []
        for card in sorted(self.root.glob("*/*/README.md")):
            data = yaml.safe_load(card.read_text().split("---")[1])
            tags = [*data.get("tags", []), data.get("library_name"), f"license:{data.get('license')}"]
            tags.append(f"base_model:{data.get('base_model')}")
            if set(wanted) <= set(tags):
                found.append({"id": f"{card.parent.parent.name}/{card.parent.name}", "tags": tags})
        self.send(found)

    def do_POST(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.read_body()
        self.requests.append(f"POST {path}")
        url = f"http://{self.headers['Host']}"
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'me'}/{content['name']}"
            is_private = content.get("private") or content.get("visibility") == "private"
            self.requests.append(f"CREATE {name} {'private' if is_private else 'public'}")
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self.send({"url": f"{url}/{name}", "name": name})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**item, "actions": {"upload": {"href": f"{url}/lfs/{item['oid']}"}}} for item in objects]
            return self.send({"transfer": "basic", "objects": actions})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send({"files": modes})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    (self.root / name / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (self.root / f"lfs-{value['oid']}").rename(self.root / name / value["path"])
            return self.send({"commitUrl": f"{url}/{name}/commit/{self.commit}", "commitOid": self.commit})
        self.refuse("EntryNotFound", "Entry not found")

    def do_PUT(self) -> None:
        self.requests.append("PUT")
        (self.root / f"lfs-{self.path.rpartition('/')[2]}").write_bytes(self.read_body())
        self.send({})

    def read_body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.bodies.append(body)
        return body

    def validate(self, card: str) -> None:
        """The Hub's check of the metadata, as far as its documentation describes it."""
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        errors = [
            f"{name} is not allowed"
            for name, allowed in {
                "base_model_relation": (None, "adapter", "finetune", "merge", "quantized"),
                "pipeline_tag": (None, "image-text-to-text", "text-generation"),
            }.items()
            if data.get(name) not in allowed
        ]
        for result in (result for model in data.get("model-index", []) for result in model["results"]):
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append("model-index is not allowed")
            errors += ["metric is not allowed" for metric in result["metrics"] if "value" not in metric]
        self.send({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def send(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code: str, message: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `root/owner/name/` as repositories; yields the endpoint and the requests as they come."""
    with running_server(root) as (endpoint, handler):
        yield endpoint, handler.requests


@contextlib.contextmanager
def running_server(root: Path) -> Iterator[tuple[str, type[HubHandler]]]:
    """As [`serve_hub`]; yields the endpoint and the handler, which records what is sent to it."""
    handler = type("Handler", (HubHandler,), {"root": root, "requests": [], "bodies": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_with_hub(code: str, endpoint: str, home: Path) -> subprocess.CompletedProcess:
    """Runs code with the server as the Hub, in a fresh interpreter because the endpoint is read at import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # a conversion would ask a service outside the Hub
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]),
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def hub_in_process(root: Path, monkeypatch: Any, token: str | None = None) -> Iterator[type[HubHandler]]:
    """Makes the server the Hub of this process, whose client has read its settings already."""
    with running_server(root) as (endpoint, handler):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()
        yield handler
    close_session()


def metadata_errors(card: ModelCard) -> list[str]:
    """What the server says of a card's metadata. Old releases of the client ask one host only when they validate."""
    body = {"repoType": "model", "content": str(card)}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body).json()
    return [error["message"] for error in answer["errors"]]
