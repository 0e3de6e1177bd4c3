"""A callback that writes what a run and the processes that it started use, step by step: for bench/soak.py."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lightning.pytorch import Callback

FILE = "soak.jsonl"
POLICY_STEPS = "step"
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class SoakWatch(Callback):
    """Appends a line to `run_dir/soak.jsonl`.

    Args:
        every_n_steps: optimizer steps.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % self.every_n_steps:
            return
        line = json.dumps({POLICY_STEPS: trainer.global_step, **usage(os.getpid())})
        with (Path(trainer.default_root_dir) / FILE).open("a") as file:
            file.write(line + "\n")


def odd(completion, row):
    """Differs within nearly every group, so that no prompt has to be drawn again."""
    return float(completion.token_ids.sum() % 2)


def usage(root: int) -> dict[str, float]:
    """Memory, descriptors, threads, processes and shared memory of a process and of all below it.

    Memory is what a process has of its own. Pages of files in /dev/shm that it has touched, as those of
    vLLM's ring of messages, count in `shm_bytes`, with the size that they may reach.
    """
    total = {"rss_mib": 0.0, "fds": 0, "threads": 0, "processes": 0}
    shared = {}
    for pid in processes_below(root):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it ended just now
            total["rss_mib"] += own_mib(pid)
            total["threads"] += len(os.listdir(f"/proc/{pid}/task"))
            total["fds"] += len(os.listdir(f"/proc/{pid}/fd"))
            total["processes"] += 1
            shared |= shared_files(pid)
    total["own_rss_mib"] = own_mib(root)
    return {**total, "shm_bytes": sum(shared.values())}


def own_mib(pid: int) -> float:
    """Resident memory of a process without pages of files."""
    resident, of_files = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return (resident - of_files) * PAGE_MIB


def processes_below(root: int) -> list[int]:
    """A process and its children, and theirs."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def shared_files(pid: int) -> dict[int, int]:
    """Inode -> bytes of the files in /dev/shm that a process holds open."""
    files = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/dev/shm/"):
                state = os.stat(path)
                files[state.st_ino] = state.st_size
    return files
