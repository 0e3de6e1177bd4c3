"""LoRA's adapters on their way to servers that compute with them beside the weights (`weight_adapters`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from longrl.engines.server_client import ServerClient
from longrl.engines.server_protocol import content_name
from longrl.engines.weight_adapters import adapter_problem, adapter_tensors
from longrl.engines.weight_senders import WeightSender
from longrl.engines.weight_stream import WeightStream
from longrl.strategies.axis import world_axis


def send_adapters(
    sender: WeightSender,
    weights: WeightStream,
    clients: Sequence[ServerClient],
    run: str,
    version: str,
    pause: Callable[[], AbstractContextManager[None]],
) -> int:
    """Has servers hold adapters as `version`, and the weights they belong to as `run`:base. Every rank calls it.

    Args:
        sender: of those weights, where a server lacks them.
        weights: without adapters.
        clients: of the servers that this rank tells.
        run: the trainer's, in which those weights stay the same.
        version: see `WeightSender.send`.
        pause: see `WeightSender.send`.

    Returns:
        Bytes that rank 0 sent or wrote.

    Raises:
        ValueError: a server does not take adapters, or not these.
    """
    world = world_axis()
    base = f"{run}:base"
    with world.raise_on_any_rank():
        infos = [client.get_info() for client in clients]
        _check(weights, clients, [info["takes_adapters"] for info in infos])
    num_bytes = 0
    with contextlib.ExitStack() as paused:
        if not all(world.gather(all(info["base"] == base for info in infos))):
            paused.enter_context(pause())  # until adapters are there: nothing is sampled by weights without theirs
            num_bytes += sender.send(weights, clients, base, pause)
        names: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for name, matrix in adapter_tensors(weights.family, weights.model, weights.bucket_bytes):
            num_bytes += matrix.nbytes
            if clients:
                content = matrix.cpu().contiguous()
                names[name] = content_name(content)
                tensors[names[name]] = content
        with pause(), world.raise_on_any_rank():
            for client in clients:
                client.load_adapters({"version": version, "base": base, "adapters": names}, tensors)
    return num_bytes


def _check(weights: WeightStream, clients: Sequence[ServerClient], takes_adapters: Sequence[bool]) -> None:
    problem = adapter_problem(weights.family)
    if problem:
        raise ValueError(f"lora=adapters of VLLMServerEngine does not work: {problem}; set it to merged")
    for client, takes in zip(clients, takes_adapters, strict=True):
        if not takes:
            raise ValueError(
                f"the server at {client.url} takes no adapters on their own; start it with --lora adapters, or set "
                "lora of VLLMServerEngine to merged"
            )
