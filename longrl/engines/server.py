"""Rollouts by vLLM servers beside the run, on GPUs or nodes of their own, fed with the trainer's features.

A server is `python -m longrl serve` with the run's config (longrl/commands/serve.py says why vLLM's own routes do not
do). It never sees a pixel: a prompt is what `VLLMEngine` gives to vLLM in the trainer's process, its features cross
once and are named by their content from then on. Weights go as files, as files of what changed in them, or from process
to process (`weight_transfer`); LoRA's adapters are merged into them, or go beside them (`lora`).

Both sides count versions of weights: a server that was started anew is given them again, and completions by other
weights than the step's are an error. Servers may come and go (`server_pool`).
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from longrl.engines.server_asks import PooledRequests, PooledRollout
from longrl.engines.server_client import SERVER_LOST, ServerClient
from longrl.engines.server_pool import ServerPool
from longrl.engines.server_protocol import ANY_STEP, model_sizes
from longrl.engines.vllm_options import VERSION, Fields
from longrl.engines.vllm_rollouts import VLLMRollouts
from longrl.engines.weight_adapter_sender import send_adapters
from longrl.engines.weight_broadcast import BroadcastSender
from longrl.engines.weight_changed_sender import ChangedSender
from longrl.engines.weight_files import default_folder
from longrl.engines.weight_senders import FileSender, WeightSender
from longrl.engines.weight_stream import WeightStream
from longrl.io.network_loop import network_loop
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, SECONDS, SECONDS_OR_ZERO, check_ranges
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis, world_axis
from longrl.types import Prompt

logger = logging.getLogger(__name__)

MAX_SENDS = 5
"""Times that weights are sent in one sync, because servers were lost meanwhile."""


class VLLMServerEngine(VLLMRollouts):
    """Generates with servers that were started beside the run.

    Args:
        urls: of the servers. Every rank uses all that are there, each as far as it has slots; one that is lost is left
            out until it is back, and what it was asked is asked elsewhere.
        weights_folder: for weights on their way, seen by server and trainer under this name (`--weights_folder` of the
            server); None is shared memory, for a server on rank 0's machine. It needs room for one set of weights.
        keep_weights: they stay there until the next ones are written, so that a server which comes back in between is
            given them at once, not with the next sync. Of files of all weights, adapters merged, alone.
        shard_mib: size of its files, which bounds the host memory of a sync.
        weight_transfer: files: all weights through `weights_folder`. changed: what changed in them, for slow networks;
            rank 0 and every server hold one set of weights on the host. broadcast: no files, from rank 0 to the workers
            of all servers over NCCL (gloo where there is no GPU).
        lora: merged: adapters are added to the weights, and rounded with them. adapters: they go beside weights that
            are sent once; servers must be started with `--lora adapters`.
        transfer_host: of a broadcast: address of rank 0's machine that the servers reach.
        transfer_port: of a broadcast; 0 is a free one.
        transfer_timeout_s: of a broadcast: how long a member of the group may keep the others waiting.
        bucket_mib: of whole weights that ranks gather in one message.
        timeout_s: of one answer; a rollout of all prompts of a rank is one.
        start_timeout_s: how long the first contact waits for servers that are still starting; then it goes on with
            those that are there.
        recover_timeout_s: how long a run waits where no server is left; then it ends. 0: at once.
        retries: further attempts where a server cannot be reached or is busy, after 1, 2, 4... seconds.

    Example:
        `VLLMServerEngine(["http://127.0.0.1:8000"])` beside `python -m longrl serve --config C --port 8000`
    """

    is_remote = True

    def __init__(
        self,
        urls: Sequence[str] | str,
        weights_folder: str | None = None,
        shard_mib: int = 1024,
        bucket_mib: int = 512,
        timeout_s: float = 1800.0,
        start_timeout_s: float = 600.0,
        retries: int = 4,
        keep_weights: bool = True,
        recover_timeout_s: float = 600.0,
        weight_transfer: Literal["files", "changed", "broadcast"] = "files",
        lora: Literal["merged", "adapters"] = "merged",
        transfer_host: str = "127.0.0.1",
        transfer_port: int = 0,
        transfer_timeout_s: float = 300.0,
    ) -> None:
        times = {"timeout_s": SECONDS, "start_timeout_s": SECONDS_OR_ZERO, "transfer_timeout_s": SECONDS}
        times |= {"recover_timeout_s": SECONDS_OR_ZERO, "transfer_port": (0, 65_535)}
        check_ranges(locals(), "the engine's ", **times, shard_mib=COUNT, bucket_mib=COUNT, retries=NOT_NEGATIVE)
        self.clients = make_clients(urls, "VLLMServerEngine", timeout_s, retries)
        self.pool = ServerPool(self.clients, recover_timeout_s, self._resend)
        folder = Path(weights_folder) if weights_folder else default_folder()
        self._sender: WeightSender
        if weight_transfer == "broadcast":
            self._sender = BroadcastSender(transfer_host, transfer_port, bucket_mib, transfer_timeout_s)
        elif weight_transfer == "changed":
            self._sender = ChangedSender(folder, shard_mib)
        else:
            self._sender = FileSender(folder, shard_mib, keep_weights)
        self.lora = lora
        self.bucket_mib = bucket_mib
        self.start_timeout_s = start_timeout_s
        self._info: dict[str, Any] | None = None
        self._run = ""
        self._version = ""

    @override
    def identity(self) -> dict[str, Any]:
        return {}  # what decides answers is the server's, which must serve the same model by the same vLLM

    @property
    def client(self) -> ServerClient:
        """The server that this rank asks first."""
        return self.clients[world_axis().rank % len(self.clients)]

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, family: CausalFamily) -> None:
        """Waits for the servers and compares them with what the run needs. Every rank of the run must call it.

        Raises:
            ConnectionError: none answers.
            ValueError: one is another vLLM, or serves another model.
        """
        world = world_axis()
        pool = self.pool
        pool.rank, pool.num_ranks = world.rank, world.size
        deadline = time.monotonic() + self.start_timeout_s
        logger.info("waiting up to %.0f s for %d rollout servers", self.start_timeout_s, len(self.clients))
        while True:
            found = self._look(world)
            is_late = world.max(int(time.monotonic() > deadline))
            if is_late or not any(isinstance(info, str) for info in found.values()):
                break
            time.sleep(1.0)
        network_loop().run(pool.adopt(found))
        described = [info for info in found.values() if not isinstance(info, str)]
        if not described:
            problems = "; ".join(info for info in found.values() if isinstance(info, str))
            raise ConnectionError(
                f"no rollout server answers within start_timeout_s={self.start_timeout_s:g}: {problems}"
            )
        for number, info in found.items():
            if not isinstance(info, str):
                check_server(self.clients[number].url, info, family)
        self._info = described[0] | {"max_model_len": min(info["max_model_len"] for info in described)}

    def _look(self, world: Axis) -> dict[int, dict[str, Any] | str]:
        """What all servers say of themselves, every rank asking some of them; a text says why one does not."""
        numbers = range(world.rank, len(self.clients), world.size)
        with world.raise_on_any_rank():
            found = network_loop().run(self.pool.look(numbers))
        return {number: info for of_rank in world.gather(found) for number, info in of_rank.items()}

    @override
    def invalidate_weights(self) -> None:
        self._run = ""

    @override
    def close(self) -> None:
        """Closes connections; servers go on."""
        network_loop().run(self.pool.rest())
        for client in self.clients:
            client.close()
        self._sender.close()
        self._info = None

    # -- weights -------------------------------------------------------------------------------------------------

    @override
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Hands over the trainer's weights of `step`, unless all servers have them. Every rank of the run calls it.

        Raises:
            ServersLost: there is no server, for too long.
        """
        self.sync_beside(family, model, step, contextlib.nullcontext)

    @override
    def sync_beside(
        self, family: CausalFamily, model: nn.Module, step: int, pause: Callable[[], AbstractContextManager[None]]
    ) -> None:
        world = world_axis()
        if self._info is None:
            self.start(family)
        if not self._run:
            self._run = world.gather(uuid.uuid4().hex[:12])[0]
        self._version = f"{self._run}:{step}"
        network_loop().run(self.pool.begin_sync(self._version))
        for attempt in range(MAX_SENDS):
            lacking = self._lacking(family, world)
            if not lacking:
                break
            told = [self.clients[number] for number in lacking[world.rank :: world.size]]
            try:
                self.num_synced_bytes += self._send(family, model, told, pause)
                self.num_syncs += 1
            except Exception as error:  # of all ranks
                is_lost = any(world.gather(isinstance(error, (*SERVER_LOST, TimeoutError))))
                if not is_lost or attempt + 1 == MAX_SENDS:
                    raise
                logger.warning("a server was lost while it was given weights (%s); the others are given them", error)
        network_loop().run(self.pool.watch())

    def _send(
        self,
        family: CausalFamily,
        model: nn.Module,
        told: Sequence[ServerClient],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> int:
        """Has servers hold the weights, each told by one rank; bytes that were sent."""
        weights = WeightStream(family, model, self.bucket_mib << 20, merge=self.lora == "merged")
        if self.lora == "adapters":
            return send_adapters(self._sender, weights, told, self._run, self._version, pause)
        return self._sender.send(weights, told, self._version, pause)

    def _lacking(self, family: CausalFamily, world: Axis) -> list[int]:
        """Numbers of the servers that are there and do not hold the weights of this sync, the same on all ranks."""
        deadline = time.monotonic() + self.pool.recover_timeout_s
        while True:
            found = self._look(world)
            for number, info in found.items():
                if not isinstance(info, str):  # whoever lost it: what one rank raises all must raise
                    check_server(self.clients[number].url, info, family)
            network_loop().run(self.pool.adopt(found))
            there = {number: info for number, info in found.items() if not isinstance(info, str)}
            if there:
                return sorted(number for number, info in there.items() if info["version"] != self._version)
            if world.max(int(time.monotonic() >= deadline)):
                raise self.pool.lost()
            time.sleep(1.0)

    async def _resend(self, client: ServerClient) -> bool:
        """Gives a server that came back the weights of the last sync, if their files are still there."""
        kept = self._sender.kept
        if kept is None or kept[1] != self.pool.version:
            return False
        await client.load_weights_async(str(kept[0]), kept[1])
        return True

    # -- generation ----------------------------------------------------------------------------------------------

    @override
    def max_length(self) -> int | None:
        """The servers', if one answers already."""
        if self._info is not None:
            return int(self._info["max_model_len"])
        for client in self.clients:
            with contextlib.suppress(ConnectionError, TimeoutError):
                return int(client.get_info(retries=0)["max_model_len"])
        return None

    @override
    def length_limit(self) -> tuple[int, str]:
        assert self._info is not None, "sync comes before generate"
        return self._info["max_model_len"], f"--max_model_len of the server at {self.client.url}"

    @override
    def answer_requests(self, prompts: Sequence[Prompt], requests: Fields, params: Fields) -> list[Fields]:
        names = [prompt.id for prompt in prompts]
        return PooledRollout(self.pool, self._version, requests, params, names).answers()

    @override
    def take_counts(self) -> dict[str, float]:
        """Completions that were asked once more because their server was lost, and servers that a rank has lost."""
        pool = self.pool
        counts = {"rollout/repeated": float(pool.num_repeated), "rollout/servers_lost": float(pool.num_losses)}
        pool.num_repeated = pool.num_losses = 0
        return counts

    @override
    def environment_problem(self) -> str | None:
        return None

    @override
    @contextlib.contextmanager
    def turn_requests(self, num_trajectories: int) -> Iterator[PooledRequests]:
        with contextlib.closing(PooledRequests(self.pool, self._version)) as requests:
            yield requests

    @override
    def staleness_problem(self) -> str | None:
        return None

    @override
    @contextlib.contextmanager
    def continuous_requests(self) -> Iterator[PooledRequests]:
        assert self._run, "sync comes before"
        with contextlib.closing(PooledRequests(self.pool, f"{self._run}:{ANY_STEP}")) as requests:
            yield requests


def make_clients(urls: Sequence[str] | str, owner: str, timeout_s: float, retries: int) -> list[ServerClient]:
    """A client for each of the servers that `owner` names."""
    addresses = [urls] if isinstance(urls, str) else list(urls)
    if not addresses:
        raise ValueError(f"urls of {owner} must name a server, got none; e.g. http://127.0.0.1:8000")
    clients = [ServerClient(url, timeout_s, retries, owner) for url in addresses]
    url, count = Counter(client.url for client in clients).most_common(1)[0]
    if count > 1:
        raise ValueError(f"urls of {owner} must name each server once, got {url} {count} times")
    return clients


def check_server(url: str, info: Mapping[str, Any], family: CausalFamily) -> None:
    """Raises ValueError if a server is another vLLM, or serves another model."""
    if info["vllm"].split("+")[0] != VERSION:
        raise ValueError(f"the server at {url} runs vllm {info['vllm']}; install {VERSION} there, as longrl needs")
    sizes, served = model_sizes(family), info["model"]
    names = [name for name, size in sizes.items() if served.get(name) != size]
    differing = [f"{name} is {served.get(name)!r} instead of {sizes[name]!r}" for name in names]
    if differing:
        raise ValueError(
            f"the server at {url} serves another model than model.family describes: {', '.join(differing)}; "
            "start `python -m longrl serve` with the run's own --config and model.family options"
        )
