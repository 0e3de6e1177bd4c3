"""Real `python -m longrl serve` processes for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.distributed import forked_processes, run_as_command
from tests.runs import ROOT, wait_for_group

SMALL = ["--max_model_len=2048", "--max_num_seqs=16", "--kv_cache_gib=0.0625", "--enforce_eager"]
OPTIONS = '--options={"block_size": 32, "seed": 0}'


class RunningServer:
    """A server for the model of a run's config, small enough for a test.

    Args:
        folder: for its log and config; weights pass through `folder/weights`.
        values: config of the run.
        key: for `LONGRL_SERVER_KEY`.
        options: further ones of the command.
        as_typed: an interpreter of its own that imports everything, and so does vLLM's engine in another; else both
            are forks, which spares half of the time.
    """

    def __init__(
        self,
        folder: Path,
        values: dict[str, Any],
        key: str | None = None,
        options: tuple[str, ...] = (),
        as_typed: bool = False,
    ) -> None:
        self.folder, self.key, self.options, self.as_typed = folder, key, options, as_typed
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "serve.yaml"
        self.config.write_text(yaml.safe_dump(values))
        self.weights = folder / "weights"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        args = ["serve", f"--config={self.config}", f"--port={self.port}"]
        args += [*SMALL, OPTIONS, f"--weights_folder={self.weights}", *self.options]
        # An engine in this process may have set variables for itself that a server is not to inherit.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        environment |= {"PYTHONPATH": str(ROOT)} | ({"LONGRL_SERVER_KEY": self.key} if self.key else {})
        if not self.as_typed:
            environment["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            self.process = forked_processes().Process(
                target=run_as_command, args=(args, environment, self.folder / "log")
            )
            self.process.start()
            return
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longrl", *args],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def is_running(self) -> bool:
        return self.process.poll() is None if self.as_typed else self.process.is_alive()

    def end(self, how: int) -> None:
        """Ends it and all that it started."""
        if self.is_running():
            os.killpg(self.process.pid, how)
            self.process.wait(30) if self.as_typed else self.process.join(30)
        assert not self.is_running(), f"the server has not ended 30 s after signal {how}"
        wait_for_group(self.process.pid)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def close(self) -> None:
        try:
            self.end(signal.SIGTERM)
        except (AssertionError, subprocess.TimeoutExpired):
            self.kill()
            raise
