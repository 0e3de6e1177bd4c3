"""The routes that `python -m longrl serve` adds to vLLM's server: what it holds, new weights, completions.

Everything may be repeated: weights have a version, tensors are named by their content, completions by their seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Request, Response
from torch import Tensor

from longrl.engines import server_protocol as protocol
from longrl.engines.server_requests import RunningRequests, unless_hung_up
from longrl.engines.server_scores import ServerScores, check_score_message
from longrl.engines.vllm_options import completion_fields
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS, restore_placeholders
from longrl.engines.weight_orders import HeldWeights, refusal as _refusal, reply as _reply
from longrl.models.base import CausalFamily

LOADING_S = 120.0
"""Seconds that a request which takes any weights of its run waits for some that are just coming."""


class TensorStore:
    """Tensors by the hash of their content, least recently used first out.

    Args:
        max_bytes: what they may take; those of one request are kept until it is answered, whatever their size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def find(self, names: Iterable[str], brought: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors that are here or were brought, and the names of those that are missing; what was brought is kept."""
        tensors = {}
        missing = []
        for name in names:
            tensor = brought.get(name, self._tensors.get(name))
            if tensor is None:
                missing.append(name)
                continue
            tensors[name] = tensor
            self._tensors[name] = tensor
            self._tensors.move_to_end(name)
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        while size > self.max_bytes:
            _, oldest = self._tensors.popitem(last=False)
            size -= oldest.nbytes
        return tensors, missing


class RolloutRoutes:
    """Our routes on vLLM's `AsyncLLM`.

    Args:
        engine: vLLM's.
        family: of the model it serves.
        weights_folder: weights are read from below it, from nowhere else.
        store_bytes: host memory for tensors of requests.
        slots: completions that the engine decodes together.
        held: further options of `HeldWeights`.
    """

    def __init__(
        self,
        engine: Any,
        family: CausalFamily,
        weights_folder: Path,
        store_bytes: int,
        slots: int = 256,
        **held: Any,
    ) -> None:
        self.engine = engine
        self.slots = slots
        self.held = HeldWeights(engine, family, weights_folder, **held)
        self.feature_size = family.feature_size
        self.sizes = protocol.model_sizes(family)
        self.store = TensorStore(store_bytes)
        self.num_received = 0
        """Tensors that came with requests."""
        # Of requests that are being answered, so that those with the same features have one tensor.
        self._joined: WeakValueDictionary[tuple[str, ...], Tensor] = WeakValueDictionary()
        self._running = RunningRequests()
        self._scores = ServerScores(engine, self._render, self.sampling)

    @property
    def _version(self) -> str:
        return self.held.version

    def router(self) -> APIRouter:
        """To be included in vLLM's app."""
        router = APIRouter(prefix=protocol.PREFIX)
        router.include_router(self.held.router())
        router.add_api_route("/info", self.info, methods=["GET"])
        router.add_api_route("/generate", self.generate, methods=["POST"])
        router.add_api_route("/score", self.score, methods=["POST"])
        router.add_api_route("/cut", self.cut, methods=["POST"])
        return router

    async def info(self) -> Response:
        """The server's description, which weights it holds, and how much it is asked."""
        engine = {"vllm": self.release(), "max_model_len": self.engine.model_config.max_model_len}
        load = {"slots": self.slots, "num_running": self._running.num_completions, "num_received": self.num_received}
        return _reply({**engine, **self.held.info(), "model": self.sizes, **load})

    def release(self) -> str:
        """Of vLLM."""
        import vllm

        return str(vllm.__version__)

    # -- generation ----------------------------------------------------------------------------------------------

    async def generate(self, raw_request: Request) -> Response:
        """Completions of some prompts by the weights of a version; ends when the trainer hangs up."""
        body = await raw_request.body()
        return await unless_hung_up(self._generate(body), raw_request)

    async def score(self, raw_request: Request) -> Response:
        """Log-probabilities of given tokens (`server_scores`); ends when the trainer hangs up."""
        body = await raw_request.body()
        return await unless_hung_up(self._score(body), raw_request)

    async def cut(self, raw_request: Request) -> Response:
        """Ends what is being sampled for `sender`; those completions are answered as far as they have come."""
        try:
            ids = self._running.ids_of(_read_sender(await raw_request.body()))
        except ValueError as error:
            return _refusal(400, str(error))
        await self.engine.abort(ids)
        return _reply({"cut": len(ids)})

    async def _read(
        self, body: bytes, check: Callable[[Any], None]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]] | Response:
        """A message and its requests, once weights and tensors are here; or what is to be answered instead."""
        try:
            message, brought = await asyncio.to_thread(protocol.unpack_message, body)
            check(message)
        except ValueError as error:
            return _refusal(400, str(error))
        asked = message["version"]
        if not await self._holds(asked):
            return self._refuse_version(asked)
        self.num_received += len(brought)
        tensors, missing = self.store.find(message["tensors"], brought)
        if missing:
            return _reply({"missing": missing}, protocol.MISSING)
        try:
            return message, protocol.load_requests(message["requests"], tensors, self.feature_size, self._joined)
        except ValueError as error:
            return _refusal(400, str(error))

    async def _score(self, body: bytes) -> Response:
        read = await self._read(body, check_score_message)
        if isinstance(read, Response):
            return read
        message, requests = read
        try:
            asked = (message["counts"], message["groups"], message["top_k"])
            scores = await self._scores.score(requests, *asked)
        except ValueError as error:
            return _refusal(400, str(error))
        return _reply({"version": self._version, "scores": scores})

    async def _generate(self, body: bytes) -> Response:
        # 1. Weights and tensors must be here.
        read = await self._read(body, protocol.check_message)
        if isinstance(read, Response):
            return read
        message, requests = read
        asked = message["version"]
        # 2. All prompts at once: vLLM batches them.
        try:
            names = message.get("names") or [""] * len(requests)
            asks = list(zip(requests, message["params"], names, strict=True))
        except ValueError as error:
            return _refusal(400, str(error))
        held = self._version
        sender = message.get("sender", "")
        outputs = await asyncio.gather(*[self._complete(*ask, sender) for ask in asks])
        # 3. Weights may have changed in between.
        versions = {span.version for group in outputs for output in group for span in output.weight_versions or ()}
        # vLLM does not tell it of what was cut. Nothing is sampled while weights change, so the tokens of what waited
        # meanwhile are by those that are here now.
        found = versions or {held if self._version == protocol.NO_VERSION else self._version}
        if len(found) > 1 or not all(protocol.is_asked(one, asked) for one in found):
            return self._refuse_version(asked)
        completions = [[_completion(output) for output in group] for group in outputs]
        return _reply({"version": found.pop(), "completions": completions})

    async def _holds(self, asked: str) -> bool:
        """Whether these weights are here; where any of a run will do, those that are just coming are waited for."""
        if asked.endswith(f":{protocol.ANY_STEP}"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOADING_S):
                    await self.held.settled()
        return protocol.is_asked(self._version, asked)

    async def _complete(self, request: dict[str, Any], params: dict[str, Any], name: str, sender: str) -> list[Any]:
        if SAMPLED_PLACEHOLDERS in request:
            request = await self._render(request)
        request_id = f"{name}-{uuid.uuid4().hex}"
        sampling = self.sampling(params)
        adapters = self.held.lora_request
        with self._running.noted(request_id, sender, params.get("n", 1)):
            answers = self.engine.generate(request, sampling, request_id, lora_request=adapters)
            outputs = [output async for output in answers]
        return sorted(outputs[-1].outputs, key=lambda output: output.index)

    def sampling(self, params: dict[str, Any]) -> Any:
        """Arguments as the engine takes them; the answer comes in one piece."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)

    async def _render(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request as vLLM renders it, with the placeholder tokens that the policy sampled."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        plain = {name: value for name, value in request.items() if name != SAMPLED_PLACEHOLDERS}
        parsed = parse_model_prompt(self.engine.model_config, plain)
        (rendered,) = await self.engine.renderer.render_cmpl_async([parsed])
        return restore_placeholders(rendered, request[SAMPLED_PLACEHOLDERS])

    def _refuse_version(self, requested: str) -> Response:
        return _refusal(protocol.OTHER_VERSION, f"the server holds weights {self._version!r}, asked for {requested!r}")


def _completion(output: Any) -> dict[str, Any]:
    """A completion as it is sent; one that vLLM was told to end was cut."""
    fields = completion_fields(output)
    return fields | {"finish_reason": "cut"} if output.finish_reason == "abort" else fields


def _read_sender(body: bytes) -> str:
    """Whose requests are to be cut."""
    try:
        order = json.loads(body)
    except (ValueError, RecursionError):
        order = None
    if not isinstance(order, dict) or not isinstance(order.get("sender"), str):
        raise ValueError('a cut must be {"sender": "..."}')
    return str(order["sender"])
