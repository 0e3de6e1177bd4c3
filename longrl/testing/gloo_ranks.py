"""Runs a function in several processes that talk over gloo, as the ranks of a run do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 240


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, preload: tuple[str, ...] = ()) -> list[Any]:
    """[function(*args) of every rank], each in a process of its own.

    Args:
        function: at the top of its module, with picklable results.
        num_ranks: processes.
        args: of the function, picklable.
        preload: modules that are imported once for all processes.

    Raises:
        AssertionError: a rank raised, with its traceback; or one did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longrl.models.qwen_vl", *preload])
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(num_ranks):
            options = (function, rank, num_ranks, Path(folder), args)
            ranks.append(context.Process(target=_run_rank, args=options, daemon=True))
            ranks[rank].start()
        for process in ranks:
            process.join(TIMEOUT_S)
        alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in alive:
            ranks[rank].kill()
        files = [Path(folder, str(rank)) for rank in range(num_ranks)]
        results = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    errors = [result[1] for result in results if result is not None and result[0] == "error"]
    assert not errors, "\n".join(errors)
    assert not alive, f"ranks {alive} did not end within {TIMEOUT_S} s"
    ended = [rank for rank, result in enumerate(results) if result is None]
    assert not ended, f"ranks {ended} ended without a result"
    return [result[1] for result in results if result is not None]


def _run_rank(function: Callable[..., Any], rank: int, num_ranks: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=num_ranks)
        result = ("result", function(*args))
        dist.destroy_process_group()
    except BaseException:
        result = ("error", f"rank {rank}:\n{traceback.format_exc()}")
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
