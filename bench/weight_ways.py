"""Three ways of weights to a server, side by side: files, files of what changed, and a broadcast.

Trainer and server are processes of one thread each; the server's vLLM is a dict that copies what comes, its orders come
through a pipe. The trainer holds float32 weights, the server's model is in bfloat16. Before each step every weight
moves by the learning rate, up or down, as in Adam's first steps; then each way brings the same weights, in turns. What
has arrived is compared with the trainer's, bit for bit. Files lie in shared memory: seconds are those of a machine
without a network, bytes are what one would carry.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from common import Row
from torch import Tensor

from longrl.engines.server_client import ServerClient
from longrl.engines.vllm_extension import WeightSync
from longrl.engines.weight_broadcast import BroadcastSender
from longrl.engines.weight_changed_sender import ChangedSender
from longrl.engines.weight_checks import expected_weights
from longrl.engines.weight_files import default_folder
from longrl.engines.weight_kept import KeptWeights
from longrl.engines.weight_senders import FileSender, WeightSender
from longrl.engines.weight_stream import WeightStream, engine_weights
from longrl.models.text import TextFamily
from longrl.testing.tiny import tiny_text

LEARNING_RATES = (1e-6, 1e-5)
BUCKET_MIB = 64
TIMEOUT_S = 60.0


def measure_ways(model_sizes: Mapping[str, int], repeats: int) -> list[Row]:
    """A row for each way and learning rate.

    Args:
        model_sizes: of `tiny_text`.
        repeats: steps of each learning rate.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=default_folder()) as shared:
        tiny_text(folder, **model_sizes)
        with server(folder, shared) as client:
            return _measure(TextFamily(folder, random_init=True), client, Path(shared), repeats)


def _measure(family: TextFamily, client: PipeClient, shared: Path, repeats: int) -> list[Row]:
    engine_family = TextFamily(family.model_path, random_init=True, dtype="bfloat16")
    model = family.build()
    stream = WeightStream(engine_family, model)
    clients = [cast(ServerClient, client)]
    ways: dict[str, WeightSender] = {
        "files": FileSender(shared, 1024),
        "changed": ChangedSender(shared, 1024),
        "broadcast": BroadcastSender("127.0.0.1", 0, BUCKET_MIB, TIMEOUT_S),
    }
    for way, sender in ways.items():  # the first time all ways bring all, and members meet
        sender.send(stream, clients, way, contextlib.nullcontext)
    rows: list[Row] = []
    for rate in LEARNING_RATES:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        sizes: dict[str, list[int]] = {way: [] for way in ways}
        for step in range(repeats):
            _move(model, rate)
            for way, sender in ways.items():
                start = time.perf_counter()
                size = sender.send(stream, clients, f"{way}:{rate}:{step}", contextlib.nullcontext)
                seconds[way].append(time.perf_counter() - start)
                sizes[way].append(size)
                _check(client, stream)
        for way in ways:
            mib = statistics.median(sizes[way]) / 2**20
            row = {"way": way, "learning_rate": rate, "mib": mib, "seconds": statistics.median(seconds[way])}
            rows.append({**row, "share_of_files": mib * 2**20 / statistics.median(sizes["files"])})
    for sender in ways.values():
        sender.close()
    return rows


@torch.no_grad()
def _move(model: torch.nn.Module, rate: float) -> None:
    for parameter in model.parameters():
        parameter += rate * torch.randn_like(parameter).sign()


def _check(client: PipeClient, stream: WeightStream) -> None:
    """Raises AssertionError unless the server holds the trainer's weights in its precision."""
    weights = engine_weights(stream.family, stream.model)
    wanted = {name: int(_words(weight.bfloat16()).sum()) for name, weight in weights}
    assert client.ask("sums") == wanted


def _words(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int16).to(torch.int64)


# ---- the server ----


class PipeClient:
    """What senders ask of a `ServerClient`, through a pipe."""

    url = "the server's pipe"

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(self, *question: Any) -> Any:
        """What the server answers; an error there is one here."""
        self._pipe.send(question)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_info(self) -> dict[str, Any]:
        """Of the server."""
        return dict(self.ask("info"))

    def load_weights(self, folder: str, version: str) -> None:
        """See `ServerClient`."""
        self.ask("order", {"folder": folder, "version": version})

    def order_weights(self, order: Mapping[str, Any]) -> None:
        """See `ServerClient`."""
        self.ask("order", dict(order))


@contextlib.contextmanager
def server(folder: str, shared: str) -> Iterator[PipeClient]:
    """A server in a process of its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, folder, shared), daemon=True)
    process.start()
    try:
        yield PipeClient(here)
    finally:
        process.terminate()
        process.join()


class Worker(WeightSync):
    """A worker whose model is a dict of tensors in bfloat16."""

    rank = 0
    device = torch.device("cpu")
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0, world_size=1))

    def __init__(self, empty: dict[str, Tensor]) -> None:
        self.held = empty

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Copies, as vLLM does."""
        for name, weight in weights_iterator:
            self.held[name].copy_(weight)


def _serve(pipe: Connection, folder: str, shared: str) -> None:
    torch.set_num_threads(1)
    expected = expected_weights(TextFamily(folder, random_init=True, dtype="bfloat16"))
    worker = Worker({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in expected.items()})
    kept = KeptWeights(Path(shared), expected)
    while True:
        what, *order = pipe.recv()
        try:
            pipe.send(_answer(worker, kept, what, *order))
        except Exception as error:
            pipe.send(RuntimeError(repr(error)))


def _answer(worker: Worker, kept: KeptWeights, what: str, order: Mapping[str, Any] | None = None) -> Any:
    if what == "sums":
        return {name: int(_words(weight).sum()) for name, weight in worker.held.items()}
    if order is None:
        group = worker.longrl_group.address.name if worker.longrl_group else ""
        return {"num_workers": 1, "weight_group": group, "kept": kept.version}
    if "changes" in order:
        return kept.take(Path(order["changes"]), order["base"], order["version"])
    if "group" in order:
        return worker.longrl_receive_weights(dict(order))
    return worker.longrl_load_weights(str(kept.folder) if "kept" in order else order["folder"])
