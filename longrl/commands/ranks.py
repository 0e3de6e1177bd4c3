"""The processes of a training run as its command sees them: which one speaks, and how all of them end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

END_WITHIN_S = 60.0
"""How long ranks may take to end after the one that started them: all have the same work behind them."""
STOP_WITHIN_S = 10.0
"""The same where that one has failed: what they do then is of no use any more."""


def is_first_rank() -> bool:
    """True of the one process of a run that writes into its folder, before ranks have met.

    torchrun sets RANK. Lightning numbers nodes and the processes that it starts on one, and these have also what the
    shell they come from was given: SLURM numbers the shell of an interactive job, too.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    numbers = ["LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"]
    if "SLURM_NTASKS" in os.environ:
        numbers.append("SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in numbers)


def started_ranks(trainer: Trainer) -> Sequence[subprocess.Popen[Any]]:
    """Processes that Lightning started from this one, `trainer.devices` less one."""
    return getattr(trainer.strategy.launcher, "procs", ())


def take_ranks(trainer: Trainer) -> Sequence[subprocess.Popen[Any]]:
    """As `started_ranks`, and takes them from the launcher.

    Its observer kills this process as soon as one of them has failed, whatever is still to be said, and its exit code.
    """
    listed = started_ranks(trainer)
    ranks = list(listed)
    if isinstance(listed, list):
        listed.clear()
    return ranks


def is_started_rank(trainer: Trainer) -> bool:
    """True if another process of the run started this one by Lightning, and ends with the code of the run."""
    environment = trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0


def wait_for_ranks(ranks: Sequence[subprocess.Popen[Any]]) -> str | None:
    """Says which rank failed after this one had ended its work; None if none did."""
    problems = [_problem(rank, process) for rank, process in enumerate(ranks, start=1)]
    return "; ".join(problem for problem in problems if problem) or None


def _problem(rank: int, process: subprocess.Popen[Any]) -> str:
    try:
        code = process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"rank {rank} did not end within {END_WITHIN_S:g} s after rank 0 and was killed"
    return f"rank {rank} ended with exit code {code}" if code else ""


def stop_ranks(ranks: Sequence[subprocess.Popen[Any]]) -> None:
    """Ends ranks whose run has failed: by themselves, for they notice, or else by force."""
    deadline = time.monotonic() + STOP_WITHIN_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def cluster_plugins(given: Sequence[Any]) -> list[ClusterEnvironment]:
    """SLURM without Lightning's handler of its signal, which saves wherever each rank is.

    Args:
        given: plugins of the config; a cluster among them is the user's choice.
    """
    is_chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in given)
    if is_chosen or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]
