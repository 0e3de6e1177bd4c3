"""A rollout server whose engine is a stand-in for vLLM: the trainer's own tiny model on a CPU, as slow as wanted.

    python -m longrl.testing.engine_server --config C --port 8000 --seconds_per_token 0.02 --tail 1

has the routes, the key and the limits of `python -m longrl serve`. Of the configs it reads `model.family`,
`model.algorithm.fp32_lm_head` and `trainer.precision`; several compose. With `--forks` it serves nothing itself: it
starts servers in forks, which takes milliseconds, as `EngineServers` tells it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from longrl.engines.server_guard import ServerGuard
from longrl.engines.server_key import server_key
from longrl.engines.server_protocol import OWN_WEIGHTS
from longrl.engines.server_routes import RolloutRoutes
from longrl.engines.vllm_options import VERSION
from longrl.engines.weight_files import default_folder
from longrl.io.plain_yaml import load_yaml
from longrl.models.base import CausalFamily
from longrl.testing.stand_in_engine import Pace, StandInEngine, StandInWorker

GIB = 1 << 30


class StandInRoutes(RolloutRoutes):
    """The routes of a rollout server, without what only vLLM needs."""

    @override
    def release(self) -> str:
        return VERSION

    @override
    def sampling(self, params: dict[str, Any]) -> Any:
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "n": 1, "seed": None, "stop_token_ids": []} | params

    @override
    async def _render(self, request: dict[str, Any]) -> dict[str, Any]:
        return request  # the stand-in reads it as it is


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="python -m longrl.testing.engine_server", description=__doc__)
    parser.add_argument("--config", action="append", required=True, help="of the run; several compose")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 is any; it is printed")
    parser.add_argument("--seconds_per_token", type=float, default=0.0, help="on average; 0 is as fast as it computes")
    parser.add_argument("--tail", type=float, default=0.0, help="of the log-normal factor of each completion on that")
    parser.add_argument("--max_num_seqs", type=int, default=256, help="completions sampled at a time")
    parser.add_argument("--max_model_len", type=int, default=32_768)
    parser.add_argument("--weights_folder", type=Path, default=default_folder())
    parser.add_argument("--weights", choices=("run", "family"), default="run", help="as of `python -m longrl serve`")
    parser.add_argument("--forks", action="store_true", help="start servers as standard input says")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Serves until the process is told to end."""
    options = make_parser().parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    family = family_of(options.config)
    worker = StandInWorker(family, own_weights=options.weights == "family")
    if options.forks:
        serve_in_forks(family, worker, options)
    else:
        sock = bind(options.host, options.port)
        sys.stdout.write(f"{sock.getsockname()[1]}\n")
        sys.stdout.flush()
        serve(family, worker, options, sock)


def family_of(configs: Sequence[str]) -> CausalFamily:
    """The family of a run's configs, as far as they say it."""
    described: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    fp32_lm_head = False
    precision = ""
    for file in configs:
        values = load_yaml(Path(file).read_text())
        model = values.get("model") or {}
        described |= model.get("family") or {}
        arguments |= (model.get("family") or {}).get("init_args") or {}
        fp32_lm_head = (model.get("algorithm") or {}).get("fp32_lm_head", fp32_lm_head)
        precision = str((values.get("trainer") or {}).get("precision", precision))
    module, _, name = described["class_path"].rpartition(".")
    family: CausalFamily = getattr(importlib.import_module(module), name)(**arguments)
    family.fp32_lm_head = fp32_lm_head
    if precision == "bf16-mixed":
        family.dtype = "bfloat16"
    return family


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return sock


def serve(family: CausalFamily, worker: StandInWorker, options: argparse.Namespace, sock: socket.socket) -> None:
    """Serves at a socket until SIGTERM or Ctrl-C."""
    import uvicorn
    from fastapi import FastAPI

    pace = Pace(options.seconds_per_token, options.tail)
    engine = StandInEngine(family, options.max_model_len, options.max_num_seqs, pace, worker)
    routes = StandInRoutes(engine, family, options.weights_folder, GIB, options.max_num_seqs)
    if options.weights == "family":
        routes.held.version = OWN_WEIGHTS
    app = FastAPI()
    app.include_router(routes.router())
    app.add_api_route("/health", lambda: {}, methods=["GET"])
    with server_key(sock.getsockname()[1]) as key:
        guarded: Any = ServerGuard(app, key, GIB)
        config = uvicorn.Config(guarded, log_level="warning", access_log=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[sock])


def serve_in_forks(family: CausalFamily, worker: StandInWorker, options: argparse.Namespace) -> None:
    """Starts a server for each line of standard input, which is a port, and says its process; ends with its input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    children = []
    for line in sys.stdin:
        sock = bind(options.host, int(line))
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(BaseException):
                serve(family, worker, options, sock)
            os._exit(0)
        children.append(child)
        sys.stdout.write(f"{child} {sock.getsockname()[1]}\n")
        sys.stdout.flush()
        sock.close()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
