"""Servers whose vLLM is a dict of tensors: all that moves weights is the real thing, HTTP's bytes included."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from longrl.engines.server_client import ServerClient
from longrl.engines.server_routes import RolloutRoutes
from longrl.engines.vllm_extension import WeightSync
from longrl.models.base import CausalFamily


class Worker(WeightSync):
    """One of `size` workers that hold all weights each, as the parts of a model that is split would come from all."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.device = torch.device("cpu")
        parallel = SimpleNamespace(data_parallel_index=0, data_parallel_size=1, world_size=size)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.held: dict[str, torch.Tensor] = {}

    def reload_weights(self, weights_iterator) -> None:
        self.held = {name: tensor.clone() for name, tensor in weights_iterator}

    def _longrl_take_over(self, weights) -> None:
        self.reload_weights(weights)


class StandInEngine:
    """What `HeldWeights` asks of vLLM's `AsyncLLM`."""

    def __init__(self, num_workers: int) -> None:
        self.workers = [Worker(rank, num_workers) for rank in range(num_workers)]
        self.vllm_config = self.workers[0].vllm_config
        self.model_config = SimpleNamespace(max_model_len=64)
        self.calls: list[str] = []
        self.adapters: Any = None

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        if method == "longrl_misplaced_adapters":
            return [[]]
        calls = [asyncio.to_thread(getattr(worker, method), *args) for worker in self.workers]
        return await asyncio.gather(*calls)

    async def add_lora(self, request) -> bool:
        from safetensors.torch import load_file

        self.adapters = load_file(Path(request.lora_path, "adapter_model.safetensors"))
        return True

    async def pause_generation(self, mode: str) -> None:
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def update_weight_version(self, version: str) -> None: ...

    async def reset_prefix_cache(self) -> bool:
        return True

    async def reset_mm_cache(self) -> None: ...

    async def reset_encoder_cache(self) -> None: ...


class StandInServer:
    """A server and a client of it.

    Args:
        family: of its model.
        folder: weights pass through `folder/weights`, and are kept in `folder/kept`.
        num_workers: of its vLLM.
        takes_adapters: as `--lora adapters`.
    """

    def __init__(self, family: CausalFamily, folder: Path, num_workers: int = 1, takes_adapters: bool = False) -> None:
        self.engine = StandInEngine(num_workers)
        self.weights_folder, kept = folder / "weights", folder / "kept"
        options = {"kept_folder": kept, "takes_adapters": takes_adapters, "num_workers": num_workers}
        routes = RolloutRoutes(self.engine, family, self.weights_folder, 0, **options)
        self.routes = routes.held
        app = FastAPI()
        app.include_router(routes.router())
        self.client = ServerClient("http://127.0.0.1:9", 60, 0)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client.__dict__["_http"] = httpx.AsyncClient(transport=transport)

    @property
    def held(self) -> list[dict[str, torch.Tensor]]:
        """Of every worker."""
        return [worker.held for worker in self.engine.workers]
