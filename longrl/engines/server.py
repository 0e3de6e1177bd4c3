"""Rollouts by vLLM servers beside the run, on GPUs or nodes of their own, fed with the trainer's features.

A server is `python -m longrl serve` with the run's config (longrl/commands/serve.py says why vLLM's own routes do not
do). It never sees a pixel: a prompt is what `VLLMEngine` gives to vLLM in the trainer's process, its features cross
once and are named by their content from then on. Weights go as files, as files of what changed in them, or from process
to process (`weight_transfer`); LoRA's adapters are merged into them, or go beside them (`lora`).

Both sides count versions of weights: a server that was started anew is given them again, and completions by other
weights than the step's are an error.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from longrl.engines.server_client import ServerClient
from longrl.engines.server_protocol import model_sizes
from longrl.engines.turn_requests import TurnRequests
from longrl.engines.vllm_options import VERSION, Fields
from longrl.engines.vllm_rollouts import VLLMRollouts
from longrl.engines.weight_adapter_sender import send_adapters
from longrl.engines.weight_broadcast import BroadcastSender
from longrl.engines.weight_changed_sender import ChangedSender
from longrl.engines.weight_files import default_folder
from longrl.engines.weight_senders import FileSender, WeightSender
from longrl.engines.weight_stream import WeightStream
from longrl.environments.trajectory import Trajectory
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, SECONDS, SECONDS_OR_ZERO, check_ranges
from longrl.models.base import CausalFamily
from longrl.strategies.axis import world_axis
from longrl.types import Prompt

logger = logging.getLogger(__name__)

MAX_THREADS = 256
"""Turns that a rank has the server answer at once: as many completions as vLLM decodes together by default."""


class VLLMServerEngine(VLLMRollouts):
    """Generates with servers that were started beside the run.

    Args:
        urls: of the servers; rank r uses number r modulo their number, so several ranks may share one.
        weights_folder: for weights on their way, seen by server and trainer under this name (`--weights_folder` of the
            server); None is shared memory, for a server on rank 0's machine. It needs room for one set of weights.
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
        start_timeout_s: how long the first contact waits for a server that is still starting.
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
        weight_transfer: Literal["files", "changed", "broadcast"] = "files",
        lora: Literal["merged", "adapters"] = "merged",
        transfer_host: str = "127.0.0.1",
        transfer_port: int = 0,
        transfer_timeout_s: float = 300.0,
    ) -> None:
        times = {"timeout_s": SECONDS, "start_timeout_s": SECONDS_OR_ZERO, "transfer_timeout_s": SECONDS}
        check_ranges(locals(), "the engine's ", **times, shard_mib=COUNT, bucket_mib=COUNT, retries=NOT_NEGATIVE)
        addresses = [urls] if isinstance(urls, str) else list(urls)
        if not addresses:
            raise ValueError("urls of VLLMServerEngine must name a server, got none; e.g. http://127.0.0.1:8000")
        self.clients = [ServerClient(url, timeout_s, retries) for url in addresses]
        folder = Path(weights_folder) if weights_folder else default_folder()
        self._sender: WeightSender
        if weight_transfer == "broadcast":
            self._sender = BroadcastSender(transfer_host, transfer_port, bucket_mib, transfer_timeout_s)
        elif weight_transfer == "changed":
            self._sender = ChangedSender(folder, shard_mib)
        else:
            self._sender = FileSender(folder, shard_mib)
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
        """This rank's server."""
        return self.clients[world_axis().rank % len(self.clients)]

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, family: CausalFamily) -> None:
        """Waits for the server and compares it with what the run needs. Every rank of the run must call it.

        Raises:
            ConnectionError: it does not answer.
            ValueError: it is another vLLM, or serves another model.
        """
        world = world_axis()
        url = self.client.url
        with world.raise_on_any_rank():
            info = self.client.wait_until_ready(self.start_timeout_s)
            if info["vllm"].split("+")[0] != VERSION:
                raise ValueError(
                    f"the server at {url} runs vllm {info['vllm']}; install {VERSION} there, as longrl needs"
                )
            sizes, served = model_sizes(family), info["model"]
            names = [name for name, size in sizes.items() if served.get(name) != size]
            differing = [f"{name} is {served.get(name)!r} instead of {sizes[name]!r}" for name in names]
            if differing:
                raise ValueError(
                    f"the server at {url} serves another model than model.family describes: {', '.join(differing)}; "
                    "start `python -m longrl serve` with the run's own --config and model.family options"
                )
        self._info = info
        if len(self.clients) > world.size:
            logger.warning("%d urls for %d ranks: the last of them are not used", len(self.clients), world.size)

    @override
    def invalidate_weights(self) -> None:
        self._run = ""

    @override
    def close(self) -> None:
        """Closes connections; servers go on."""
        for client in self.clients:
            client.close()
        self._sender.close()
        self._info = None

    # -- weights -------------------------------------------------------------------------------------------------

    @override
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Hands over the trainer's weights of `step`, unless all servers have them. Every rank of the run calls it."""
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
        with world.raise_on_any_rank():
            has_weights = self.client.get_info()["version"] == self._version
        if all(world.gather(has_weights)):
            return
        weights = WeightStream(family, model, self.bucket_mib << 20, merge=self.lora == "merged")
        told = [self.client] if world.rank < len(self.clients) else []
        if self.lora == "adapters":
            num_bytes = send_adapters(self._sender, weights, told, self._run, self._version, pause)
        else:
            num_bytes = self._sender.send(weights, told, self._version, pause)
        self.num_synced_bytes += num_bytes
        self.num_syncs += 1

    # -- generation ----------------------------------------------------------------------------------------------

    @override
    def max_length(self) -> int | None:
        """The server's, if it answers already."""
        if self._info is None:
            try:
                return int(self.client.get_info(retries=0)["max_model_len"])
            except (ConnectionError, TimeoutError):
                return None
        return int(self._info["max_model_len"])

    @override
    def length_limit(self) -> tuple[int, str]:
        assert self._info is not None, "sync comes before generate"
        return self._info["max_model_len"], f"--max_model_len of the server at {self.client.url}"

    @override
    def answer_requests(self, prompts: Sequence[Prompt], requests: Fields, params: Fields) -> list[Fields]:
        return self.client.generate(self._version, requests, params)

    @override
    def environment_problem(self) -> str | None:
        return None

    @override
    @contextlib.contextmanager
    def turn_requests(self, num_trajectories: int) -> Iterator[ThreadedRequests]:
        requests = ThreadedRequests(self.client, self._version, min(num_trajectories, MAX_THREADS))
        try:
            yield requests
        finally:
            requests.give_up()


class ThreadedRequests(TurnRequests):
    """Turns that a server answers, each asked for by a thread (`TurnRequests`).

    Args:
        client: of the server.
        version: of the weights that sample.
        num_threads: turns that are asked for at once.
    """

    def __init__(self, client: ServerClient, version: str, num_threads: int) -> None:
        self._client = client
        self._version = version
        self._threads = ThreadPoolExecutor(max(1, num_threads))
        self._pending: dict[Future[list[Fields]], Trajectory] = {}

    @override
    def add(self, trajectory: Trajectory, request: dict[str, Any], params: dict[str, Any]) -> None:
        future = self._threads.submit(self._client.generate, self._version, [request], [params], bring_first=True)
        self._pending[future] = trajectory

    @override
    def finished(self, answers: Collection[Future[Any]]) -> list[tuple[Trajectory, dict[str, Any]]]:
        wait([*self._pending, *answers], return_when=FIRST_COMPLETED)
        done = [future for future in self._pending if future.done()]
        return [(self._pending.pop(future), future.result()[0][0]) for future in done]

    def give_up(self) -> None:
        """Ends the threads, after an error once the server has answered them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
