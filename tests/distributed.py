"""Runs a function in several processes that talk over gloo, as the ranks of a run do."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

from longrl.commands.main import main
from longrl.testing.gloo_ranks import run_on_ranks
from tests.runs import PORTS

PRELOADED = ("tests.preloaded",)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """See `run_on_ranks`."""
    return run_on_ranks(function, world_size, *args, preload=PRELOADED)


def forked_processes() -> BaseContext:
    """Processes that start as those of `run_distributed`, where a program would spawn: without seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longrl.models.qwen_vl", *PRELOADED])
    return context


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
