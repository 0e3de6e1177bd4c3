"""The routes that `python -m longrl serve` adds to vLLM's server: what it holds, new weights, completions.

Everything may be repeated: weights have a version, tensors are named by their content, completions by their seed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Request, Response
from torch import Tensor

from longrl.engines import server_protocol as protocol
from longrl.engines.vllm_options import completion_fields
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS, restore_placeholders
from longrl.engines.weight_orders import HeldWeights, refusal as _refusal, reply as _reply
from longrl.models.base import CausalFamily


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
        held: further options of `HeldWeights`.
    """

    def __init__(self, engine: Any, family: CausalFamily, weights_folder: Path, store_bytes: int, **held: Any) -> None:
        self.engine = engine
        self.held = HeldWeights(engine, family, weights_folder, **held)
        self.feature_size = family.feature_size
        self.sizes = protocol.model_sizes(family)
        self.store = TensorStore(store_bytes)
        self.num_received = 0
        """Tensors that came with requests."""
        # Of requests that are being answered, so that those with the same features have one tensor.
        self._joined: WeakValueDictionary[tuple[str, ...], Tensor] = WeakValueDictionary()

    @property
    def _version(self) -> str:
        return self.held.version

    def router(self) -> APIRouter:
        """To be included in vLLM's app."""
        router = APIRouter(prefix=protocol.PREFIX)
        router.include_router(self.held.router())
        router.add_api_route("/info", self.info, methods=["GET"])
        router.add_api_route("/generate", self.generate, methods=["POST"])
        return router

    async def info(self) -> Response:
        """The server's description, and which weights it holds."""
        import vllm

        engine = {"vllm": vllm.__version__, "max_model_len": self.engine.model_config.max_model_len}
        return _reply({**engine, **self.held.info(), "model": self.sizes, "num_received": self.num_received})

    # -- generation ----------------------------------------------------------------------------------------------

    async def generate(self, raw_request: Request) -> Response:
        """Completions of some prompts by the weights of a version; ends when the trainer hangs up."""
        from vllm.entrypoints.serve.utils.api_utils import with_cancellation

        body = await raw_request.body()
        return await with_cancellation(self._generate)(body, raw_request)

    async def _generate(self, body: bytes, raw_request: Request) -> Response:
        # 1. Weights and tensors must be here.
        try:
            message, brought = await asyncio.to_thread(protocol.unpack_message, body)
            protocol.check_message(message)
        except ValueError as error:
            return _refusal(400, str(error))
        version = message["version"]
        if version != self._version:
            return self._refuse_version(version)
        self.num_received += len(brought)
        tensors, missing = self.store.find(message["tensors"], brought)
        if missing:
            return _reply({"missing": missing}, protocol.MISSING)
        # 2. All prompts at once: vLLM batches them.
        try:
            requests = protocol.load_requests(message["requests"], tensors, self.feature_size, self._joined)
            pairs = list(zip(requests, message["params"], strict=True))
        except ValueError as error:
            return _refusal(400, str(error))
        outputs = await asyncio.gather(*[self._complete(request, params) for request, params in pairs])
        # 3. Weights may have changed in between.
        versions = {span.version for group in outputs for output in group for span in output.weight_versions or ()}
        if versions - {version}:
            return self._refuse_version(version)
        completions = [[completion_fields(output) for output in group] for group in outputs]
        return _reply({"version": version, "completions": completions})

    async def _complete(self, request: dict[str, Any], params: dict[str, Any]) -> list[Any]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if SAMPLED_PLACEHOLDERS in request:
            request = await self._render(request)
        sampling = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        adapters = self.held.lora_request
        outputs = [
            output async for output in self.engine.generate(request, sampling, uuid.uuid4().hex, lora_request=adapters)
        ]
        return sorted(outputs[-1].outputs, key=lambda output: output.index)

    async def _render(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request as vLLM renders it, with the placeholder tokens that the policy sampled."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        plain = {name: value for name, value in request.items() if name != SAMPLED_PLACEHOLDERS}
        parsed = parse_model_prompt(self.engine.model_config, plain)
        (rendered,) = await self.engine.renderer.render_cmpl_async([parsed])
        return restore_placeholders(rendered, request[SAMPLED_PLACEHOLDERS])

    def _refuse_version(self, requested: str) -> Response:
        return _refusal(protocol.OTHER_VERSION, f"the server holds weights {self._version!r}, asked for {requested!r}")
