"""The server's app without vLLM's engine: what a stranger, and a trainer with another model, are told."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest
import torch

from longrl.engines import server_protocol as protocol
from longrl.engines.vllm_extension import write_shards
from longrl.engines.weight_stream import engine_weights
from tests.tiny import text_family

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from longrl.engines.server_guard import ServerGuard  # noqa: E402
from longrl.engines.server_routes import RolloutRoutes  # noqa: E402

KEY = "a-key-of-the-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ROUTES = [("POST", "weights"), ("POST", "generate"), ("GET", "info")]


class Engine:
    """Notes what it is told to do."""

    def __init__(self):
        self.calls = []

    async def collective_rpc(self, method, args):
        self.calls.append(args[0])

    async def reset_prefix_cache(self):
        return True

    def __getattr__(self, name):
        async def nothing(*args, **options):
            pass

        return nothing


@pytest.fixture(scope="module")
def family():
    return text_family()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def routes(family, engine, tmp_path):
    return RolloutRoutes(engine, family, tmp_path, 1 << 20)


@pytest.fixture
def client(routes):
    app = fastapi.FastAPI()
    app.include_router(routes.router())
    app.add_api_route("/metrics", lambda: "vLLM's own", methods=["GET"])
    app.add_api_route("/v1/completions", lambda: "vLLM's own", methods=["POST"])
    app.add_api_route("/health", lambda: "well", methods=["GET"])
    app.add_middleware(ServerGuard, key=KEY, max_body_bytes=4096)
    return TestClient(app)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Key": KEY}])
@pytest.mark.parametrize(
    ("method", "path"),
    [*((method, f"/v1/longrl/{name}") for method, name in ROUTES), ("POST", "/v1/completions"), ("GET", "/metrics"),
     ("OPTIONS", "/v1/completions"), ("POST", "/health"), ("GET", "/nothing")],
)  # fmt: skip
def test_no_route_answers_without_the_key(client, engine, headers, method, path):
    """A weight push too: the engine is not told of it."""
    answer = client.request(method, path, content=b"{}" if method == "POST" else None, headers=headers)
    assert answer.status_code == 401
    assert "set LONGRL_SERVER_KEY" in answer.json()["error"]["message"]
    assert engine.calls == []


def test_what_a_stranger_brought_is_not_logged(client, caplog):
    with caplog.at_level(logging.DEBUG):
        client.get("/metrics", headers={"Authorization": "Bearer canary"})
        client.get("/metrics", headers={"Authorization": "Bearer canary"})
    assert caplog.text.count("which did not bring the server's key") == 1
    assert "canary" not in caplog.text


def test_with_the_key_all_routes_are_there(client):
    assert client.get("/health").json() == "well"
    assert client.get("/metrics", headers=HEADERS).json() == "vLLM's own"
    assert client.post("/v1/completions", headers=HEADERS, content=b"{}").json() == "vLLM's own"


def test_a_body_too_large_or_of_no_said_length_is_not_read(client):
    answer = client.post("/v1/longrl/generate", headers=HEADERS, content=bytes(4097))
    assert (answer.status_code, "--max_request_gib" in answer.text) == (413, True)
    answer = client.post("/v1/longrl/generate", headers=HEADERS, content=iter([b"chunked"]))
    assert answer.status_code == 411


# ---- weights ----


def push(client, folder, version="1"):
    answer = client.post(
        "/v1/longrl/weights", headers=HEADERS, content=json.dumps({"folder": folder, "version": version})
    )
    return answer.status_code, answer.json().get("error", answer.json())


def test_weights_of_the_model_are_taken_over(client, engine, family, tmp_path):
    write_shards(engine_weights(family, family.build()), tmp_path / "w", 1 << 14)
    assert push(client, str(tmp_path / "w")) == (200, {"version": "1"})
    assert engine.calls == [str(tmp_path / "w")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.nothing": torch.ones(2)}, "'model.nothing' is no weight of it"),
        (lambda w: w | {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' is \[3\] instead of"),
        (lambda w: w | {"model.norm.weight": w["model.norm.weight"].long()}, "'model.norm.weight' is of I64"),
        (lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}, "'model.norm.weight' is missing"),
    ],
)
def test_weights_of_another_model_are_refused_before_any_is_read(client, engine, family, tmp_path, change, message):
    weights = change(dict(engine_weights(family, family.build())))
    write_shards(weights.items(), tmp_path / "w", 1 << 20)
    status, error = push(client, str(tmp_path / "w"))
    assert status == 400
    assert re.search(message, error["message"])
    assert engine.calls == []


def damage(folder, kind):
    index = {
        "index": '["../other/00000.safetensors"]',
        "absolute": '["/etc/passwd"]',
        "number": "7",
        "nested": "[" * 100_000,
        "twice": '["00000.safetensors", "00000.safetensors"]',
    }
    if kind in index:
        (folder / "index.json").write_text(index[kind])
    elif kind == "link":
        (folder / "00000.safetensors").rename(folder / "elsewhere")
        (folder / "00000.safetensors").symlink_to("elsewhere")
    elif kind == "torn":
        (folder / "00000.safetensors").write_bytes((folder / "00000.safetensors").read_bytes()[:-1])
    else:
        (folder / "00000.safetensors").write_bytes(b"\x80\x04pickle")


@pytest.mark.parametrize("kind", ["index", "absolute", "number", "nested", "twice", "link", "torn", "pickle"])
def test_hostile_weight_files_are_refused(client, engine, family, tmp_path, kind):
    write_shards(engine_weights(family, family.build()), tmp_path / "w", 1 << 30)
    damage(tmp_path / "w", kind)
    status, error = push(client, str(tmp_path / "w"))
    assert (status, engine.calls) == (400, [])
    assert str(tmp_path / "w") in error["message"]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"folder": 1, "version": "v"}', b'{"folder": "/"}', b"[" * 4000])
def test_an_order_of_another_form_is_refused(client, body):
    answer = client.post("/v1/longrl/weights", headers=HEADERS, content=body)
    assert (answer.status_code, "a weight push must be" in answer.text) == (400, True)


def test_folders_elsewhere_are_refused(client, tmp_path):
    (tmp_path / "out").symlink_to("/etc")
    for folder in ("/etc", f"{tmp_path}/../..", f"{tmp_path}/out"):
        assert push(client, folder)[0] == 403
    assert push(client, f"{tmp_path}/no")[0] == 404
    assert push(client, "a\0b")[0] == 400
    assert push(client, f"{tmp_path}/{'a' * 300}")[0] in (400, 404)


# ---- generation ----


def generate(routes, message, tensors=None):
    body = protocol.pack_message(message, tensors or {})
    answer = asyncio.run(routes._generate(body))
    return answer.status_code, json.loads(answer.body)


def message_of(asked, **others):
    tensors = {}
    text = protocol.dump_requests(asked, tensors)
    fields = {
        "version": "none",
        "requests": text,
        "tensors": list(tensors),
        "params": [{"n": 1}],
    }
    return fields | others, tensors


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tensors": ["../../etc/passwd"]}, "must be hashes of 32 digits, got '../../etc/passwd'"),
        ({"tensors": [["a"]]}, "must be hashes"),
        ({"params": [{"logits_processors": ["os.system"]}]}, "may have .*; got 'logits_processors'"),
        ({"params": [{"n": 10**9}]}, "n of params must be positive, and 65536 at most"),
        ({"params": [{"n": "1"}]}, "n of params must be positive"),
        ({"params": [7]}, "got 'no mapping'"),
        ({"params": []}, "shorter|argument 2"),
        ({"version": 1}, "version of a message must be a str, got a int"),
        ({"more": 1}, "a message must have version, requests, tensors, params"),
        ({"requests": "[" * 100_000}, "the requests are no JSON"),
        ({"requests": '[{"tensor:": "x"}]'}, "the requests are no JSON with the tensors"),
        ({"requests": '[{"tensor:": []}]'}, "the requests are no JSON with the tensors"),
        ({"requests": "7"}, "the requests must be a list of mappings"),
    ],
)  # fmt: skip
def test_hostile_messages_are_refused(routes, others, message):
    fields, tensors = message_of([{"prompt_token_ids": [1]}], **others)
    status, answer = generate(routes, fields, tensors)
    assert status == 400
    assert re.search(message, answer["error"]["message"])


def test_features_must_be_what_their_name_says_and_as_wide_as_the_models(routes, family):
    wide = torch.ones(2, family.feature_size + 1)
    fields, tensors = message_of([{"multi_modal_data": {"video": {"video_embeds": wide}}}])
    status, answer = generate(routes, fields, tensors)
    assert status == 400
    assert "the model's features are [N, " in answer["error"]["message"]
    (name,) = tensors
    status, answer = generate(routes, fields, {name: wide + 1})
    assert status == 400
    assert "is not what its name says" in answer["error"]["message"]
    assert routes.store.find([name], {})[1] == []  # the true one, which came before


@pytest.mark.parametrize(
    ("scope", "refused"),
    [
        ({"type": "http", "method": "POST", "headers": [(b"content-length", b"0" * 30 + b"99999999")]}, True),
        ({"type": "http", "method": "POST", "headers": [(b"content-length", b"0" * 30 + b"9")]}, False),
        ({"type": "websocket", "headers": []}, False),
    ],
)
def test_a_length_with_zeros_in_front_is_its_number(scope, refused):
    keyed = scope | {"path": "/health", "headers": [*scope["headers"], (b"authorization", f"Bearer {KEY}".encode())]}
    assert (ServerGuard(None, KEY, 4096)._refusal(keyed) is not None) is refused


def test_health_is_open_to_get_alone():
    guard = ServerGuard(None, KEY, 4096)
    assert guard._refusal({"type": "http", "method": "GET", "path": "/health", "headers": []}) is None
    assert guard._refusal({"type": "websocket", "path": "/health", "headers": []}) is not None
