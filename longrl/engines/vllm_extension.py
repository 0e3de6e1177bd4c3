"""Methods that longrl adds to the workers of a vLLM server: weights from files, or as rank 0 of the trainer sends them.

vLLM itself names the class in `worker_extension_cls` and gives its methods to every worker; nothing is patched.
Files are safetensors: nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longrl.engines.weight_buckets import DTYPES, Listed, cut_buckets, empty_bucket, weights_in
from longrl.engines.weight_group import GroupAddress, WeightGroup, reach_store
from longrl.features.provenance import tensor_bytes

INDEX = "index.json"
"""Written last: a folder that has it is complete."""


class WeightSync:
    """Methods that `collective_rpc` finds on every worker of the server."""

    model_runner: Any
    reload_weights: Any
    device: Any
    rank: int
    vllm_config: Any
    longrl_group: WeightGroup | None = None
    """In which weights were received, and the next ones may be."""

    def longrl_head_dtypes(self) -> list[str]:
        """The precisions in which the worker computes logits."""
        return head_dtypes(self.model_runner.model)

    def longrl_load_weights(self, folder: str) -> None:
        """Takes over all weights of a folder that `write_shards` wrote."""
        self._longrl_take_over(read_shards(Path(folder)))

    def longrl_receive_weights(self, order: dict[str, Any]) -> None:
        """Takes over all weights that rank 0 of the trainer sends.

        Args:
            order: see `weight_broadcast.BroadcastSender`.

        Raises:
            ConnectionError: the trainer or another server gave up, or died.
            TimeoutError: one of them hangs.
        """
        address = GroupAddress.from_json(order["group"])
        listed = [Listed(name, tuple(shape), DTYPES[dtype]) for name, shape, dtype in order["weights"]]
        group = self._longrl_join(address, int(order["first_rank"]))
        try:
            self._longrl_take_over(receive(group, cut_buckets(listed, order["bucket_bytes"])))
        except BaseException as error:
            group.give_up(f"a server's worker failed: {error!r}")
            group.close()
            self.longrl_group = None
            raise

    def _longrl_join(self, address: GroupAddress, first_rank: int) -> WeightGroup:
        """The group of an address, which is joined unless it is known."""
        if self.longrl_group is not None:
            if self.longrl_group.address == address:
                return self.longrl_group
            self.longrl_group.close()
            self.longrl_group = None
        parallel = self.vllm_config.parallel_config
        number = parallel.data_parallel_index * parallel.world_size + self.rank
        device = torch.device(self.device)
        group = WeightGroup(address, first_rank + number, device, reach_store(address))
        try:
            group.open()
        except BaseException as error:
            group.give_up(f"a server's worker could not join: {error!r}")
            raise
        self.longrl_group = group
        return group

    def _longrl_take_over(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """All weights of the model, after which it can be given weights again, whatever happened."""
        try:
            self.reload_weights(weights_iterator=weights)
        except BaseException:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            # else the next ones would be counted on top of these, and a layer be done before it has its own
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_runner.model_config)
            raise

    def longrl_weight_digests(self) -> dict[str, str]:
        """A hash of each parameter's content, by vLLM's name of it."""
        model = self.model_runner.get_model()
        digests = {name: digest(value) for name, value in model.named_parameters(remove_duplicate=False)}
        for name, layer in model.named_modules():
            packed = getattr(layer, "cpu_linear", None)
            if packed is not None and not layer.weight.numel():  # on a CPU vLLM packs weights out of sight
                unit = torch.eye(layer.input_size_per_partition, dtype=layer.weight.dtype)
                digests[f"{name}.weight"] = digest(packed(unit, layer.weight, None))
        return digests

    def longrl_misplaced_adapters(self, number: int) -> list[str]:
        """Adapted layers of an adapter that no layer of the model takes, which vLLM leaves out without a word.

        Args:
            number: `lora_int_id` of the adapter.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(number)
        return sorted(set(adapter.loras) - set(manager.modules))


def receive(group: WeightGroup, buckets: Iterable[list[Listed]]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as rank 0 sends them. Each bucket has memory of its own: vLLM keeps what a layer waits with."""
    for bucket in buckets:
        buffer = empty_bucket(bucket, group.device)
        group.broadcast(buffer)
        yield from weights_in(buffer, bucket)


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bytes, its precision and its shape."""
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return content.hexdigest()


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
