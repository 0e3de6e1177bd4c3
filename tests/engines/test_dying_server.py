"""A server that is killed in the middle of a rollout: the run ends with the address and the remedy, and hangs never."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from longrl.engines import server_client
from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_protocol import model_sizes
from longrl.engines.vllm_options import VERSION
from longrl.types import SamplingParams
from tests.callbacks.test_rollout import callback, train
from tests.tiny import text_family

SERVER = """
import json, os, re, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

info, calls_left = json.loads(sys.argv[1]), int(sys.argv[2])
completion = {"token_ids": [3, 4], "logprobs": [-0.5, -0.5], "finish_reason": "stop"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(info)

    def do_POST(self):
        global calls_left
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/weights"):
            info["version"] = json.loads(body)["version"]
            return self.reply({"version": info["version"]})
        if not calls_left:
            os.kill(os.getpid(), signal.SIGKILL)
        calls_left -= 1
        counts = [int(count) for count in re.findall(rb'\\\\"n\\\\": (\\d+)', body)]  # JSON within JSON
        self.reply({"version": info["version"], "completions": [[completion] * count for count in counts]})

    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""Answers so many rollouts, then dies as by `kill -9` while the next one is asked for."""


@pytest.mark.parametrize(("max_staleness", "num_answered"), [(0, 0), (0, 2), (1, 2)])
def test_a_server_killed_while_it_generates_ends_the_run(tmp_path, monkeypatch, max_staleness, num_answered):
    """The first call compares engine and trainer; at 1 the third is under way during the first update."""
    monkeypatch.setattr(server_client, "pause", lambda seconds: asyncio.sleep(0))
    info = {"vllm": VERSION, "version": "none", "model": model_sizes(text_family()), "max_model_len": 2048}
    command = [sys.executable, "-c", SERVER, json.dumps(info), str(num_answered)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        engine = VLLMServerEngine(
            url, weights_folder=str(tmp_path / "weights"), timeout_s=30, retries=2, recover_timeout_s=0
        )
        rollouts = callback(
            engine, sampling=SamplingParams(2, 8), max_staleness=max_staleness, max_mismatch=1e9, max_mean_mismatch=1e9
        )
        try:
            with pytest.raises(ConnectionError, match=f"{url} cannot be reached, or died.*attempts: 3.*--ckpt_path"):
                train(tmp_path, rollouts, steps=4)
            assert server.wait(10) == -9
        finally:
            server.kill()
    engine.close()
    assert not list((tmp_path / "weights").iterdir())
