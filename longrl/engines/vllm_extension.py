"""Methods that longrl adds to the workers of a vLLM server: weights from files, in shards of bounded size.

vLLM itself names the class in `worker_extension_cls` and gives its methods to every worker; nothing is patched.
Files are safetensors: nothing that is read can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

INDEX = "index.json"
"""Written last: a folder that has it is complete."""


class WeightSync:
    """Methods that `collective_rpc` finds on every worker of the server."""

    model_runner: Any

    def longrl_head_dtypes(self) -> list[str]:
        """The precisions in which the worker computes logits."""
        return head_dtypes(self.model_runner.model)

    def longrl_load_weights(self, folder: str) -> None:
        """Takes over all weights of a folder that `write_shards` wrote."""
        self.model_runner.reload_weights(weights_iterator=read_shards(Path(folder)))


def head_dtypes(model: nn.Module) -> list[str]:
    """The precisions in which a model of vLLM computes logits."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [str(part.head_dtype) for part in model.modules() if isinstance(part, LogitsProcessor)]


def write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path | None, max_bytes: int) -> None:
    """Writes weights in files of at most about `max_bytes`; the host holds no more than that at once.

    Args:
        weights: names and whole tensors; gathering them may need every rank.
        folder: where to write; made if missing. None goes through the weights only, as the other ranks must.
        max_bytes: of a file; a larger tensor has a file of its own.
    """
    from safetensors.torch import save_file

    if folder is None:
        for _ in weights:
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    for shard in _split_weights(weights, max_bytes):
        files.append(f"{len(files):05d}.safetensors")
        save_file(shard, folder / files[-1])
        shard.clear()  # before the next one is filled: the host holds one
    (folder / INDEX).write_text(json.dumps(files))


def _split_weights(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The contents of one file after the other, on the host."""
    shard: dict[str, Tensor] = {}
    for name, value in weights:
        if shard and sum(tensor.nbytes for tensor in shard.values()) + value.nbytes > max_bytes:
            yield shard
            shard = {}
        tensor = value.detach().to("cpu", copy=False).contiguous()
        # safetensors refuses two names of one memory, which tied embeddings have
        storages = {other.untyped_storage().data_ptr() for other in shard.values()}
        shard[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        del tensor, value  # they would outlive their shard
    yield shard


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a folder, one tensor in memory at a time.

    Raises:
        FileNotFoundError: the folder is not there, or not complete.
    """
    from safetensors import safe_open

    for file in json.loads((folder / INDEX).read_text()):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)
