"""vLLM's engine as the routes of a rollout server use it, over the trainer's own tiny model on a CPU.

It computes a completion at once, and lets it take its time by sleeping: an engine that is as slow as wanted, with
completions of long-tailed durations, and leaves the CPU to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from longrl.engines.server_protocol import NO_VERSION
from longrl.engines.vllm_extension import WeightSync
from longrl.models.base import CausalFamily
from longrl.testing.stand_in_sampler import Ask, Sampled, prompt_logprobs, sample

GATHER_S = 0.02
"""A request waits so long for others that are computed with it."""
MAX_TOGETHER = 64
"""Requests of one completion that are computed in one batch."""


@dataclass(frozen=True)
class Pace:
    """How long completions take.

    Args:
        seconds_per_token: on average; 0 is as fast as they are computed.
        tail: standard deviation of the logarithm of a completion's own factor on that. A completion keeps its factor
            wherever it is sampled, and through cuts.
    """

    seconds_per_token: float = 0.0
    tail: float = 0.0

    def seconds(self, name: str) -> float:
        """Of a token of a completion."""
        if not self.tail:
            return self.seconds_per_token
        factor = random.Random(name).lognormvariate(-(self.tail**2) / 2, self.tail)  # its mean is 1
        return self.seconds_per_token * factor


@dataclass(frozen=True)
class StandInOutput:
    """The fields of `vllm.CompletionOutput` that are read."""

    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Any]]
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[Any]


class StandInWorker(WeightSync):
    """The methods that a worker of a rollout server has, over the trainer's model.

    Args:
        family: of the model.
        own_weights: those that the family names; else random ones, until a trainer sends its own.
    """

    def __init__(self, family: CausalFamily, own_weights: bool = False) -> None:
        self.model = (family.build() if own_weights else family.build(weights=None)).eval()
        names = {family.engine_weight(name): name for name in self.model.state_dict()}
        self.names = {engine_name: name for engine_name, name in names.items() if engine_name is not None}
        self.model_runner = self
        self.device = torch.device("cpu")
        self.rank = 0
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=0, data_parallel_size=1, world_size=1)
        )

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights under the engine's names."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, weight in weights_iterator:
                state[self.names[name]].copy_(weight)

    @override
    def _longrl_take_over(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.reload_weights(weights)

    @override
    def longrl_head_dtypes(self) -> list[str]:
        return ["torch.float32"]


@dataclass
class _Running:
    """A request that is being answered."""

    ask: Ask
    sampled: asyncio.Future[list[Sampled]]
    is_cut: asyncio.Event
    """Set once it is to end early."""


class StandInEngine:
    """The part of `vllm.v1.engine.async_llm.AsyncLLM` that `RolloutRoutes` uses.

    Args:
        family: of the model.
        max_model_len: tokens of the longest prompt and completion.
        max_num_seqs: completions that are sampled at a time; others wait.
        pace: how long they take.
        worker: with the model; None makes it.
    """

    def __init__(
        self,
        family: CausalFamily,
        max_model_len: int,
        max_num_seqs: int,
        pace: Pace,
        worker: StandInWorker | None = None,
    ) -> None:
        self.family = family
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.pace = pace
        self.worker = worker or StandInWorker(family)
        self._thread = ThreadPoolExecutor(1)  # computes, and loads weights: never both
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._running: dict[str, _Running] = {}
        self._to_compute: list[_Running] = []
        self._is_computing = False
        self._idle = asyncio.Condition()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._weight_version = NO_VERSION

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self, request: dict[str, Any], sampling: dict[str, Any], request_id: str, lora_request: None = None
    ) -> AsyncIterator[Any]:
        """One answer with all completions of a request, or with what is thought of its own tokens."""
        if "prompt_logprobs" in sampling:
            yield await asyncio.get_running_loop().run_in_executor(self._thread, self._scored, request, sampling)
            return
        ask = Ask.read(self.family, request, sampling)
        length = len(ask.prompt.input_ids) + ask.sampling.max_completion_tokens
        if length > self.model_config.max_model_len:
            raise ValueError(f"{length} tokens are above max_model_len={self.model_config.max_model_len}")
        await self._is_open.wait()
        loop = asyncio.get_running_loop()
        running = _Running(ask, loop.create_future(), asyncio.Event())
        self._running[request_id] = running
        try:
            if not self._to_compute:
                loop.call_later(GATHER_S, self._compute)
            self._to_compute.append(running)
            name = request_id.rpartition("-")[0]
            versions = [SimpleNamespace(version=self._weight_version)]
            waits = []
            for index, (ids, logps, reason) in enumerate(await self._sampled(running)):
                logprobs = [{token: SimpleNamespace(logprob=logp)} for token, logp in zip(ids, logps, strict=True)]
                output = StandInOutput(index, ids, logprobs, reason, versions)
                own_name = name if "#" in name else f"{name}#{index}"  # a turn's request says which completion it is
                waits.append(self._take_time(output, self.pace.seconds(own_name), running.is_cut))
            yield SimpleNamespace(outputs=await asyncio.gather(*waits))
        finally:
            del self._running[request_id]
            async with self._idle:
                self._idle.notify_all()

    def _scored(self, request: dict[str, Any], sampling: dict[str, Any]) -> Any:
        """The fields of `vllm.RequestOutput` that are read where log-probabilities of a prompt are asked for."""
        ask = Ask.read(self.family, request, {"max_tokens": 1, "seed": None, **sampling})
        if len(ask.prompt.input_ids) >= self.model_config.max_model_len:
            raise ValueError(f"{len(ask.prompt.input_ids)} tokens are above {self.model_config.max_model_len}")
        ids, rows = prompt_logprobs(self.family, self.worker.model, ask, sampling["prompt_logprobs"])
        found = [{token: SimpleNamespace(logprob=logp) for token, logp in row.items()} for row in rows]
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=[None, *found], num_cached_tokens=0)

    async def _sampled(self, running: _Running) -> list[Sampled]:
        """The completions of a request; of one that is cut before they are computed none has a token."""
        cutting = asyncio.ensure_future(running.is_cut.wait())
        waited: list[asyncio.Future[Any]] = [running.sampled, cutting]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        cutting.cancel()
        if running.sampled.done():
            return running.sampled.result()
        running.sampled.cancel()
        return [([], [], "abort")] * running.ask.sampling.num_generations

    def _compute(self) -> None:
        """Has the thread compute some of what waits for it, and what came meanwhile once it has."""
        if self._is_computing or not self._to_compute:
            return
        self._is_computing = True
        batch, num_siblings = next_batch(self._to_compute)
        taken = set(map(id, batch))
        self._to_compute = [running for running in self._to_compute if id(running) not in taken]
        computed = asyncio.get_running_loop().run_in_executor(self._thread, self._sample, batch, num_siblings)
        computed.add_done_callback(functools.partial(self._hand_out, batch))

    def _hand_out(self, batch: Sequence[_Running], computed: asyncio.Future[list[list[Sampled]]]) -> None:
        """Gives requests that were computed together their completions."""
        self._is_computing = False
        error = computed.exception()
        for number, running in enumerate(batch):
            if running.sampled.done():  # it was cut, its sender hung up, or it stands here twice
                continue
            if error is not None:
                running.sampled.set_exception(error)
            else:
                running.sampled.set_result(computed.result()[number])
        self._compute()

    def _sample(self, batch: Sequence[_Running], num_siblings: int) -> list[list[Sampled]]:
        """Completions of requests that are computed together; none if all were cut."""

        def is_wanted() -> bool:
            return not all(running.is_cut.is_set() for running in batch)

        if not is_wanted():
            return []
        return sample(self.family, self.worker.model, [running.ask for running in batch], is_wanted, num_siblings)

    async def _take_time(self, output: StandInOutput, seconds_per_token: float, is_cut: asyncio.Event) -> StandInOutput:
        """The output, after as long as its tokens take; of one that is cut before, the tokens that it has by then."""
        if not seconds_per_token:
            return output
        count = 0
        cutting = asyncio.ensure_future(is_cut.wait())
        entering = asyncio.ensure_future(self._slots.acquire())
        try:
            await asyncio.wait([cutting, entering], return_when=asyncio.FIRST_COMPLETED)
            if entering.done():
                started = asyncio.get_running_loop().time()
                await asyncio.wait([cutting], timeout=seconds_per_token * len(output.token_ids))
                count = int((asyncio.get_running_loop().time() - started) / seconds_per_token)
        finally:
            was_cut = cutting.done()
            cutting.cancel()
            entering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await entering
                self._slots.release()
        if not was_cut or count >= len(output.token_ids):
            return output
        tokens, logprobs = output.token_ids[:count], output.logprobs[:count]
        return replace(output, token_ids=tokens, logprobs=logprobs, finish_reason="abort")

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests early; their answers have what was sampled by then."""
        for request_id in request_ids:
            if request_id in self._running:
                self._running[request_id].is_cut.set()

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Returns once nothing is being sampled; what comes meanwhile waits."""
        assert mode in ("abort", "wait"), mode
        self._is_open.clear()
        if mode == "abort":
            await self.abort(list(self._running))
        async with self._idle:
            await self._idle.wait_for(lambda: not self._running)

    async def resume_generation(self) -> None:
        """Goes on with what waits."""
        self._is_open.set()

    # -- weights -------------------------------------------------------------------------------------------------

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """[what the worker's method returns]."""
        call = functools.partial(getattr(self.worker, method), *args, **kwargs or {})
        return [await asyncio.get_running_loop().run_in_executor(self._thread, call)]

    async def update_weight_version(self, new_version: str) -> None:
        """Names the weights that sample from now on."""
        self._weight_version = new_version

    async def reset_prefix_cache(self) -> bool:
        """Nothing is kept between requests."""
        return True

    async def reset_mm_cache(self) -> None:
        """Nothing is kept between requests."""

    async def reset_encoder_cache(self) -> None:
        """Nothing is kept between requests."""


def next_batch(waiting: Sequence[_Running]) -> tuple[list[_Running], int]:
    """Requests that are computed together, and how many neighbours ask about one prompt.

    The one that has waited longest is among them; one of several completions is alone. Where prompts have fewer
    requests than others the last one stands there again.
    """
    oldest = waiting[0].ask.sampling
    if oldest.num_generations > 1:
        return [waiting[0]], 1
    wanted = (1, oldest.temperature, oldest.top_k, oldest.top_p)
    of_prompts: dict[Any, list[_Running]] = {}
    for running in waiting:
        one = running.ask.sampling
        if (one.num_generations, one.temperature, one.top_k, one.top_p) == wanted:
            of_prompts.setdefault(running.ask.prompt_key, []).append(running)
    families = list(of_prompts.values())
    first = len(families[0])
    families.sort(key=lambda family: abs(len(family) - first))  # those of like size, the oldest first
    batch: list[list[_Running]] = []
    most = 0
    for family in families:
        larger = max(most, len(family))
        if batch and larger * (len(batch) + 1) > MAX_TOGETHER:
            break
        batch.append(family)
        most = larger
    return [running for family in batch for running in family + family[-1:] * (most - len(family))], most
