"""Runs a function in several processes that talk over gloo, as the ranks of a run do."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import longrl.__main__ as typed
from longrl.commands.main import main
from longrl.testing.gloo_ranks import run_on_ranks
from tests.runs import PORTS, ROOT

PRELOADED = ("tests.preloaded",)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """See `run_on_ranks`."""
    return run_on_ranks(function, world_size, *args, preload=PRELOADED)


def forked_processes() -> BaseContext:
    """Processes that start as those of `run_distributed`, where a program would spawn: without seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longrl.models.qwen_vl", *PRELOADED])
    return context


class ForkedCommand:
    """`python -m longrl ARGS` in a fork, whose ranks are started as a user's; asked as a `subprocess.Popen` is."""

    def __init__(self, *args: str) -> None:
        self.log = Path(tempfile.mkdtemp(prefix="longrl-command-"), "log")
        environment = os.environ | {"MASTER_PORT": str(next(PORTS)), "PYTHONPATH": str(ROOT)}
        self._process = forked_processes().Process(target=run_as_command, args=(list(args), environment, self.log))
        self._process.start()
        self.pid = self._process.pid
        """Also of its session, to which its ranks and their workers belong."""

    @property
    def returncode(self) -> int | None:
        """None while it runs, minus the signal that ended it."""
        return self._process.exitcode

    def output(self) -> str:
        """All that it and its ranks have printed so far."""
        return self.log.read_text()

    def wait(self, timeout_s: float = 600) -> str:
        """`output` of a command that has ended."""
        self._process.join(timeout_s)
        assert self.returncode is not None, f"the command has not ended within {timeout_s} s:\n{self.output()}"
        return self.output()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_as_command(args: list[str], environment: dict[str, str], log: Path) -> None:
    """The command as the leader of a session of its own, whose output goes to `log`."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["longrl", *args]
    sys.modules["__main__"] = typed  # from which Lightning knows how to start the other ranks
    main()


def run_as_torchrun(num_ranks: int, *args: str) -> list[str]:
    """What each rank of `torchrun --nproc_per_node=N -m longrl ARGS` prints; forked, with the variables torchrun sets.

    Two other interpreters and torchrun's own would import for longer than a tiny run takes.
    """
    shared = {
        "LOCAL_WORLD_SIZE": str(num_ranks), "WORLD_SIZE": str(num_ranks), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default", "ROLE_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(next(PORTS)), "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "False",  # there is no agent
    }  # fmt: skip
    with ProcessPoolExecutor(num_ranks, forked_processes(), max_tasks_per_child=1) as pool:
        ranks = [pool.submit(_as_rank, rank, shared, args) for rank in range(num_ranks)]
        return [rank.result(timeout=300) for rank in ranks]


def _as_rank(rank: int, shared: dict[str, str], args: tuple[str, ...]) -> str:
    os.environ.update(shared, **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(args)
    return printed.getvalue()
