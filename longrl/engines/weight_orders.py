"""What weights a rollout server holds, and how it does what a trainer orders to be done with others.

`POST /weights` brings one of these, each with a `version`:

    folder                               load all weights of a folder (`weight_senders.FileSender`)
    group, first_rank, weights, ...      receive all from the trainer's rank 0 (`weight_broadcast`)
    changes, base                        put changes into the weights that are kept here (`weight_changed_sender`)
    kept                                 load those

`POST /adapters` brings LoRA's adapters for weights that are here already (`weight_adapters`). `GET /weights` gives a
hash of each parameter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from longrl.engines import server_protocol as protocol
from longrl.engines.weight_adapters import NUMBER, adapter_shapes, check_adapters, write_adapters
from longrl.engines.weight_checks import check_listed, check_weights, expected_weights
from longrl.engines.weight_files import default_folder, new_folder
from longrl.engines.weight_group import GroupAddress
from longrl.engines.weight_kept import KeptWeights
from longrl.models.base import CausalFamily

logger = logging.getLogger(__name__)

Load = Callable[[], Awaitable[None]]


class OrderRefused(Exception):
    """An order that a server does not carry out.

    Args:
        status: of HTTP.
        message: why, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HeldWeights:
    """The weights of vLLM's `AsyncLLM`.

    Args:
        engine: vLLM's.
        family: of the model it serves.
        weights_folder: weights are read from below it, from nowhere else.
        kept_folder: for weights that are kept between changes, on this machine; None is shared memory.
        takes_adapters: the engine was started for adapters on their own.
        num_workers: of the engine, each of which receives what a trainer sends.
    """

    def __init__(
        self,
        engine: Any,
        family: CausalFamily,
        weights_folder: Path,
        *,
        kept_folder: Path | None = None,
        takes_adapters: bool = False,
        num_workers: int = 1,
    ) -> None:
        self.engine = engine
        self.family = family
        self.expected = expected_weights(family)
        self.weights_folder = weights_folder.resolve()
        self.kept = KeptWeights(kept_folder or default_folder(), self.expected)
        self.num_workers = num_workers
        self.version = protocol.NO_VERSION
        """Of the weights that sample, adapters included."""
        self.base = protocol.NO_VERSION
        """Of the weights without adapters."""
        self.lora_request: Any = None
        """The adapters, for vLLM."""
        self.adapters = adapter_shapes(family) if takes_adapters else {}
        self._adapter_folder: Path | None = None
        self._group = ""
        self._updating = asyncio.Lock()

    def router(self) -> APIRouter:
        """To be included in vLLM's app."""
        router = APIRouter()
        router.add_api_route("/weights", self.take, methods=["POST"])
        router.add_api_route("/weights", self.digests, methods=["GET"])
        router.add_api_route("/adapters", self.take_adapters, methods=["POST"])
        return router

    def info(self) -> dict[str, Any]:
        """What trainers ask before they send."""
        return {
            "version": self.version,
            "base": self.base,
            "kept": self.kept.version,
            "weight_group": self._group,
            "num_workers": self.num_workers,
            "takes_adapters": bool(self.adapters),
            "weights_folder": str(self.weights_folder),
        }

    def close(self) -> None:
        """Deletes what is kept."""
        self.kept.close()
        if self._adapter_folder is not None:
            shutil.rmtree(self._adapter_folder, ignore_errors=True)

    async def settled(self) -> None:
        """Returns when no others are being taken over."""
        async with self._updating:
            pass

    async def digests(self) -> Response:
        """{parameter: hash of its content} of every worker, by vLLM's names."""
        digests = await self.engine.collective_rpc("longrl_weight_digests")
        return reply({"version": self.version, "workers": digests})

    # -- orders --------------------------------------------------------------------------------------------------

    async def take(self, raw_request: Request) -> Response:
        """Does what an order says with weights."""
        body = await raw_request.body()
        if self.version == protocol.OWN_WEIGHTS:
            return refusal(403, "the server was started with --weights family and takes no others; start one without")
        try:
            order = read_order(body)
            if "changes" in order:
                return await self._keep(order)
            load = await self._loading(order)
        except OrderRefused as refused:
            return refusal(refused.status, str(refused))
        except ValueError as error:
            return refusal(400, str(error))
        return await self._take_over(order["version"], load, is_base=True)

    async def _loading(self, order: Mapping[str, Any]) -> Load:
        """Has the workers take over what an order means, which is checked before."""
        version = order["version"]
        if "folder" in order:
            folder = self._seen(order["folder"])
            await asyncio.to_thread(check_weights, folder, self.expected)
            return lambda: self._call("longrl_load_weights", str(folder))
        if "group" in order:
            address = GroupAddress.from_json(order["group"])
            check_listed(order["weights"], self.expected)
            first, size = order.get("first_rank"), order.get("bucket_bytes")
            if type(first) is not int or type(size) is not int or not 0 < first < address.size or size < 1:
                raise ValueError(f"first_rank and bucket_bytes of a broadcast are {first!r} and {size!r}")

            async def receive() -> None:
                self._group = ""
                await self._call("longrl_receive_weights", dict(order))
                self._group = address.name

            return receive
        if order.get("kept") is not True:
            raise ValueError("a weight push must have folder, group, changes or kept")
        if self.kept.version != version:
            raise OrderRefused(
                protocol.OTHER_VERSION, f"the server keeps weights {self.kept.version!r}, asked for {version!r}"
            )
        return lambda: self._call("longrl_load_weights", str(self.kept.folder))

    async def _keep(self, order: Mapping[str, Any]) -> Response:
        """Puts changes into the weights that are kept; what is being sampled goes on."""
        folder = self._seen(order["changes"])
        version, base = order["version"], order.get("base")
        if not isinstance(base, str):
            raise ValueError("changes must say their base")
        async with self._updating:
            if self.kept.version != version:
                await asyncio.to_thread(self.kept.take, folder, base, version)
        return reply({"version": version})

    def _seen(self, name: object) -> Path:
        """A folder below that of weights."""
        try:
            folder = Path(str(name)).resolve()
            is_folder = folder.is_dir()
        except OSError as error:
            raise ValueError(str(error)) from error
        if not folder.is_relative_to(self.weights_folder):
            raise OrderRefused(
                403, f"{folder} is not below {self.weights_folder}; give server and engine the same --weights_folder"
            )
        if not is_folder:
            raise OrderRefused(
                404, f"the server finds no {folder}; name a --weights_folder that trainer and server both see"
            )
        return folder

    async def _call(self, method: str, argument: Any) -> None:
        await self.engine.collective_rpc(method, args=(argument,))

    # -- adapters ------------------------------------------------------------------------------------------------

    async def take_adapters(self, raw_request: Request) -> Response:
        """Takes over LoRA's adapters."""
        body = await raw_request.body()
        try:
            order, tensors = await asyncio.to_thread(protocol.unpack_message, body)
            version, base, names = (order.get(name) for name in ("version", "base", "adapters"))
            if not isinstance(version, str) or not isinstance(names, dict):
                raise ValueError('adapters must come with {"version": "...", "base": "...", "adapters": {...}}')
            if not self.adapters:
                raise ValueError("the server takes no adapters on their own; start it with --lora adapters")
            if base != self.base:
                raise OrderRefused(
                    protocol.OTHER_VERSION, f"the server holds weights {self.base!r}, and was sent adapters of {base!r}"
                )
            adapters = {name: tensors[content] for name, content in names.items() if content in tensors}
            check_adapters(adapters, self.adapters)
            folder = await asyncio.to_thread(new_folder, self.kept.parent)
            await asyncio.to_thread(write_adapters, self.family, adapters, folder)
        except OrderRefused as refused:
            return refusal(refused.status, str(refused))
        except (ValueError, OSError) as error:
            return refusal(400, str(error))
        return await self._take_over(version, lambda: self._load_adapters(folder), is_base=False)

    async def _load_adapters(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("longrl", NUMBER, str(folder))
        loading = LoRARequest("longrl", NUMBER, str(folder), load_inplace=True)
        if not await self.engine.add_lora(loading):
            raise RuntimeError("vLLM did not load the adapters")
        misplaced = (await self.engine.collective_rpc("longrl_misplaced_adapters", args=(NUMBER,)))[0]
        if misplaced:
            raise RuntimeError(
                f"vLLM has no layer for the adapters of {', '.join(misplaced[:3])}; start server and run with lora: "
                "merged"
            )
        self.lora_request = request
        if self._adapter_folder is not None:
            shutil.rmtree(self._adapter_folder, ignore_errors=True)
        self._adapter_folder = folder

    # -- taking over ---------------------------------------------------------------------------------------------

    async def _take_over(self, version: str, load: Load, *, is_base: bool) -> Response:
        """Has the engine compute with other weights, once what is being generated is done."""
        async with self._updating:
            if self.version != version:
                # Between pause and resume no token is sampled, and no cache keeps what older weights computed.
                await self.engine.pause_generation(mode="wait")
                try:
                    self.version = protocol.NO_VERSION
                    await self.engine.update_weight_version(protocol.NO_VERSION)
                    if is_base:
                        self.base = protocol.NO_VERSION
                        self.lora_request = None  # vLLM forgets adapters when weights come
                    await load()
                    if not await self.engine.reset_prefix_cache():
                        raise RuntimeError("vLLM kept keys and values of older weights; start the server again")
                    await self.engine.reset_mm_cache()
                    await self.engine.reset_encoder_cache()
                    await self.engine.update_weight_version(version)
                    self.version = version
                    self.base = version if is_base else self.base
                finally:
                    await self.engine.resume_generation()
                logger.info("holds weights %s", self.version)
        return reply({"version": self.version})


def read_order(body: bytes) -> dict[str, Any]:
    """What is to be done with weights.

    Raises:
        ValueError: it is no order.
    """
    try:
        order = json.loads(body)
    except (ValueError, RecursionError):
        order = None
    kinds = ("folder", "group", "changes", "kept")
    if not isinstance(order, dict) or not isinstance(order.get("version"), str) or not any(k in order for k in kinds):
        raise ValueError('a weight push must be {"folder": "...", "version": "..."}, or another order of the trainer')
    for name in ("folder", "changes"):
        if name in order and not isinstance(order[name], str):
            raise ValueError(f'a weight push must be {{"{name}": "...", "version": "..."}}')
    return order


def reply(content: dict[str, Any], status: int = 200) -> Response:
    """An answer as JSON."""
    return Response(json.dumps(content), status, media_type="application/json")


def refusal(status: int, message: str) -> Response:
    """An answer that says why there is no other."""
    return reply({"error": {"message": message, "code": status}}, status)
