"""LoRA's adapters as vLLM computes with them: beside weights that stay as they are, so that no sum is rounded.

A trainer sends the weights that adapters belong to once, and the matrices A and B after every step, in the body of a
request: they are small. The server leaves them in a folder as the peft library writes it, which vLLM reads. In an
engine of bfloat16 each number of A and B is rounded to it, a change of up to 2^-9 of itself; merged, their product
would be rounded to 2^-9 of the far larger weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longrl.models.base import CausalFamily
from longrl.models.expert_routing import num_experts
from longrl.models.lora import OPTION, adapter_name, add_adapters, is_adapter
from longrl.strategies.whole_tensors import BUCKET_BYTES, whole_tensors

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
NUMBER = 1
"""vLLM's number of the only adapter."""


def adapter_options(family: CausalFamily) -> dict[str, Any]:
    """Options of a vLLM that takes a family's adapters.

    Layers that have none stay plain, the LM head among them, whose logits vLLM could else not compute in float32.

    Raises:
        ValueError: vLLM cannot take them.
    """
    problem = adapter_problem(family)
    if problem:
        raise ValueError(f"lora: adapters does not work: {problem}; use lora: merged")
    assert family.lora is not None
    names = sorted({layer.rpartition(".")[2] for layer in adapted_layers(family)})
    rank = min(rank for rank in RANKS if rank >= family.lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": names}


def adapter_problem(family: CausalFamily) -> str | None:
    """Why vLLM cannot take a family's adapters on their own, None if it can.

    What vLLM makes of a model's layers is seen once it runs: a server compares the two before it takes adapters.
    """
    if family.lora is None:
        return f"the run trains no adapters ({OPTION} is null)"
    if family.lora.rank > RANKS[-1]:
        return f"vLLM takes adapters of rank {RANKS[-1]} at most, and {OPTION}.rank is {family.lora.rank}"
    if num_experts(family):
        return "it has not been tried beside a mixture of experts"
    return None


def adapted_layers(family: CausalFamily) -> list[str]:
    """The engine's names of the layers that have adapters."""
    with torch.device("meta"):
        model = add_adapters(family, family.build(weights=None))
    return [_engine_layer(family, name) for name in model.state_dict() if name.endswith(adapter_name("", "A"))]


def _engine_layer(family: CausalFamily, name: str) -> str:
    """The engine's name of the layer that a matrix belongs to."""
    layer = name.partition(".lora_")[0]
    engine_name = family.engine_weight(f"{layer}.weight")
    assert engine_name is not None, f"{layer} has adapters, and the engine does not compute with it"
    return engine_name.removesuffix(".weight")


def adapter_tensors(
    family: CausalFamily, model: nn.Module, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Matrices A and B by the names that vLLM reads them by, whole; every rank must go through.

    Args:
        family: says what the engine calls its layers.
        model: perhaps in shards.
        bucket_bytes: of whole tensors that are gathered in one message.
    """
    state = {name: value for name, value in model.state_dict().items() if is_adapter(name)}
    for name, matrix in zip(state, whole_tensors(state.values(), bucket_bytes), strict=True):
        which = name.partition(".lora_")[2][0]
        yield f"base_model.model.{_engine_layer(family, name)}.lora_{which}.weight", matrix.detach()


def adapter_shapes(family: CausalFamily) -> dict[str, tuple[int, ...]]:
    """{name: shape} of `adapter_tensors`, without a byte of them."""
    with torch.device("meta"):
        model = add_adapters(family, family.build(weights=None))
    return {name: tuple(matrix.shape) for name, matrix in adapter_tensors(family, model)}


def check_adapters(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if tensors are not a family's adapters, all of them and nothing else."""
    problems = [f"{name[:200]!r} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name[:200]!r} is none of them" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(tensors.keys() & expected.keys()):
        tensor = tensors[name]
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            problems.append(f"{name!r} is {list(tensor.shape)} of {tensor.dtype} instead of {list(expected[name])}")
    if problems:
        raise ValueError(
            f"what came is not the adapters of the server's model: {'; '.join(problems[:3])}; start server and trainer "
            "with the same config"
        )


def write_adapters(family: CausalFamily, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes adapters as vLLM reads them.

    Args:
        family: whose they are.
        tensors: see `adapter_tensors`.
        folder: to write; made if missing.
    """
    from safetensors.torch import save_file

    settings = family.lora
    assert settings is not None
    folder.mkdir(parents=True, exist_ok=True)
    separate = {name: tensor.clone() for name, tensor in tensors.items()}  # those that are zero come as one
    save_file(separate, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    names = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": names,
        "bias": "none",
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
