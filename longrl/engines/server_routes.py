"""The routes that `python -m longrl serve` adds to vLLM's server: what it holds, new weights, completions.

Everything may be repeated: weights have a version, tensors are named by their content, completions by their seed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from torch import Tensor

from longrl.engines.server_protocol import (
    MISSING,
    NO_VERSION,
    OTHER_VERSION,
    PREFIX,
    model_sizes,
    pointers,
    resolved,
    unpacked,
)
from longrl.engines.vllm_options import token_logprobs
from longrl.models.base import CausalFamily

logger = logging.getLogger(__name__)


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
        found = {name: brought.get(name, self._tensors.get(name)) for name in names}
        for name, tensor in found.items():
            if tensor is not None:
                self._tensors[name] = tensor
                self._tensors.move_to_end(name)
        self._evict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}, [
            name for name, tensor in found.items() if tensor is None
        ]

    def _evict(self) -> None:
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        while size > self.max_bytes:
            _, oldest = self._tensors.popitem(last=False)
            size -= oldest.nbytes


class RolloutRoutes:
    """Our routes on vLLM's `AsyncLLM`.

    Args:
        engine: vLLM's.
        family: of the model it serves.
        weights_folder: weights are read from below it, from nowhere else.
        store_bytes: host memory for tensors of requests.
    """

    def __init__(self, engine: Any, family: CausalFamily, weights_folder: Path, store_bytes: int) -> None:
        self.engine = engine
        self.sizes = model_sizes(family)
        self.weights_folder = weights_folder.resolve()
        self.store = TensorStore(store_bytes)
        self.num_received = 0
        """Tensors that came with requests."""
        self._version = NO_VERSION
        self._updating = asyncio.Lock()

    def router(self) -> APIRouter:
        """To be included in vLLM's app."""
        made = APIRouter(prefix=PREFIX)
        made.add_api_route("/info", self.info, methods=["GET"])
        made.add_api_route("/weights", self.weights, methods=["POST"])
        made.add_api_route("/generate", self.generate, methods=["POST"])
        return made

    async def info(self) -> Response:
        """What this server is and which weights it holds."""
        import vllm

        return _reply(
            {
                "vllm": vllm.__version__,
                "version": self._version,
                "model": self.sizes,
                "max_model_len": self.engine.model_config.max_model_len,
                "weights_folder": str(self.weights_folder),
                "num_received": self.num_received,
            }
        )

    # -- weights -------------------------------------------------------------------------------------------------

    async def weights(self, raw_request: Request) -> Response:
        """Takes over the weights of `folder` as `version`, once what is being generated is done."""
        asked = await raw_request.json()
        folder = Path(asked["folder"]).resolve()
        if not folder.is_relative_to(self.weights_folder):
            return _refusal(
                403, f"{folder} is not below {self.weights_folder}; give server and engine the same --weights_folder"
            )
        if not folder.is_dir():
            return _refusal(
                404, f"the server finds no {folder}; name a --weights_folder that trainer and server both see"
            )
        async with self._updating:
            if self._version != asked["version"]:
                await self._load(str(folder), asked["version"])
        return _reply({"version": self._version})

    async def _load(self, folder: str, version: str) -> None:
        """Between pause and resume no token is sampled, and no cache keeps what older weights computed."""
        await self.engine.pause_generation(mode="wait")
        try:
            self._version = NO_VERSION
            await self.engine.update_weight_version(NO_VERSION)
            await self.engine.collective_rpc("longrl_load_weights", args=(folder,))
            if not await self.engine.reset_prefix_cache():
                raise RuntimeError("vLLM kept keys and values of older weights; start the server again")
            await self.engine.reset_mm_cache()
            await self.engine.reset_encoder_cache()
            await self.engine.update_weight_version(version)
            self._version = version
        finally:
            await self.engine.resume_generation()
        logger.info("holds weights %s", version)

    # -- generation ----------------------------------------------------------------------------------------------

    async def generate(self, raw_request: Request) -> Response:
        """Completions of some prompts by the weights of a version; ends when the trainer hangs up."""
        from vllm.entrypoints.serve.utils.api_utils import with_cancellation

        body = await raw_request.body()
        return await with_cancellation(self._generate)(body, raw_request)

    async def _generate(self, body: bytes, raw_request: Request) -> Response:
        message, brought = await asyncio.to_thread(unpacked, body)
        if message["version"] != self._version:
            return self._other_version(message["version"])
        self.num_received += len(brought)
        tensors, missing = self.store.find(pointers(message["prompts"]), brought)
        if missing:
            return _reply({"missing": missing}, MISSING)
        answers = [self._completions(prompt, params, tensors) for prompt, params in _pairs(message)]
        outputs = await asyncio.gather(*answers)
        versions = {span.version for own in outputs for output in own for span in output.weight_versions or ()}
        if versions - {message["version"]}:
            return self._other_version(message["version"])
        completions = [[_as_json(output) for output in own] for own in outputs]
        return _reply({"version": message["version"], "completions": completions})

    async def _completions(self, prompt: Any, params: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        wanted = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        request = resolved(prompt, tensors)
        outputs = [output async for output in self.engine.generate(request, wanted, uuid.uuid4().hex)]
        return sorted(outputs[-1].outputs, key=lambda output: output.index)

    def _other_version(self, asked: str) -> Response:
        return _refusal(OTHER_VERSION, f"the server holds weights {self._version!r}, asked for {asked!r}")


def _pairs(message: dict[str, Any]) -> Iterable[tuple[Any, dict[str, Any]]]:
    return zip(message["prompts"], message["params"], strict=True)


def _as_json(output: Any) -> dict[str, Any]:
    return {
        "token_ids": list(output.token_ids),
        "logprobs": token_logprobs(output),
        "finish_reason": output.finish_reason,
    }


def _reply(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


def _refusal(status: int, message: str) -> Response:
    return _reply({"error": {"message": message, "code": status}}, status)
