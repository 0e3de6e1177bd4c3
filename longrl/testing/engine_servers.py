"""Rollout servers with a stand-in engine as processes of their own, started in milliseconds, killed at will."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self


class EngineServers:
    """Servers of `longrl.testing.engine_server`, forked by a process that has imported and built all they need.

    Args:
        configs: files of the run.
        weights_folder: weights pass through it.
        log: what they write.
        in_fork: that process is a fork of this one, which spares the imports.
        options: further options of the command, e.g. `seconds_per_token=0.01`.

    Example:
        with EngineServers(["config.yaml"], folder, log) as servers:
            url = servers.start()
            servers.kill(url)
            servers.start(url)
    """

    def __init__(
        self, configs: Sequence[str | Path], weights_folder: Path, log: Path, in_fork: bool = False, **options: Any
    ) -> None:
        args = ["--forks", *[f"--config={config}" for config in configs], f"--weights_folder={weights_folder}"]
        args += [f"--{name}={value}" for name, value in options.items()]
        self._log = log
        self.processes: dict[str, int] = {}
        self._is_ready = False
        with log.open("a") as errors:
            start = _fork if in_fork else _spawn
            self._orders, self._replies, self._wait = start(args, errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, url: str = "http://127.0.0.1:0") -> str:
        """Starts a server, anew where one was; returns its address once it answers."""
        if not self._is_ready:
            self._read()
            self._is_ready = True
        self._orders.write(f"{url.rpartition(':')[2]}\n")
        self._orders.flush()
        process, port = self._read().split()
        url = f"http://127.0.0.1:{port}"
        self.processes[url] = int(process)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                return url
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)

    def kill(self, url: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Ends a server, which is gone when this returns, or sends it another signal."""
        process = self.processes[url]
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, how)
        while how == signal.SIGKILL and Path(f"/proc/{process}").exists():
            time.sleep(0.002)

    def close(self) -> None:
        """Ends all."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._orders.close()
        self._wait()
        self._replies.close()

    def _read(self) -> str:
        line = self._replies.readline()
        assert line, self._log.read_text()
        return line


Started = tuple[IO[str], IO[str], Callable[[], Any]]
"""Where orders go in, where replies come out, and what waits for the end."""


def _spawn(args: list[str], errors: IO[str]) -> Started:
    command = [sys.executable, "-m", "longrl.testing.engine_server", *args]
    parent = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    assert parent.stdin is not None
    assert parent.stdout is not None
    return parent.stdin, parent.stdout, parent.wait


def _fork(args: list[str], errors: IO[str]) -> Started:
    orders_out, orders_in = os.pipe()
    replies_out, replies_in = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _serve_in_fork(args, orders_out, replies_in, errors.fileno())
    os.close(orders_out)
    os.close(replies_in)
    return os.fdopen(orders_in, "w"), os.fdopen(replies_out), lambda: os.waitpid(child, 0)


def _serve_in_fork(args: list[str], orders: int, replies: int, errors: int) -> None:
    """Runs the command with these standard streams; ends the process."""
    from longrl.testing import engine_server

    try:
        os.setsid()  # what a terminal tells the process that tests is not meant for it
        for number, file in enumerate((orders, replies, errors)):
            os.dup2(file, number)
        os.closerange(3, 1024)  # the pipes' other ends among them
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        engine_server.main(args)
    finally:
        os._exit(0)
