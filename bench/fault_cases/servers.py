"""What a rollout server is sent by strangers, and by a trainer of another model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import command, text_run
from longrl.engines import server_protocol as protocol
from longrl.engines.server_guard import ServerGuard
from longrl.engines.vllm_extension import INDEX
from longrl.engines.weight_checks import check_weights
from tests.runs import arguments

KEY = "canary-key-of-a-server"
EXPECTED = {"a.weight": ((2, 3), torch.float32)}


def asked(method: str, path: str, headers: dict[bytes, bytes]) -> Outcome:
    """What the guard answers, and whether vLLM's app was reached."""
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers.items())}
    asyncio.run(ServerGuard(app, KEY, max_body_bytes=1000)(scope, None, send))
    told = "the engine was told" if reached else "the engine was not told"
    seen = f"HTTP {sent[0]['status']}: {sent[1]['body'].decode()}; {told}" if sent else "let through"
    return Outcome(seen, 0 if sent else 1, told)


def push_without_key(folder: Path) -> Outcome:
    """A POST of any process of this machine to the route of weights."""
    return asked("POST", "/v1/longrl/weights", {b"content-length": b"10"})


def metrics_without_key(folder: Path) -> Outcome:
    """A route of vLLM's own, which its own check leaves open."""
    return asked("GET", "/metrics", {})


def endless_body(folder: Path) -> Outcome:
    """A body above the limit, with the key."""
    headers = {b"authorization": f"Bearer {KEY}".encode(), b"content-length": b"9" * 30}
    return asked("POST", "/v1/longrl/generate", headers)


def refused(check: Callable[[], Any], kept: str) -> Outcome:
    """The message of a check."""
    try:
        check()
    except ValueError as error:
        return Outcome(str(error), 2, kept)
    return Outcome("accepted", 0, "")


def other_shape(folder: Path) -> Outcome:
    """Weights of another model."""
    save_file({"a.weight": torch.ones(4096, 3)}, folder / "00000.safetensors")
    (folder / INDEX).write_text(json.dumps(["00000.safetensors"]))
    return refused(lambda: check_weights(folder, EXPECTED), "the weights of before")


def index_with_a_path(folder: Path) -> Outcome:
    """An index that leads out of its folder."""
    (folder / INDEX).write_text(json.dumps(["../../etc/00000.safetensors"]))
    return refused(lambda: check_weights(folder, EXPECTED), "the weights of before")


def features_of_another_name(folder: Path) -> Outcome:
    """A tensor under the name of another one, which later requests would find."""
    body = protocol.pack_message({}, {protocol.content_name(torch.ones(2)): torch.zeros(2)})
    return refused(lambda: protocol.unpack_message(body), "the features of before")


def feature_name_with_a_path(folder: Path) -> Outcome:
    """A name with path parts."""
    message = {"version": "1", "requests": "[]", "tensors": ["../../etc/passwd"], "params": []}
    return refused(lambda: protocol.check_message(message), "nothing read")


def open_host(folder: Path) -> Outcome:
    """A server for other machines without a key."""
    args = arguments(folder / "run", text_run(folder), "--host=0.0.0.0", command="serve")
    ended = command(args, folder)
    return Outcome(ended.last_line, ended.exit_code, "no port open")


def key_on_the_command_line(folder: Path) -> Outcome:
    """A key where everybody on the machine can read it."""
    option = "--options=" + json.dumps({"api_key": [KEY]})
    ended = command(arguments(folder / "run", text_run(folder), option, command="serve"), folder)
    told = "it is said again" if KEY in ended.output else "it is not said again"
    return Outcome(f"{ended.last_line}; {told}", ended.exit_code, "no port open")


FAULTS = [
    Fault("servers", "a weight push without the key", push_without_key, 0, "HTTP 401.*set LONGRL_SERVER_KEY.*not told"),
    Fault("servers", "vLLM's metrics without the key", metrics_without_key, 0, "HTTP 401"),
    Fault("servers", "a request above the limit", endless_body, 0, "HTTP 413.*--max_request_gib"),
    Fault(
        "servers",
        "a push of weights of another shape",
        other_shape,
        2,
        r"'a.weight' is \[4096, 3\] instead of \[2, 3\]",
    ),
    Fault(
        "servers", "a push whose index leads out of its folder", index_with_a_path, 2, "must list files of that folder"
    ),
    Fault("servers", "features under the name of others", features_of_another_name, 2, "is not what its name says"),
    Fault("servers", "a feature's name with path parts", feature_name_with_a_path, 2, "must be hashes of 32 digits"),
    Fault("servers", "--host 0.0.0.0 without a key", open_host, 2, "opens the server to other machines.*no key"),
    Fault("servers", "a server's key on the command line", key_on_the_command_line, 2, "can be read by.*not said"),
]
