"""Where vLLM's worker runs: on the device of its rank, as part of the trainer's process group.

Left to itself, vLLM 0.32 puts the worker of a process on cuda:0 and makes that the process's current device, the
trainer's too: the engines of all ranks of a node would share one GPU. Its `external_launcher` reads rank and device
from the variables that torchrun sets; Lightning's own launcher and SLURM set others, or none.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist


def device_index() -> int:
    """Index of the process's current GPU, 0 on a machine without."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.current_device()


def launcher_options(ranks_per_engine: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make this process its worker, none where vLLM's own choice is right.

    Args:
        ranks_per_engine: neighbouring ranks of the process group that are one engine.
    """
    is_alone = _world_size() == 1
    if is_alone and device_index() == 0:
        return {}
    options: dict[str, Any] = {"distributed_executor_backend": "external_launcher"}
    if ranks_per_engine > 1:
        options["tensor_parallel_size"] = ranks_per_engine
    return options


@contextlib.contextmanager
def launcher_environment() -> Iterator[None]:
    """Inside, the environment says of this process what torchrun would have said; afterwards it is as it was."""
    before = dict(os.environ)
    variables = _launcher_variables()
    os.environ.update(variables)
    try:
        yield
    finally:
        _restore(variables, before)


def _launcher_variables() -> dict[str, str]:
    variables = {"LOCAL_RANK": str(device_index())}  # read as the index of the device
    if dist.is_initialized():
        variables["RANK"] = str(dist.get_rank())
        variables["WORLD_SIZE"] = str(dist.get_world_size())
        return variables
    # Processes without a group, as those of `evaluate` under torchrun, do not know each other: vLLM makes a group of
    # this one alone, by an address of its own, and must not look for it at torchrun's.
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def _restore(names: Mapping[str, str], before: Mapping[str, str]) -> None:
    for name in names:
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
