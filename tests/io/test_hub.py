"""Exports that go to a hub: huggingface_hub's own client against a scripted server on this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from longrl.commands.export import export_run
from longrl.io.hub import check_target, push
from tests.runs import saved_run
from tests.tiny import text_family


class Hub:
    """Answers as a hub does: makes repositories, takes commits of files that it wants inline.

    Args:
        taken: {repository: private} that are there.
        refuse: whether commits are refused.
    """

    def __init__(self, taken: dict[str, bool] | None = None, refuse: bool = False) -> None:
        self.repos, self.refuse = dict(taken or {}), refuse
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, "GET", b"")

            def do_POST(self):
                hub.answer(self, "POST", self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, method: str, body: bytes) -> None:
        path = handler.path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        if method == "POST":
            self.tokens.add(handler.headers.get("Authorization"))
        status, reply = self.reply(path, body)
        data = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def reply(self, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, asked.get("visibility") == "private" or asked.get("private") is True)
            return status, {"url": f"{self.url}/{name}", "error": "it is there"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path and not self.refuse:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}
        name = path.removeprefix("/api/models/")
        if name in self.repos:
            return 200, {"id": name, "private": self.repos[name]}
        return 403, {"error": "not yours"}


@pytest.fixture
def hub_of(monkeypatch):
    """Starts a hub and makes it the client's."""
    started = []

    def start(**options):
        hub = Hub(**options)
        started.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        return hub

    yield start
    for hub in started:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.fixture
def run_folder(tmp_path):
    return saved_run(tmp_path / "run", text_family())


def test_an_export_is_pushed_file_by_file_and_stays_private(run_folder, hub_of, tmp_path):
    hub = hub_of()
    out = tmp_path / "out"
    export_run(str(run_folder), str(out), push_to="me/tiny")
    written = {file.name: file.read_bytes() for file in out.iterdir()}
    assert hub.files == written
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= written.keys()
    assert hub.repos == {"me/tiny": True}
    assert hub.tokens == {"Bearer hf_of_this_test"}


def test_nothing_is_asked_of_a_hub_by_default(run_folder, hub_of, tmp_path):
    hub = hub_of()
    export_run(str(run_folder), str(tmp_path / "out"))
    assert hub.requests == []


def test_a_repository_is_shown_to_everyone_only_when_asked_to(hub_of, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    hub = hub_of()
    push(tmp_path, "me/open", private=False)
    assert (hub.repos, hub.files) == ({"me/open": False}, {"a.txt": b"x"})


@pytest.mark.parametrize(("is_private", "private"), [(False, True), (True, False)])
def test_a_repository_that_is_there_must_be_as_private_as_asked(hub_of, tmp_path, is_private, private):
    (tmp_path / "a.txt").write_text("x")
    hub = hub_of(taken={"me/old": is_private})
    with pytest.raises(ValueError, match=f"me/old exists and is .*; give --private {str(is_private).lower()} or"):
        push(tmp_path, "me/old", private=private)
    assert hub.files == {}
    push(tmp_path, "me/old", private=is_private)
    assert hub.files == {"a.txt": b"x"}


def test_a_refused_push_keeps_the_folder_and_says_how_to_go_on(run_folder, hub_of, tmp_path):
    hub_of(refuse=True)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=rf"(?s){out} is written, but .*403.*`hf upload me/tiny {out}`"):
        export_run(str(run_folder), str(out), push_to="me/tiny")
    assert (out / "model.safetensors").is_file()


def test_without_a_token_nothing_is_written(run_folder, hub_of, tmp_path, monkeypatch):
    hub = hub_of()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--push_to=me/tiny needs a hub token that may write; set HF_TOKEN"):
        export_run(str(run_folder), str(tmp_path / "out"), push_to="me/tiny")
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["tiny", "https://hub/me/tiny", "me/tiny/x", "me/ti ny", ""])
def test_a_target_is_an_owner_and_a_name(hub_of, repo):
    hub_of()
    with pytest.raises(ValueError, match="--push_to must be owner/name, got"):
        check_target(repo)


def test_a_hub_that_is_switched_off_is_told(hub_of, monkeypatch):
    hub_of()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--push_to=me/tiny needs the hub, but HF_HUB_OFFLINE is set"):
        check_target("me/tiny")
