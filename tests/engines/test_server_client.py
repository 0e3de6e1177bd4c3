"""The client against a plain HTTP server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from longrl.engines import server_client
from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_client import ServerClient
from longrl.engines.server_protocol import dump_requests, model_sizes, unpack_message
from longrl.engines.vllm_options import VERSION
from longrl.types import SamplingParams
from tests.tiny import row, text_family

PARAMS = [{"n": 1}]
REQUEST = [{"prompt_token_ids": [1, 2], "multi_modal_data": {"video": {"video_embeds": torch.ones(2, 3)}}}]
ONE = {"token_ids": [3], "logprobs": [-0.5], "finish_reason": "stop"}
GOOD = {"version": "v", "completions": [[ONE]]}


class Fake:
    """Answers from a list of (status, body or seconds to wait), then the last of them again."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fake.requests.append((self.path, body, dict(self.headers)))
                status, content = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                if isinstance(content, float):
                    threading.Event().wait(content)
                    content = {}
                if status is None:  # hangs up
                    self.close_connection = True
                    return
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def fake():
    made = []

    def start(*answers):
        made.append(Fake(*answers))
        return made[-1]

    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """Seconds that the client slept between attempts."""
    slept = []

    async def pause(seconds):
        slept.append(seconds)
        await asyncio.sleep(min(seconds, 0.01))

    monkeypatch.setattr(server_client, "pause", pause)
    return slept


def client_of(server, timeout_s=5.0, retries=3):
    return ServerClient(server.url, timeout_s, retries)


def test_a_busy_server_is_asked_again_after_growing_pauses(fake, naps):
    server = fake((429, {}), (503, {}), (200, GOOD))
    assert client_of(server).generate("v", REQUEST, PARAMS) == [[ONE]]
    assert naps == [1.0, 2.0]
    assert len({body for _, body, _ in server.requests}) == 1


def test_a_server_that_stays_busy_is_an_error(fake):
    with pytest.raises(ConnectionError, match=r"HTTP 429: 'slow down', after 3 attempts; raise retries"):
        client_of(fake((429, b"slow down")), retries=2).generate("v", REQUEST, PARAMS)


def test_a_connection_that_breaks_is_tried_again(fake, naps):
    assert client_of(fake((None, {}), (200, GOOD))).generate("v", REQUEST, PARAMS) == [[ONE]]
    assert naps == [1.0]


def test_an_error_of_the_server_comes_with_its_words_and_at_once(fake):
    server = fake((500, {"error": {"message": "EngineCore died"}}))
    with pytest.raises(RuntimeError, match=r"HTTP 500: EngineCore died.*start the server again.*--ckpt_path"):
        client_of(server).generate("v", REQUEST, PARAMS)
    assert len(server.requests) == 1


def test_a_refused_request_comes_with_its_words(fake):
    with pytest.raises(ValueError, match="HTTP 400: too long"):
        client_of(fake((400, {"error": {"message": "too long"}}))).generate("v", REQUEST, PARAMS)
    with pytest.raises(ValueError, match="HTTP 404: Not Found.*`vllm serve` does not take features"):
        client_of(fake((404, {"detail": "Not Found"}))).get_info()
    with pytest.raises(PermissionError, match="HTTP 401: Unauthorized; set LONGRL_SERVER_KEY"):
        client_of(fake((401, {"error": "Unauthorized"}))).get_info()


def test_a_slow_answer_names_the_option(fake):
    with pytest.raises(TimeoutError, match=r"did not answer /generate within timeout_s=0\.3; raise timeout_s"):
        client_of(fake((200, 1.5)), timeout_s=0.3).generate("v", REQUEST, PARAMS)


def test_an_answer_without_end_is_let_go_of(fake, monkeypatch):
    monkeypatch.setattr(server_client, "MAX_ANSWER_BYTES", 1 << 20)
    client = client_of(fake((200, {"completions": "x" * (2 << 20)})))
    with pytest.raises(RuntimeError, match="larger than 1 MiB"):
        client.generate("v", REQUEST, PARAMS)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"\xff\x00", {"version": "v"}, {**GOOD, "completions": [[]]}])
def test_garbage_is_told_from_a_server(fake, answer):
    with pytest.raises(RuntimeError, match="is not this version's `python -m longrl serve`"):
        client_of(fake((200, answer))).generate("v", REQUEST, PARAMS)


def test_completions_by_other_weights_are_an_error(fake):
    with pytest.raises(RuntimeError, match="answered with weights 'w' instead of 'v'; give every run a server"):
        client_of(fake((200, {**GOOD, "version": "w"}))).generate("v", REQUEST, PARAMS)
    with pytest.raises(RuntimeError, match="HTTP 412: the server holds.*started anew in the middle of a step"):
        client_of(fake((412, {"error": {"message": "the server holds 'w'"}}))).generate("v", REQUEST, PARAMS)


def test_only_the_tensors_that_are_missing_are_sent(fake):
    tensors = {}
    dump_requests(REQUEST, tensors)
    (name,) = tensors
    server = fake((409, {"missing": [name]}), (200, GOOD))
    assert client_of(server).generate("v", REQUEST, PARAMS) == [[ONE]]
    (_, first, _), (_, second, _) = server.requests
    assert not unpack_message(first)[1]
    assert torch.equal(unpack_message(second)[1][name], torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="misses tensors that no request has"):
        client_of(fake((409, {"missing": ["x"]}))).generate("v", REQUEST, PARAMS)


def test_the_tensors_that_are_remembered_do_not_grow_with_the_run(fake, monkeypatch):
    monkeypatch.setattr(server_client, "MAX_BROUGHT", 3)
    client = ServerClient(fake((200, {"version": "r:0", "completions": [[ONE]]})).url, 5, 0)
    for number in range(20):  # over several updates the version is one
        client.generate("r:*", [{"embeds": torch.full((1, 2), number)}], PARAMS, bring_first=True)
        assert 0 < len(client._brought) <= 4
    client.close()


def test_threads_with_the_same_tensors_bring_them_once(fake):
    tensors = {}
    dump_requests(REQUEST, tensors)
    (name,) = tensors
    server = fake((409, {"missing": [name]}), (200, {}), (200, GOOD))
    client = client_of(server)
    with ThreadPoolExecutor(4) as threads:
        turns = [threads.submit(client.generate, "v", REQUEST, PARAMS, bring_first=True) for _ in range(4)]
        assert [turn.result() for turn in turns] == [[[ONE]]] * 4
    bodies = [unpack_message(body) for _, body, _ in server.requests]
    assert [list(tensors) for _, tensors in bodies] == [[], [name], [], [], [], []]
    assert [message["params"] for message, _ in bodies[:3]] == [[], [], PARAMS]
    # Another version of the weights may be another server: it is asked again.
    client.generate("v", REQUEST, PARAMS, bring_first=True)
    assert len(server.requests) == 7
    with pytest.raises(RuntimeError, match="answered with weights 'v' instead of 'w'"):
        client.generate("w", REQUEST, PARAMS, bring_first=True)
    assert len(server.requests) == 9


def test_a_server_that_is_gone_is_found_out_by_one_thread(fake, naps):
    client = client_of(fake((429, b"slow down")), retries=1)
    start = threading.Barrier(4)

    def turn(_):
        start.wait()
        with pytest.raises(ConnectionError):
            client.generate("v", REQUEST, PARAMS, bring_first=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(turn, range(4)))
    assert naps == [1.0]


def test_nobody_at_the_address_is_an_error_that_names_it():
    client = ServerClient("http://127.0.0.1:9", 5.0, retries=1)
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9 cannot be reached, or died.*attempts: 2"):
        client.get_info()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        client.wait_until_ready(0.1)
    with pytest.raises(ValueError, match="must begin with http:// or https://, got 'localhost:8000'"):
        ServerClient("localhost:8000", 5.0, 1)


def test_the_key_comes_from_the_environment(fake, monkeypatch):
    monkeypatch.setenv("LONGRL_SERVER_KEY", "secret")
    server = fake((200, GOOD))
    client_of(server).generate("v", REQUEST, PARAMS)
    assert server.requests[0][2]["Authorization"] == "Bearer secret"


# ---- engine ----


def info_of(family, **others):
    return {"vllm": VERSION, "version": "none", "model": model_sizes(family), "max_model_len": 64, **others}


def test_another_vllm_is_refused(fake):
    family = text_family()
    server = fake((200, info_of(family, vllm="0.11.0")))
    with pytest.raises(ValueError, match=rf"runs vllm 0\.11\.0; install {VERSION}"):
        VLLMServerEngine(server.url).start(family)


def test_another_model_is_refused(fake):
    family = text_family()
    sizes = model_sizes(family) | {"hidden_size": 8}
    with pytest.raises(ValueError, match="serves another model.*hidden_size is 8 instead of"):
        VLLMServerEngine(fake((200, info_of(family, model=sizes))).url).start(family)


def test_a_prompt_without_room_is_named_before_anything_is_sent(fake):
    family = text_family()
    engine = VLLMServerEngine(fake((200, info_of(family))).url)
    engine.start(family)
    prompt = family.render(row("long"), "word " * 100)
    with pytest.raises(ValueError, match="prompt 'long' has .* above 64, the --max_model_len of the server"):
        engine.generate(family, None, [prompt], {}, SamplingParams(1, 8), seed=0)
