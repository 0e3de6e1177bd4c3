"""`MRSPStrategy`: multi-modal reinforcement sequence parallelism over FSDP2 (MR-SP, arXiv:2507.07966).

The devices of a run form a grid. The `sequence_parallel_size` ranks of a sequence-parallel group have the same prompts:
each decodes and encodes its shard of a video's frames (stage 1), and holds its rows of every packed sequence (stage 2).
Groups have different prompts. Weights are sharded over all ranks, or over the ranks of one replica.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import override

from longrl.io.atomic import sync_folder
from longrl.io.checkpoint_files import explained_failure, is_trusted, load_state
from longrl.io.number_ranges import check_ranges
from longrl.strategies.axis import SINGLE_RANK, Axis, world_axis
from longrl.strategies.fsdp import ShardingOptions, move_unsharded, shard_policy
from longrl.strategies.parallel import Parallel, ParallelModule
from longrl.strategies.sequence import SequenceParallel
from longrl.strategies.shards import check_by_ranks, read_shards, save_shards

logger = logging.getLogger(__name__)

DEFAULT_SHARDING = ShardingOptions()


class MRSPStrategy(ModelParallelStrategy):
    """Data x sequence parallelism over FSDP2, for `PolicyModule`.

    Args:
        sequence_parallel_size: ranks that share prompts and every sequence. `auto` makes groups of all devices of a
            node and lets, batch by batch, as few of them share a sequence as its length allows; the others of the group
            take other micro-batches.
        num_replicas: copies of the weights (HSDP); gradients are summed over them. With several nodes, one per node
            keeps the gathering of weights inside nodes.
        sharding: precision and offload.
        num_gather_chunks: messages in which features are gathered; more of them need less memory beside the result.
        save_distributed_checkpoint: every rank saves its shards, and any number of ranks can go on from them; else rank
            0 saves one file.
        timeout_s: how long a rank waits for others before it gives up with an error.
        process_group_backend: of torch.distributed; by default NCCL on GPUs and gloo on CPUs, both with offload.

    Example:
        In YAML:

            trainer:
              devices: 8
              strategy:
                class_path: longrl.strategies.mr_sp.MRSPStrategy
                init_args: {sequence_parallel_size: 4}
    """

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = 1,
        num_replicas: int = 1,
        sharding: ShardingOptions = DEFAULT_SHARDING,
        num_gather_chunks: int = 1,
        save_distributed_checkpoint: bool = True,
        timeout_s: float = 1800.0,
        process_group_backend: str | None = None,
    ) -> None:
        check_ranges(locals(), "trainer.strategy.init_args.", timeout_s=(1e-3, 1e9))
        if process_group_backend is None and sharding.offload and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        sizes: dict[str, Any] = {
            "sequence_parallel_size": sequence_parallel_size,
            "num_replicas": num_replicas,
            "num_gather_chunks": num_gather_chunks,
        }
        for name, size in sizes.items():
            if size != "auto" and size < 1:
                raise ValueError(f"trainer.strategy.init_args.{name} must be at least 1, got {size}")
        self.sequence_parallel_size = sequence_parallel_size
        self.num_replicas = num_replicas
        self.sharding = sharding
        self.num_gather_chunks = num_gather_chunks

    # -- the grid ------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        """Checks the sizes before any other process is started."""
        self._sp_group_size()
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        """Starts the processes' communication and gives the module its place in the grid."""
        module = self.lightning_module
        assert isinstance(module, ParallelModule)
        sp_group_size = self._sp_group_size()
        if sp_group_size > 1 and not module.family.supports_sequence_parallel:
            raise ValueError(
                f"{type(module.family).__name__} has no sequence parallelism, but "
                f"trainer.strategy.init_args.sequence_parallel_size is {self.sequence_parallel_size}; set it to 1"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes // sp_group_size
        self._tensor_parallel_size = sp_group_size
        super().setup_environment()
        module.parallel = self._make_grid(sp_group_size)

    def _sp_group_size(self) -> int:
        """Ranks with the same prompts, checked."""
        world_size = self.num_nodes * self.num_processes
        size = sp_group_size_of(self.sequence_parallel_size, self.num_processes, world_size)
        check_sizes(world_size, size, self.num_replicas)
        return size

    def _make_grid(self, sp_group_size: int) -> Parallel:
        device = self.root_device.type
        world_size = self.world_size

        # 1. Who has which prompts: rows of the grid are data parallel, columns sequence parallel.
        grid_shape = (world_size // sp_group_size, sp_group_size)
        grid = init_device_mesh(device, grid_shape, mesh_dim_names=("data_parallel", "sequence_parallel"))
        self._device_mesh = grid
        sp_group = Axis.of(grid.get_group("sequence_parallel"))

        # 2. Who has which weights: all ranks, or those of one replica, whatever their prompts.
        if self.num_replicas > 1:
            shard_shape = (self.num_replicas, world_size // self.num_replicas)
            shards = init_device_mesh(device, shard_shape, mesh_dim_names=("replicate", "shard"))
        else:
            shards = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))

        # 3. How many ranks may share a sequence.
        if self.sequence_parallel_size == "auto":
            degrees = sequence_degrees(sp_group, world_size)
        else:
            degrees = {sp_group.size: SequenceParallel(sp_group)}
        return Parallel(
            device=self.root_device,
            world=Axis.of(None),
            dp=Axis.of(grid.get_group("data_parallel")),
            sp_group=sp_group,
            degrees=degrees,
            num_gather_chunks=self.num_gather_chunks,
            compute_dtype=self.sharding.compute_dtype,
            wrap=functools.partial(shard_policy, mesh=shards, options=self.sharding),
            wrap_offloaded=functools.partial(shard_policy, mesh=shards, options=replace(self.sharding, offload=True)),
        )

    @override
    def model_to_device(self) -> None:
        """Lightning moves all that is left on the CPU; under offload that would be the shards, which FSDP refuses."""
        assert self.model is not None
        move_unsharded(self.model, self.root_device)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Says what failed while this rank still can: the others notice at once, and the launcher then ends it."""
        is_failure = isinstance(exception, Exception)  # else a signal ends the run, on all ranks
        if self.world_size > 1 and is_failure:
            logger.error("rank %d failed", self.global_rank, exc_info=exception)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes beside the target and renames: whoever is killed while saving still has the one before."""
        path = Path(self.broadcast(filepath))
        partial = _partial(path)
        before = path.with_name(f".{path.name}.before")

        # 1. All ranks write beside the target. What killed runs left half written or half deleted goes first.
        if self.is_global_zero:
            for left in path.parent.glob(_partial(Path("*")).name):
                _remove(left)
        self.barrier()
        with explained_failure(path):
            if self._save_distributed_checkpoint:
                save_shards(checkpoint, partial, world_axis())
            else:
                super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()

        # 2. Rank 0 puts it in place. No folder is replaced in one go: the old one stays until the new one is there.
        if self.is_global_zero:
            _remove(before)
            if path.exists():
                os.rename(path, before)
            os.rename(partial, path)
            sync_folder(path.parent)
            _remove(before)
        self.barrier()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Renames before it deletes: whoever is killed meanwhile leaves no half of a checkpoint under its name."""
        path = Path(filepath)
        if self.is_global_zero and path.exists():
            partial = _partial(path)
            _remove(partial)
            os.rename(path, partial)
            _remove(partial)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        before = path.with_name(f".{path.name}.before")
        if self.is_global_zero and before.exists() and not path.exists():  # killed between the two renames
            os.rename(before, path)
        self.barrier()
        assert isinstance(self.lightning_module, ParallelModule)
        check_by_ranks(path, world_axis())
        self.lightning_module.before_load(path)
        if path.is_dir():
            assert self.model is not None
            return read_shards(self.model, self.optimizers, path, strict=self.lightning_module.strict_loading)
        load_state(path)
        return super().load_checkpoint(path, weights_only=not is_trusted())


def sp_group_size_of(sequence_parallel_size: int | Literal["auto"], num_processes: int, world_size: int) -> int:
    """Ranks with the same prompts."""
    return min(num_processes, world_size) if sequence_parallel_size == "auto" else sequence_parallel_size


def check_sizes(world_size: int, sp_group_size: int, num_replicas: int) -> None:
    """Raises ValueError, before weights are loaded, if the devices do not divide into groups or replicas."""
    for name, size in (("sequence_parallel_size", sp_group_size), ("num_replicas", num_replicas)):
        if world_size % size:
            fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ValueError(
                f"trainer.strategy.init_args.{name}={size} must divide the {world_size} devices of the run "
                f"(trainer.devices times trainer.num_nodes); set it to one of {fitting}"
            )


def sequence_degrees(sp_group: Axis, world_size: int) -> dict[int, SequenceParallel]:
    """For every divisor of the group's size, this rank's part of a group of that many neighbouring ranks."""
    degrees = {}
    for degree in range(1, sp_group.size + 1):
        if sp_group.size % degree:
            continue
        axis = SINGLE_RANK
        for start in range(0, world_size, degree):  # every process takes part in making every group
            group = dist.new_group(list(range(start, start + degree))) if degree > 1 else None
            if group is not None and start <= dist.get_rank() < start + degree:
                axis = Axis.of(group)
        degrees[degree] = SequenceParallel(axis)
    return degrees


def _partial(path: Path) -> Path:
    """Where a checkpoint is while it is written or deleted."""
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
